"""Time to open a dataset of billions of tokens for training, on a sparse file.

    python benchmarks/open_dataset.py --tokens 5000000000 --work-dir DIR

The index is complete (lengths, offsets, document numbers); the tokens are a hole in the file. Opening is
`PackedDataset(...)` and its first and last windows of 128K tokens; importing PyTorch is not counted.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from megatron_long.dataset.indexed import HEADER, MAGIC, VERSION, bin_path, idx_path

MEAN_LENGTH_TOKENS = 1500
"""Shorter than in a real mixture, so that the index is longer."""
SEQ_LENGTH = 131_072
REPEATS = 20


def write_sparse(prefix: Path, num_tokens: int) -> int:
    """Write a dataset whose tokens take no disk space; return the number of documents."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 2 * MEAN_LENGTH_TOKENS, num_tokens // MEAN_LENGTH_TOKENS)
    ends = np.cumsum(lengths)
    lengths = lengths[ends <= num_tokens]
    lengths[-1] += num_tokens - lengths.sum()
    count = len(lengths)
    with open(idx_path(prefix), "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, count, count + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(((np.cumsum(lengths) - lengths) * 2).astype("<i8").tobytes())
        file.write(np.arange(count + 1, dtype="<i8").tobytes())
    with open(bin_path(prefix), "wb") as file:
        file.truncate(2 * num_tokens)
    return count


def time_opening(prefix: Path) -> list[float]:
    """Open the dataset repeatedly; return the milliseconds of each time."""
    from megatron_long.dataset.packed_dataset import PackedDataset

    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        dataset = PackedDataset(prefix, SEQ_LENGTH, eod_id=2)
        first, last = dataset[0], dataset[len(dataset) - 1]
        times.append(1e3 * (time.perf_counter() - start))
        assert len(first["tokens"]) == len(last["tokens"]) == SEQ_LENGTH
    return times


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    args = parser.parse_args()
    folder = args.work_dir / "sparse"
    folder.mkdir(parents=True, exist_ok=True)
    count = write_sparse(folder / "train", args.tokens)
    times = time_opening(folder / "train")
    shutil.rmtree(folder)
    told = {"first_ms": times[0], "median_ms": statistics.median(times), "repeats": len(times)}
    print(json.dumps(told | {"tokens": args.tokens, "documents": count, "seq_length": SEQ_LENGTH}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
