"""Compares a layout with the smallest one, over two steps of the user's run in each.

What is compared: the loss and the gradient norm of each step, and the loss of every token. A layout that is
split wrongly (a mask, a position, a gradient summed twice) shows in the tokens of the first step or in the
norm, before it shows in the mean.
"""

import json
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_long.checkpoint.choosing import has_checkpoint
from megatron_long.errors import ConfigError

STEPS = 2
ALL_VALUES = sys.maxsize
"""Number of values of a flag that takes all arguments up to the next flag."""
LAYOUT_FLAGS = {
    "--tensor-model-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
    "--context-parallel-size": 1,
    "--cp-comm-type": "p2p",
}
"""Flags of the layout, with their values in the smallest one."""
CUT_FLAGS = {
    "--tensor-model-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
    "--context-parallel-size": 1,
    "--cp-comm-type": ALL_VALUES,
    "--hierarchical-context-parallel-sizes": ALL_VALUES,
    "--num-layers-per-virtual-pipeline-stage": 1,
    "--num-virtual-stages-per-pipeline-rank": 1,
    "--microbatch-group-size-per-virtual-pipeline-stage": 1,
    "--pipeline-model-parallel-layout": 1,
    "--decoder-first-pipeline-num-layers": 1,
    "--decoder-last-pipeline-num-layers": 1,
    "--account-for-embedding-in-pipeline-split": 0,
    "--account-for-loss-in-pipeline-split": 0,
    "--defer-embedding-wgrad-compute": 0,
}
"""Flags that the smallest layout omits, with their number of values."""
RUN_FLAGS = {
    # Where the run starts, what it writes.
    "--save": 1,
    "--save-interval": 1,
    "--save-minutes": 1,
    "--save-retain-interval": 1,
    "--keep-last": 1,
    "--keep-every": 1,
    "--non-persistent-save-interval": 1,
    "--non-persistent-ckpt-type": 1,
    "--non-persistent-global-ckpt-dir": 1,
    "--non-persistent-local-ckpt-dir": 1,
    "--non-persistent-local-ckpt-algo": 1,
    "--async-save": 0,
    "--load": 1,
    "--pretrained-checkpoint": 1,
    "--ckpt-step": 1,
    "--finetune": 0,
    "--exit-on-missing-checkpoint": 0,
    "--export-hf": 1,
    # What it logs.
    "--loss-log": 1,
    "--verbose": 0,
    "--log-progress": 0,
    "--tensorboard-dir": 1,
    "--wandb-project": 1,
    "--wandb-exp-name": 1,
    "--wandb-save-dir": 1,
    "--wandb-entity": 1,
    # How long it is: a warmup must be shorter than the two steps, and their rate does not matter.
    "--train-iters": 1,
    "--train-samples": 1,
    "--skip-train": 0,
    "--lr-decay-style": 1,
    "--lr-decay-iters": 1,
    "--lr-decay-samples": 1,
    "--lr-wsd-decay-style": 1,
    "--lr-wsd-decay-iters": 1,
    "--lr-wsd-decay-samples": 1,
    "--lr-warmup-fraction": 1,
    "--lr-warmup-iters": 1,
    "--lr-warmup-samples": 1,
    "--lr-warmup-init": 1,
    "--global-batch-size": 1,
    "--exit-interval": 1,
    "--exit-duration-in-mins": 1,
    "--exit-signal-handler": 0,
    "--enable-ft-package": 0,
    # What it evaluates.
    "--eval-iters": 1,
    "--full-validation": 0,
    "--multiple-validation-sets": 0,
    "--needle-interval": 1,
    "--needle-haystack": 1,
    "--needle-num-lengths": 1,
    "--needle-num-depths": 1,
    "--needle-min-length": 1,
    "--position-loss-interval": 1,
    "--position-loss-documents": 1,
    "--evaluation-dir": 1,
}
"""Flags of the user's run that the comparison sets itself or omits, with their number of values."""


