"""Check a training run before it starts: files, layout, memory, disk, and what the layout computes.

Takes the flags of megatron_long.pretrain and the number of processes; exits with 2 and one paragraph
where a rule is broken, else prints what a step will be, what the run takes of GPU memory, host memory and
disk, and warnings. With --compare it also trains two steps, in this layout and in the smallest one
(--reference-world-size processes that are all replicas), from the same weights on the same windows, and
exits with 1 where losses, gradient norms or token losses differ by more than rounding does.
"""

import argparse
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from megatron_long.errors import ConfigError
from megatron_long.flags.argv import Argv
from megatron_long.planning.hardware import GPUS, find_gpu
from megatron_long.planning.layout_parity import (
    RUN_FLAGS,
    STEPS,
    TOLERANCES,
    Comparison,
    Tolerance,
    compare,
    precision_of,
    run_steps,
    smallest_layout,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.epilog = "All flags of megatron_long.pretrain, ours and Megatron's, are taken."
    parser.add_argument("--world-size", type=int, required=True, help="processes of the job")
    parser.add_argument(
        "--compare", action="store_true", help="train two steps here and in the smallest layout"
    )
    parser.add_argument(
        "--reference-world-size", type=int, default=1, help="processes of the smallest layout (1)"
    )
    parser.add_argument(
        "--gpu", help=f"kind of GPU, where this machine has none: {', '.join(GPUS)}"
    )
    parser.add_argument("--work-dir", type=Path, help="keep what --compare writes here")
    arguments, argv = parser.parse_known_args()

    from megatron_long.engine import host_backend

    host_backend.install()
    from megatron_long.command_line import parse
    from megatron_long.engine.megatron_adapter import check_version
    from megatron_long.flags.backend import GPU, detect_backend
    from megatron_long.planning.preflight import check_machine, needs_of, visible_gpu

    check_version()
    backend, gpu = detect_backend(), visible_gpu()
    if arguments.gpu and arguments.compare:
        raise ConfigError(
            "--compare trains on this machine, whatever --gpu names; drop one of them"
        )
    if arguments.gpu:
        backend, gpu = backend if backend.cuda else GPU, find_gpu(arguments.gpu)
    _, args = parse(argv, backend, arguments.world_size)
    warnings = check_machine(args, arguments.world_size, gpu)
    print(describe(args, arguments.world_size))
    print(
        needs_of(args, arguments.world_size) or "memory and disk: unknown without the model's shape"
    )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not arguments.compare:
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work_dir or Path(temporary)
        comparisons = compare_layouts(arguments, args, argv, folder)
    tolerance = TOLERANCES[precision_of(args)]
    print(as_table(comparisons, tolerance))
    is_same = all(comparison.is_within(tolerance) for comparison in comparisons)
    print("the layouts train alike" if is_same else "THE LAYOUTS DIFFER")
    return 0 if is_same else 1


def compare_layouts(
    arguments: argparse.Namespace, args: Namespace, argv: list[str], folder: Path
) -> list[Comparison]:
    """Two steps in each layout, from one checkpoint: the user's, or random weights made here.

    Raises: ConfigError: this machine has fewer GPUs than processes, or a job fails.
    """
    check_devices(max(arguments.world_size, arguments.reference_world_size))
    windows = args.global_batch_size or args.micro_batch_size * replicas_of(
        args, arguments.world_size
    )
    common = [*Argv(argv).without(*RUN_FLAGS), "--global-batch-size", str(windows)]
    common += ["--eval-iters", "0", "--save-interval", "1000000"]
    small = smallest_layout(common)
    start = start_of(args)
    reference = arguments.reference_world_size
    if start is None:
        start = folder / "start"
        made = ["--train-iters", "1", "--lr", "0", "--min-lr", "0", "--save", str(start)]
        counts = windows // (args.micro_batch_size * reference)
        run_steps(folder / "weights", reference, counts, [*small, *made])
    steps = ["--train-iters", str(STEPS), "--load", str(start), "--finetune"]
    seen, expected = (
        run_steps(folder / name, size, windows // (args.micro_batch_size * parts), [*flags, *steps])
        for name, size, parts, flags in (
            (
                "layout",
                arguments.world_size,
                replicas_of(args, arguments.world_size),
                common,
            ),
            ("smallest", reference, reference, small),
        )
    )
    return compare(seen, expected)


def check_devices(processes: int) -> None:
    """Refuse more processes than this machine has GPUs for; the host backend takes any number."""
    import torch

    count = torch.cuda.device_count()
    if torch.cuda.is_available() and processes > count:
        raise ConfigError(
            f"--compare starts {processes} processes on this machine, which has {count} GPUs; give the "
            "--world-size of one replica, with fewer layers if it does not fit"
        )


def replicas_of(args: Namespace, world_size: int) -> int:
    """Data-parallel size."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    return world_size // (tp * pp * args.context_parallel_size)


def start_of(args: Namespace) -> Path | None:
    """The checkpoint that the run would start from."""
    from megatron_long.checkpoint.choosing import has_checkpoint

    for folder in (args.load, args.pretrained_checkpoint):
        if has_checkpoint(folder):
            return Path(folder)
    return None


def as_table(comparisons: list[Comparison], tolerance: Tolerance) -> str:
    """One line a step, and what is allowed."""
    lines = ["step  loss      grad norm  tokens (rms)  largest difference of a token"]
    lines += [
        f"{step.step:4}  {step.loss:8.1e}  {step.grad_norm:9.1e}  {step.token:12.1e}  {step.worst_token}"
        for step in comparisons
    ]
    allowed = f"{tolerance.loss:8.1e}  {tolerance.grad_norm:9.1e}  {tolerance.token:12.1e}"
    return "\n".join([*lines, f" may  {allowed}"])


def describe(args: Namespace, world_size: int) -> str:
    """One line about replicas and the optimizer step."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp = args.context_parallel_size
    replicas = replicas_of(args, world_size)
    windows = args.global_batch_size or args.micro_batch_size * replicas
    tokens = windows * args.seq_length
    return (
        f"layout ok: {world_size} processes = tensor {tp} * pipeline {pp} * context {cp} * data "
        f"{replicas}; a step is {windows} windows of {args.seq_length} tokens ({tokens:,} tokens), "
        f"{args.seq_length // cp:,} tokens of a window on each rank; {args.train_iters} steps"
    )
