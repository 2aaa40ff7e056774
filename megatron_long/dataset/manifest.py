"""The manifest of a dataset: its content, its origin, and hashes to verify it.

It contains no local path and no time, so equal inputs and options give equal bytes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_long.errors import DataError
from megatron_long.hashing import FileInfo, hash_file
from megatron_long.tokenizer.tokenizer_types import Tokenizer

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
DOCUMENTS_FILE = "documents.npy"
TRAIN_PREFIX = "train"
TOKENIZER_FOLDER = "tokenizer"
LENGTH_STEPS = tuple(2**k for k in (12, 14, 15, 16, 17))
"""Lengths for which the share of tokens in documents at least as long is recorded: 4K to 128K."""


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that produced the tokens; `tokenizer/` has a copy of it."""

    kind: str
    vocab_size: int
    bos_id: int | None
    eod_id: int
    vocabulary_sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One pair of .bin and .idx, and the files next to it."""

    prefix: str
    """Path of the pair relative to the dataset folder, without suffix."""
    num_documents: int
    num_tokens: int
    files: dict[str, FileInfo]


@dataclass(frozen=True)
class SourceInfo:
    """One source, before (in the corpus) and after (in the training set)."""

    index: int
    """Its number in `documents.npy`."""
    share_asked: float
    share_got: float
    documents_in: int
    tokens_in: int
    documents_valid: int
    tokens_valid: int
    documents_kept: int
    tokens_kept: int
    long_share_before: float
    """Share of the source's tokens that are in long documents, in the corpus."""
    long_share_after: float
    tokens_by_length_before: list[int]
    """Tokens in documents of [2^k, 2^(k+1)) tokens at index k."""
    tokens_by_length_after: list[int]
    bytes_in: int = 0
    """Bytes of text."""
    documents_tokenized: int = 0
    """Documents that had to be tokenized; the others were dropped by hash and size."""
    tokens_tokenized: int = 0
    tokens_in_is_exact: bool = True
    """Whether every document was tokenized; if not, `tokens_in` and the "before" values are estimated from
    those that were, by size, and so is what was dropped; the errors below say how well."""
    documents_dropped: int = 0
    tokens_dropped: int = 0
    documents_repeated: int = 0
    """Training documents that are second or later uses."""
    tokens_repeated: int = 0
    passes: int = 0
    """Passes over the source, the last one counted whole."""
    short_keep_ratio: float = 1.0
    """Probability with which short documents were kept: given, or solved for the requested share."""
    token_share_from_length_before: dict[str, float] = field(default_factory=dict)
    """Share of tokens in documents of at least this many tokens."""
    token_share_from_length_after: dict[str, float] = field(default_factory=dict)
    tokens_in_error: int = 0
    """Bound of the error of `tokens_in` in 95 of 100 cases; 0 if it is exact. So are the next two."""
    share_in_error: float = 0.0
    """Of this source's share of the tokens of the corpus."""
    long_share_before_error: float = 0.0
    documents_plain: int = 0
    """Of the training documents, those as they are (`--short-share`), next to the length-upsampled ones."""
    tokens_plain: int = 0


@dataclass(frozen=True)
class InputInfo:
    """One file of the corpus."""

    name: str
    size_bytes: int
    num_documents: int
    xxh3_128: str = ""
    num_bad: int = 0
    """Documents left out because they could not be read."""


@dataclass(frozen=True)
class OrderInfo:
    """How evenly the sources are spread over the file: shares in windows against shares of the whole."""

    window_tokens: int
    num_windows: int
    mean_deviation: float
    """Mean over windows and sources of the absolute difference of shares."""
    largest_deviation: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a dataset."""

    seed: int
    mixture: dict[str, Any]
    tokenizer: TokenizerInfo
    dtype: str
    train: SplitInfo
    valid: dict[str, SplitInfo]
    sources: dict[str, SourceInfo]
    inputs: list[InputInfo]
    format_version: int = FORMAT_VERSION
    order: OrderInfo | None = None
    documents_empty: int = 0
    """Texts without any token."""
    documents_bad: int = 0
    """Documents left out because they could not be read (`--on-bad-document skip`)."""
    bad_documents: list[dict[str, Any]] = field(default_factory=list)
    """`file`, `line` and `reason` of the first of them."""
    warnings: list[str] = field(default_factory=list)
    made_by: dict[str, str] = field(default_factory=dict)
    """Name and version of the engine that made the tokens; not part of the fingerprint, because every engine
    gives the same tokens."""
    tokenizer_files: dict[str, FileInfo] = field(default_factory=dict)
    """Of the copy in `tokenizer/`, by path relative to the dataset folder; not part of the fingerprint,
    because the vocabulary is. Empty in datasets of earlier versions."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything else; datasets with the same fingerprint have the same bytes."""
        return _fingerprint(_content(self))

    @property
    def source_names(self) -> list[str]:
        """Names of the sources by their number in `documents.npy`."""
        return sorted(self.sources, key=lambda name: self.sources[name].index)


def write_manifest(dataset_dir: Path, manifest: Manifest) -> None:
    """Write `manifest.json`."""
    content = _content(manifest) | {"fingerprint": manifest.fingerprint}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (dataset_dir / MANIFEST_FILE).write_text(text, encoding="utf-8")


