"""The command line of training: our flags and Megatron's put together, parsed and checked.

Flags come in this order, later ones winning: backend, recipe (with the model's geometry), dataset, command
line. Megatron's own parser reads them all; everything that can be wrong is found before a GPU is taken.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from megatron_long.checkpoint.choosing import describe_view, require_checkpoint
from megatron_long.checkpoint.hashes import check_sidecars
from megatron_long.checkpoint.opening import split_checkpoint
from megatron_long.checkpoint.sidecars import TOKENIZER_DIR_NAME
from megatron_long.checkpoint.trained_model import check_same_model, keep_rope, trained_model
from megatron_long.cli import length_tokens
from megatron_long.conversion import run_ends
from megatron_long.conversion.formats.sources import read_source_geometry
from megatron_long.conversion.run_model import model_source
from megatron_long.dataset.manifest import Manifest, read_manifest
from megatron_long.errors import ConfigError
from megatron_long.evaluation.live_evaluation import EvaluationArguments
from megatron_long.flags.arguments import (
    LongContextArguments,
    choose_async_writer,
    choose_save_times,
)
from megatron_long.flags.argv import Argv
from megatron_long.flags.backend import ALWAYS_ARGV, Backend
from megatron_long.flags.recipe import RECIPES, Recipe, build_recipe
from megatron_long.flags.recipe_flags import base_advice, follow_user, keep_budget
from megatron_long.flags.relations import check_flags, check_words
from megatron_long.flags.rules import check_rules
from megatron_long.job import rendezvous
from megatron_long.job.rendezvous import is_first_process
from megatron_long.model.geometry import LlamaGeometry, geometry_from_args
from megatron_long.model.rope_stretch import stretch_rope
from megatron_long.training.next_stage import check_starts


def parse(
    user_argv: Sequence[str], backend: Backend, world_size: int
) -> tuple[LongContextArguments, argparse.Namespace]:
    """Put the flags together, parse them with Megatron's parser and check them.

    Args:
        backend: What the run computes with.
        world_size: Processes of the job.
    Returns: Our flags, and all flags as Megatron's code takes them (not yet validated by Megatron).
    Raises: ConfigError: see `check_flags`, `check_same_model`, `check_dataset`.
    """
    from megatron_long.engine import megatron_adapter

    check_words(Argv(user_argv))
    arguments, early = _parse_early(user_argv)
    check_rules(early)
    if arguments.next_stage_of:
        check_starts(arguments.next_stage_of, early)
        early.pretrained_checkpoint = str(split_checkpoint(Path(arguments.next_stage_of))[0])
    rendezvous.see_alike(partial(describe_view, (early.load, early.pretrained_checkpoint)))
    for folder in (early.load, early.pretrained_checkpoint):
        if folder:
            check_sidecars(Path(folder))
    model = _model_geometry(arguments, early)
    trained = trained_model(early.load, finetune=early.finetune)
    if trained is not None:
        model = keep_rope(model, trained)
    model = _stretched(arguments, early, model)
    recipe = _chosen_recipe(arguments, model, keeps_rope=trained is not None)
    argv = [*_first_argv(arguments, recipe, model, backend, user_argv), *_dataset_argv(arguments)]
    if arguments.next_stage_of:
        argv += ["--pretrained-checkpoint", early.pretrained_checkpoint]
    args = megatron_adapter.parse_flags([*argv, *ALWAYS_ARGV, *user_argv], _add_own_flags)
    arguments = _own_arguments(args)
    if args.num_layers is None:
        raise _no_model()
    if args.transformer_impl == "local" and not backend.apex:
        # Chosen by the user where Transformer Engine is: Megatron's own layers need Apex's kernel for it.
        args.gradient_accumulation_fusion = False
    special = args.deterministic_mode or arguments.document_masking
    if special and not Argv(user_argv).given("--attention-backend"):
        # Transformer Engine knows which of its kernels are deterministic, or take padded documents.
        args.attention_backend = type(args.attention_backend).auto
    check_flags(args, world_size)
    choose_save_times(arguments, args)
    choose_async_writer(args)
    # Without it Megatron's loop would not see a signal, and the run would end with nothing saved.
    args.exit_signal_handler = True
    if trained is not None:
        check_same_model(trained, geometry_from_args(args), args.load)
    if arguments.hf_checkpoint:
        run_ends.check_weights(Path(arguments.hf_checkpoint))
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
    from megatron_long.tokenizer.loading import load_tokenizer

    for flag in ("tokenizer_model", "load", "pretrained_checkpoint", "hf_checkpoint"):
        path = Path(getattr(args, flag) or "")
        if flag in ("load", "pretrained_checkpoint"):
            path /= TOKENIZER_DIR_NAME
        if getattr(args, flag) is None or not (path.exists() or flag == "tokenizer_model"):
            continue
        if flag == "hf_checkpoint":
            seen = run_ends.vocabulary_of(path)
        else:
            seen = load_tokenizer(path, "reference").vocabulary_sha256
        if seen not in (None, manifest.tokenizer.vocabulary_sha256):
            stage = flag == "pretrained_checkpoint" and args.next_stage_of
            name = (
                f"next-stage-of {stage}"
                if stage
                else f"{flag.replace('_', '-')} {getattr(args, flag)}"
            )
            raise ConfigError(
                f"the tokenizer of --{name} (vocabulary "
                f"{str(seen)[:12]}) is not the one that --dataset {args.dataset} was made with "
                f"({manifest.tokenizer.vocabulary_sha256[:12]}, a copy is in its tokenizer folder); "
                "prepare the dataset with the tokenizer of this model"
            )
    _check_windows(manifest, args)


def _check_windows(manifest: Manifest, args: argparse.Namespace) -> None:
    held = max(manifest.train.num_tokens - 1, 0) // args.seq_length
    asked = args.train_samples or (args.train_iters or 0) * (args.global_batch_size or 0)
    by = f"--train-iters {args.train_iters} * --global-batch-size {args.global_batch_size}"
    if args.train_samples:
        by = f"--train-samples {args.train_samples}"
    if asked <= held or args.allow_repeat:
        return
    raise ConfigError(
        f"{by} asks for {asked:,} windows of --seq-length {args.seq_length}, and one pass over --dataset "
        f"{args.dataset} ({manifest.train.num_tokens:,} tokens) holds {held:,}; lower it, "
        "prepare more tokens (--train-tokens of tools/preprocess_mix.py), or give --allow-repeat"
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of training: our flags and Megatron's."""
    from megatron_long.engine import megatron_adapter

    return megatron_adapter.build_parser(_add_own_flags)


