"""Text to token ids with the model's own tokenizer: SentencePiece, tiktoken or a Hugging Face tokenizer.json.

They give no special tokens of their own, and a literal `<s>` inside a text stays text; the caller adds
BOS and EOD. `vocabulary_sha256` lets tools check that a dataset and a model speak the same vocabulary.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_long.errors import ConfigError, DataError

Tokens = NDArray[np.int32]
Lengths = NDArray[np.int64]
TokensAndLengths = tuple[Tokens, Lengths]

AUTO, REFERENCE = "auto", "reference"

SENTENCEPIECE_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE_FILE,
)
KNOWN_EOD = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")
ADD_EOS_REMEDY = 'put a tokenizer_config.json with "eos_token" beside it'


class Tokenizer(Protocol):
    """What the data path and the evaluations need of a tokenizer."""

    kind: str
    vocab_size: int
    bos_id: int | None
    """Id put before every document, or None when the model's tokenizer puts none."""
    eod_id: int
    vocabulary_sha256: str
    engine_name: str
    """The package that makes the ids; every engine gives the same ids."""
    engine_version: str
    engine_notes: tuple[str, ...]
    """Why faster engines were passed over, one sentence each."""

    def encode(self, text: str) -> Tokens:
        """Give the ids of `text`, without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Give the ids of each text, without special tokens."""

    def encode_flat(self, texts: Sequence[str]) -> TokensAndLengths:
        """Give the ids of all texts one after another, and how many each text has."""

    def encode_prompt(self, text: str) -> Tokens:
        """Give the ids of a prompt: special tokens are what `transformers` makes of them.

        Where the folder has no chat template, they are text as everywhere else.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Give the text of `ids`."""


class ReferenceTokenizer(Tokenizer, Protocol):
    """A tokenizer whose ids are right by definition, and what a fast engine needs to copy it."""

    def to_json(self) -> str:
        """Give the vocabulary as the text of a `tokenizer.json`.

        Raises: NotConvertible: it cannot be said so.
        """

    def special_texts(self) -> list[str]:
        """Give the special tokens and user-defined pieces as they are written in text."""


def join_ids(batch: Sequence[Sequence[int]]) -> TokensAndLengths:
    """Lay lists of ids one after another.

    >>> tokens, lengths = join_ids([[5, 6], [], [7]])
    >>> tokens.tolist(), lengths.tolist()
    ([5, 6, 7], [2, 0, 1])
    """
    lengths = np.fromiter(map(len, batch), np.int64, len(batch))
    tokens = np.fromiter(chain.from_iterable(batch), np.int32, int(lengths.sum()))
    return tokens, lengths


def split_flat(tokens: Tokens, lengths: Lengths) -> list[Tokens]:
    """Cut ids laid one after another into one array a text, each a view.

    >>> [part.tolist() for part in split_flat(np.array([5, 6, 7], np.int32), np.array([2, 0, 1]))]
    [[5, 6], [], [7]]
    """
    ends = np.cumsum(lengths).tolist()
    return [tokens[end - size : end] for end, size in zip(ends, lengths.tolist(), strict=True)]


def encode_prompt(tokenizer: Tokenizer, file: Path, text: str) -> Tokens:
    """Give the ids of a prompt; see `Tokenizer.encode_prompt`.

    Raises: ConfigError: special tokens are asked for, and nothing can encode them.
    """
    from megatron_long.data.prompt_tokens import encode_as_model

    ids = encode_as_model(file, text)
    return tokenizer.encode(text) if ids is None else np.array(ids, np.int32)


class SentencePieceTokenizer:
    """A SentencePiece `.model` file; BOS is added when the model defines one (Llama's convention)."""

    kind = "sentencepiece"
    engine_name = "sentencepiece"
    engine_version = version("sentencepiece")
    engine_notes: tuple[str, ...] = ()

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
        # One thread: parallelism is over processes, and more threads would fight for the cores.
        return join_ids(self._processor.encode(list(texts), out_type=int, num_threads=1))

    def encode_prompt(self, text: str) -> Tokens:
        return encode_prompt(self, self._path, text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(index) for index in ids])

    def to_json(self) -> str:
        from megatron_long.data.sentencepiece_json import sentencepiece_to_json

        return sentencepiece_to_json(self._processor.serialized_model_proto())

    def special_texts(self) -> list[str]:
        pieces = map(self._processor.id_to_piece, range(self.vocab_size))
        # The API does not tell user-defined pieces from others; all that look so are tried.
        return [piece for piece in pieces if piece[:1] in "<[" and piece[-1:] in ">]"][:2000]


