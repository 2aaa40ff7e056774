"""Speed, memory and opening time of tools/preprocess_mix.py, against its peers, on one core.

    python benchmarks/preprocess.py --input corpus/ --tokenizer tokenizer.model --output result.json

Every contender gets the same bytes on the same core, twice: a small file and a large one. Its speed is
computed from the difference, which excludes imports, startup and warm-up; the times of the whole command on
the small file include them. Speeds are megabytes of text per second of processor time of the whole process
tree, so that other work on the machine does not matter; wall-clock time is reported too. Documents are
compared token by token. Contenders:

ours            tools/preprocess_mix.py with every document kept (so nothing is skipped), mixed and hashed
ours_mixture    the same with its defaults: short documents are dropped with a probability of 0.9
megatron_core   the calls of Megatron-LM's preprocess_data.py through megatron-core, without its pool
megatron        that script itself, of --megatron-dir, with one worker
megatron_fast   its preprocess_data_fast.py (gigatoken, the whole file in memory), if --megatron-dir has one
datatrove       JsonlReader and MegatronDocumentTokenizer
engine          only the fast tokenizer engine, on texts in memory
engine_batch    only gigatoken, through its `encode_batch` instead of text by text
reference       only SentencePiece or Hugging Face tokenizers, on texts in memory
"""

import argparse
import json
import os
import platform
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, as the tools are

from benchmarks.preprocess_peers import write_hf_folder  # noqa: E402
from benchmarks.process_cost import Cost, python, remove_folder, run_on_core  # noqa: E402
from megatron_long.cli import run_tool  # noqa: E402
from megatron_long.dataset.indexed import IndexedDatasetReader  # noqa: E402
from megatron_long.errors import ConfigError, DataError  # noqa: E402
from megatron_long.files import atomic_path, refuse_overwrite  # noqa: E402

MEGABYTE = 1_000_000
PACKAGES = ("gigatoken", "tuetoken", "sentencepiece", "tokenizers", "megatron-core", "datatrove")
SWAPPED = b"bfgkpvwyjqxz"
"""Letters that are not frequent."""
CONTENDERS = (
    "ours",
    "ours_mixture",
    "megatron_core",
    "datatrove",
    "engine",
    "engine_batch",
    "reference",
)
EXACT = (
    "ours",
    "megatron_core",
    "megatron",
    "megatron_fast",
    "datatrove",
    "engine",
    "engine_batch",
)
"""Contenders whose documents are compared with the reference's."""


@dataclass(frozen=True)
class Slice:
    """A part of the corpus as one file."""

    path: Path
    text_bytes: int
    num_documents: int


@dataclass(frozen=True)
class Setup:
    """Settings of all runs."""

    tokenizer: Path
    megatron_dir: Path | None
    core: int
    work: Path
    marks: dict[str, Any]
    """BOS and EOD of the tokenizer, and the tokens of each slice."""


def main() -> None:
    args = _parse_args()
    if args.output:
        refuse_overwrite(args.output, force=args.force)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    setup = Setup(args.tokenizer, args.megatron_dir, args.core, args.work_dir, {})
    result: dict[str, Any] = {"machine": describe_machine()}
    small = args.small_megabytes * MEGABYTE or args.megabytes * MEGABYTE // 10
    sizes = [small, args.megabytes * MEGABYTE]
    if args.contenders:
        slices = make_slices(args.input, sizes, setup.work)
        result |= compare(slices, args.contenders, setup, args.rounds)
        print_speeds(result)
    if args.rss_megabytes:
        slices = make_slices(
            args.input, [size * MEGABYTE for size in args.rss_megabytes], setup.work
        )
        result["memory"] = measure_memory(slices, setup)
    if args.open_tokens:
        result["opening"] = measure_opening(args.open_tokens, setup)
    if args.output:
        with atomic_path(args.output) as path:
            path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        print(f"written: {args.output}")


