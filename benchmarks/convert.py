"""Converting a checkpoint against copying its bytes: time and memory of both directions.

    python benchmarks/convert.py --work-dir /scratch/convert --layers 32

Makes a Hugging Face folder of Llama-3-8B's shape with random BF16 weights (`--layers 32` is 16 GB; the disk
must hold three times that), then times, each from a cold page cache and to an fsynced end, a plain copy
(`cp`), the conversion to Megatron, a second copy, and the conversion back. Memory is what the process
itself holds (anonymous pages), sampled; the system can drop pages of mapped files. The work folder is
removed at the end.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_long.conversion.formats.hf_folder import PlannedTensor, plan_shards, write_weights
from megatron_long.conversion.options import MAX_SHARD_BYTES
from megatron_long.files import refuse_overwrite
from megatron_long.flags.recipe import LLAMA3_8B
from megatron_long.model.geometry import LlamaGeometry
from megatron_long.model.mapping import units_of

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One timed step."""

    step: str
    seconds: float
    gb_per_second: float
    peak_gb: float | None = None
    """Anonymous memory of the process; None for `cp`."""


def make_model(folder: Path, geometry: LlamaGeometry, max_shard_bytes: int) -> int:
    """Write random BF16 weights in shards, and the configuration.

    Returns: Bytes of the tensors.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**24, generator=generator).mul_(0.02).bfloat16()
    units = [
        [
            PlannedTensor(name=name, shape=shape, dtype=torch.bfloat16)
            for name, shape in zip(unit.hf_names, unit.rule.layout.hf_shapes(geometry), strict=True)
        ]
        for unit in units_of(geometry)
    ]
    sizes = [sum(tensor.size_bytes for tensor in unit) for unit in units]

    def tensors() -> Iterator[tuple[str, Any]]:
        for tensor in itertools.chain(*units):
            count = math.prod(tensor.shape)
            yield tensor.name, noise.repeat(-(-count // 2**24))[:count].reshape(tensor.shape)

    folder.mkdir(parents=True)
    shards = [
        [tensor for number in numbers for tensor in units[number]]
        for numbers in plan_shards(sizes, max_shard_bytes)
    ]
    write_weights(folder, shards, tensors())
    (folder / "config.json").write_text(json.dumps(geometry.to_hf_config()), encoding="utf-8")
    return sum(sizes)


def forget(folder: Path) -> None:
    """Drop a folder's pages from the cache, so that the next reader reads from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def sync(folder: Path) -> None:
    """Sync a folder's files to disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure(
    step: str, source: Path, size_bytes: int, work: Callable[[], float | None]
) -> Measurement:
    """Time a step that reads `source`, from a cold cache."""
    forget(source)
    start = time.monotonic()
    peak = work()
    seconds = time.monotonic() - start
    result = Measurement(
        step=step,
        seconds=round(seconds, 2),
        gb_per_second=round(size_bytes / seconds / 1e9, 3),
        peak_gb=peak,
    )
    print(json.dumps(asdict(result)), flush=True)
    return result


def copy(source: Path, target: Path) -> None:
    """Copy a folder with `cp`, to the disk, and remove the copy."""
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    sync(target)


def convert(command: str, source: Path, target: Path) -> float:
    """Run the tool; return the peak of its anonymous memory in GB."""
    words = [sys.executable, "tools/convert_checkpoint.py", command]
    words += ["--input", str(source), "--output", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        words, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    peak_kb = 0
    while process.poll() is None:
        peak_kb = max(peak_kb, _anonymous_kb(process.pid))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{command} failed with exit status {process.returncode}")
    return round(peak_kb * 1024 / 1e9, 3)


def _anonymous_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(values.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem"))


def run(work_dir: Path, layers: int, max_shard_bytes: int) -> dict[str, Any]:
    """Create the model and run all measurements."""
    source, copied = work_dir / "hf", work_dir / "copy"
    checkpoint, back = work_dir / "megatron", work_dir / "back"
    size_bytes = make_model(source, replace(LLAMA3_8B, num_layers=layers), max_shard_bytes)
    copies, conversions = [], []
    for command, start, end in (
        ("hf-to-megatron", source, checkpoint),
        ("megatron-to-hf", checkpoint, back),
    ):
        copies.append(measure("cp", start, size_bytes, partial(copy, start, copied)))
        shutil.rmtree(copied)
        conversions.append(
            measure(command, start, size_bytes, partial(convert, command, start, end))
        )
        shutil.rmtree(start)
    return {
        "size_gb": round(size_bytes / 1e9, 3),
        "max_shard_gb": max_shard_bytes / 1e9,
        "ratios": {
            done.step: round(done.seconds / copied.seconds, 2)
            for done, copied in zip(conversions, copies, strict=True)
        },
        "peaks_gb": {done.step: done.peak_gb for done in conversions},
    }


def main() -> None:
    """Measure, print, clean up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="scratch folder, removed after"
    )
    parser.add_argument("--layers", type=int, default=32, help="default: %(default)s (16 GB)")
    args = parser.parse_args()
    refuse_overwrite(args.work_dir, force=False, flag="--work-dir")
    try:
        print(json.dumps(run(args.work_dir, args.layers, MAX_SHARD_BYTES)))
    finally:
        shutil.rmtree(args.work_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