def read_manifest(dataset_dir: Path) -> Manifest:
    """Read a manifest and check it, and the sizes of the files it names.

    Raises: DataError: no dataset there, a newer format, or a damaged manifest or file.
    """
    path = Path(dataset_dir) / MANIFEST_FILE
    if not path.is_file():
        raise DataError(
            f"{dataset_dir} is not a dataset: it has no {MANIFEST_FILE}; give the --output folder of "
            "tools/preprocess_mix.py"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version}; this program reads {FORMAT_VERSION}: make the "
                "dataset again"
            )
        fingerprint = content.pop("fingerprint")
        manifest = _from_json(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = (
            f"{type(error).__name__}: {error}"  # the `repr` of an error of UTF-8 is the whole file
        )
        raise DataError(f"{path} is damaged ({reason}); make the dataset again") from None
    if manifest.fingerprint != fingerprint:
        raise DataError(f"{path} was changed after it was written (its fingerprint does not match)")
    for name, info in dataset_files(manifest).items():
        file = Path(dataset_dir) / name
        size_bytes = file.stat().st_size if file.is_file() else None
        if size_bytes != info.size_bytes:
            state = "is missing" if size_bytes is None else f"has {size_bytes:,} bytes"
            raise DataError(
                f"{file} {state}, its manifest says {info.size_bytes:,} bytes; copy or make the "
                "dataset again"
            )
    return manifest


def verify_files(dataset_dir: Path, manifest: Manifest, *, held_out_only: bool = False) -> None:
    """Read every file of the dataset and compare its hash with the manifest.

    Args:
        held_out_only: Read only the held-out documents, which an evaluation needs.
    Raises: DataError: a file has changed since it was written.
    """
    held_out = {
        name: info for split in manifest.valid.values() for name, info in split.files.items()
    }
    for name, info in (held_out if held_out_only else dataset_files(manifest)).items():
        if hash_file(dataset_dir / name).xxh3_128 != info.xxh3_128:
            raise DataError(
                f"{dataset_dir / name} is damaged: its hash differs from the manifest's; copy or make the "
                "dataset again"
            )


def dataset_files(manifest: Manifest) -> dict[str, FileInfo]:
    """Return the files of all splits, and the tokenizer's, by their path relative to the dataset folder."""
    splits = [manifest.train, *manifest.valid.values()]
    files = {name: info for split in splits for name, info in split.files.items()}
    return files | manifest.tokenizer_files


def hash_tokenizer_files(dataset_dir: Path) -> dict[str, FileInfo]:
    """Return the manifest's record of the tokenizer's copy in a dataset folder."""
    paths = sorted((dataset_dir / TOKENIZER_FOLDER).iterdir())
    return {f"{TOKENIZER_FOLDER}/{path.name}": hash_file(path) for path in paths}


def share_at_least(tokens_by_length: Sequence[int], length_tokens: int) -> float:
    """Return the share of tokens in documents of at least so many tokens, a power of two.

    >>> share_at_least([0, 10, 30], 4)
    0.75
    """
    total = sum(tokens_by_length)
    return sum(tokens_by_length[length_tokens.bit_length() - 1 :]) / total if total else 0.0


def documents_path(prefix: Path) -> Path:
    """Return the file that records the origin of the documents of a held-out split."""
    return prefix.with_name(prefix.name + ".documents.npy")


def tokenizer_info(tokenizer: Tokenizer) -> TokenizerInfo:
    """Return the manifest's record of a tokenizer."""
    names = [field.name for field in dataclasses.fields(TokenizerInfo)]
    return TokenizerInfo(**{name: getattr(tokenizer, name) for name in names})


def _content(item: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, nested; a field that was added later is omitted at its default,
    so that older manifests keep their fingerprint."""
    content = {}
    for entry in dataclasses.fields(item):
        value = getattr(item, entry.name)
        factory = entry.default_factory
        default = entry.default if factory is dataclasses.MISSING else factory()
        if value != default or entry.name == "format_version":
            content[entry.name] = _plain(value)
    return content


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _content(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _fingerprint(content: dict[str, Any]) -> str:
    apart = ("made_by", "tokenizer_files")
    content = {name: value for name, value in content.items() if name not in apart}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _from_json(content: dict[str, Any]) -> Manifest:
    parts: dict[str, Any] = dict(content)
    parts["tokenizer"] = TokenizerInfo(**content["tokenizer"])
    infos = content.get("tokenizer_files", {})
    parts["tokenizer_files"] = {name: FileInfo(**item) for name, item in infos.items()}
    parts["train"] = _split_from_json(content["train"])
    parts["valid"] = {name: _split_from_json(item) for name, item in content["valid"].items()}
    parts["sources"] = {name: SourceInfo(**item) for name, item in content["sources"].items()}
    if content.get("order") is not None:
        parts["order"] = OrderInfo(**content["order"])
    parts["inputs"] = [InputInfo(**item) for item in content["inputs"]]
    return Manifest(**parts)


def _split_from_json(content: dict[str, Any]) -> SplitInfo:
    files = {name: FileInfo(**item) for name, item in content["files"].items()}
    return SplitInfo(**(content | {"files": files}))
