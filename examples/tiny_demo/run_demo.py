"""The whole pipeline on one machine without a GPU: `python -m examples.tiny_demo.run_demo` (`make demo`).

Each step is one command, printed before it runs, so that it can be pasted into a shell. Finished
steps are skipped when the demo is started again; `--force` runs all.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Run as a file (`make demo`), Python puts this folder on its path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.tiny_demo.demo_steps import (
    LONG_LENGTH,
    REQUIRED_LOSS_DROP_NATS,
    SHORT_LENGTH,
    Step,
    demo_steps,
)
from examples.tiny_demo.step_runner import run_command
from megatron_long.cli import run_tool

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
"""The demo always runs on the host backend: four processes, even with GPUs."""
NUM_LOG_LINES = 40
ARTEFACTS = (
    ("dataset_lengths.png", "document lengths and sources before and after mixing"),
    ("loss_curve.png", "training loss of both trainings"),
    ("loss-after.png", "loss by position, before and after the stretch"),
    ("needle/needle.png", "needle heatmap, length x depth"),
    ("dataset", "the mixed dataset (Megatron's format and a manifest)"),
    ("checkpoint_long", "the stretched Megatron checkpoint"),
    ("hf_export", "the same for transformers"),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a step ended."""

    name: str
    seconds: float
    skipped: bool = False


def step_marker(workdir: Path, step: Step) -> Path:
    """The file that says a step is done; its name holds a digest of the command."""
    digest = hashlib.sha256(shlex.join(step.command).encode()).hexdigest()[:12]
    return workdir / ".done" / f"{step.name}-{digest}"


def is_done(workdir: Path, step: Step) -> bool:
    """Whether a step has finished with the same command and its outputs are still there."""
    return step_marker(workdir, step).exists() and all(path.exists() for path in step.outputs)


def shell_text(step: Step) -> str:
    """The step's command for a shell.

    >>> from pathlib import Path
    >>> command = ("python", "x.py", "--name", "two words")
    >>> shell_text(Step(name="x", title="", command=command, outputs=()))
    "OMP_NUM_THREADS=1 python x.py --name 'two words'"
    """
    return f"OMP_NUM_THREADS={step.num_threads} {shlex.join(step.command)}"


def run_steps(steps: Sequence[Step], workdir: Path, *, force: bool) -> list[Outcome] | None:
    """Run the steps that are not done yet; after the first that runs, all that follow run too.

    Returns: How each ended, or None when one failed (its log's end is printed).
    """
    outcomes: list[Outcome] = []
    fresh = force
    for number, step in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {step.title}", flush=True)
        if not fresh and is_done(workdir, step):
            print("  done before; --force runs it again")
            outcomes.append(Outcome(name=step.name, seconds=0.0, skipped=True))
            continue
        fresh = True
        print(f"  $ {shell_text(step)}", flush=True)
        started = time.monotonic()
        if not _run_step(step, workdir):
            return None
        outcomes.append(Outcome(name=step.name, seconds=time.monotonic() - started))
        print(f"  {outcomes[-1].seconds:.1f} s", flush=True)
    return outcomes


def _run_step(step: Step, workdir: Path) -> bool:
    marker = step_marker(workdir, step)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    for path in step.outputs:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    log = workdir / "logs" / f"{step.name}.log"
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(step.num_threads)}
    status = run_command(step.command, log, environment, show_output=step.show_output)
    missing = [str(path) for path in step.outputs if not path.exists()]
    if status == 0 and not missing:
        marker.touch()
        return True
    print(f"\nlast lines of {log}:", file=sys.stderr)
    lines = log.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:]
    print("\n".join(f"  | {line}" for line in lines), file=sys.stderr)
    reason = f"it ended with status {status}" if status else f"it left no {', '.join(missing)}"
    print(f"\ndemo: step {step.name} failed: {reason}; the whole log: {log}", file=sys.stderr)
    return False


def print_summary(outcomes: Sequence[Outcome], workdir: Path) -> None:
    """Print what was created, where it is and how long it took."""
    print("\nWhat the demo made")
    for name, meaning in ARTEFACTS:
        print(f"  {workdir / name!s:40s} {meaning}")
    print("\nSeconds by step")
    for outcome in outcomes:
        print(
            f"  {outcome.name:14s} {'done before' if outcome.skipped else f'{outcome.seconds:.1f}'}"
        )
    print(f"  {'total':14s} {sum(outcome.seconds for outcome in outcomes):.1f}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Corpus, mixed dataset, conversion, training, stretch, evaluation, export."
    )
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/tiny_demo"), help="folder to use"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/.cache"), help="downloads, kept between runs"
    )
    parser.add_argument("--force", action="store_true", help="run steps that are done already")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    return parser.parse_args(argv)


def _interpreter() -> str:
    """This interpreter, as a path relative to the current folder where it lies below it."""
    path, here = Path(sys.executable), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def main() -> int:
    args = parse_args()
    steps = demo_steps(args.workdir, args.cache, _interpreter())
    if args.dry_run:
        print("\n".join(shell_text(step) for step in steps))
        return 0
    print(
        f"megatron_long demo: {len(steps)} steps, everything in {args.workdir}; to paste a command, "
        "first: export CUDA_VISIBLE_DEVICES=\n"
        f"Promise: on held-out documents longer than {LONG_LENGTH} tokens, the loss beyond "
        f"{SHORT_LENGTH} tokens falls by at least {REQUIRED_LOSS_DROP_NATS} nats through the stretch."
    )
    outcomes = run_steps(steps, args.workdir, force=args.force)
    if outcomes is None:
        return 1
    print_summary(outcomes, args.workdir)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
