"""The training phases: interrupted, resumed, in another layout, uninterrupted, saving in the background."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.walk import logs
from benchmarks.walk.children import Child, Ended, PhaseFailed
from benchmarks.walk.context import Context, read_records
from benchmarks.walk.settings import (
    CALM_FLAGS,
    DETERMINISTIC_ATTENTION,
    DETERMINISTIC_FLAGS,
    FP8_FLAGS,
    LAST_STEP,
    LAUNCH_ENVIRONMENT,
    RECOMPUTE_FLAGS,
    REPOSITORY,
    STEPS_COMPARED,
    Work,
    layout_argv,
)

TRAIN_STEPS = 40
"""--train-iters of every run; each is ended earlier, and the learning rate is constant."""
LEAST_PAUSE_S = 0.05
ASYNC_SAVE_MINUTES = {"full": 0.25, "tiny": 0.01}
"""--save-minutes, by size: the third step or so saves. By time no save begins while another is written."""
TRACKER = "latest_checkpointed_iteration.txt"


def training_flags(work: Work, layout: tuple[int, int]) -> list[str]:
    """Flags that every run shares."""
    settings = work.settings
    flags = [*layout_argv(layout), "--seq-length", str(settings.seq_length)]
    flags += ["--global-batch-size", str(settings.windows), "--train-iters", str(TRAIN_STEPS)]
    flags += ["--allow-repeat", "--log-memory-interval", "1", "--save-interval", "1000000"]
    flags += ["--verbose"]  # the events that `logs` reads
    if settings.recompute_all:
        flags += RECOMPUTE_FLAGS
    if settings.fp8:
        flags += FP8_FLAGS
    if settings.deterministic:
        flags += DETERMINISTIC_FLAGS
    if settings.is_full:
        flags += CALM_FLAGS
        flags += DETERMINISTIC_ATTENTION if settings.deterministic else ()
    return flags


def launch_script(work: Work, *more: object) -> list[object]:
    """The launch script's command; its variables come from `script_variables`."""
    flags = training_flags(work, work.settings.layout)
    return ["bash", REPOSITORY / "examples" / "pretrain_llama_128k.sh", *flags, *more]


def script_variables(work: Work, output: Path) -> dict[str, str]:
    """Variables that the launch script reads."""
    return {
        "OMP_NUM_THREADS": LAUNCH_ENVIRONMENT["OMP_NUM_THREADS"],
        "CHECKPOINT": str(work.base),
        "DATASET": str(work.dataset),
        "OUTPUT": str(output),
        "RECIPE": work.settings.recipe,
        "NPROC_PER_NODE": str(work.settings.processes),
    }


def without_saving(context: Context, layout: tuple[int, int], log: Path, *start: object) -> Ended:
    """Train to the last step that is compared with no checkpoint written, then kill."""
    work = context.work
    command = [work.python, "-m", "megatron_long.launch", "--nproc-per-node"]
    command += [str(work.settings.processes), "--standalone", "-m", "megatron_long.pretrain"]
    command += ["--recipe", work.settings.recipe, "--dataset", str(work.dataset)]
    log.unlink(missing_ok=True)
    words = [*command, *start, *training_flags(work, layout), "--loss-log", log]
    return until_logged(context, log, words, LAUNCH_ENVIRONMENT)


def until_logged(
    context: Context, log: Path, command: Sequence[object], variables: dict[str, str]
) -> Ended:
    """Run training until it logs the last loss that is compared, then kill all of it: nothing is saved."""
    offset = log.stat().st_size if log.is_file() else 0
    last = last_step(context.work)

    def watch(child: Child) -> bool:
        return last in logs.read_losses(log, offset)

    ended = context.run(command, environment=variables, watch=watch)
    if ended.status == 0:
        raise PhaseFailed(f"training ended before step {last} was in {log}")
    return ended


def last_step(work: Work) -> int:
    """The last step whose loss is compared."""
    interrupted = read_records(work.folder).get("train", {}).get("interrupted_at")
    return LAST_STEP if interrupted is None else interrupted + STEPS_COMPARED


def tracker(folder: Path) -> int:
    """The newest checkpoint's iteration, 0 before the first."""
    path = folder / TRACKER
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else 0


def iteration(folder: Path, number: int) -> Path:
    """A checkpoint's own folder."""
    return folder / f"iter_{number:07d}"


