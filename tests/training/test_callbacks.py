"""Callbacks alone: what the guard judges, and when the watchdog gets a sign of life."""

import math
from typing import Any

import pytest

from megatron_long.engine import host_backend
from megatron_long.engine.callback import Gradients, Step
from megatron_long.job.watchdog import LONG_PHASE
from megatron_long.training.callbacks.heartbeat import Heartbeat

host_backend.install()

# ruff: noqa: E402
from megatron_long.training.callbacks.guarding import GuardSteps

STEP = Step(3, [], None)


class Judge:
    """A guard that finds every step faulty."""

    stop_reason = None
    reports = True

    def __init__(self) -> None:
        self.judged: list[tuple] = []

    def judge(self, *figures: Any) -> bool:
        self.judged.append(figures)
        return True


class Losses:
    """One micro-batch of ten tokens."""

    def __init__(self, loss: float) -> None:
        self.table = [[(loss, 10.0)]]

    def reduce(self) -> list:
        return self.table


@pytest.mark.parametrize(
    ("loss", "lowers", "judged"),
    [(20.0, False, True), (20.0, True, False), (math.nan, True, True)],
)
def test_an_overflow_that_lowers_the_loss_scale_is_no_fault(loss, lowers, judged, tmp_path):
    """FP16 finds its scale so; a loss that is not finite is a fault all the same."""
    judge, norms = Judge(), []
    guard: Any = GuardSteps(judge, Losses(loss), tmp_path, lambda folder: None)  # type: ignore[arg-type]
    gradients = Gradients(lowers, lowers, lambda: norms.append(1) or math.inf)
    assert guard.after_backward(STEP, gradients) is judged
    assert len(judge.judged) == len(norms) == judged
    assert guard.after_step(STEP) is None


def test_signs_of_life_allow_for_saves():
    beats: list[Any] = []

    class Watched:
        beat = staticmethod(lambda times=1: beats.append(times))
        end_step = staticmethod(lambda: beats.append("step"))
        stop = staticmethod(lambda: beats.append("stop"))

    heartbeat = Heartbeat(Watched())  # type: ignore[arg-type]
    heartbeat.after_step(STEP)
    heartbeat.before_save(STEP)
    heartbeat.after_save(STEP, True)
    heartbeat.before_settle()
    heartbeat.after_settle()
    heartbeat.on_end()
    assert beats == ["step", LONG_PHASE, LONG_PHASE, LONG_PHASE, 1, "stop"]