def _add_own_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    from megatron_long.engine import megatron_adapter

    for kind, title in (
        (LongContextArguments, "megatron_long"),
        (EvaluationArguments, "megatron_long: evaluation while training"),
    ):
        parser = megatron_adapter.add_dataclass_flags(parser, kind, title)
    return parser


def _parse_early(argv: Sequence[str]) -> tuple[LongContextArguments, argparse.Namespace]:
    """Our flags, and those of Megatron's that decide which other flags are put before the user's."""
    from megatron_long.engine.megatron_adapter import add_dataclass_flags

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_dataclass_flags(parser, LongContextArguments, "megatron_long")
    for flag in ("--load", "--save", "--pretrained-checkpoint"):
        parser.add_argument(flag)
    parser.add_argument("--seq-length", type=length_tokens)
    parser.add_argument("--finetune", action="store_true")
    try:
        early, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; `--help` lists the flags, ours and Megatron's") from None
    return _own_arguments(early), early


def _own_arguments(args: argparse.Namespace) -> LongContextArguments:
    names = [field.name for field in fields(LongContextArguments)]
    return LongContextArguments(**{name: getattr(args, name) for name in names})


def _model_geometry(
    arguments: LongContextArguments, early: argparse.Namespace
) -> LlamaGeometry | None:
    if early.pretrained_checkpoint is not None:
        flag = "--next-stage-of" if arguments.next_stage_of else "--pretrained-checkpoint"
        require_checkpoint(Path(early.pretrained_checkpoint), flag)
    path = model_source(arguments, early)
    return read_source_geometry(path) if path is not None else None


def _stretched(
    arguments: LongContextArguments, early: argparse.Namespace, model: LlamaGeometry | None
) -> LlamaGeometry | None:
    """The model with the RoPE of `--rope-method`."""
    method, factor = arguments.rope_method, arguments.rope_factor
    if method is None:
        return model
    recipe = build_recipe(arguments.recipe, model) if arguments.recipe else None
    model = recipe.model if recipe else model
    if model is None:
        raise ConfigError(
            f"--rope-method {method} needs to know the model; give --recipe, --hf-config or --load"
        )
    default = recipe.seq_length if recipe else model.max_position_embeddings
    length = early.seq_length or default
    return stretch_rope(model, length, method, factor, arguments.rope_original_length)


def _chosen_recipe(
    arguments: LongContextArguments, model: LlamaGeometry | None, *, keeps_rope: bool
) -> Recipe | None:
    if not arguments.recipe:
        return None
    recipe = build_recipe(arguments.recipe, model)
    return replace(recipe, rotary_base=int(recipe.model.rotary_base)) if keeps_rope else recipe


def _first_argv(
    arguments: LongContextArguments,
    recipe: Recipe | None,
    model: LlamaGeometry | None,
    backend: Backend,
    user_argv: Sequence[str],
) -> Sequence[str]:
    """The flags that the user's follow: those of the recipe, or of the backend and the model alone."""
    own_loss = not arguments.megatron_loss
    if recipe is None:
        shape = model.to_argv() if model else []
        return [*backend.to_argv(own_loss=own_loss), *shape, *_validation_argv(user_argv)]
    argv = follow_user(recipe.to_argv(backend, own_loss=own_loss), user_argv)
    argv, note = keep_budget(recipe, argv, user_argv)
    advice = base_advice(recipe, user_argv)
    for told in (f"note: {note}" if note else None, f"warning: {advice}" if advice else None):
        if told and is_first_process():
            print(told, file=sys.stderr)
    return argv


def _validation_argv(user_argv: Sequence[str]) -> list[str]:
    """As in the recipes: no validation unless it is asked for. Megatron has no interval of its own."""
    if Argv(user_argv).given("--eval-interval"):
        return []
    return ["--eval-interval", "100", "--eval-iters", "0"]


def _no_model() -> ConfigError:
    return ConfigError(
        f"no model: give --recipe ({', '.join(RECIPES)}), or start from one with --hf-checkpoint FOLDER, "
        "--pretrained-checkpoint FOLDER or --hf-config FOLDER; the data come from --dataset, and "
        "examples/pretrain_llama_128k.sh shows a whole command"
    )


def _dataset_argv(arguments: LongContextArguments) -> list[str]:
    """The tokens are made already: Megatron needs a tokenizer only by name."""
    if not arguments.dataset:
        return []
    tokenizer = read_manifest(Path(arguments.dataset)).tokenizer
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(tokenizer.vocab_size)]
