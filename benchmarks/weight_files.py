"""Writing and reading safetensors of one shard: ours against the library, time and memory.

    python benchmarks/weight_files.py --work-dir /scratch/files --gb 4

Each arm is a process of its own. Reading begins with a cold page cache (of this file), writing ends with the
data on the disk. The library writes a dictionary, so it holds the whole shard; ours holds one tensor. Peak
is the process's memory without mapped files. Arms alternate; ratios are those of medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_long.cli import run_tool, tool_parser

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPE = (4096, 14_336)
"""Of an MLP's weight of Llama-3-8B, BF16: 117 MB."""
ARMS = ("write ours", "write safetensors", "read ours", "read safetensors")


def tensors(count: int) -> Iterator[tuple[str, object]]:
    """Random weights, the same values in each."""
    import torch

    value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    for number in range(count):
        yield f"layer.{number}", value.clone()


def run_arm(arm: str, folder: Path, count: int) -> None:
    """Do it in this process; print seconds and peak."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from megatron_long.checkpoint.stored import find_tensors
    from megatron_long.conversion.formats.hf_folder import PlannedTensor, write_weights

    path = folder / "model.safetensors"
    what, how = arm.split()
    if what == "write":
        path.unlink(missing_ok=True)
    else:
        drop_cache(path)
    began, peak = time.perf_counter(), 0.0
    if arm == "write ours":
        planned = [
            PlannedTensor(name=f"layer.{number}", shape=SHAPE, dtype=torch.bfloat16)
            for number in range(count)
        ]
        write_weights(folder, [planned], tensors(count))  # type: ignore[arg-type]
    elif arm == "write safetensors":
        save_file(dict(tensors(count)), path)  # type: ignore[arg-type]
    elif how == "ours":
        for stored in find_tensors(path, [f"layer.{number}" for number in range(count)]).values():
            stored.tensor()
    else:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dictionary
                file.get_tensor(name).clone()  # the library maps the file
            peak = peak_gb()  # before its pages are unmapped
    if what == "write":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    print(time.perf_counter() - began, peak or peak_gb())


def drop_cache(path: Path) -> None:
    """Forget the pages of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def peak_gb() -> float:
    """Largest resident memory so far, without the pages of mapped files that are resident now."""
    values = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = [int(values[name].split()[0]) for name in ("VmHWM", "RssFile")]
    return (kilobytes[0] - kilobytes[1]) / 1e6


def main() -> int:
    """Run all arms in turn; print a row for each."""
    parser = tool_parser(__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the shard (4)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    count = max(1, round(args.gb * 1e9 / (2 * SHAPE[0] * SHAPE[1])))
    if args.arm:
        run_arm(args.arm, args.work_dir, count)
        return 0
    args.work_dir.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in ARMS:
            command = [sys.executable, __file__, "--work-dir", args.work_dir, "--gb", args.gb]
            done = subprocess.run(
                [*map(str, command), "--arm", arm],
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            seconds, peak = map(float, done.stdout.split())
            found[arm].append((seconds, peak))
    size = count * 2 * SHAPE[0] * SHAPE[1] / 1e9
    medians = {
        arm: statistics.median(seconds for seconds, _ in rows) for arm, rows in found.items()
    }
    for arm, rows in found.items():
        peer = medians[arm.split()[0] + " safetensors"]
        print(
            f"{arm:18} {medians[arm]:7.2f} s  {size / medians[arm]:6.2f} GB/s  "
            f"peak {max(peak for _, peak in rows):5.2f} GB  {peer / medians[arm]:5.2f} x the library's speed"
        )
    (args.work_dir / "model.safetensors").unlink()
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
