"""Twenty steps at once, and ten, a new start and ten more: the same losses, norms, weights and optimizer."""

import json
from pathlib import Path

import pytest

DISTRIBUTED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
PADDED_BUCKETS = ("--ddp-bucket-size", "20000", "--ffn-hidden-size", "196")
"""Several buckets of gradients, none of which ends on a multiple of 128: Megatron pads their ends."""
LAYOUTS = {
    "tp2-cp2": (4, ("--tensor-model-parallel-size", "2", "--context-parallel-size", "2")),
    "pp2": (2, ("--pipeline-model-parallel-size", "2")),
    "dp2-distributed-optimizer": (2, DISTRIBUTED),
    "dp2-padded-buckets": (2, (*DISTRIBUTED, *PADDED_BUCKETS)),
}
TOLERANCE = 2e-6


def read_state(folder: Path) -> dict:
    """All tensors of a checkpoint by their names, and the rest of it that training resumes from."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict = {}
    _load_state_dict(
        state, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return state


def differing(seen: dict, expected: dict) -> list[str]:
    import torch

    assert seen.keys() == expected.keys()
    tensors = {name for name, value in expected.items() if isinstance(value, torch.Tensor)}
    assert any(name.startswith("optimizer") for name in tensors)
    assert any(name.startswith("decoder") for name in tensors)
    return [name for name in sorted(tensors) if not torch.equal(seen[name], expected[name])]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_resume_is_bit_exact(name, jobs, read_log, tmp_path):
    ranks, layout = LAYOUTS[name]
    common = (*layout, "--train-iters", 20, "--save-interval", 10)
    jobs.run(ranks, *common, "--save", tmp_path / "whole", "--loss-log", tmp_path / "whole.jsonl")
    first = ("--save", tmp_path / "parts", "--loss-log", tmp_path / "parts.jsonl")
    jobs.run(ranks, *common, *first, "--exit-interval", 10)
    jobs.run(ranks, *common, *first, "--load", tmp_path / "parts")
    whole, parts = read_log(tmp_path / "whole.jsonl"), read_log(tmp_path / "parts.jsonl")
    assert [step["iteration"] for step in whole] == list(range(1, 21))
    assert whole == parts
    assert whole[-1]["lm loss"] < whole[0]["lm loss"] - 0.5
    expected = read_state(tmp_path / "whole" / "iter_0000020")
    assert differing(read_state(tmp_path / "parts" / "iter_0000020"), expected) == []
    assert differing(read_state(tmp_path / "parts" / "iter_0000010"), expected)
    facts = [
        json.loads((tmp_path / kind / "iter_0000020" / "training.json").read_text())["guard"]
        for kind in ("whole", "parts")
    ]
    assert facts[0] == facts[1]


CHAIN = (
    (2, DISTRIBUTED),
    (1, ("--use-distributed-optimizer",)),
    (4, DISTRIBUTED),
    (
        4,
        (
            *("--tensor-model-parallel-size", "2", "--context-parallel-size", "2"),
            "--use-distributed-optimizer",
        ),
    ),
    (2, ("--pipeline-model-parallel-size", "2", "--use-distributed-optimizer")),
)
"""Data parallel 2, 1 and 4, then other layouts, four steps each."""


@pytest.mark.slow
def test_another_number_of_processes_goes_on_in_the_same_data(jobs, read_log, tmp_path):
    common = (*PADDED_BUCKETS, "--train-iters", 20, "--override-opt-param-scheduler")
    whole = (*common, "--use-distributed-optimizer", "--loss-log", tmp_path / "whole.jsonl")
    jobs.run(1, *whole)
    for number, (ranks, layout) in enumerate(CHAIN):
        flags = (*common, *layout, "--save", tmp_path / "ckpt", "--exit-interval", 4)
        flags += ("--loss-log", tmp_path / "chain.jsonl")
        flags += ("--load", tmp_path / "ckpt") if number else ()
        path = tmp_path / f"windows{number}"
        jobs.run(
            ranks,
            *flags,
            faults=[{"kind": "trace", "ranks": list(range(ranks)), "path": str(path)}],
        )
        read = sorted(int(line) for line in path.read_text().split())
        copies = len(read) // 16  # both ends of a pipeline read, and each context-parallel rank
        assert read == sorted(list(range(16 * number, 16 * number + 16)) * copies)
    seen, expected = read_log(tmp_path / "chain.jsonl"), read_log(tmp_path / "whole.jsonl")
    assert [step["iteration"] for step in seen] == [step["iteration"] for step in expected]
    losses = [(a["lm loss"], b["lm loss"]) for a, b in zip(seen, expected, strict=True)]
    largest = max(abs(a - b) for a, b in losses)
    print(f"largest difference of a loss {largest:.1e}")
    assert largest <= TOLERANCE


def test_another_schedule_is_refused(jobs, tmp_path):
    """By name, instead of Megatron's assertion; the flag that it names lets the run resume."""
    save = ("--save", tmp_path, "--load", tmp_path)
    jobs.run(1, "--train-iters", 1, *save[:2])
    refused = jobs.run(1, "--train-iters", 2, *save, status=2)
    assert "--override-opt-param-scheduler" in " ".join(refused.text.split())
    jobs.run(1, "--train-iters", 2, *save, "--override-opt-param-scheduler")
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