@dataclass(frozen=True)
class Tolerance:
    """How far two layouts may differ."""

    loss: float
    """Nats, mean over the tokens of a step."""
    grad_norm: float
    """Share of the norm."""
    token: float
    """Nats, root mean square over the tokens of a step."""


TOLERANCES = {
    # Sums in another order: a few units in the last place of float32 at losses of about 10.
    "fp32": Tolerance(2e-6, 1e-4, 2e-5),
    # BF16 keeps 8 bits: a logit of 10 is off by up to 0.03, of either sign, so that the mean over thousands
    # of tokens stays far closer than one token.
    "bf16": Tolerance(5e-3, 2e-2, 5e-2),
    # FP8 keeps 3 to 4 bits of each factor, scaled by another largest value in each shard.
    "fp8": Tolerance(2e-2, 1e-1, 1.5e-1),
}


@dataclass(frozen=True)
class Steps:
    """The figures of two steps of a run."""

    losses: list[float]
    grad_norms: list[float]
    tokens: dict[str, np.ndarray]
    """`step`, `row`, `position`, `loss` of each counted token, in that order."""


@dataclass(frozen=True)
class Comparison:
    """Largest differences of a step."""

    step: int
    loss: float
    grad_norm: float
    token: float
    worst_token: str
    """Where the largest difference of one token is, and how large."""

    def is_within(self, tolerance: Tolerance) -> bool:
        """Whether no difference is larger; NaN never passes."""
        return (
            self.loss <= tolerance.loss
            and self.grad_norm <= tolerance.grad_norm
            and self.token <= tolerance.token
        )


def precision_of(args: Namespace) -> str:
    """Key of `TOLERANCES` for a run's flags."""
    return "fp8" if args.fp8 else "bf16" if args.bf16 or args.fp16 else "fp32"


