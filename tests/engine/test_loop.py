"""Events of the loop: their order on every rank, and callbacks that answer, end the run or raise."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_long.engine.callback import Callback, Callbacks, End, Gradients, Log, Step
from tests.engine.test_megatron_adapter import changed_symbols

STEP = Step(3, [], None)
GIVEN: dict[str, tuple] = {
    "after_backward": (STEP, Gradients(False, False, lambda: 1.0)),
    "wants_save": (STEP, False),
    "after_save": (STEP, True),
    "on_log": (Log(3, {}, None),),
    **dict.fromkeys(("before_settle", "after_settle", "on_end"), ()),
}
"""What an event is given, where that is not a step alone."""
EVENTS = [name for name in vars(Callback) if not name.startswith("_")]


class Told(Callback):
    """Writes down what it is told, and gives these answers."""

    def __init__(self, name: str, told: list[str], answers: dict[str, Any] | None = None) -> None:
        for event in EVENTS:
            setattr(self, event, self.listen(name, event, told, (answers or {}).get(event)))

    def listen(self, name: str, event: str, told: list[str], answer: Any) -> Any:
        def act(*given: Any) -> Any:
            assert given == GIVEN.get(event, (STEP,))
            told.append(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return act


@pytest.mark.parametrize("event", EVENTS)
def test_each_event_goes_to_all_in_order(event):
    told: list[str] = []
    events = Callbacks([Told("first", told), Told("second", told), Callback()])
    assert not getattr(events, event)(*GIVEN.get(event, (STEP,)))
    assert told == ["first", "second"]


@pytest.mark.parametrize("event", ["after_backward", "wants_save"])
def test_one_that_wants_it_is_enough_and_all_are_asked(event):
    """Each may speak with other ranks when it is asked."""
    told: list[str] = []
    events = Callbacks([Told("first", told, {event: True}), Told("second", told, {event: False})])
    assert getattr(events, event)(*GIVEN[event]) is True
    assert told == ["first", "second"]


def test_the_first_that_ends_the_run_says_how():
    told: list[str] = []
    ends = [None, End(5), End(6)]
    events = Callbacks([Told(str(end), told, {"after_step": end}) for end in ends])
    assert events.after_step(STEP) == End(5)
    assert len(told) == 3


def test_one_that_raises_keeps_no_other_from_the_end():
    told: list[str] = []
    broken = Told("broken", told, {"on_end": ValueError("broken")})
    with pytest.raises(ValueError, match="broken"):
        Callbacks([Told("first", told), broken, Told("last", told)]).on_end()
    assert told == ["first", "broken", "last"]


class Scaled:
    """An FP16 optimizer, whose loss scale has this far to go down; its gradients overflow."""

    def __init__(self, scale: float, lowest: float | None) -> None:
        self.grad_scaler = SimpleNamespace(scale=scale, min_scale=lowest)

    def prepare_grads(self) -> bool:
        return True

    def get_grad_norm(self) -> float:
        return 2.0


@pytest.mark.parametrize(("lowest", "lowers"), [(1.0, True), (8.0, False), (None, False)])
def test_a_callback_knows_of_an_overflow_and_cannot_undo_it(lowest, lowers, monkeypatch):
    import megatron.training.training as training

    from megatron_long.engine.loop import Loop

    seen: list[Gradients] = []

    class Seeing(Callback):
        def after_backward(self, step: Step, gradients: Gradients) -> bool:
            seen.append(gradients)
            assert gradients.norm() == 2.0
            return False

    def train_step(model, optimizer):
        return {}, int(optimizer.prepare_grads()), False, False, 0

    monkeypatch.setattr(training, "train_step", train_step)
    loop = Loop(Callbacks([Seeing()]), None, Namespace(curr_iteration=0))  # type: ignore[arg-type]
    optimizer = Scaled(8.0, lowest)
    assert loop.train_step([], optimizer) == ({}, 1, False, False, 0)
    assert loop.train_step([], optimizer) == ({}, 1, False, False, 0)
    assert [(found.overflow, found.lowers_loss_scale) for found in seen] == [(True, lowers)] * 2


def step_lines(step: int) -> list[str]:
    names = ("before_step", "after_backward", "after_step")
    return [f"{name} {step}" for name in names]


def between_lines(step: int, *, saves: bool = False) -> list[str]:
    saved = [f"before_save {step}", f"after_save {step}"] if saves else []
    return [f"on_log {step}", f"between_steps {step}", *saved, f"wants_save {step}"]


def listen(jobs: Any, path: Path, *flags: object, status: int = 0, **acts: Any) -> list[list[str]]:
    """Train on two ranks, and give the events of each."""
    fault = {"kind": "listen", "ranks": [0, 1], "path": str(path / "events"), **acts}
    hashes = {"kind": "hash", "ranks": [0], "path": str(path / "hashes")}
    jobs.run(2, *flags, faults=[fault, hashes], status=status)
    return [(path / f"events.{rank}").read_text().splitlines() for rank in (0, 1)]


def test_events_come_in_order_on_every_rank(jobs, tmp_path):
    flags = ("--train-iters", 3, "--save-interval", 2, "--save", tmp_path / "ckpt")
    expected = ["before_training 0"]
    expected += step_lines(1) + between_lines(1)
    expected += step_lines(2) + between_lines(2, saves=True)
    expected += step_lines(3) + between_lines(3)
    expected += ["before_save 3", "after_save 3", "on_end"]
    assert listen(jobs, tmp_path, *flags) == [expected] * 2


def test_saves_in_the_background_are_settled(jobs, tmp_path):
    """A callback asks for the save of the first step; before the run ends it is waited for."""
    flags = ("--train-iters", 2, "--save", tmp_path / "ckpt", "--async-save")
    seen = listen(jobs, tmp_path, *flags, answers={"wants_save 1": True})
    settles = ["before_settle", "after_settle"]
    for events in seen:
        lines = [line for line in events if line not in settles]
        begin = ["before_training 0", *step_lines(1), *between_lines(1)]
        assert lines[: len(begin) + 2] == [*begin, "before_save 1", "after_save 1"]
        assert lines[-3:] == ["before_save 2", "after_save 2", "on_end"]
        assert [line for line in events if line in settles] == settles * events.count(settles[0])
        assert settles[0] in events[events.index("after_save 2") :]
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_a_step_is_left_out_where_a_callback_says_so(jobs, tmp_path):
    events = listen(jobs, tmp_path, "--train-iters", 3, answers={"after_backward 2": True})
    expected = ["before_training 0"]
    for step in (1, 2, 3):
        expected += step_lines(step) + between_lines(step)
    assert events == [[*expected, "on_end"]] * 2
    hashes = (tmp_path / "hashes").read_text().split()
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_callback_ends_the_run_with_a_status(jobs, tmp_path):
    flags = ("--train-iters", 3, "--save", tmp_path / "ckpt")
    events = listen(jobs, tmp_path, *flags, status=7, answers={"after_step 2": [7, None]})
    expected = ["before_training 0", *step_lines(1), *between_lines(1), *step_lines(2), "on_end"]
    assert events == [expected] * 2
    assert not list((tmp_path / "ckpt").glob("iter_*"))


def test_a_callback_ends_the_run_with_a_checkpoint_of_before_the_step(jobs, tmp_path):
    flags = ("--train-iters", 3, "--save", tmp_path / "ckpt")
    answers = {"after_backward 2": True, "after_step 2": [7, str(tmp_path / "before")]}
    events = listen(jobs, tmp_path, *flags, status=7, answers=answers)
    expected = ["before_training 0", *step_lines(1), *between_lines(1), *step_lines(2)]
    assert events == [[*expected, "before_save 1", "after_save 1", "on_end"]] * 2
    assert (tmp_path / "before" / "iter_0000001" / "hashes.json").is_file()
    assert not list((tmp_path / "ckpt").glob("iter_*"))


def test_a_callback_that_raises_ends_the_job_and_all_hear_of_it(jobs, tmp_path):
    acts = {"kind": "listen", "path": str(tmp_path / "events")}
    faults = [
        {**acts, "ranks": [0]},
        {**acts, "ranks": [1], "raises": "between_steps 2"},
    ]
    job = jobs.run(2, "--train-iters", 3, faults=faults, status=1)
    assert "RuntimeError: a callback is broken" in job.logs[1]
    broken = (tmp_path / "events.1").read_text().splitlines()
    assert broken[-2:] == ["between_steps 2", "on_end"]
    assert (tmp_path / "events.0").read_text().splitlines()[-1] == "on_end"


def test_every_symbol_that_is_changed_is_listed(jobs, tmp_path):
    """In a resumed run: its loading, its loop and its saving."""
    save = ("--save", tmp_path / "ckpt", "--use-distributed-optimizer")
    jobs.run(1, "--train-iters", 2, "--exit-interval", 1, *save)
    fault = {"kind": "changes", "ranks": [0], "path": str(tmp_path / "changes")}
    jobs.run(1, "--train-iters", 2, *save, "--load", tmp_path / "ckpt", faults=[fault])
    changes = {(module, name) for module, name in json.loads((tmp_path / "changes").read_text())}
    assert changes - changed_symbols() == set()
    assert ("megatron.training.training", "train_step") in changes
    assert ("megatron.training.arguments", "parse_args") in changes
