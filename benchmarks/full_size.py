"""The whole pipeline at full size, phase by phase: an 8B model from and to a Hugging Face folder, measured.

    python benchmarks/full_size.py --work W --phases data                      # where the packages are; carry W/data
    python benchmarks/full_size.py --work W --dataset DATA --fast-dir /dev/shm/walk --until-s 580   # GPUs
    python benchmarks/full_size.py --work W --report

Finished phases are skipped, so the same command, run again, does the rest; `--list` shows what is
done, the expected duration of the others, and its parts (`walk.budget`). Phases joined by + run concurrently.
Each leaves a record in W/records.jsonl and its output in W/logs/PHASE.log. Nothing is downloaded on the GPU
machine: weights are random, with a trained model's standard deviations. `--size tiny` runs on the host.
"""  # noqa: E501

import argparse
import json
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.walk import logs
from benchmarks.walk.children import STOP, OutOfTime, PhaseFailed, tail
from benchmarks.walk.context import Context
from benchmarks.walk.phases import GROUPS, PHASES
from benchmarks.walk.ready import STARTED, is_done, list_phases, why_not
from benchmarks.walk.report import report
from benchmarks.walk.sampling import Peaks
from benchmarks.walk.settings import K, Settings, Work, keep_settings
from megatron_long.cli import run_tool, tool_parser
from megatron_long.errors import ConfigError, UserError
from megatron_long.files import append_whole

SECONDS_TO_LEAVE = 15
"""Children are stopped this long before --until-s."""
NUM_COPIED_LINES = 150
"""Of each log, for --copy-to."""
_RECORDING = threading.Lock()


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
    copies = [args.copy_to] if args.copy_to else []
    for folder in (work.folder, work.results, *([work.fast] if work.fast else []), *copies):
        folder.mkdir(parents=True, exist_ok=True)
    failed: set[str] = set()
    for group in args.phases or GROUPS:
        run_group(group, work, args, failed)
        for folder in copies:
            leave_copies(work, folder)
        if failed and not args.keep_going:
            break
    print(f"\n{report(work.folder, settings)}")
    return 1 if failed else 0


def run_group(group: Sequence[str], work: Work, args: argparse.Namespace, failed: set[str]) -> None:
    """Run phases concurrently; those that are not done afterwards are added to `failed`."""
    begun = []
    for name in group:
        if is_done(work, name) and name not in args.again:
            print(f"{name}: done before", flush=True)
            continue
        reason = why_not(name, work, args.until_s, failed, drops=args.drop_checkpoint)
        if reason:
            print(f"{name}: not started: {reason}", flush=True)
            failed.add(name)
        else:
            begun.append(name)

    def do(name: str) -> None:
        if not run_phase(name, work, [other for other in begun if other != name]):
            failed.add(name)

    threads = [threading.Thread(target=do, args=(name,)) for name in begun]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        STOP.set()
        for thread in threads:
            thread.join()
        raise


def leave_copies(work: Work, folder: Path) -> None:
    """Put the records, the tables and the ends of the logs into a folder."""
    if (work.folder / "records.jsonl").is_file():
        shutil.copy(work.folder / "records.jsonl", folder)
    (folder / "report.md").write_text(report(work.folder, work.settings) + "\n")
    found = sorted((work.folder / "logs").glob("*.log"))
    ends = [f"{path.name}\n{tail(path, NUM_COPIED_LINES)}\n" for path in found]
    (folder / "logs.txt").write_text("\n".join(ends))


def run_phase(name: str, work: Work, beside: Sequence[str]) -> bool:
    """Run and record one phase; returns whether it is done."""
    context = Context(work, name)
    print(f"{name}: started at {time.monotonic() - STARTED:.0f} s", flush=True)
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
        "beside": list(beside),
        "notes": context.notes,
        "commands": [shlex.join(command) for command in context.commands],
        "at": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with _RECORDING:
        append_whole(work.folder / "records.jsonl", json.dumps(record) + "\n")
    if status != "done":
        print(f"{tail(context.log)}\n{name}: {status}\nthe whole log: {context.log}", flush=True)
        return False
    shown = {key: value for key, value in record.items() if key not in ("commands", "phase")}
    print(f"{name}: {json.dumps(shown)}", flush=True)
    return True


def make_work(args: argparse.Namespace) -> tuple[Settings, Work]:
    """Settings and paths from the flags; those of earlier commands by default."""
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


def read_group(text: str) -> tuple[str, ...]:
    """Phases of one value of --phases.

    >>> read_group("loss+needle")
    ('loss', 'needle')
    """
    names = tuple(text.split("+"))
    for name in names:
        if name not in PHASES:
            raise ConfigError(f"--phases {name} is unknown; choose from {', '.join(PHASES)}")
    return names


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for everything; its disk is measured")
    order = " ".join("+".join(group) for group in GROUPS)
    add("--phases", nargs="+", type=read_group, metavar="PHASE[+PHASE]", help=f"default: {order}")
    add("--again", nargs="+", choices=PHASES, default=[], metavar="PHASE", help="though done")
    add(
        "--until-s",
        type=float,
        help="seconds of this command: no phase that takes longer is started",
    )
    add(
        "--keep-going",
        action="store_true",
        help="after a failure, run phases that do not depend on it",
    )
    add("--drop-checkpoint", action="store_true", help="async may remove what others still need")
    add(
        "--copy-to",
        type=Path,
        help="folder for records, tables and ends of logs, written after each phase",
    )
    add("--list", action="store_true", help="what is done, and how long the rest takes")
    add("--report", action="store_true", help="print the tables")
    add("--dataset", type=Path, help="folder written by the phase data; default: WORK/data")
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
