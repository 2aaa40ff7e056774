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
from typing import Any, Literal, get_args

PROGRAM_START = time.time()

# ruff: noqa: E402
from megatron_long.cli import run_tool
from megatron_long.conversion.sources import is_gguf, read_config, read_source_geometry
from megatron_long.data.manifest import Manifest, read_manifest
from megatron_long.errors import ConfigError
from megatron_long.model.geometry import CONFIG_NAME, LlamaGeometry, geometry_from_args
from megatron_long.training import hugging_face, signals
from megatron_long.training.arguments import (
    LongContextArguments,
    check_checkpoint,
    check_documents,
    check_export,
    check_files,
    check_layout,
    check_paths,
    check_reliability,
    check_rope,
    check_start_and_end,
)
from megatron_long.training.backend import (
    GUARD_ARGV,
    Backend,
    detect_backend,
    join_or_start_job,
    split_flags,
)
from megatron_long.training.checkpoint_folder import (
    HF_CONFIG_NAME,
    TOKENIZER_DIR_NAME,
    copy_generation_config,
    copy_tokenizer,
    write_hf_config,
    write_run,
)
from megatron_long.training.checkpoint_hashes import check_sidecars
from megatron_long.training.checkpoint_saving import CheckpointKeeper
from megatron_long.training.live_evaluation import (
    EvaluationArguments,
    LiveEvaluation,
    Logs,
    plan_live_evaluation,
)
from megatron_long.training.recipe import build_recipe
from megatron_long.training.reliability import (
    Start,
    find_start,
    make_guard,
    make_snapshot,
    record_sidecars,
)
from megatron_long.training.rope import stretch_rope
from megatron_long.training.watchdog import Watchdog


def main(argv: Sequence[str] | None = None) -> int:
    """Train; the flags are those of the command line.

    Returns: Exit status.
    """
    signals.leave_before_training()
    user_argv = list(sys.argv[1:] if argv is None else argv)
    arguments, args, start = prepare(user_argv)
    from megatron_long.training import megatron_adapter

    if args.train_iters and start.iteration >= args.train_iters:  # as after a late requeue
        if args.rank == 0:
            print(
                f"--load {args.load} is at --train-iters {args.train_iters} already: nothing to train"
            )
        if arguments.export_hf and not Path(arguments.export_hf).exists():
            _export(arguments, args)
        return 0
    check_export(arguments.export_hf)
    listener = _LossLog(Path(arguments.loss_log)) if arguments.loss_log else None
    live = plan_live_evaluation(args, arguments.dataset, _tokenizer_dir(arguments, args))
    megatron_adapter.install_patches(listener, output_layer_is_called=arguments.megatron_loss)
    if start.choice is not None:
        megatron_adapter.load_from(start.choice, args)
    megatron_adapter.validate_flags(args)
    if args.save and args.rank == 0:
        write_sidecars(Path(args.save), arguments, args, user_argv)
        record_sidecars(Path(args.save), start)
    _train(arguments, args, start, user_argv, live)
    _export(arguments, args)
    return 0


