"""The data that a run trains on, recorded in each checkpoint and compared on resume.

A run's position in its data is a number of windows, which is valid only for the same dataset, cut into
windows of the same length.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_long.dataset.manifest import TOKENIZER_FOLDER, Manifest, dataset_files, verify_files
from megatron_long.differences import differences, format_differences
from megatron_long.errors import ConfigError, DataError

_NAMES = {
    "dataset_fingerprint": "fingerprint of the dataset",
    "vocabulary_sha256": "vocabulary of its tokenizer",
    "seq_length": "--seq-length",
    "eod_mask_loss": "--eod-mask-loss",
    "document_masking": "--document-masking",
    "train_tokens": "training tokens",
    "train_documents": "training documents",
    "seed": "seed of the mixture",
    "mixture": "mixture",
    "sources": "tokens by source",
    "inputs": "files of the corpus (hash)",
    "stock_data": "--data-path and similar flags",
}
_NOT_ALWAYS_KEPT = ("document_masking",)
"""Those of `_NAMES` that checkpoints of earlier versions lack: not compared."""


def describe_data(manifest: Manifest | None, args: Namespace) -> dict[str, Any]:
    """Return the values that determine the tokens of a window, as plain data.

    Args:
        manifest: Of `--dataset`; None for Megatron's own data flags.
    """
    facts: dict[str, Any] = {
        "seq_length": args.seq_length,
        "eod_mask_loss": args.eod_mask_loss,
        "document_masking": args.document_masking,
    }
    if manifest is None:
        stock = [args.data_path, args.train_data_path, args.data_args_path, args.split]
        return facts | {"stock_data": stock, "seed": args.seed}
    inputs = json.dumps([[item.name, item.xxh3_128] for item in manifest.inputs])
    facts |= {
        "dataset_fingerprint": manifest.fingerprint,
        "vocabulary_sha256": manifest.tokenizer.vocabulary_sha256,
        "train_tokens": manifest.train.num_tokens,
        "train_documents": manifest.train.num_documents,
        "seed": manifest.seed,
        "mixture": manifest.mixture,
        "sources": {name: info.tokens_kept for name, info in sorted(manifest.sources.items())},
        "inputs": hashlib.sha256(inputs.encode()).hexdigest()[:16],
    }
    return json.loads(json.dumps(facts))  # as JSON returns it


def check_same_data(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to resume with different data.

    Raises: ConfigError: names everything that differs, before and now.
    """
    compared = [name for name in _NAMES if name in before or name not in _NOT_ALWAYS_KEPT]
    found = [item._replace(name=_NAMES[item.name]) for item in differences(before, now, compared)]
    if not before or not found:
        return
    listed = format_differences(found, _short)
    raise ConfigError(
        f"{checkpoint} was trained on other data ({listed}); its position in them has no meaning here. "
        "Give the same --dataset and flags to resume, --finetune to start at step 0 from its weights, or "
        "--allow-dataset-change to resume at the same number of windows anyway"
    )


def check_same_optimizer(checkpoint: Path, args: Namespace) -> None:
    """Refuse optimizer state that Megatron cannot load: the distributed optimizer has its own format.

    Args:
        checkpoint: Its own folder, `iter_0000100`.
        args: Flags after Megatron's validation, which may change this one.
    Raises: ConfigError: names both. DataError: the checkpoint is damaged.
    """
    from megatron_long.checkpoint.torch_dist import read_common_state

    before = getattr(read_common_state(checkpoint).get("args"), "use_distributed_optimizer", None)
    now = bool(args.use_distributed_optimizer)
    if before in (None, now):
        return
    words = {True: "with", False: "without"}
    remedy = "drop the flag (on GPUs it is always set)" if now else "give the flag"
    raise ConfigError(
        f"{checkpoint} was saved {words[before]} --use-distributed-optimizer, and this run is {words[now]} "
        f"it: Megatron cannot load the optimizer state of the other kind; {remedy}, give --no-load-optim to "
        "resume at its step with a new optimizer, or --finetune to start at step 0 from its weights"
    )


def file_times(dataset: Path, manifest: Manifest) -> dict[str, list[int]]:
    """Return size and modification time of each file of a dataset."""
    stats = {name: (dataset / name).stat() for name in dataset_files(manifest)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def check_content(dataset: Path, manifest: Manifest, times_before: Any) -> None:
    """Read the dataset and compare hashes, unless its files have not changed since the last check.

    Args:
        times_before: `file_times` as the checkpoint has them; None at the start of a run.
    Raises: DataError: a file is not what its manifest says.
    """
    if file_times(dataset, manifest) != times_before:
        verify_files(dataset, manifest)
    if not manifest.tokenizer_files:  # of an earlier version, which hashes only the vocabulary
        from megatron_long.tokenizer.loading import load_tokenizer

        folder = dataset / TOKENIZER_FOLDER
        found = load_tokenizer(folder, "reference").vocabulary_sha256 if folder.exists() else None
        if found not in (None, manifest.tokenizer.vocabulary_sha256):
            raise DataError(f"{folder} is damaged: it is not the vocabulary of the manifest")


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else text[:77] + "..."
