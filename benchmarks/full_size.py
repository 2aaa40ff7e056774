"""The whole path at full size, phase by phase: an 8B model from a Hugging Face folder and back, measured.

    python benchmarks/full_size.py --work W --phases data                      # where the packages are; carry W/data
    python benchmarks/full_size.py --work W --dataset DATA --fast-dir /dev/shm/walk --until-s 580   # GPUs
    python benchmarks/full_size.py --work W --report

A phase that is done is skipped, so that the same command, given again, does the rest; `--list` shows what is
done and how long the others are expected to take. Each phase leaves a record in W/records.jsonl and its output
in W/logs/PHASE.log. Nothing is downloaded on the GPU machine: weights are random, of a trained model's
deviations. `--size tiny` walks the same path on the host.
"""  # noqa: E501

import argparse
import json
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.walk import logs
from benchmarks.walk.children import OutOfTime, PhaseFailed, tail
from benchmarks.walk.context import Context, read_records
from benchmarks.walk.phases import PHASES, READERS_OF_TRAIN
from benchmarks.walk.report import report
from benchmarks.walk.sampling import Peaks
from benchmarks.walk.settings import K, Settings, Work, keep_settings
from megatron_long.cli import run_tool, tool_parser
from megatron_long.errors import UserError
from megatron_long.files import append_whole

STARTED = time.monotonic()
SECONDS_TO_LEAVE = 15
"""Children are stopped so long before --until-s."""
SPARE_GB = 2


def main() -> int:
    """Run the phases that are not done; status 0 if all of them are."""
    args = build_parser().parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # ends the children too
    settings, work = make_work(args)
    if args.report:
        print(report(work.folder, settings))
        return 0
    if args.list:
        print(list_phases(work))
        return 0
    keep_settings(settings, work.folder / "settings.json")
    for folder in (work.folder, work.results, *([work.fast] if work.fast else [])):
        folder.mkdir(parents=True, exist_ok=True)
    failed: set[str] = set()
    for name in args.phases or [name for name in PHASES if name != "data"]:
        if is_done(work, name) and name not in args.again:
            print(f"{name}: done before", flush=True)
        elif not run_phase(name, work, args, failed):
            failed.add(name)
            if not args.keep_going:
                break
    print(f"\n{report(work.folder, settings)}")
    return 1 if failed else 0