def prepare(
    user_argv: Sequence[str],
) -> tuple[LongContextArguments, argparse.Namespace, Start]:
    """Check everything that can be checked before Megatron starts; each process of the job calls it.

    Returns: Our flags, all flags, and the checkpoint that the run starts from.
    """
    from megatron_long.training import host_backend

    host_backend.install()
    from megatron_long.training import megatron_adapter

    megatron_adapter.check_version()
    arguments, args = parse(user_argv, detect_backend(), join_or_start_job())
    return arguments, args, find_start(arguments, args)


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
    for folder in (early.load, early.pretrained_checkpoint):
        if folder:
            check_sidecars(Path(folder))
    model = _stretched(arguments, early, _model_geometry(arguments, early))
    argv = [*_recipe_argv(arguments, model, backend), *_dataset_argv(arguments)]
    argv += split_flags(GUARD_ARGV)
    args = megatron_adapter.parse_flags(
        [*argv, *user_argv],
        _add_own_flags,
    )
    arguments = LongContextArguments(
        **{field.name: getattr(args, field.name) for field in fields(LongContextArguments)}
    )
    if args.transformer_impl == "local" and not backend.apex:
        # Chosen by the user where Transformer Engine is: Megatron's own layers need Apex's kernel for it.
        args.gradient_accumulation_fusion = False
    special = args.deterministic_mode or arguments.document_masking
    if special and "--attention-backend" not in user_argv:
        # Transformer Engine knows which of its kernels are deterministic, or take padded documents.
        args.attention_backend = type(args.attention_backend).auto
    check_files(arguments, args)
    check_start_and_end(arguments, args)
    check_reliability(arguments, args)
    check_layout(args, world_size)
    check_rope(args)
    check_documents(arguments, args)
    if arguments.hf_checkpoint:
        hugging_face.check_weights(Path(arguments.hf_checkpoint))
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

    for flag in ("tokenizer_model", "load", "pretrained_checkpoint", "hf_checkpoint"):
        path = Path(getattr(args, flag) or "")
        if flag in ("load", "pretrained_checkpoint"):
            path /= TOKENIZER_DIR_NAME
        if getattr(args, flag) is None or not (path.exists() or flag == "tokenizer_model"):
            continue
        if flag == "hf_checkpoint":
            seen = hugging_face.vocabulary_of(path)
        else:
            seen = load_tokenizer(path, "reference").vocabulary_sha256
        if seen not in (None, manifest.tokenizer.vocabulary_sha256):
            raise ConfigError(
                f"the tokenizer of --{flag.replace('_', '-')} {getattr(args, flag)} (vocabulary "
                f"{str(seen)[:12]}) is not the one that --dataset {args.dataset} was made with "
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


def write_sidecars(
    folder: Path, arguments: LongContextArguments, args: argparse.Namespace, argv: Sequence[str]
) -> None:
    """Put beside the checkpoints what evaluation and export need (see `checkpoint_folder`)."""
    folder.mkdir(parents=True, exist_ok=True)
    source = _hf_config_path(arguments, args)
    model_type = read_source_geometry(source).model_type if source else None
    trained = geometry_from_args(args, _vocab_size(arguments, args), model_type)
    write_hf_config(folder, trained, read_config(source) if source else None)
    if arguments.hf_checkpoint:
        hugging_face.write_start_sidecars(folder, Path(arguments.hf_checkpoint))
    for start in (args.load, args.pretrained_checkpoint):
        if start:
            copy_generation_config(folder, Path(start))
    tokenizer = _tokenizer_dir(arguments, args)
    if tokenizer is not None:
        copy_tokenizer(folder, tokenizer)
    fingerprint = read_manifest(Path(arguments.dataset)).fingerprint if arguments.dataset else None
    run = {"argv": list(argv), "world_size": args.world_size, "dataset_fingerprint": fingerprint}
    write_run(folder, run)


def _train(
    arguments: LongContextArguments,
    args: argparse.Namespace,
    start: Start,
    argv: list[str],
    live: LiveEvaluation | None,
) -> None:
    from functools import partial

    from megatron_long.training import megatron_adapter
    from megatron_long.training.batch import StepSettings, forward_step
    from megatron_long.training.datasets import dataset_provider
    from megatron_long.training.guarded_step import LossRecorder, TorchJob
    from megatron_long.training.loss import chunked_loss

    masking = attention_format(args) if arguments.document_masking else None
    save = Path(args.save) if args.save else None
    watchdog, losses = Watchdog(arguments.hang_timeout, save, args.rank), LossRecorder()
    guard = make_guard(arguments, args, start, args.rank)
    facts = {"data": start.data, "dataset_files": start.dataset_files, "argv": argv}
    keeper = CheckpointKeeper(
        TorchJob(),
        save,
        lambda: facts | {"guard": guard.state()},
        keep_last=arguments.keep_last,
        keep_every=arguments.keep_every,
    )

    def write_beside(folder: Path) -> None:
        write_sidecars(folder, arguments, args, argv)

    snapshot = make_snapshot(guard, args.save, args.rank, write_beside)
    megatron_adapter.install_keeper(keeper, args, watchdog)
    megatron_adapter.install_guard(guard, losses, args, watchdog, snapshot)
    if live is not None:
        evaluate = _evaluator(live, arguments, args, watchdog.beat)
        megatron_adapter.install_evaluation(live.is_due, evaluate)
    settings = StepSettings(
        args.micro_batch_size,
        args.eval_micro_batch_size,
        args.seq_length,
        None if arguments.megatron_loss else partial(chunked_loss, _vocab_size(arguments, args)),
        masking,
        args.tensor_model_parallel_size if args.sequence_parallel else 1,
        watchdog.beat,
        losses.add,
    )
    provider = dataset_provider(arguments, args)
    fill = None
    if arguments.hf_checkpoint and hugging_face.starts_from_hf(arguments.hf_checkpoint, args.load):
        model = Path(arguments.hf_checkpoint)
        fill = hugging_face.filler(model, lambda: args.padded_vocab_size)
    step = partial(forward_step, settings)
    # Padded documents make micro-batches of different lengths, and pipeline stages must tell each other.
    varies = masking == "thd"
    try:
        megatron_adapter.run_pretrain(
            args, provider, step, PROGRAM_START, fill, lengths_vary=varies
        )
    finally:
        watchdog.stop()


def _export(arguments: LongContextArguments, args: argparse.Namespace) -> None:
    """Leave the trained model behind as a Hugging Face folder; one rank writes, none waits."""
    if arguments.export_hf and args.rank == 0:
        report = hugging_face.export(Path(args.save), Path(arguments.export_hf))
        print(f"wrote {report.output}: {report.num_tensors} tensors of {report.dtype}")


def attention_format(args: argparse.Namespace) -> Literal["sbhd", "thd"]:
    """How masks between documents are given to the attention in use, see `training.documents`."""
    return "thd" if args.transformer_impl == "transformer_engine" else "sbhd"


def _evaluator(
    live: LiveEvaluation,
    arguments: LongContextArguments,
    args: argparse.Namespace,
    on_batch: Callable[[], None],
) -> Callable[..., None]:
    def evaluate(model: Any, iteration: int, tensorboard: Any, wandb: Any) -> None:
        from megatron_long.evaluation.scoring import Scorer

        scorer = Scorer(
            model,
            context_length=args.seq_length,
            vocab_size=_vocab_size(arguments, args),
            sequence_parallel=args.sequence_parallel,
            on_batch=on_batch,
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
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for field in fields(LongContextArguments):
        flag = "--" + field.name.replace("_", "-")
        if field.default is False:
            parser.add_argument(flag, action="store_true")
        else:
            kinds = get_args(field.type) or (field.type,)  # of `float | None`, or `float`
            parser.add_argument(flag, type=kinds[0], default=field.default)
    for flag in ("--load", "--pretrained-checkpoint"):
        parser.add_argument(flag)
    parser.add_argument("--seq-length", type=int)
    try:
        early, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; `--help` lists the flags, ours and Megatron's") from None
    ours = {field.name: getattr(early, field.name) for field in fields(LongContextArguments)}
    return LongContextArguments(**ours), early


def _hf_config_path(arguments: LongContextArguments, args: argparse.Namespace) -> Path | None:
    """The config.json that describes the model, if one is known."""
    if arguments.hf_config:
        path = Path(arguments.hf_config)
        return path / CONFIG_NAME if path.is_dir() else path
    for folder in (args.load, args.pretrained_checkpoint):
        if folder and (Path(folder) / HF_CONFIG_NAME).is_file():
            return Path(folder) / HF_CONFIG_NAME
    if arguments.hf_checkpoint:
        path = Path(arguments.hf_checkpoint)
        return path if is_gguf(path) else path / CONFIG_NAME
    return None


def _vocab_size(arguments: LongContextArguments, args: argparse.Namespace) -> int:
    """Real tokens of the model, without the padding rows of its embedding."""
    config = _hf_config_path(arguments, args)
    return read_source_geometry(config).vocab_size if config else args.padded_vocab_size


def _model_geometry(
    arguments: LongContextArguments, early: argparse.Namespace
) -> LlamaGeometry | None:
    check_checkpoint(early.pretrained_checkpoint, "--pretrained-checkpoint")
    path = _hf_config_path(arguments, early)
    return read_source_geometry(path) if path is not None else None


def _stretched(
    arguments: LongContextArguments, early: argparse.Namespace, model: LlamaGeometry | None
) -> LlamaGeometry | None:
    """The model with the RoPE of `--rope-method`."""
    method, factor = arguments.rope_method, arguments.rope_factor
    if method is None:
        if factor is not None or arguments.rope_original_length is not None:
            raise ConfigError(
                "--rope-factor and --rope-original-length belong to --rope-method linear, yarn or "
                "llama3; give that too"
            )
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