OPTIMIZERS = {
    "distributed": (2, DISTRIBUTED),
    "plain": (1, ()),
    "bf16": (1, ("--bf16",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_rate_can_be_changed_on_resume(kind, jobs, read_log, tmp_path):
    """The paper's schedule: constant, another rate. The next start needs no flag again.

    Steps 3 to 5 of a run at another rate are those of a run that had this rate from step 3 on; a plain resume
    of it is exact.
    """
    ranks, flags = OPTIMIZERS[kind]
    start, log = tmp_path / "start", tmp_path / "log.jsonl"
    common = (*flags, "--train-iters", 6)
    jobs.run(ranks, *common, "--save", start, "--exit-interval", 2)
    refused = jobs.run(ranks, *common, "--load", start, "--lr", 1e-4, "--min-lr", 1e-4, status=2)
    told = " ".join(refused.text.split())
    assert "--lr was 0.002, and now it is 0.0001" in told
    assert "--override-opt-param-scheduler" in told

    changed = (*common, "--lr", 1e-4, "--min-lr", 1e-4, "--load", start)
    save = ("--save", tmp_path / "changed", "--exit-interval", 4, "--loss-log", log)
    job = jobs.run(ranks, *changed, *save, "--override-opt-param-scheduler")
    assert "learning rate: 1.000000E-04" in job.text
    assert "learning rate: 2.000000E-03" not in job.text
    resumed = (*common, "--lr", 1e-4, "--min-lr", 1e-4, "--load", tmp_path / "changed")
    job = jobs.run(ranks, *resumed, "--loss-log", log)
    assert "learning rate: 1.000000E-04" in job.text
    whole = tmp_path / "whole.jsonl"
    jobs.run(ranks, *changed, "--override-opt-param-scheduler", "--loss-log", whole)
    assert read_log(log) == read_log(whole)

    kept = jobs.run(ranks, *changed, "--use-checkpoint-opt-param-scheduler")
    assert "learning rate: 2.000000E-03" in kept.text
    assert "learning rate: 1.000000E-04" not in kept.text


def test_another_batch_on_resume_is_named(jobs, tmp_path):
    jobs.run(1, "--train-iters", 2, "--save", tmp_path, "--exit-interval", 1)
    again = ("--train-iters", 2, "--load", tmp_path, "--global-batch-size", 8)
    told = " ".join(jobs.run(1, *again, status=2).text.split())
    assert "(--train-iters * --global-batch-size) was 8, and now it is 16" in told
    assert "--lr" not in told
