"""Continual pretraining on long windows: `torchrun -m megatron_long.pretrain` (or `python -m`).

The loop is Megatron's own `megatron.training.pretrain`. Its flags all work; ours are those of
`LongContextArguments`. Flags come in this order, later ones winning: backend, recipe (with the model's
geometry), dataset, command line.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

PROGRAM_START = time.time()

# ruff: noqa: E402
from megatron_long.cli import run_tool
from megatron_long.data.manifest import Manifest, read_manifest
from megatron_long.errors import ConfigError
from megatron_long.model.geometry import LlamaGeometry, geometry_from_args, geometry_from_hf
from megatron_long.training.arguments import (
    LongContextArguments,
    check_checkpoint,
    check_files,
    check_layout,
    check_paths,
)
from megatron_long.training.backend import Backend, detect_backend, join_or_start_job
from megatron_long.training.checkpoint_folder import (
    HF_CONFIG_NAME,
    TOKENIZER_DIR_NAME,
    copy_generation_config,
    copy_tokenizer,
    latest_iteration,
    write_hf_config,
    write_run,
)
from megatron_long.training.live_evaluation import (
    EvaluationArguments,
    LiveEvaluation,
    Logs,
    plan_live_evaluation,
)
from megatron_long.training.recipe import build_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Train; the flags are those of the command line.

    Returns: Exit status.
    """
    from megatron_long.training import host_backend

    user_argv = list(sys.argv[1:] if argv is None else argv)
    host_backend.install()
    from megatron_long.training import megatron_adapter

    megatron_adapter.check_version()
    arguments, args = parse(user_argv, detect_backend(), join_or_start_job())
    if is_finished(args):
        if args.rank == 0:
            print(
                f"--load {args.load} is at --train-iters {args.train_iters} already: nothing to do"
            )
        return 0
    listener = _LossLog(Path(arguments.loss_log)) if arguments.loss_log else None
    live = plan_live_evaluation(args, arguments.dataset, _tokenizer_dir(arguments, args))
    megatron_adapter.install_patches(
        listener,
        output_layer_is_called=arguments.megatron_loss,
        after_step=None if live is None else (live.is_due, _evaluator(live, arguments, args)),
    )
    megatron_adapter.validate_flags(args)
    if args.save and args.rank == 0:
        write_sidecars(Path(args.save), arguments, args, user_argv)
    _train(arguments, args)
    return 0


def parse(
    user_argv: Sequence[str], backend: Backend, world_size: int
) -> tuple[LongContextArguments, argparse.Namespace]:
    """Put the flags together, parse them with Megatron's parser and check them.

    Args:
        backend: What the run computes with.
        world_size: Processes of the job.
    Returns: Our flags, and all flags as Megatron's code takes them (not yet validated by Megatron).
    Raises: ConfigError: see `check_files`, `check_layout`, `check_dataset`.
    """
    from megatron_long.training import megatron_adapter

    arguments, early = _parse_early(user_argv)
    check_paths(arguments)
    model = _model_geometry(arguments, early)
    argv = [*_recipe_argv(arguments, model, backend), *_dataset_argv(arguments)]
    args = megatron_adapter.parse_flags(
        [*argv, *user_argv],
        _add_own_flags,
    )
    if args.transformer_impl == "local" and not backend.apex:
        # Chosen by the user where Transformer Engine is: Megatron's own layers need Apex's kernel for it.
        args.gradient_accumulation_fusion = False
    check_files(arguments, args)
    check_layout(args, world_size)
    if arguments.dataset:
        check_dataset(read_manifest(Path(arguments.dataset)), args)
    return arguments, args