def train(context: Context) -> dict[str, Any]:
    """SIGTERM in the second step: it saves, and exits with status 0."""
    work = context.work
    output, sent = work.run, list[float]()
    log = output / "loss.jsonl"

    def watch(child: Child) -> bool:
        if not sent and logs.read_losses(log):
            sent.append(round(child.seconds, 2))
            child.process.send_signal(signal.SIGTERM)
        return False

    context.remove(output, "of a command that was stopped")
    ended = context.run(
        launch_script(work), environment=script_variables(work, output), watch=watch
    )
    last = tracker(output)
    if not sent or not 1 <= last < TRAIN_STEPS:
        raise PhaseFailed(
            f"status 0, but the checkpoint of step {last} is the newest, and SIGTERM was "
            f"{'sent' if sent else 'not sent'}; one of steps 1 to {TRAIN_STEPS - 1} was expected"
        )
    keep_losses(log, work.results / "train.jsonl")
    steps = logs.step_figures(ended.lines)
    return {
        "sigterm_at_s": sent[0],
        "sigterm_to_exit_s": round(ended.seconds - sent[0], 2),
        "interrupted_at": last,
        "save_s": logs.saves(ended.lines),
        "checkpoint_gb": round(_size_gb(iteration(output, last)), 3),
        "step_s": {step: figures["s"] for step, figures in steps.items()},
        **_start_facts(ended),
    }


def resume(context: Context) -> dict[str, Any]:
    """The same command; killed with SIGKILL before it saves."""
    work = context.work
    log = work.run / "loss.jsonl"
    offset = log.stat().st_size
    ended = until_logged(context, log, launch_script(work), script_variables(work, work.run))
    keep_losses(log, work.results / "resume.jsonl", offset)
    return _load_facts(work, ended)


def keep_losses(log: Path, target: Path, offset: int = 0) -> None:
    """Copy the lines that a run has added to its loss log."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(log.read_bytes()[offset:])


def uninterrupted(context: Context) -> dict[str, Any]:
    """The same steps from the converted checkpoint, in one run."""
    work = context.work
    log = work.results / "uninterrupted.jsonl"
    ended = without_saving(context, work.settings.layout, log, "--pretrained-checkpoint", work.base)
    return _start_facts(ended)


def reshard(context: Context) -> dict[str, Any]:
    """The saved checkpoint in another layout."""
    work = context.work
    log = work.results / "reshard.jsonl"
    ended = without_saving(context, work.settings.reshard_layout, log, "--load", work.run)
    return _load_facts(work, ended)


def async_save(context: Context) -> dict[str, Any]:
    """A save in the background of a run from the start: how long does it block the steps?"""
    work = context.work
    output = work.folder / "async"
    log = output / "loss.jsonl"
    context.remove(work.run, "no later phase needs it, and the next checkpoint needs its space")
    context.remove(output, "of a command that was stopped")
    arrived: list[int] = []

    def watch(child: Child) -> bool:
        steps = logs.read_losses(log)
        if not arrived and tracker(output) and steps:
            arrived.append(max(steps))
        return bool(arrived) and max(steps) > max(arrived[0], LAST_STEP - 1)

    minutes = ASYNC_SAVE_MINUTES[work.settings.size]
    command = launch_script(work, "--save-minutes", minutes, "--async-save")
    ended = context.run(command, environment=script_variables(work, output), watch=watch)
    saved = logs.first_scheduled(ended.lines)
    if not arrived or saved is None or ended.status == 0:
        raise PhaseFailed("training ended before the checkpoint in the background was written")
    # The step after the last one seen before its arrival has finalized it; the next save begins then.
    found = logs.pauses(ended.lines, saved)
    pauses = {step: pause for step, pause in found.items() if step <= arrived[0] + 1}
    keep_losses(log, work.results / "async.jsonl")
    context.remove(output, "measured")
    return {
        "saved_at": saved,
        "arrived_at": arrived[0],
        "pauses_s": {step: pause for step, pause in pauses.items() if pause >= LEAST_PAUSE_S},
        "stopped_s": round(sum(pauses.values()), 2),
        "step_s": {n: figures["s"] for n, figures in logs.step_figures(ended.lines).items()},
        **_start_facts(ended),
    }


def _start_facts(ended: Ended) -> dict[str, Any]:
    steps = logs.step_figures(ended.lines)
    parts = logs.start_times(ended.lines)
    first = min(steps, default=None)
    return {
        "start_s": parts,
        "launch_to_first_step_s": round(sum(parts.values()), 2),
        "first_step_s": steps[first]["s"] if first is not None else None,
    }


def _load_facts(work: Work, ended: Ended) -> dict[str, Any]:
    return {
        "load_s": logs.load_seconds(ended.lines),
        "checkpoint_gb": round(_size_gb(iteration(work.run, tracker(work.run))), 3),
        **_start_facts(ended),
    }


def _size_gb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
