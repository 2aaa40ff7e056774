"""Text to token ids with the model's own tokenizer: SentencePiece, tiktoken or a Hugging Face tokenizer.json.

They add no special tokens, and a literal `<s>` inside a text stays text; the caller adds
BOS and EOD. `vocabulary_sha256` lets tools check that a dataset and a model use the same vocabulary.
"""

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megatron_long.errors import ConfigError, DataError, UserError
from megatron_long.tokenizer.engines import open_engine
from megatron_long.tokenizer.prompt_tokens import encode_prompt
from megatron_long.tokenizer.tiktoken_model import TiktokenTokenizer, is_tiktoken
from megatron_long.tokenizer.tokenizer_files import (
    HF_FILE,
    SENTENCEPIECE_FILE,
    read_config,
    token_text,
    tokenizer_file,
)
from megatron_long.tokenizer.tokenizer_types import (
    REFERENCE,
    ReferenceTokenizer,
    Tokenizer,
    Tokens,
    TokensAndLengths,
    hash_vocabulary,
    join_ids,
    split_flat,
)

KNOWN_EOD = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")
ADD_EOS_REMEDY = 'put a tokenizer_config.json with "eos_token" next to it'


class SentencePieceTokenizer:
    """A SentencePiece `.model` file; BOS is added when the model defines one (Llama's convention)."""

    kind = "sentencepiece"
    engine_name = "sentencepiece"
    engine_version = version("sentencepiece")
    engine_notes: tuple[str, ...] = ()
    num_by_reference = 0

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._path = path
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError:
            raise DataError(
                f"--tokenizer {path} is neither a SentencePiece model nor a tiktoken file; if the model "
                f"has a {HF_FILE}, give that"
            ) from None
        processor, config = self._processor, read_config(path.parent)
        if processor.eos_id() < 0:
            raise DataError(f"--tokenizer {path} defines no EOS piece; train it with an eos_id")
        self.vocab_size: int = processor.vocab_size()
        self.eod_id: int = processor.eos_id()
        adds_bos = processor.bos_id() >= 0 and config.get("add_bos_token", True)
        self.bos_id: int | None = processor.bos_id() if adds_bos else None
        pieces = [processor.id_to_piece(index) for index in range(self.vocab_size)]
        self.vocabulary_sha256 = hash_vocabulary(pieces)

    def encode(self, text: str) -> Tokens:
        return np.array(self._processor.encode(text, out_type=int), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return split_flat(*self.encode_flat(texts))

    def encode_flat(self, texts: Sequence[str]) -> TokensAndLengths:
        # One thread: parallelism is over processes, and more threads would compete for the cores.
        return join_ids(self._processor.encode(list(texts), out_type=int, num_threads=1))

    def encode_prompt(self, text: str) -> Tokens:
        return encode_prompt(self, self._path, text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(index) for index in ids])

    def to_json(self) -> str:
        from megatron_long.tokenizer.sentencepiece_json import sentencepiece_to_json

        return sentencepiece_to_json(self._processor.serialized_model_proto())

    def control_ids(self) -> dict[str, int]:
        found = filter(self._processor.is_control, range(self.vocab_size))
        return {self._processor.id_to_piece(index): index for index in found}

    def special_texts(self) -> list[str]:
        pieces = map(self._processor.id_to_piece, range(self.vocab_size))
        # The API does not mark user-defined pieces; all that look like one are tried.
        return [piece for piece in pieces if piece[:1] in "<[" and piece[-1:] in ">]"][:2000]


