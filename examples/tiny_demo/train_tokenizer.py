"""Train the demo's tokenizer: a small SentencePiece BPE model of the kind Llama 1 and 2 use.

python -m examples.tiny_demo.train_tokenizer --corpus DIR --output DIR/tokenizer.model
"""

import argparse
import hashlib
import heapq
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_long.cli import run_tool
from megatron_long.errors import DataError
from megatron_long.files import atomic_path, refuse_overwrite

PIECE_CHARS = 2_000
"""Documents are sampled in pieces of this length, so that no long book fills the sample."""


def corpus_files(corpus: Path) -> list[Path]:
    """List the jsonl files of a corpus folder.

    Raises: DataError: there are none.
    """
    files = sorted(corpus.glob("*.jsonl"))
    if not files:
        raise DataError(f"--corpus {corpus} holds no *.jsonl file; run build_corpus.py first")
    return files


def sample_text(file: Path, num_chars: int) -> Iterator[str]:
    """Draw pieces of one source's documents, always the same ones.

    The pieces with the smallest hashes are taken, which is a uniform sample in one pass.

    Args:
        file: A jsonl file with a "text" field.
        num_chars: Text to draw, in characters (about).
    """
    num_pieces = max(1, num_chars // PIECE_CHARS)
    chosen: list[tuple[int, str]] = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            for start in range(0, len(text), PIECE_CHARS):
                piece = text[start : start + PIECE_CHARS]
                digest = hashlib.blake2b(piece.encode(), digest_size=8).digest()
                entry = (-int.from_bytes(digest), piece)
                if len(chosen) < num_pieces:
                    heapq.heappush(chosen, entry)
                elif entry > chosen[0]:
                    heapq.heapreplace(chosen, entry)
    yield from (piece for _, piece in sorted(chosen))


def train(corpus: Path, output: Path, *, vocab_size: int, num_chars: int) -> None:
    """Train and write the SentencePiece model file.

    Raises: DataError: the corpus is empty.
    """
    import sentencepiece

    files = corpus_files(corpus)
    lines = (
        line
        for file in files
        for piece in sample_text(file, num_chars // len(files))
        for line in piece.split("\n")
        if line
    )
    with atomic_path(output) as path, path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            # As in Llama: digits one by one, unknown characters as bytes, white space kept.
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=16_384,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=2,
            minloglevel=2,
        )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a SentencePiece BPE tokenizer on a corpus.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of jsonl files")
    parser.add_argument("--output", type=Path, required=True, help="tokenizer.model to write")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces (default 4096)")
    parser.add_argument(
        "--num-chars", type=int, default=12_000_000, help="text to train on, in characters"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing --output")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    refuse_overwrite(args.output, force=args.force)
    train(args.corpus, args.output, vocab_size=args.vocab_size, num_chars=args.num_chars)
    print(f"  wrote {args.output} ({args.vocab_size} pieces)")


if __name__ == "__main__":
    sys.exit(run_tool(main))
