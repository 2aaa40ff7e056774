"""The phases by name. Everything goes through the tools and entries that any user types."""

from collections.abc import Callable

from examples.smollm2_128k.job_runner import Job
from examples.smollm2_128k.measuring import after, before, compare, export, history, report
from examples.smollm2_128k.preparation import convert, prepare
from examples.smollm2_128k.training import main_run, mixtures, sweep
from examples.smollm2_128k.work import Work

PHASES: dict[str, Callable[[Work], list[list[Job]]]] = {
    "prepare": prepare,
    "convert": lambda work: [[convert(work)]],
    "sweep": sweep,
    "before": before,
    "main": main_run,
    "after": after,
    "export": export,
    "mixtures": mixtures,
    "history": history,
    "compare": compare,
    "report": report,
}
"""In the order of a whole run; each needs those before it, but for `convert`, which `prepare` includes."""