class HFTokenizer:
    """A `tokenizer.json`; BOS as its post-processor or `add_bos_token` of its configuration says."""

    kind = "hf"
    engine_name = "tokenizers"
    engine_version = version("tokenizers")
    engine_notes: tuple[str, ...] = ()
    num_by_reference = 0

    def __init__(self, path: Path) -> None:
        import tokenizers

        self._path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise DataError(f"--tokenizer {path} cannot be loaded: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = read_config(path.parent)
        self.bos_id = self._find_bos(config)
        self.eod_id = self._find_eod(config, path)
        # After reading the post-processor: "<s>" inside a document must stay text.
        self._tokenizer.encode_special_tokens = True
        pieces = {index: piece for piece, index in self._tokenizer.get_vocab().items()}
        self.vocab_size = max(pieces) + 1
        self.vocabulary_sha256 = hash_vocabulary(
            pieces.get(index, "") for index in range(self.vocab_size)
        )

    def encode(self, text: str) -> Tokens:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return split_flat(*self.encode_flat(texts))

    def encode_flat(self, texts: Sequence[str]) -> TokensAndLengths:
        batch = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return join_ids([encoding.ids for encoding in batch])

    def encode_prompt(self, text: str) -> Tokens:
        return encode_prompt(self, self._path, text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(index) for index in ids])

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    def control_ids(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: index for index, token in added if token.special}

    def special_texts(self) -> list[str]:
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def _find_bos(self, config: dict[str, Any]) -> int | None:
        if config.get("add_bos_token") is False:
            return None
        bos = token_text(config.get("bos_token"))
        if config.get("add_bos_token") and bos is not None:
            return self._tokenizer.token_to_id(bos)
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        starts_with_special = len(full) > len(plain) and full[0] != plain[0]
        return full[0] if starts_with_special else None

    def _find_eod(self, config: dict[str, Any], path: Path) -> int:
        asked = token_text(config.get("eos_token"))
        for token in (asked,) if asked is not None else KNOWN_EOD:
            index = self._tokenizer.token_to_id(token)
            if index is not None:
                return index
        raise DataError(
            f"--tokenizer {path} does not define its end-of-document token "
            f"(looked for {asked or ', '.join(KNOWN_EOD)}): {ADD_EOS_REMEDY}"
        )


def load_tokenizer(path: Path, engine: str = "auto") -> Tokenizer:
    """Load a tokenizer from a SentencePiece or tiktoken `*.model`, a `tokenizer.json`, or their folder.

    In a folder with both, `tokenizer.model` is used: the other was made from it.

    Args:
        engine: What makes the ids: `auto` (the fastest package that gives the same ids), a name in
            `engines.ENGINES`, or `reference` (the package the file belongs to).
    Raises: ConfigError: nothing there, or an engine that cannot be used. DataError: the file is damaged
        or names no EOS token.
    """
    file = tokenizer_file(path)
    reference = open_reference(file)
    if engine == REFERENCE:
        return reference
    return open_engine(reference, engine)


def separate_documents(tokenizer: Tokenizer, path: Path, separator: str | None) -> None:
    """Make a special token end each document instead of EOD, and no BOS begin it; None changes nothing.

    Args:
        path: Of the tokenizer.
    Raises: ConfigError: it is no special token.
    """
    if separator is None:
        return
    known = open_reference(tokenizer_file(path)).control_ids()
    if separator not in known:
        raise ConfigError(
            f"--document-separator {separator} is no special token of --tokenizer {path}, which tells where "
            f"a document ends because no text gives it; give one of {', '.join([*known][:20])}"
        )
    tokenizer.bos_id, tokenizer.eod_id = None, known[separator]


def open_reference(file: Path) -> ReferenceTokenizer:
    """Open a tokenizer file with the package that it belongs to."""
    if file.suffix == ".json":
        return HFTokenizer(file)
    if is_tiktoken(file.read_bytes()):
        return TiktokenTokenizer(file)
    return SentencePieceTokenizer(file)


def check_tokenizer(folder: Path) -> list[str]:
    """Look at the tokenizer of a model folder before it is copied.

    Returns: Warnings, each of a file that holds a tokenizer of a kind that cannot be loaded here.
    Raises: DataError: a file is empty, or cannot be parsed.
    """
    warnings = []
    for name in (SENTENCEPIECE_FILE, HF_FILE):
        file = folder / name
        if not file.is_file():
            continue
        _check_content(file)
        read_config(folder)
        try:
            open_reference(file)
        except UserError as error:
            warnings.append(f"{file} cannot be loaded here: {error}")
    return warnings


def _check_content(file: Path) -> None:
    import sentencepiece

    content, remedy = file.read_bytes(), "download it again, or remove it from the folder"
    if not content:
        raise DataError(f"{file} is empty; {remedy}")
    if file.suffix == ".json":
        try:
            is_tokenizer = isinstance(json.loads(content), dict)
        except (ValueError, RecursionError):
            is_tokenizer = False
    else:
        try:
            sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(content)
            is_tokenizer = True
        except RuntimeError:
            is_tokenizer = is_tiktoken(content)
    if not is_tokenizer:
        what = "JSON object" if file.suffix == ".json" else "SentencePiece model or tiktoken file"
        raise DataError(f"{file} is not a {what} (it begins with {content[:40]!r}); {remedy}")
