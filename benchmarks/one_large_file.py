"""Does one large file keep all workers busy, in flat memory? Made, read, measured and removed again.

    python benchmarks/one_large_file.py --input corpus/ --tokenizer tokenizer.json --gigabytes 20 \\
        --kinds jsonl zst zst-frames parquet --train-tokens 500M --output result.json

The file has the documents of the corpus, again and again with new words (`preprocess.changed`). While
tools/preprocess_mix.py reads it, every process is sampled: its processor time, its share of memory
(PSS), and whether it is at work: on a core, waiting for one or for the disk, but not for another process. So
the figures hold also next to other work on the machine.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, as the tools are

from benchmarks.preprocess import MEGABYTE, changed, describe_machine  # noqa: E402
from benchmarks.process_cost import python, remove_folder  # noqa: E402
from megatron_long.cli import run_tool  # noqa: E402
from megatron_long.errors import DataError  # noqa: E402
from megatron_long.files import atomic_path  # noqa: E402

SAMPLE_INTERVAL_S = 0.2
BLOCK_BYTES = 64 << 20
"""Text of a frame, or of a group of rows."""
STAGES = ("dataset", "parts", "plan", "tokens.0", "pieces")
"""Folders of the work folder, from the last stage that makes one; before the first, it starts."""


@dataclass
class Sampled:
    """Samples of one stage."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    at_work: list[int] = field(default_factory=list)
    """How many processes were at work."""
    pss_bytes: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """By process."""


def blocks(corpus: Path, text_bytes: int) -> Iterator[list[bytes]]:
    """Yield lines of BLOCK_BYTES or more, until they are `text_bytes`."""
    files = sorted(corpus.glob("*.jsonl"))
    lines = [line for file in files for line in file.read_bytes().splitlines()]
    random.Random(0).shuffle(lines)
    block, size, total = list[bytes](), 0, 0
    for turn in itertools.count():
        for line in lines:
            block.append(changed(line, turn) + b"\n")
            size += len(block[-1])
            if size >= BLOCK_BYTES:
                yield block
                total, block, size = total + size, [], 0
                if total >= text_bytes:
                    return


def write_lines(path: Path, made: Iterator[list[bytes]]) -> None:
    with open(path, "wb") as file:
        for block in made:
            file.writelines(block)


def write_zst(path: Path, made: Iterator[list[bytes]], *, frames: bool) -> None:
    import zstandard

    compressor = zstandard.ZstdCompressor(level=3)
    with open(path, "wb") as file:
        if frames:
            for block in made:
                file.write(compressor.compress(b"".join(block)))
            return
        with compressor.stream_writer(file) as writer:
            for block in made:
                writer.write(b"".join(block))


def write_parquet(path: Path, made: Iterator[list[bytes]]) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    schema = arrow.schema([("text", arrow.string()), ("source", arrow.string())])
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for block in made:
            records = map(orjson.loads, block)
            rows = [(r["text"], r["meta"]["redpajama_set_name"]) for r in records]
            table = arrow.Table.from_arrays(
                list(map(arrow.array, zip(*rows, strict=True))), schema=schema
            )
            writer.write_table(table, row_group_size=len(rows))


KINDS: dict[str, tuple[str, Callable[[Path, Iterator[list[bytes]]], None]]] = {
    "jsonl": (".jsonl", write_lines),
    "zst": (".jsonl.zst", lambda path, made: write_zst(path, made, frames=False)),
    "zst-frames": (".jsonl.zst", lambda path, made: write_zst(path, made, frames=True)),
    "parquet": (".parquet", write_parquet),
}