def make_slices(corpus: Sequence[Path], sizes: Sequence[int], work: Path) -> list[Slice]:
    """Write files of about `sizes` bytes of text, of all files of the corpus in a fixed random order.

    A corpus that is too small is read again, with new words (`changed`). A small slice is the beginning of a
    large one.
    """
    files = [file for path in corpus for file in (sorted(path.glob("*.jsonl")) or [path])]
    lines = [line for file in files for line in file.read_bytes().splitlines() if line.strip()]
    random.Random(0).shuffle(lines)
    texts = [len(orjson.loads(line)["text"].encode()) for line in lines]
    made = []
    for size in sizes:
        folder = work / f"input_{size // 1000}k"
        folder.mkdir(exist_ok=True)
        text_bytes = count = 0
        with open(folder / "corpus.jsonl", "wb") as file:
            while text_bytes < size:
                file.write(changed(lines[count % len(lines)], count // len(lines)) + b"\n")
                text_bytes += texts[count % len(lines)]
                count += 1
        made.append(Slice(folder / "corpus.jsonl", text_bytes, count))
    return made


def changed(line: bytes, turn: int) -> bytes:
    """Return a line of the corpus with the letters of SWAPPED in its text rotated by `turn`.

    So words that contain them, a third of all that differ, are new, as in a corpus that is not repeated.
    """
    if not turn:
        return line
    turn %= len(SWAPPED)
    record = orjson.loads(line)
    table = bytes.maketrans(SWAPPED, SWAPPED[turn:] + SWAPPED[:turn])
    record["text"] = record["text"].encode().translate(table).decode()
    return orjson.dumps(record)


def compare(
    slices: Sequence[Slice], contenders: Sequence[str], setup: Setup, rounds: int
) -> dict[str, Any]:
    """Run the contenders in turn, `rounds` times, and return speeds and ratios."""
    small, large = slices
    for part in slices:
        output = setup.work / f"reference_{part.num_documents}"
        told = json.loads(run_contender("reference", part, setup, output).output)
        setup.marks.update(bos_id=told["bos_id"], eod_id=told["eod_id"])
        digests = document_digests(output / "out", setup)
        setup.marks[part.path.as_posix()] = digests
        setup.marks[f"tokens {part.path.as_posix()}"] = IndexedDatasetReader(
            output / "out"
        ).num_tokens + (0 if told["bos_id"] is None else len(digests))
        remove_folder(output)
    runs: dict[str, list[list[Cost]]] = {name: [] for name in contenders}
    different: dict[str, int] = {}
    for turn in range(rounds):
        for name in contenders:
            costs = []
            for part in slices:
                cost, different[name] = checked_run(name, part, setup, setup.work / name)
                costs.append(cost)
            runs[name].append(costs)
            seconds = " and ".join(f"{cost.cpu_s:.2f}" for cost in costs)
            print(f"round {turn + 1} of {rounds}: {name} {seconds} s", file=sys.stderr)
    table = {
        name: speed(of_name, small.text_bytes, large.text_bytes)
        | {"documents_different": different[name]}
        for name, of_name in runs.items()
    }
    return {
        "text_bytes": large.text_bytes,
        "documents": large.num_documents,
        "tokens": setup.marks[f"tokens {large.path.as_posix()}"],
        "speeds": table,
        "cpu_s_of_rounds": {
            name: [[cost.cpu_s for cost in costs] for costs in of_name]
            for name, of_name in runs.items()
        },
        "ratios": _ratios(table),
    }


def checked_run(name: str, part: Slice, setup: Setup, output: Path) -> tuple[Cost, int]:
    """Run a contender; return its cost, and how many documents differ from the reference's.

    Raises: DataError: ours differs.
    """
    cost, num_different = run_contender(name, part, setup, output), 0
    if name in EXACT:
        prefix = output / ("train" if name == "ours" else "out")
        expected = setup.marks[part.path.as_posix()]
        found = document_digests(prefix, setup, output)
        num_different = abs(len(found) - len(expected))
        num_different += sum(a != b for a, b in zip(found, expected, strict=False))
        if num_different and name == "ours":
            raise DataError(
                f"{num_different} of {len(expected)} documents of ours differ from the reference's; see "
                f"{output}"
            )
    remove_folder(output)
    return cost, num_different


def run_contender(name: str, part: Slice, setup: Setup, output: Path) -> Cost:
    """Run one contender on one file; engines report their own time."""
    remove_folder(output)
    log, env = setup.work / f"{name}.log", {"PYTHONPATH": str(ROOT)}
    words: list[str | Path] = ["--input", part.path, "--tokenizer", setup.tokenizer]
    words += ["--output", output]
    if name in ("ours", "ours_mixture"):
        tool = python(ROOT / "tools/preprocess_mix.py", *words, *_mixture_words(name, part, setup))
        return run_on_core(tool, setup.core, log, env)
    if name in ("megatron", "megatron_fast"):
        output.mkdir()
        command = {"megatron": _megatron_words, "megatron_fast": _megatron_fast_words}[name]
        cost = run_on_core(command(part, setup, output), setup.core, log, _path(setup))
        for suffix in ("bin", "idx"):
            (output / f"out_text_document.{suffix}").rename(output / f"out.{suffix}")
        return cost
    cost = run_on_core(
        python(ROOT / "benchmarks/preprocess_peers.py", name, *words), setup.core, log, env
    )
    if name in ("engine", "engine_batch", "reference"):
        told = json.loads(cost.output)
        return Cost(
            told["cpu_s"], told["cpu_s"], cost.peak_rss_bytes, cost.peak_private_bytes, cost.output
        )
    return cost


def document_digests(prefix: Path, setup: Setup, dataset: Path | None = None) -> list[str]:
    """Hash the tokens of every document, without BOS and EOD, in the order of the corpus."""
    reader, eod = IndexedDatasetReader(prefix), setup.marks["eod_id"]
    digests = []
    for index in range(len(reader)):
        tokens = reader.read(index).astype(np.int32)
        first = 1 if len(tokens) and tokens[0] == setup.marks["bos_id"] else 0
        last = len(tokens) - 1 if len(tokens) and tokens[-1] == eod else len(tokens)
        digests.append(xxhash.xxh3_128_hexdigest(np.ascontiguousarray(tokens[first:last]).data))
    rows = dataset / "documents.npy" if dataset else None
    if rows and rows.is_file():
        lines = np.load(rows)["line"]
        digests = [digests[i] for i in np.argsort(lines).tolist()]
    return digests


def measure_memory(slices: Sequence[Slice], setup: Setup) -> list[dict[str, float]]:
    """Return our peak memory for inputs of several sizes, with defaults, keeping every document."""
    measured = []
    for part in slices:
        told = run_contender("engine", part, setup, setup.work / "engine_memory")
        setup.marks.update({key: json.loads(told.output)[key] for key in ("bos_id", "eod_id")})
        reader = IndexedDatasetReader(setup.work / "engine_memory" / "out")
        tokens = reader.num_tokens + len(reader) * (setup.marks["bos_id"] is not None)
        setup.marks[f"tokens {part.path.as_posix()}"] = tokens
        cost = run_contender("ours", part, setup, setup.work / "ours_memory")
        measured.append(
            {
                "input_text_mb": part.text_bytes / MEGABYTE,
                "tokens": tokens,
                "peak_rss_mb": cost.peak_rss_bytes / MEGABYTE,
                "peak_private_mb": cost.peak_private_bytes / MEGABYTE,
                "cpu_s": cost.cpu_s,
                "wall_s": cost.wall_s,
            }
        )
        print(
            f"memory: {part.text_bytes / MEGABYTE:,.0f} MB of text: peak "
            f"{cost.peak_rss_bytes / MEGABYTE:,.0f} MB resident, "
            f"{cost.peak_private_bytes / MEGABYTE:,.0f} MB of it private; {cost.cpu_s:.1f} s processor time"
        )
        for name in ("engine_memory", "ours_memory"):
            remove_folder(setup.work / name)
    return measured


def measure_opening(num_tokens: int, setup: Setup) -> dict[str, float]:
    """Open a sparse dataset of `num_tokens` for training, in a fresh process."""
    words = python(ROOT / "benchmarks/open_dataset.py", "--tokens", str(num_tokens))
    log, env = setup.work / "opening.log", {"PYTHONPATH": str(ROOT)}
    cost = run_on_core([*words, "--work-dir", setup.work], setup.core, log, env)
    told = json.loads(cost.output.splitlines()[-1])
    print(
        f"opening {num_tokens:,} tokens in {told['documents']:,} documents: first "
        f"{told['first_ms']:.1f} ms, then {told['median_ms']:.1f} ms (median of {told['repeats']})"
    )
    return told


def print_speeds(result: dict[str, Any]) -> None:
    """Print the table of speeds and the ratios."""
    print(
        f"{result['text_bytes'] / MEGABYTE:,.0f} MB of text, {result['documents']:,} documents, "
        f"{result['tokens']:,} tokens; MB of text per second of one core"
    )
    heads = ("MB/s", "MB/s wall", "start s", "small s", "small wall", "peak MB", "other docs")
    print(f"{'contender':15}" + "".join(f"{head:>11}" for head in heads))
    for name, row in result["speeds"].items():
        names = (
            "cpu_mb_s",
            "wall_mb_s",
            "start_cpu_s",
            "small_cpu_s",
            "small_wall_s",
            "peak_rss_mb",
        )
        numbers = [row[column] for column in names]
        print(
            f"{name:15}"
            + "".join(f"{number:11.2f}" for number in numbers)
            + (f"{row['documents_different']:11.0f}" if name in EXACT else "")
        )
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.2f}")


def describe_machine() -> dict[str, Any]:
    """Return the software and machine of the figures."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except ImportError:
            continue


def _mixture_words(name: str, part: Slice, setup: Setup) -> list[str]:
    tokens = setup.marks[f"tokens {part.path.as_posix()}"]
    common = ["--source-shares", "natural", "--workers", "1"]
    if name == "ours":
        every = ["--strategy", "original", "--valid-tokens-per-source", "0"]
        return [*common, *every, "--train-tokens", str(tokens)]
    # A budget that every source can fill: what the mixture leaves is unknown beforehand.
    return [*common, "--train-tokens", str(tokens // 10), "--allow-repeat", "100"]


def _megatron_words(part: Slice, setup: Setup, output: Path) -> list[str | Path]:
    """Return the command of preprocess_data.py."""
    words: list[str | Path] = ["--append-eod", "--workers", "1"]
    words += ["--input", part.path, "--output-prefix", output / "out"]
    if setup.tokenizer.suffix == ".json":
        folder = setup.work / "hf_tokenizer"
        write_hf_folder(setup.tokenizer, folder)
        words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]
        words.append("--tokenizer-hf-no-include-special-tokens")
    else:
        words += [
            "--tokenizer-type",
            "SentencePieceTokenizer",
            "--tokenizer-model",
            setup.tokenizer,
        ]
    return [*_megatron_script("preprocess_data.py", setup), *words]


def _megatron_fast_words(part: Slice, setup: Setup, output: Path) -> list[str | Path]:
    """Return the command of preprocess_data_fast.py, which needs a Hugging Face folder."""
    folder = setup.work / "hf_tokenizer"
    write_hf_folder(setup.tokenizer, folder)
    words: list[str | Path] = ["--tokenizer-model", folder, "--append-eod", "--use-gigatoken"]
    words += ["--tokenizer-hf-no-include-special-tokens"]
    words += ["--input", part.path, "--output-prefix", output / "out"]
    script = _megatron_script("preprocess_data_fast.py", setup)
    return [*script, "--tokenizer-type", "HuggingFaceTokenizer", *words]


def _megatron_script(name: str, setup: Setup) -> list[str | Path]:
    if setup.megatron_dir is None:
        raise ConfigError(f"{name} needs --megatron-dir, a checkout of Megatron-LM")
    return python(setup.megatron_dir / "tools" / name)


def _path(setup: Setup) -> dict[str, str]:
    return {"PYTHONPATH": str(setup.megatron_dir), "CUDA_VISIBLE_DEVICES": ""}


def speed(runs: Sequence[Sequence[Cost]], small_bytes: int, large_bytes: int) -> dict[str, float]:
    """Return the speed over the additional bytes of the second file.

    The minimum time of all rounds is used for each: other work on the machine only adds time.
    """
    cpu_s = [min(costs[size].cpu_s for costs in runs) for size in (0, 1)]
    wall_s = [min(costs[size].wall_s for costs in runs) for size in (0, 1)]
    more_mb = (large_bytes - small_bytes) / MEGABYTE
    mb_s = more_mb / max(cpu_s[1] - cpu_s[0], 1e-9)
    return {
        "small_cpu_s": cpu_s[0],
        "small_wall_s": wall_s[0],
        "cpu_mb_s": mb_s,
        "wall_mb_s": more_mb / max(wall_s[1] - wall_s[0], 1e-9),
        "start_cpu_s": cpu_s[0] - small_bytes / MEGABYTE / mb_s,
        "peak_rss_mb": min(costs[1].peak_rss_bytes for costs in runs) / MEGABYTE,
    }


def _ratios(table: dict[str, dict[str, float]]) -> dict[str, float]:
    if "ours" not in table:
        return {}
    ours, ratios = table["ours"], {}
    for name, row in table.items():
        if name != "ours":
            ratios[f"ours / {name}"] = ours["cpu_mb_s"] / row["cpu_mb_s"]
            for kind, words in (("cpu", "processor time"), ("wall", "wall-clock time")):
                ratio = row[f"small_{kind}_s"] / ours[f"small_{kind}_s"]
                ratios[f"ours / {name}, small file with start, {words}"] = ratio
    return ratios


def _contenders(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in (*CONTENDERS, "megatron", "megatron_fast"):
            raise argparse.ArgumentTypeError(
                f"{name!r}: choose from {', '.join(CONTENDERS)}, megatron"
            )
    return names


def _tokens(text: str) -> int:
    from megatron_long.mixture.shares import parse_token_count

    return parse_token_count(text, "--open-tokens")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, help=".jsonl files, or folders of them")
    add("--tokenizer", type=Path, required=True, help="*.model, or tokenizer.json")
    add("--output", type=Path, metavar="FILE.json", help="file for all figures")
    add(
        "--contenders", type=_contenders, default=None, metavar="A,B", help="default: all; '': none"
    )
    add("--megatron-dir", type=Path, help="checkout of Megatron-LM with the script to run")
    add("--megabytes", type=int, default=100, help="text of the large file; default: %(default)s")
    small = "text of the small file; default: a tenth of the large one"
    add("--small-megabytes", type=int, default=0, help=small)
    add("--rounds", type=int, default=3, help="runs of each contender; default: %(default)s")
    add("--core", type=int, default=max(os.sched_getaffinity(0)), help="default: the last one")
    rss = "input sizes at which our memory is measured, such as 100 1000"
    add("--rss-megabytes", type=int, nargs="*", default=[], help=rss)
    add("--open-tokens", type=_tokens, default=0, help="tokens of the sparse dataset, such as 5B")
    add("--work-dir", type=Path, default=ROOT / "runs/benchmark", help="default: %(default)s")
    add("--force", action="store_true", help="replace --output if it exists")
    args = parser.parse_args()
    if args.contenders is None:
        args.contenders = list(CONTENDERS)
        if args.megatron_dir:
            args.contenders.insert(3, "megatron")
            if (args.megatron_dir / "tools/preprocess_data_fast.py").is_file():
                args.contenders.insert(4, "megatron_fast")
    return args


if __name__ == "__main__":
    sys.exit(run_tool(main))
