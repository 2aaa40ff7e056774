"""A small corpus in three file formats, and a tokenizer built as Llama's is."""

import gzip
import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

SYLLABLES = [a + b for a in "bcdfglmnprst" for b in "aeiou"]
LABELS = ("RedPajamaBook", "RedPajamaC4", "RedPajamaGithub")


def make_text(generator: random.Random, num_words: int) -> str:
    return " ".join(
        "".join(generator.choices(SYLLABLES, k=generator.randint(1, 3))) for _ in range(num_words)
    )


def to_jsonl(records: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file under a folder, by its name there; of a report without the dataset's name."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    page = "report/index.html"
    return found | (
        {page: re.sub(rb"<(title|h1)>.*?</\1>", b"", found[page])} if page in found else {}
    )


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Iterable[Any]], Path]:
    """A function that writes records as .jsonl, .jsonl.gz or .jsonl.zst."""
    import zstandard

    def write(path: Path, records: Iterable[Any]) -> Path:
        compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(compress.get(path.suffix, bytes)(to_jsonl(records)))
        return path

    return write


@pytest.fixture(scope="session")
def records() -> list[dict[str, Any]]:
    """600 documents of three sources; every tenth is long, with texts that name their number."""
    generator = random.Random(1)
    rows = []
    for number in range(600):
        words = generator.randint(150, 400) if number % 10 == 0 else generator.randint(2, 60)
        text = f"{number} {make_text(generator, words)}"
        rows.append({"text": text, "meta": {"redpajama_set_name": LABELS[number % 7 % 3]}})
    return rows


@pytest.fixture(scope="session")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], write_jsonl: Callable
) -> Path:
    """A folder with the records in a plain, a gzip and a zstandard file."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", records[:250])
    write_jsonl(folder / "sub" / "b.jsonl.gz", records[250:400])
    write_jsonl(folder / "sub" / "c.jsonl.zst", records[400:])
    return folder


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]) -> Path:
    """A SentencePiece BPE model with byte fallback and no normalization, as Llama-2's."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(record["text"] for record in records),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"