def run_phase(name: str, work: Work, args: argparse.Namespace, failed: set[str]) -> bool:
    """Run one phase and record it; gives whether it is done."""
    reason = why_not(name, work, args.until_s, failed, drops=args.drop_checkpoint)
    if reason:
        print(f"{name}: not begun: {reason}", flush=True)
        return False
    context = Context(work, name)
    print(f"{name}: begun at {time.monotonic() - STARTED:.0f} s", flush=True)
    began, peaks, status, facts = time.monotonic(), Peaks().start(), "done", {}
    try:
        facts = PHASES[name].do(context)
    except OutOfTime as error:
        status = f"out of time: {error}"
    except (PhaseFailed, UserError, OSError, LookupError, ValueError) as error:
        status = f"failed: {type(error).__name__}: {error}"
    memory = peaks.stop()
    record = {
        "phase": name,
        "status": status,
        "seconds": round(time.monotonic() - began, 2),
        "gpu_torch_gib": logs.peak_gpu_gib(context.lines),
        **memory,
        **facts,
        "notes": context.notes,
        "commands": [shlex.join(command) for command in context.commands],
        "at": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    append_whole(work.folder / "records.jsonl", json.dumps(record) + "\n")
    if status != "done":
        print(f"{tail(context.log)}\n{name}: {status}\nthe whole log: {context.log}", flush=True)
        return False
    shown = {key: value for key, value in record.items() if key not in ("commands", "phase")}
    print(f"{name}: {json.dumps(shown)}", flush=True)
    return True


def is_done(work: Work, name: str) -> bool:
    """Whether the phase's newest record says so."""
    return read_records(work.folder).get(name, {}).get("status") == "done"


def expected_s(name: str, settings: Settings) -> float:
    """Seconds that a phase is expected to take."""
    if not settings.is_full:
        return 60.0
    share = settings.geometry.num_layers / 32
    return PHASES[name].expected_s * (0.3 + 0.7 * share)


def why_not(
    name: str, work: Work, until_s: float | None, failed: set[str], *, drops: bool = False
) -> str | None:
    """What keeps a phase from being begun: something it needs, too little time, too small a disk."""
    phase = PHASES[name]
    missing = [need for need in phase.needs if need in failed or not is_done(work, need)]
    if missing:
        return f"it needs {' and '.join(missing)}, which is not done"
    if name not in ("data", "disk") and not (work.dataset / "manifest.json").is_file():
        return (
            f"{work.dataset} is not there; make it with --phases data, and give it with --dataset"
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
    """Say which disk has no room for what the phase writes."""
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
    """A line for each phase."""
    records = read_records(work.folder)
    lines = []
    for name, phase in PHASES.items():
        state = records.get(name, {}).get("status", "not done")
        took = f"took {records[name]['seconds']:.0f} s" if name in records else ""
        lines.append(
            f"{name:14} expected {expected_s(name, work.settings):4.0f} s  {state[:60]:12} {took:12} "
            f"needs {', '.join(phase.needs) or 'nothing'}"
        )
    return "\n".join(lines)


def make_work(args: argparse.Namespace) -> tuple[Settings, Work]:
    """Settings and places of the flags; those of the commands before, where none are given."""
    folder = args.work.resolve()
    kept = folder / "settings.json"
    if (args.report or args.list) and kept.is_file():
        settings = Settings(**json.loads(kept.read_text()))
    else:
        full = args.size == "full"
        tensor, context = args.layout
        reshard = args.reshard_layout or (1, tensor * context)
        settings = Settings(
            size=args.size,
            layers=args.layers,
            processes=tensor * context,
            tensor=tensor,
            context=context,
            reshard_tensor=reshard[0],
            reshard_context=reshard[1],
            seq_length=args.seq_length or (128 * K if full else 512),
            windows=args.windows,
            fp8=full and not args.no_fp8,
            deterministic=args.deterministic_mode,
            recompute_all=args.recompute_all,
        )
    deadline = None if args.until_s is None else STARTED + args.until_s - SECONDS_TO_LEAVE
    places = {name: path and path.resolve() for name, path in vars(args).items() if name in PLACES}
    work = Work(
        folder=folder,
        settings=settings,
        data=places["dataset"],
        fast=places["fast_dir"],
        corpus=places["corpus"],
        deadline=deadline,
    )
    return settings, work


PLACES = ("dataset", "fast_dir", "corpus")


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for everything; its disk is measured")
    add("--phases", nargs="+", choices=PHASES, metavar="PHASE", help=f"of: {', '.join(PHASES)}")
    add("--again", nargs="+", choices=PHASES, default=[], metavar="PHASE", help="though done")
    add(
        "--until-s", type=float, help="seconds of this command: no phase is begun that takes longer"
    )
    add("--keep-going", action="store_true", help="after a failure, what does not depend on it")
    add("--drop-checkpoint", action="store_true", help="async may remove what others still need")
    add("--list", action="store_true", help="what is done, and how long the rest takes")
    add("--report", action="store_true", help="print the tables")
    add("--dataset", type=Path, help="folder that the phase data wrote; default: WORK/data")
    add("--fast-dir", type=Path, help="for the model's folders, as in /dev/shm; default: WORK")
    add("--corpus", type=Path, help="for data: jsonl files and heldout/*.txt")
    add("--size", choices=("full", "tiny"), default="full", help="Llama-3-8B, or one for the host")
    add("--layers", type=int, help="fewer layers")
    sizes = ("TENSOR", "CONTEXT")
    add("--layout", type=int, nargs=2, default=(2, 2), metavar=sizes, help="of training (2 2)")
    add("--reshard-layout", type=int, nargs=2, metavar=sizes, help="default: 1 and all processes")
    add("--seq-length", type=int, help="tokens of a window (131072; 512 for tiny)")
    add("--windows", type=int, default=1, help="windows of a step (1)")
    add("--no-fp8", action="store_true", help="BF16 on GPUs")
    add("--recompute-all", action="store_true", help="all activations, for GPUs of 80 GB")
    add("--deterministic-mode", action="store_true", help="resumed losses must then be equal")
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(main))