def check_dataset(manifest: Manifest, args: argparse.Namespace) -> None:
    """Refuse a model or a tokenizer that the dataset's tokens were not made for.

    Raises: ConfigError: the vocabulary is larger than the embedding, another tokenizer is named, or the
        run asks for more windows than one pass holds.
    """
    vocab_size = manifest.tokenizer.vocab_size
    rows = args.padded_vocab_size or args.vocab_size
    if rows and vocab_size > rows:
        raise ConfigError(
            f"--dataset {args.dataset} was tokenized with a vocabulary of {vocab_size}, and the model "
            f"has {rows} embedding rows (--padded-vocab-size); prepare the dataset with the tokenizer "
            "of this model"
        )
    from megatron_long.data.tokenizers import load_tokenizer

    for flag in ("tokenizer_model", "load", "pretrained_checkpoint"):
        path = Path(getattr(args, flag) or "")
        if flag != "tokenizer_model":
            path /= TOKENIZER_DIR_NAME
        if getattr(args, flag) is None or not (path.exists() or flag == "tokenizer_model"):
            continue
        seen = load_tokenizer(path, "reference").vocabulary_sha256
        if seen != manifest.tokenizer.vocabulary_sha256:
            raise ConfigError(
                f"the tokenizer of --{flag.replace('_', '-')} {getattr(args, flag)} (vocabulary "
                f"{seen[:12]}) is not the one that --dataset {args.dataset} was made with "
                f"({manifest.tokenizer.vocabulary_sha256[:12]}, a copy is in its tokenizer folder); "
                "prepare the dataset with the tokenizer of this model"
            )
    _check_windows(manifest, args)


def _check_windows(manifest: Manifest, args: argparse.Namespace) -> None:
    held = max(manifest.train.num_tokens - 1, 0) // args.seq_length
    asked = args.train_samples or (args.train_iters or 0) * (args.global_batch_size or 0)
    if asked <= held or args.allow_repeat:
        return
    raise ConfigError(
        f"--train-iters {args.train_iters} * --global-batch-size {args.global_batch_size} asks for "
        f"{asked:,} windows of --seq-length {args.seq_length}, and one pass over --dataset "
        f"{args.dataset} ({manifest.train.num_tokens:,} tokens) holds {held:,}; lower --train-iters, "
        "prepare more tokens (--train-tokens of tools/preprocess_mix.py), or give --allow-repeat"
    )


def is_finished(args: argparse.Namespace) -> bool:
    """Whether the newest checkpoint of `--load` is where the run would end, as after a late requeue."""
    if not args.load or args.finetune or not args.train_iters:
        return False
    newest = latest_iteration(Path(args.load))
    return newest is not None and newest >= args.train_iters


