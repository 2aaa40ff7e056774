"""Whether a phase can start: its requirements, the remaining time, the space on its disks."""

import shutil
import time

from benchmarks.walk.context import read_records
from benchmarks.walk.phases import PHASES, READERS_OF_TRAIN
from benchmarks.walk.settings import Settings, Work

STARTED = time.monotonic()
SPARE_GB = 2
TINY_S = 60.0
"""Of any phase with the tiny model."""


def is_done(work: Work, name: str) -> bool:
    """Whether the phase's newest record says so."""
    return read_records(work.folder).get(name, {}).get("status") == "done"


def expected_s(name: str, settings: Settings) -> float:
    """Seconds that a phase is expected to take."""
    if not settings.is_full:
        return TINY_S
    return PHASES[name].cost.seconds(settings.geometry.num_layers / 32)


def why_not(
    name: str, work: Work, until_s: float | None, failed: set[str], *, drops: bool = False
) -> str | None:
    """The reason that a phase cannot start: a missing requirement, too little time, too small a disk."""
    phase = PHASES[name]
    missing = [need for need in phase.needs if need in failed or not is_done(work, need)]
    if missing:
        return f"it needs {' and '.join(missing)}, which is not done"
    if name not in ("data", "disk") and not (work.dataset / "manifest.json").is_file():
        return (
            f"{work.dataset} is missing; create it with --phases data, and give it with --dataset"
        )
    left = None if until_s is None else until_s - (time.monotonic() - STARTED)
    expected = expected_s(name, work.settings)
    if left is not None and left < expected:
        return (
            f"expected to take {expected:.0f} s, and {left:.0f} s are left of --until-s {until_s:g}"
        )
    if name == "async" and work.run.exists() and not drops:
        waiting = [reader for reader in READERS_OF_TRAIN if not is_done(work, reader)]
        if waiting:
            return (
                f"it removes the checkpoint of train, which {', '.join(waiting)} still need; run them first, "
                "or give --drop-checkpoint"
            )
    return too_small(name, work)


def too_small(name: str, work: Work) -> str | None:
    """Return which disk is too small for the phase's output."""
    phase, settings = PHASES[name], work.settings
    models, checkpoints = (
        phase.models * settings.model_gb,
        phase.checkpoints * settings.checkpoint_gb,
    )
    fast = work.fast or work.folder
    needs = [(fast, models, "--fast-dir" if work.fast else "--work")]
    needs.append((work.folder, checkpoints if work.fast else models + checkpoints, "--work"))
    for folder, need, flag in needs:
        free = shutil.disk_usage(folder).free / 1e9
        if name == "async" and work.run.exists():
            free += settings.checkpoint_gb  # which it removes first
        if need and free < 1.02 * need + (SPARE_GB if settings.is_full else 0):
            return (
                f"it writes {need:.1f} GB to {flag} {folder}, and {free:.1f} GB are free; remove what is "
                f"not needed there, give another {flag}, or fewer --layers"
            )
    return None


def list_phases(work: Work) -> str:
    """A line for each phase: its expected duration, and its parts."""
    records = read_records(work.folder)
    lines = []
    for name, phase in PHASES.items():
        state = records.get(name, {}).get("status", "not done")
        took = f"took {records[name]['seconds']:.0f} s" if name in records else ""
        lines.append(
            f"{name:14} expected {expected_s(name, work.settings):4.0f} s ({phase.cost.words():28}) "
            f"{state[:60]:12} {took:12} needs {', '.join(phase.needs) or 'nothing'}"
        )
    return "\n".join(lines)
