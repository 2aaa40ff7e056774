"""Which model an evaluation tool runs: a Megatron checkpoint, a Hugging Face folder, or random weights."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_long.checkpoint.choosing import SKIP_HASH_CHECK
from megatron_long.checkpoint.megatron_folder import WEIGHTS, choose_weights
from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.batches import TokenScorer
from megatron_long.evaluation.fingerprint import fingerprint
from megatron_long.evaluation.input_checks import (
    CheckpointFolder,
    find_checkpoint,
    find_hf_folder,
    positive_int,
)
from megatron_long.flags.argv import Argv
from megatron_long.job.rendezvous import is_first_process
from megatron_long.model.geometry import LlamaGeometry, geometry_from_hf

if TYPE_CHECKING:
    from megatron_long.evaluation.hf_scorer import HFScorer
    from megatron_long.evaluation.scoring import Scorer

MEGATRON, HF = "megatron", "hf"
LAYOUT_FLAGS = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
    "--cp-comm-type",
)
"""How a model is cut over devices: it does not change what is measured."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """What a report says of its model."""

    path: str
    """Folder of the checkpoint or HF model, or the config of a freshly initialised one."""
    iteration: str = ""
    """Training iteration, "release", "hf" or "random"; empty until a step of training is measured."""
    backend: str = MEGATRON
    precision: str | None = None
    megatron_argv: tuple[str, ...] = ()
    """Flags for Megatron."""
    weights: str = "model"
    """Which of the checkpoint's weights: `main` is the optimizer's copy, before FP8 rounded it."""
    weights_sha256: str | None = None
    """Fingerprint of the weights, where an evaluation may be resumed."""


@dataclass(frozen=True)
class ModelChoice:
    """A model that is known to be there, not yet loaded."""

    folder: CheckpointFolder
    backend: str
    random_weights: bool
    hf_config: Path | None
    """Config of a model of random weights."""
    check_hashes: bool = True
    """Whether the checkpoint's files are compared with its hashes before it is loaded."""
    tool_flags: tuple[str, ...] = ()
    """All flags of the tool itself."""
    weights: str = WEIGHTS[0]
    """Which of the checkpoint's weights, one of `WEIGHTS`."""
    megatron_argv: tuple[str, ...] = ()
    """Flags for Megatron, which the tool does not know itself."""
    precision: str | None = None
    """`bf16` or `fp32`; None is bf16 on GPUs, fp32 without."""

    def geometry(self) -> LlamaGeometry | None:
        """Its shape, where a config says it."""
        path = self.hf_config or self.folder.hf_config
        return None if path is None else geometry_from_hf(path)

    def measured(self) -> MeasuredModel:
        """Give what a report says of it, but for the fingerprint.

        Raises: ConfigError: see `measured_weights`.
        """
        return MeasuredModel(
            path=str(self.folder.path),
            iteration=self.folder.iteration,
            backend=self.backend,
            precision=self.precision,
            megatron_argv=self.megatron_argv,
            weights=self.measured_weights(),
        )

    def measured_weights(self) -> str:
        """Give which weights are measured: `main` for the optimizer's copy, else `model`.

        Raises: ConfigError: `--weights main`, or weights rounded to FP8, and no main copy in the checkpoint.
        """
        checkpoint = self.folder.checkpoint
        if checkpoint is None:
            return "model"
        try:
            prefix, _ = choose_weights(checkpoint.path, self.weights)
        except DataError:  # the comparison with its hashes says more when it is loaded
            return "model"
        return "main" if prefix else "model"

    def weights_sha256(self) -> str:
        """Give a fingerprint of the weights that are measured."""
        whole, measured = fingerprint(self.folder), self.measured_weights()
        return whole if measured == "model" else sha256(f"{whole} {measured}".encode()).hexdigest()


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a model, its tokenizer and its precision."""
    add = parser.add_argument
    add("--checkpoint", type=Path, help="Megatron checkpoint folder; HF folder with --backend hf")
    add(
        "--backend",
        choices=(MEGATRON, HF),
        default=MEGATRON,
        help="hf: score with transformers, and generate (default: %(default)s)",
    )
    add(
        SKIP_HASH_CHECK,
        action="store_true",
        help="do not compare the checkpoint's files with its hashes.json first",
    )
    add(
        "--weights",
        choices=WEIGHTS,
        default=WEIGHTS[0],
        help="the model's, the optimizer's main copy, or the latter where FP8 rounded the former, as "
        "the export takes them (default: %(default)s)",
    )
    add(
        "--random-weights",
        action="store_true",
        help="measure a freshly initialised model of --hf-config, for its speed",
    )
    add("--hf-config", type=Path, help="HF folder or config.json, with --random-weights")
    add("--tokenizer", type=Path, help="file or folder (default: the checkpoint's own)")
    add(
        "--micro-batch-size",
        type=positive_int,
        default=1,
        help="full-length rows at a time (default: 1)",
    )
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on GPUs, fp32 without")


def choose_model(args: argparse.Namespace, megatron_argv: Sequence[str]) -> ModelChoice:
    """See which model the flags of `add_model_flags` mean, without loading it.

    Raises: ConfigError: no such model, or flags that do not go together.
    """
    if args.random_weights != (args.hf_config is not None):
        raise ConfigError(
            "--random-weights and --hf-config go together: the first says that nothing is loaded, the "
            "second gives the shape; give both or neither"
        )
    if args.random_weights == (args.checkpoint is not None):
        raise ConfigError(
            "give either --checkpoint FOLDER or --random-weights --hf-config CONFIG, "
            f"{'not both' if args.checkpoint else 'one of them'}"
        )
    if args.backend == HF and megatron_argv:
        raise ConfigError(
            f"--backend hf does not know {megatron_argv[0]}; Megatron's flags need Megatron"
        )
    choice = _find_model(args, megatron_argv)
    return replace(choice, megatron_argv=tuple(megatron_argv), precision=args.precision)


def _find_model(args: argparse.Namespace, megatron_argv: Sequence[str]) -> ModelChoice:
    backend = args.backend
    tool_flags = tuple(f"--{name.replace('_', '-')}" for name in vars(args))
    if args.random_weights:
        _refuse_weights(args, "--random-weights reads none")
        folder = CheckpointFolder.of_config(args.hf_config)
        return ModelChoice(folder, backend, True, folder.hf_config, tool_flags=tool_flags)
    if backend == HF:
        _refuse_weights(args, "--backend hf reads a model that has one kind of weights")
        return ModelChoice(find_hf_folder(args.checkpoint), backend, False, None)
    checks = not args.skip_hash_check
    folder = find_checkpoint(args.checkpoint, megatron_argv, check_hashes=checks)
    return ModelChoice(folder, backend, False, None, checks, tool_flags, args.weights)


def _refuse_weights(args: argparse.Namespace, reason: str) -> None:
    if args.weights != WEIGHTS[0]:
        raise ConfigError(
            f"--weights {args.weights} is for Megatron checkpoints: {reason}; drop the flag"
        )


def warn_beyond_rope(choice: ModelChoice, context_length: int) -> None:
    """Say that the model was not made for the length; it is measured all the same."""
    limit = choice.folder.max_positions
    if limit and context_length > limit and is_first_process():
        base = Argv(choice.megatron_argv).value("--rotary-base")
        _log.warning(
            "--context-length %d is beyond the %d tokens that %s was made for (max_position_embeddings)"
            "%s; continuing: scores beyond that length show what the model does untrained",
            context_length,
            limit,
            choice.folder.path,
            f", with --rotary-base {base}" if base else "; --rotary-base would stretch RoPE",
        )


class RowGenerator(TokenScorer, Protocol):
    """A model, sharded or not, that also writes on; replicas may be given different prompts."""

    def generate_rows(self, prompts: Sequence[np.ndarray], max_new_tokens: int) -> list[np.ndarray]:
        """Give the tokens that greedy decoding adds to each prompt, without the one that ends it."""
        ...


def open_model(choice: ModelChoice, *, context_length: int) -> TokenScorer:
    """Load the model; under torchrun every rank calls this."""
    if choice.backend == HF:
        return open_generator(choice, context_length=context_length)
    from megatron_long.evaluation.scoring import Scorer

    return _open_shards(choice, context_length, Scorer)


def open_row_generator(
    choice: ModelChoice, *, context_length: int, stop_ids: Collection[int]
) -> RowGenerator:
    """Load the model to generate; under torchrun every rank calls this.

    Args:
        stop_ids: Tokens that end an answer, besides those that the model's config names.
    """
    if choice.backend == HF:
        model = open_generator(choice, context_length=context_length)
        model.stop_ids = set(stop_ids)
        return model
    from megatron_long.evaluation.generation.shard_generator import ShardGenerator

    shards = _open_shards(choice, context_length, ShardGenerator)
    assert isinstance(shards, ShardGenerator)
    shards.stop_ids = {*choice.folder.stop_ids(), *stop_ids}
    return shards


def _open_shards(choice: ModelChoice, context_length: int, kind: type[Scorer]) -> Scorer:
    from megatron_long.evaluation import scoring

    return scoring.open_scorer(
        None if choice.random_weights else choice.folder.path,
        context_length=context_length,
        megatron_argv=list(choice.megatron_argv),
        precision=choice.precision,
        hf_config=choice.hf_config,
        check_hashes=choice.check_hashes,
        tool_flags=choice.tool_flags,
        iteration=None if choice.random_weights else choice.folder.iteration,
        weights=choice.weights,
        kind=kind,
    )


def check_megatron_flags(choice: ModelChoice, *, context_length: int) -> None:
    """Refuse the flags for Megatron that `open_model` would refuse, without loading anything.

    Raises: ConfigError: Megatron does not know a flag, or not this value.
    """
    if not choice.megatron_argv:
        return  # and Megatron need not be imported
    from megatron_long.evaluation import scoring

    scoring.check_flags(
        None if choice.random_weights else choice.folder.path,
        context_length=context_length,
        megatron_argv=list(choice.megatron_argv),
        precision=choice.precision,
        hf_config=choice.hf_config,
        tool_flags=choice.tool_flags,
    )


def open_generator(choice: ModelChoice, *, context_length: int) -> HFScorer:
    """Load a Hugging Face model, which scores and generates."""
    from megatron_long.evaluation.hf_scorer import open_hf_scorer

    path = choice.hf_config if choice.random_weights else choice.folder.path
    assert path is not None
    return open_hf_scorer(
        path,
        context_length=context_length,
        precision=choice.precision,
        random_weights=choice.random_weights,
    )