def write_sidecars(
    folder: Path, arguments: LongContextArguments, args: argparse.Namespace, argv: Sequence[str]
) -> None:
    """Put beside the checkpoints what evaluation and export need (see `checkpoint_folder`)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_hf_config(
        folder,
        geometry_from_args(args, _vocab_size(arguments, args)),
        _hf_config_path(arguments, args),
    )
    for start in (args.load, args.pretrained_checkpoint):
        if start:
            copy_generation_config(folder, Path(start))
    tokenizer = _tokenizer_dir(arguments, args)
    if tokenizer is not None:
        copy_tokenizer(folder, tokenizer)
    fingerprint = read_manifest(Path(arguments.dataset)).fingerprint if arguments.dataset else None
    run = {"argv": list(argv), "world_size": args.world_size, "dataset_fingerprint": fingerprint}
    write_run(folder, run)


def _train(arguments: LongContextArguments, args: argparse.Namespace) -> None:
    from functools import partial

    from megatron_long.training import megatron_adapter
    from megatron_long.training.batch import StepSettings, forward_step
    from megatron_long.training.datasets import dataset_provider
    from megatron_long.training.loss import chunked_loss

    settings = StepSettings(
        args.micro_batch_size,
        args.eval_micro_batch_size,
        args.seq_length,
        None if arguments.megatron_loss else partial(chunked_loss, _vocab_size(arguments, args)),
    )
    provider = dataset_provider(arguments, args)
    megatron_adapter.run_pretrain(args, provider, partial(forward_step, settings), PROGRAM_START)


def _evaluator(
    live: LiveEvaluation, arguments: LongContextArguments, args: argparse.Namespace
) -> Callable[..., None]:
    def evaluate(model: Any, iteration: int, tensorboard: Any, wandb: Any) -> None:
        from megatron_long.evaluation.scoring import Scorer

        scorer = Scorer(
            model,
            context_length=args.seq_length,
            vocab_size=_vocab_size(arguments, args),
            sequence_parallel=args.sequence_parallel,
        )
        live.run(scorer, iteration, Logs(tensorboard, wandb))

    return evaluate


def _add_own_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    from megatron_long.training import megatron_adapter

    for kind in (LongContextArguments, EvaluationArguments):
        parser = megatron_adapter.add_dataclass_flags(
            parser, kind, f"megatron_long: {kind.__name__}"
        )
    return parser


class _LossLog:
    """Appends the unrounded figures of each step to a JSON-lines file, from the last rank."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, iteration: int, losses: dict, grad_norm: float | None) -> None:
        import torch

        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        figures = {name: float(value) for name, value in losses.items()}
        record = {"iteration": iteration, **figures, "grad_norm": grad_norm}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _parse_early(argv: Sequence[str]) -> tuple[LongContextArguments, argparse.Namespace]:
    """Our flags, and those of Megatron's that decide which other flags are put before the user's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for field in fields(LongContextArguments):
        flag = "--" + field.name.replace("_", "-")
        if field.default is False:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag)
    for flag in ("--load", "--pretrained-checkpoint"):
        parser.add_argument(flag)
    early, _ = parser.parse_known_args(argv)
    ours = {field.name: getattr(early, field.name) for field in fields(LongContextArguments)}
    return LongContextArguments(**ours), early


def _hf_config_path(arguments: LongContextArguments, args: argparse.Namespace) -> Path | None:
    """The config.json that describes the model, if one is known."""
    if arguments.hf_config:
        path = Path(arguments.hf_config)
        return path / "config.json" if path.is_dir() else path
    for folder in (args.load, args.pretrained_checkpoint):
        if folder and (Path(folder) / HF_CONFIG_NAME).is_file():
            return Path(folder) / HF_CONFIG_NAME
    return None


def _vocab_size(arguments: LongContextArguments, args: argparse.Namespace) -> int:
    """Real tokens of the model, without the padding rows of its embedding."""
    config = _hf_config_path(arguments, args)
    return geometry_from_hf(config).vocab_size if config else args.padded_vocab_size


def _model_geometry(
    arguments: LongContextArguments, early: argparse.Namespace
) -> LlamaGeometry | None:
    check_checkpoint(early.pretrained_checkpoint, "--pretrained-checkpoint")
    path = _hf_config_path(arguments, early)
    return geometry_from_hf(path) if path is not None else None


def _recipe_argv(
    arguments: LongContextArguments, model: LlamaGeometry | None, backend: Backend
) -> list[str]:
    own_loss = not arguments.megatron_loss
    if arguments.recipe:
        return build_recipe(arguments.recipe, model).to_argv(backend, own_loss=own_loss)
    return [*backend.to_argv(own_loss=own_loss), *(model.to_argv() if model else [])]


def _dataset_argv(arguments: LongContextArguments) -> list[str]:
    """The tokens are made already: Megatron needs a tokenizer only by name."""
    if not arguments.dataset:
        return []
    tokenizer = read_manifest(Path(arguments.dataset)).tokenizer
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(tokenizer.vocab_size)]


def _tokenizer_dir(arguments: LongContextArguments, args: argparse.Namespace) -> Path | None:
    for folder in (args.load, args.pretrained_checkpoint, arguments.dataset):
        if folder and (Path(folder) / TOKENIZER_DIR_NAME).is_dir():
            return Path(folder) / TOKENIZER_DIR_NAME
    return None


if __name__ == "__main__":
    sys.exit(run_tool(main))
