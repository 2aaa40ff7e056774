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
from megatron_long.flags.argv import Argv

STEPS = 2
LAYOUT_FLAGS = {
    "--tensor-model-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
    "--context-parallel-size": 1,
    "--cp-comm-type": "p2p",
}
"""Flags of the layout, by what they are in the smallest one."""
CUT_FLAGS = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
    "--cp-comm-type",
    "--hierarchical-context-parallel-sizes",
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
    "--microbatch-group-size-per-virtual-pipeline-stage",
    "--pipeline-model-parallel-layout",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
    "--defer-embedding-wgrad-compute",
)
"""Flags that the smallest layout does without."""
RUN_FLAGS = (
    # Where the run starts, what it leaves behind.
    "--save",
    "--save-interval",
    "--save-minutes",
    "--save-retain-interval",
    "--keep-last",
    "--keep-every",
    "--non-persistent-save-interval",
    "--non-persistent-ckpt-type",
    "--non-persistent-global-ckpt-dir",
    "--non-persistent-local-ckpt-dir",
    "--non-persistent-local-ckpt-algo",
    "--async-save",
    "--load",
    "--pretrained-checkpoint",
    "--next-stage-of",
    "--ckpt-step",
    "--finetune",
    "--exit-on-missing-checkpoint",
    "--export-hf",
    # What it logs.
    "--loss-log",
    "--verbose",
    "--log-progress",
    "--tensorboard-dir",
    "--wandb-project",
    "--wandb-exp-name",
    "--wandb-save-dir",
    "--wandb-entity",
    # How long it is: a warmup must be shorter than the two steps, and their rate decides nothing.
    "--train-iters",
    "--train-samples",
    "--skip-train",
    "--lr-decay-style",
    "--lr-decay-iters",
    "--lr-decay-samples",
    "--lr-wsd-decay-style",
    "--lr-wsd-decay-iters",
    "--lr-wsd-decay-samples",
    "--lr-warmup-fraction",
    "--lr-warmup-iters",
    "--lr-warmup-samples",
    "--lr-warmup-init",
    "--global-batch-size",
    "--exit-interval",
    "--exit-duration-in-mins",
    "--exit-signal-handler",
    "--enable-ft-package",
    # What it evaluates.
    "--eval-iters",
    "--full-validation",
    "--multiple-validation-sets",
    "--needle-interval",
    "--needle-haystack",
    "--needle-num-lengths",
    "--needle-num-depths",
    "--needle-min-length",
    "--position-loss-interval",
    "--position-loss-documents",
    "--evaluation-dir",
)
"""Flags of the user's run that the comparison sets itself or does without."""


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
    common = [*Argv(argv).without(*RUN_FLAGS), "--global-batch-size", str(windows)]
    common += ["--eval-iters", "0", "--save-interval", "1000000", "--keep-window-order"]
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


def smallest_layout(argv: Sequence[str]) -> list[str]:
    """The flags with one device a replica."""
    kept = Argv(argv).without(*CUT_FLAGS)
    return [*kept] + [word for flag, value in LAYOUT_FLAGS.items() for word in (flag, str(value))]
