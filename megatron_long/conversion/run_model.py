"""The model that a run trains, and its files next to the checkpoints."""

import shutil
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_long.checkpoint.sidecars import (
    HF_CONFIG_NAME,
    TOKENIZER_DIR_NAME,
    add_tokenizer,
    copy_generation_config,
    write_hf_config,
    write_run,
)
from megatron_long.conversion import run_ends
from megatron_long.conversion.formats.sources import is_gguf, read_config, read_source_geometry
from megatron_long.dataset.manifest import read_manifest
from megatron_long.flags.arguments import LongContextArguments
from megatron_long.model.geometry import CONFIG_NAME, geometry_from_args


def model_source(arguments: LongContextArguments, args: Namespace) -> Path | None:
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


def real_vocab_size(arguments: LongContextArguments, args: Namespace) -> int:
    """Real tokens of the model, without the padding rows of its embedding."""
    config = model_source(arguments, args)
    return read_source_geometry(config).vocab_size if config else args.padded_vocab_size


def tokenizer_dir(arguments: LongContextArguments, args: Namespace) -> Path | None:
    """The folder of the model's tokenizer, if one is known."""
    for folder in (args.load, args.pretrained_checkpoint, arguments.dataset):
        if folder and (Path(folder) / TOKENIZER_DIR_NAME).is_dir():
            return Path(folder) / TOKENIZER_DIR_NAME
    return None


def write_sidecars(
    folder: Path, arguments: LongContextArguments, args: Namespace, argv: Sequence[str]
) -> None:
    """Put next to the checkpoints what evaluation and export need (see `checkpoint.sidecars`).

    Args:
        argv: Words of the command line, for the record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = model_source(arguments, args)
    model_type = read_source_geometry(source).model_type if source else None
    trained = geometry_from_args(args, real_vocab_size(arguments, args), model_type)
    write_hf_config(folder, trained, read_config(source) if source else None)
    if arguments.hf_checkpoint:
        run_ends.write_start_sidecars(folder, Path(arguments.hf_checkpoint))
    for start in (args.load, args.pretrained_checkpoint):
        if start:
            copy_generation_config(folder, Path(start))
    tokenizer = tokenizer_dir(arguments, args)
    if tokenizer is not None:
        add_tokenizer(folder, partial(shutil.copytree, tokenizer, dirs_exist_ok=True))
    fingerprint = read_manifest(Path(arguments.dataset)).fingerprint if arguments.dataset else None
    run = {"argv": list(argv), "world_size": args.world_size, "dataset_fingerprint": fingerprint}
    write_run(folder, run)