def watch(words: list[str | Path], work: Path, log: Path) -> dict[str, Sampled]:
    """Run the tool, and sample its processes by stage.

    Raises: DataError: it failed.
    """
    found: dict[str, Sampled] = defaultdict(Sampled)
    with open(log, "wb") as errors:
        process = subprocess.Popen(list(map(str, words)), stdout=errors, stderr=errors)
    root, before, last = psutil.Process(process.pid), dict[int, float](), time.monotonic()
    while process.poll() is None:
        time.sleep(SAMPLE_INTERVAL_S)
        stage = found[next((name for name in STAGES if (work / name).exists()), "start")]
        num_at_work = 0
        for one in _processes(root):
            try:
                times, status = one.cpu_times(), one.status()
                stage.pss_bytes[one.pid].append(one.memory_full_info().pss)
            except psutil.Error:
                continue  # it has ended
            stage.cpu_s += times.user + times.system - before.get(one.pid, 0.0)
            before[one.pid] = times.user + times.system
            num_at_work += status in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
        stage.at_work.append(num_at_work)
        stage.wall_s, last = stage.wall_s + time.monotonic() - last, time.monotonic()
    if process.returncode:
        raise DataError(f"{' '.join(map(str, words))} ended with {process.returncode}; see {log}")
    return dict(found)


def _processes(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def summary(found: dict[str, Sampled]) -> dict[str, dict[str, Any]]:
    """Return the figures of each stage: seconds, processes at work, and memory of the largest processes."""
    table = {}
    for name in ("start", *reversed(STAGES)):
        if name not in found:
            continue
        stage = found[name]
        processes = sorted(stage.pss_bytes.values(), key=max)[-2:]
        halves = [(of[: len(of) // 2] or of, of[len(of) // 2 :]) for of in processes]
        table[name] = {
            "wall_s": stage.wall_s,
            "cpu_s": stage.cpu_s,
            "cores": stage.cpu_s / max(stage.wall_s, 1e-9),
            "at_work": sum(stage.at_work) / max(len(stage.at_work), 1),
            "peak_pss_mb": [[max(half) / MEGABYTE for half in of] for of in halves],
        }
    return table


def print_summary(kind: str, size_bytes: int, table: dict[str, dict[str, Any]]) -> None:
    """Print a line for each stage."""
    print(f"{kind}: a file of {size_bytes / 1e9:.1f} GB")
    for name, row in table.items():
        memory = " and ".join(f"{a:.0f}, then {b:.0f}" for a, b in row["peak_pss_mb"])
        print(
            f"  {name:9}{row['wall_s']:7.0f} s, {row['cpu_s']:6.0f} CPU s, {row['cores']:.2f} cores, "
            f"{row['at_work']:.2f} processes at work; peak PSS of a process {memory} MB"
        )


def main() -> None:
    args = _parse_args()
    result: dict[str, Any] = {"machine": describe_machine(), "train_tokens": args.train_tokens}
    for kind in args.kinds:
        suffix, write = KINDS[kind]
        folder, output = args.work_dir / kind, args.work_dir / f"{kind}_out"
        remove_folder(output)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"corpus{suffix}"
        if not path.exists():
            with atomic_path(path) as temporary:
                write(temporary, blocks(args.input, int(args.gigabytes * 1e9)))
        words = python(ROOT / "tools/preprocess_mix.py", "--input", path, "--output", output)
        words += ["--tokenizer", args.tokenizer, "--train-tokens", args.train_tokens]
        words += ["--workers", str(args.workers), "--strategy", "original"]
        found = watch(words, Path(f"{output}.work"), args.work_dir / f"{kind}.log")
        result[kind] = summary(found) | {"size_bytes": path.stat().st_size}
        print_summary(kind, path.stat().st_size, summary(found))
        remove_folder(output)
        if not args.keep:
            remove_folder(folder)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--input", type=Path, required=True, help="folder of .jsonl files")
    add("--tokenizer", type=Path, required=True)
    add("--gigabytes", type=float, default=1, help="text of the file; default: %(default)s")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--train-tokens", default="100M")
    add("--workers", type=int, default=2)
    add("--output", type=Path, metavar="FILE.json", help="file for all figures")
    add("--work-dir", type=Path, default=ROOT / "runs/one_large_file")
    add("--keep", action="store_true", help="keep the files that were made, and use them if there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_tool(main))