class HFTokenizer:
    """A `tokenizer.json`; BOS as its post-processor or `add_bos_token` of its configuration says."""

    kind = "hf"
    engine_name = "tokenizers"
    engine_version = version("tokenizers")
    engine_notes: tuple[str, ...] = ()

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
        # After the look at the post-processor: "<s>" inside a document must stay text.
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
            f"--tokenizer {path} does not tell its end-of-document token "
            f"(looked for {asked or ', '.join(KNOWN_EOD)}): {ADD_EOS_REMEDY}"
        )


def load_tokenizer(path: Path, engine: str = "auto") -> Tokenizer:
    """Load a tokenizer from a SentencePiece or tiktoken `*.model`, a `tokenizer.json`, or their folder.

    In a folder with both, `tokenizer.model` is taken: it is the reference the other was made from.

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
    from megatron_long.data.engines import open_engine

    return open_engine(reference, engine)


def open_reference(file: Path) -> ReferenceTokenizer:
    """Open a tokenizer file with the package that it belongs to."""
    from megatron_long.data.tiktoken_model import TiktokenTokenizer, is_tiktoken

    if file.suffix == ".json":
        return HFTokenizer(file)
    if is_tiktoken(file.read_bytes()):
        return TiktokenTokenizer(file)
    return SentencePieceTokenizer(file)


def tokenizer_file(path: Path) -> Path:
    """Find the tokenizer file that `path` (a file or a folder) stands for.

    Raises: ConfigError: there is none.
    """
    candidates = [path / SENTENCEPIECE_FILE, path / HF_FILE] if path.is_dir() else [path]
    for file in candidates:
        # Mistral's are called tokenizer.model.v1, tokenizer.model.v3.
        if file.is_file() and (file.suffix == ".json" or ".model" in file.suffixes):
            return file
    raise ConfigError(
        f"--tokenizer {path}: no tokenizer there; give a *.model file, a {HF_FILE}, or a "
        f"folder with {SENTENCEPIECE_FILE} or {HF_FILE}"
    )


def copy_tokenizer(path: Path, folder: Path) -> None:
    """Copy the tokenizer that `path` stands for into `folder`, so that `load_tokenizer(folder)` works."""
    file = tokenizer_file(path)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / (HF_FILE if file.suffix == ".json" else SENTENCEPIECE_FILE))
    # Of a folder both forms travel: transformers reads in the JSON what a SentencePiece model does not say.
    both = (SENTENCEPIECE_FILE, HF_FILE) if path.is_dir() else ()
    for name in (*CONFIG_FILES, *both):
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, folder / name)


def hash_vocabulary(pieces: Iterable[str]) -> str:
    """Hash the pieces of a vocabulary in the order of their ids.

    >>> hash_vocabulary(["a", "b"]) == hash_vocabulary(["ab", ""])
    False
    """
    digest = hashlib.sha256()
    for piece in pieces:
        encoded = piece.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.hexdigest()


def has_chat_template(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a tokenizer's folder has a chat template, in a file of its own or in its configuration."""
    return (folder / CHAT_TEMPLATE_FILE).is_file() or bool(config.get("chat_template"))


def read_config(folder: Path) -> dict[str, Any]:
    """Give the settings in a tokenizer's folder, of all files that hold some."""
    merged: dict[str, Any] = {}
    for name in reversed(CONFIG_FILES):
        if name != CHAT_TEMPLATE_FILE and (folder / name).is_file():
            try:
                merged.update(json.loads((folder / name).read_text("utf-8")))
            except ValueError as error:
                raise DataError(f"{folder / name} is not JSON: {error}") from None
    return merged


def token_text(token: Any) -> str | None:
    """Give the text of a token as configurations write it: a string, or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token
