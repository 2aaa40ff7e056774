"""What a run of preprocessing was asked: its options, and what follows from them for every file."""

import dataclasses
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_long.corpus.documents import SOURCE_FROM_FOLDER, RecordKeys
from megatron_long.corpus.inputs import InputFile, is_url
from megatron_long.corpus.listing import Listing, list_inputs
from megatron_long.dataset.indexed import token_dtype
from megatron_long.errors import ConfigError
from megatron_long.mixture.mixture import STRATEGIES, Mixture, Strategy, named_sources
from megatron_long.mixture.shares import (
    NATURAL,
    SLIMPAJAMA,
    parse_shares,
    parse_token_count,
    read_shares,
)
from megatron_long.preprocess.executors import ExecutorOptions
from megatron_long.preprocess.stages import TokenizeJob
from megatron_long.preprocess.survey import everything
from megatron_long.preprocess.tokenize_file import TokenizeOptions
from megatron_long.preprocess.workdir import hash_tokenizer
from megatron_long.tokenizer.length_bound import extra_tokens_bound
from megatron_long.tokenizer.tokenizer_types import Tokenizer

WORK_SUFFIX = ".work"
WORK_VERSION = 5
"""Changes with what lies in the work folder, and with what is chosen."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to read and how to mix it."""

    inputs: Sequence[Path | str]
    """Files, folders or URLs."""
    tokenizer: Path
    mixture: Mixture
    seed: int = 0
    keys: RecordKeys = field(default_factory=RecordKeys)
    workers: int = 1
    engine: str = "auto"
    on_bad_document: str = "stop"
    """`stop`, or `skip` to leave out documents that cannot be read and list them."""
    on_unread_file: str = "stop"
    """`stop`, or `skip` to leave out files that are likely to hold documents and cannot be read."""
    token_dtype: str = "auto"
    """`auto`, `uint16` or `int32`."""
    execution: ExecutorOptions | None = None
    """Where to run; None for `workers` processes here."""
    work_dir: Path | None = None
    """Folder for unfinished work; None for `OUTPUT.work`."""
    keep_work: bool = False
    document_separator: str | None = None
    """Special token that ends each document instead of EOD, without BOS."""
    force: bool = False
    """Throw away unfinished work of another command."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers} is too small; at least 1")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"--seed {self.seed} is not within 0 and 2^64 - 1")
        if self.on_bad_document not in ("stop", "skip"):
            raise ConfigError(f"--on-bad-document {self.on_bad_document}: choose stop or skip")
        if self.on_unread_file not in ("stop", "skip"):
            raise ConfigError(f"--on-unread-file {self.on_unread_file}: choose stop or skip")
        if self.token_dtype not in ("auto", "uint16", "int32"):
            raise ConfigError(f"--token-dtype {self.token_dtype}: choose auto, uint16 or int32")

    @property
    def executor(self) -> ExecutorOptions:
        """Where to run."""
        return self.execution or ExecutorOptions(workers=self.workers)

    def list_inputs(self) -> Listing:
        """List the files to read, and the others."""
        return list_inputs(self.inputs, skip_unread=self.on_unread_file == "skip")

    def command(self) -> dict[str, Any]:
        """Give what decides which bytes come out, for the work folder to compare."""
        separator = {"document_separator": self.document_separator}
        return (separator if self.document_separator else {}) | {
            "version": WORK_VERSION,
            "tokenizer": hash_tokenizer(self.tokenizer),
            "mixture": self.mixture.to_json(),
            "seed": self.seed,
            "keys": dataclasses.asdict(self.keys),
            "on_bad_document": self.on_bad_document,
            "token_dtype": self.token_dtype,
        }


def read_config(flags: Namespace) -> PreprocessConfig:
    """Give what the flags of `preprocess_mix.py` ask for.

    Raises: ConfigError: a flag has no such value, or flags exclude each other.
    """
    shares, missing = flags.source_shares, "error"
    if shares not in (NATURAL, SLIMPAJAMA):
        shares, missing = read_shares(Path(shares))
    if "" in flags.input:
        raise ConfigError("--input '' is empty; give files or folders")
    strategy, *named = flags.strategy
    _refuse_unused(flags, strategy)
    mixture = Mixture(
        train_tokens=parse_token_count(flags.train_tokens),
        strategy=strategy,
        short_keep_ratio=_read_ratio(flags),
        long_token_share=flags.long_token_share,
        long_threshold_tokens=flags.long_threshold,
        cut_length_tokens=flags.cut_length or Mixture.cut_length_tokens,
        upsampled_shares=parse_shares(named),
        source_shares=shares,
        missing_sources=flags.missing_sources or missing,
        valid_tokens_per_source=parse_token_count(
            flags.valid_tokens_per_source, "--valid-tokens-per-source"
        ),
        allow_repeat=flags.allow_repeat,
        short_share=flags.short_share,
    )
    return PreprocessConfig(
        inputs=flags.input,
        tokenizer=flags.tokenizer,
        mixture=mixture,
        seed=flags.seed,
        keys=_read_keys(flags),
        workers=flags.workers,
        engine=flags.engine,
        on_bad_document=flags.on_bad_document,
        on_unread_file=flags.on_unread_file,
        token_dtype=flags.token_dtype,
        execution=_read_execution(flags),
        work_dir=flags.work_dir,
        keep_work=flags.keep_work,
        document_separator=flags.document_separator,
        force=flags.force,
    )


def _read_ratio(flags: Namespace) -> float:
    if flags.short_keep_ratio is None:
        return Mixture.short_keep_ratio
    if flags.long_token_share is not None:
        raise ConfigError(
            "--short-keep-ratio and --long-token-share exclude each other: the second decides which ratio "
            "each source gets; give one"
        )
    return float(flags.short_keep_ratio)


def _refuse_unused(flags: Namespace, strategy: str) -> None:
    rules = STRATEGIES.get(strategy, Strategy(thins_short=True, cuts=True))  # a `Mixture` names it
    unused = (
        ("--cut-length", flags.cut_length, rules.cuts, "keeps documents whole; use cut"),
        (
            "--short-keep-ratio",
            flags.short_keep_ratio,
            rules.thins_short,
            "keeps every document; use per-source or global",
        ),
    )
    for flag, value, is_used, why in unused:
        if value is not None and not is_used:
            raise ConfigError(
                f"{flag} {value} has no effect with --strategy {strategy}, which {why}, or leave out {flag}"
            )
    if flags.missing_sources and flags.source_shares == NATURAL:
        raise ConfigError(
            f"--missing-sources {flags.missing_sources} has no effect with --source-shares {NATURAL}, which "
            "names no source; give shares, or leave it out"
        )


def _read_keys(flags: Namespace) -> RecordKeys:
    _check_keys(flags)
    if flags.source_from_folder and flags.source_key:
        raise ConfigError("--source-from-folder and --source-key exclude each other; give one")
    source = SOURCE_FROM_FOLDER if flags.source_from_folder else flags.source_key
    keys = RecordKeys(text=flags.text_key)
    return dataclasses.replace(keys, source=source) if source else keys


def _check_keys(flags: Namespace) -> None:
    for flag, key in (("--text-key", flags.text_key), ("--source-key", flags.source_key)):
        if key is not None and not all(key.split(".")):
            raise ConfigError(
                f"{flag} {key!r} has an empty part; write names of keys, with dots for nested objects: "
                "meta.source"
            )


def _read_execution(flags: Namespace) -> ExecutorOptions:
    return ExecutorOptions(
        executor=flags.executor,
        workers=flags.workers,
        tasks=flags.tasks,
        slurm_partition=flags.slurm_partition,
        slurm_time=flags.slurm_time,
        memory_gb=flags.task_memory_gb,
        slurm_args=dict(word.partition("=")[::2] for word in flags.slurm_args),
    )


def tokenize_options(config: PreprocessConfig, tokenizer: Tokenizer) -> TokenizeOptions:
    """Say what is the same for every file, before there are limits."""
    return TokenizeOptions(
        seed=config.seed,
        keys=config.keys,
        long_threshold_tokens=config.mixture.long_threshold_tokens,
        admission=everything(config.mixture.keep_short),
        dtype=choose_dtype(config.token_dtype, tokenizer.vocab_size),
        overhead=1 + (tokenizer.bos_id is not None),
        extra_tokens=extra_tokens_bound(config.tokenizer),
        skip_bad=config.on_bad_document == "skip",
        sources_allowed=named_sources(config.mixture),
    )


def tokenize_job(
    files: Sequence[InputFile], tokenizer: Path, engine: str, options: TokenizeOptions
) -> TokenizeJob:
    """Say what the tasks need to know; with absolute paths, for they may start in another folder."""
    found = [
        file if is_url(file.path) else dataclasses.replace(file, path=os.path.abspath(file.path))
        for file in files
    ]
    return TokenizeJob(found, tokenizer.absolute(), engine, options)


def choose_dtype(name: str, vocab_size: int) -> np.dtype:
    """Give the type of the tokens in the dataset.

    Raises: ConfigError: the one asked for is too small.
    """
    needed = token_dtype(vocab_size)
    if name == "auto":
        return needed
    asked = np.dtype(name).newbyteorder("<")
    if asked.itemsize < needed.itemsize:
        raise ConfigError(
            f"--token-dtype {name} is too small for a vocabulary of "
            f"{vocab_size:,} ids (Megatron uses it below 65,500); use int32 or auto"
        )
    return np.dtype("<i4") if asked.itemsize == 4 else np.dtype("<u2")


def work_folder(given: Path | None, output: Path | str) -> Path:
    """Give the folder for unfinished work.

    Raises: ConfigError: the output is a URL and none was given.
    """
    if given is not None:
        return given.absolute()
    if is_url(output):
        raise ConfigError(
            f"--output {output} is a URL: give --work-dir, a folder for the unfinished dataset (on a "
            "cluster, one that all nodes share)"
        )
    path = Path(output).absolute()
    return path.with_name(path.name + WORK_SUFFIX)


def check_folders(inputs: Sequence[Path | str], output: Path | str, work: Path) -> None:
    """Refuse an output that cannot be put in its place, and folders of which one lies in another.

    Raises: ConfigError: the output cannot be made; or the output, the work folder or an input is or contains
        another of them, so that it would be read, replaced or removed with it.
    """
    local = [("--input", path) for path in inputs if not is_url(path)]
    if not is_url(output):
        _check_output(Path(output))
    for flag, path in [*[("--output", output)] * (not is_url(output)), ("--work-dir", work)]:
        for other_flag, other in local:
            one, two = os.path.realpath(path), os.path.realpath(other)
            if f"{one}/".startswith(f"{two}/") or f"{two}/".startswith(f"{one}/"):
                raise ConfigError(
                    f"{flag} {path} and {other_flag} {other} are one folder, or one lies in the other, which "
                    f"would be read, replaced or removed with it; give a {flag} apart from it"
                )
        local.append((flag, path))


def _check_output(output: Path) -> None:
    if os.path.lexists(output) and not output.is_dir():
        raise ConfigError(f"--output {output} is not a folder; give another path, or remove it")
    if os.path.ismount(output):
        raise ConfigError(
            f"--output {output} is a mount point, which cannot be replaced; give a folder in it"
        )
    parent = Path(os.path.realpath(output)).parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--output {output}: {parent} is not a folder that can be written; give another path"
        )
