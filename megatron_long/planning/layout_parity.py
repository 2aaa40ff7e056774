"""Whether a layout trains as the smallest one does: two steps of the user's run in each, compared.

What is compared: the loss and the gradient norm of each step, and the loss of every token. A layout that is
cut wrongly (a mask, a position, a gradient summed twice) shows in the tokens of the first step or in the
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

from megatron_long.errors import ConfigError

STEPS = 2
LAYOUT_FLAGS = {
    "--tensor-model-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
    "--context-parallel-size": 1,
    "--num-layers-per-virtual-pipeline-stage": None,
    "--num-virtual-stages-per-pipeline-rank": None,
    "--pipeline-model-parallel-layout": None,
}
"""Flags that the smallest layout does without, by what takes their place."""
RUN_FLAGS = {
    "--save": 1,
    "--load": 1,
    "--pretrained-checkpoint": 1,
    "--loss-log": 1,
    "--tensorboard-dir": 1,
    "--train-iters": 1,
    "--train-samples": 1,
    "--eval-iters": 1,
    "--global-batch-size": 1,
    "--finetune": 0,
    "--exit-signal-handler": 0,
    "--enable-ft-package": 0,
    "--async-save": 0,
}
"""Flags of the user's run that the comparison sets itself, by the values they take."""


@dataclass(frozen=True)
class Tolerance:
    """How far two layouts may lie apart."""

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
    """What two steps of a run left."""

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
        """Whether no difference is larger; one that is no number is not."""
        return (
            self.loss <= tolerance.loss
            and self.grad_norm <= tolerance.grad_norm
            and self.token <= tolerance.token
        )


def precision_of(args: Namespace) -> str:
    """Key of `TOLERANCES` for a run's flags."""
    return "fp8" if args.fp8 else "bf16" if args.bf16 or args.fp16 else "fp32"


def compare(seen: Steps, expected: Steps) -> list[Comparison]:
    """Compare two runs step by step.

    Raises: ConfigError: they did not train on the same tokens.
    """
    for name in ("step", "row", "position"):
        if not np.array_equal(seen.tokens[name], expected.tokens[name]):
            raise ConfigError(
                f"the two layouts trained on other tokens ({len(seen.tokens[name]):,} and "
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
    """Train two steps on this machine and collect what they left.

    Raises: ConfigError: the job failed; with its last lines.
    """
    folder.mkdir(parents=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(world_size), "-m", "megatron_long.training.layout_probe"]
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
    """Put the files of all ranks together, in the order of step, row and position."""
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
    """Leave flags out, with so many values each.

    >>> without_flags(["--save", "x", "--lr", "1", "--finetune", "--load=y"], RUN_FLAGS)
    ['--lr', '1']
    """
    kept: list[str] = []
    skip = 0
    for word in argv:
        name, _, value = word.partition("=")
        if skip:
            skip -= 1
        elif name in flags:
            skip = 0 if value else flags[name]
        else:
            kept.append(word)
    return kept


def smallest_layout(argv: Sequence[str]) -> list[str]:
    """The flags with one device a replica."""
    kept = without_flags(argv, dict.fromkeys(LAYOUT_FLAGS, 1))
    for flag, value in LAYOUT_FLAGS.items():
        kept += [flag, str(value)] if value is not None else []
    return kept