def compare_layouts(
    args: Namespace, argv: Sequence[str], world_size: int, reference_world_size: int, folder: Path
) -> list[Comparison]:
    """Train two steps in each layout, from one checkpoint: the user's, or random weights made here.

    Args:
        args, argv: The user's run, parsed and as flags.
        world_size: Processes of its layout.
        reference_world_size: Processes of the smallest layout, all of them replicas.
        folder: Where the runs write.
    Raises: ConfigError: this machine has fewer GPUs than processes, or a job fails.
    """
    _check_devices(max(world_size, reference_world_size))
    replicas = replicas_of(args, world_size)
    windows = args.global_batch_size or args.micro_batch_size * replicas
    common = [*without_flags(argv, RUN_FLAGS), "--global-batch-size", str(windows)]
    common += ["--eval-iters", "0", "--save-interval", "1000000"]
    small = smallest_layout(common)
    start = _start_of(args)
    if start is None:
        start = folder / "start"
        made = ["--train-iters", "1", "--lr", "0", "--min-lr", "0", "--save", str(start)]
        counts = windows // (args.micro_batch_size * reference_world_size)
        run_steps(folder / "weights", reference_world_size, counts, [*small, *made])
    steps = ["--train-iters", str(STEPS), "--load", str(start), "--finetune"]
    seen, expected = (
        run_steps(folder / name, size, windows // (args.micro_batch_size * parts), [*flags, *steps])
        for name, size, parts, flags in (
            ("layout", world_size, replicas, common),
            ("smallest", reference_world_size, reference_world_size, small),
        )
    )
    return compare(seen, expected)


def _check_devices(processes: int) -> None:
    """Refuse more processes than this machine has GPUs for; the host backend takes any number."""
    import torch

    count = torch.cuda.device_count()
    if torch.cuda.is_available() and processes > count:
        raise ConfigError(
            f"--compare starts {processes} processes on this machine, which has {count} GPUs; give the "
            "--world-size of one replica, with fewer layers if it does not fit"
        )


def replicas_of(args: Namespace, world_size: int) -> int:
    """Give the data-parallel size."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    return world_size // (tp * pp * args.context_parallel_size)


def _start_of(args: Namespace) -> Path | None:
    """The checkpoint that the run would start from."""
    for folder in (args.load, args.pretrained_checkpoint):
        if has_checkpoint(folder):
            return Path(folder)
    return None


def compare(seen: Steps, expected: Steps) -> list[Comparison]:
    """Compare two runs step by step.

    Raises: ConfigError: they did not train on the same tokens.
    """
    for name in ("step", "row", "position"):
        if not np.array_equal(seen.tokens[name], expected.tokens[name]):
            raise ConfigError(
                f"the two layouts trained on different tokens ({len(seen.tokens[name]):,} and "
                f"{len(expected.tokens[name]):,} with a loss; their {name}s differ); give data that do "
                "not depend on the layout (--dataset)"
            )
    comparisons = []
    for step in range(STEPS):
        own = seen.tokens["step"] == step
        difference = np.abs(seen.tokens["loss"][own] - expected.tokens["loss"][own])
        worst = int(np.argmax(difference))
        row, position = (int(seen.tokens[name][own][worst]) for name in ("row", "position"))
        norm = expected.grad_norms[step]
        comparisons.append(
            Comparison(
                step + 1,
                abs(seen.losses[step] - expected.losses[step]),
                abs(seen.grad_norms[step] - norm) / norm,
                float(np.sqrt(np.mean(difference.astype(np.float64) ** 2))),
                f"window {row} position {position}: {difference[worst]:.1e}",
            )
        )
    return comparisons


def run_steps(folder: Path, world_size: int, micro_batches: int, argv: Sequence[str]) -> Steps:
    """Train two steps on this machine and collect their figures.

    Raises: ConfigError: the job failed; contains its last lines.
    """
    folder.mkdir(parents=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(world_size), "-m", "megatron_long.layout_probe"]
    command = [*launch, str(folder), str(micro_batches), *argv]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = reason_of(result.stdout + result.stderr)
        raise ConfigError(f"{world_size} processes with {' '.join(argv)} failed: {reason}")
    return read_steps(folder)


def reason_of(output: str) -> str:
    """The line of a job's output that says why it failed: ours, or the first exception's.

    >>> reason_of("start\\nerror: --lr is missing\\nTraceback\\nSomeError: child failed")
    'error: --lr is missing'
    """
    lines = output.strip().splitlines()
    for pattern in (r"error: ", r"(\[rank\d+\]: )?[\w.]+(Error|Exception): "):
        found = [index for index, line in enumerate(lines) if re.match(pattern, line)]
        if found:
            return lines[found[0]]
    return " / ".join(lines[-4:])


def read_steps(folder: Path) -> Steps:
    """Merge the files of all ranks, in the order of step, row and position."""
    records = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    parts = []
    for path in sorted(folder.glob("rank-*.npz")):
        with np.load(path) as part:
            parts.append(dict(part))
    tokens = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((tokens["position"], tokens["row"], tokens["step"]))
    return Steps(
        [record["lm loss"] for record in records],
        [record["grad_norm"] for record in records],
        {name: values[order] for name, values in tokens.items()},
    )


def without_flags(argv: Sequence[str], flags: dict[str, int]) -> list[str]:
    """Remove flags, with this many values each.

    >>> without_flags(["--save", "x", "--lr", "1", "--finetune", "--load=y"], RUN_FLAGS)
    ['--lr', '1']
    """
    kept: list[str] = []
    values = 0
    for word in argv:
        name, is_joined, _ = word.partition("=")
        if values and not word.startswith("--"):
            values -= 1
        elif name in flags:
            values = 0 if is_joined else flags[name]
        else:
            values = 0
            kept.append(word)
    return kept


def smallest_layout(argv: Sequence[str]) -> list[str]:
    """The flags with one device per replica."""
    kept = without_flags(argv, CUT_FLAGS)
    return kept + [word for flag, value in LAYOUT_FLAGS.items() for word in (flag, str(value))]
