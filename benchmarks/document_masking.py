#!/usr/bin/env python3
"""What `--document-masking` saves: the same training steps with and without it, on a real mixture.

    python benchmarks/document_masking.py --dataset data/mix --nproc-per-node 2 --steps 8 \\
        --recipe llama3_8b_128k --num-layers 8 --tensor-model-parallel-size 1 --context-parallel-size 2

Other flags go to megatron_long.pretrain. Prints the median seconds of the steps after
the warm-up, the padding, and the share of the attention's work that is within documents.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_long.dataset.indexed import IndexedDatasetReader

STEP_TIME = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")


@dataclass(frozen=True)
class Measured:
    """One of the two jobs."""

    seconds: float
    """Median of a step."""
    padding_share: float
    """Of the tokens of the last step's buffers."""
    losses: list[float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset", type=Path, required=True, help="of tools/preprocess_mix.py")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="GPUs (1)")
    parser.add_argument("--steps", type=int, default=8, help="steps of each job (8)")
    parser.add_argument("--warm-up", type=int, default=3, help="of these, skipped (3)")
    parser.add_argument("--seq-length", type=int, default=131_072, help="tokens (131072)")
    arguments, flags = parser.parse_known_args()
    windows = describe(arguments.dataset / "train", arguments.seq_length, arguments.steps)
    print(json.dumps(windows, indent=2))
    without = train(arguments, flags)
    masked = train(arguments, [*flags, "--document-masking"])
    print("| attention | s a step | padding | loss of the last step |\n|---|---|---|---|")
    for name, run in (("whole window", without), ("within documents", masked)):
        print(f"| {name} | {run.seconds:.3f} | {run.padding_share:.3%} | {run.losses[-1]:.4f} |")
    print(f"speed-up {without.seconds / masked.seconds:.2f}")
    return 0


def describe(prefix: Path, seq_length: int, num_windows: int) -> dict[str, float]:
    """Documents of the first windows, and the share of causal attention within them."""
    reader = IndexedDatasetReader(prefix)
    num_windows = min(num_windows, reader.num_tokens // seq_length)
    lengths = [
        np.diff(np.append(reader.document_starts(i * seq_length, seq_length), seq_length))
        for i in range(num_windows)
    ]
    within = [float(np.sum(window.astype(float) ** 2)) / seq_length**2 for window in lengths]
    return {
        "windows": num_windows,
        "documents_per_window": statistics.mean(map(len, lengths)),
        "longest_document_tokens": max(int(window.max()) for window in lengths),
        "attention_within_documents": statistics.mean(within),
    }


def train(arguments: argparse.Namespace, flags: list[str]) -> Measured:
    """Run one job; its whole output is printed if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "loss.jsonl"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(arguments.nproc_per_node), "-m"]
        command += ["megatron_long.pretrain", "--dataset", str(arguments.dataset)]
        command += ["--global-batch-size", "1", "--seq-length", str(arguments.seq_length)]
        command += ["--train-iters", str(arguments.steps), "--allow-repeat", "--log-interval", "1"]
        result = subprocess.run(
            [*command, *flags, "--loss-log", str(log)], capture_output=True, text=True
        )
        if result.returncode:
            sys.exit(f"{result.stdout}{result.stderr}\njob failed: {command}")
        records = [json.loads(line) for line in log.read_text().splitlines()]
    times = [float(time) / 1000 for time in STEP_TIME.findall(result.stdout)]
    return Measured(
        statistics.median(times[arguments.warm_up :]),
        records[-1].get("padding share", 0.0),
        [record["lm loss"] for record in records],
    )


if __name__ == "__main__":
    sys.exit(main())
