"""A stage of training that follows another: `--next-stage-of` keeps weights and optimizer, all else is new.

Steps, schedule and data begin at 0; Adam's moments and its own count of steps, which corrects their bias,
are those of the stage before. Without them the first updates are as large as the learning rate allows.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_long.checkpoint.choosing import Choice, has_checkpoint, saved_iterations
from megatron_long.checkpoint.opening import split_checkpoint
from megatron_long.checkpoint.sidecars import HF_CONFIG_NAME
from megatron_long.checkpoint.torch_dist import read_common_state
from megatron_long.checkpoint.trained_model import check_same_shape
from megatron_long.errors import ConfigError
from megatron_long.model.geometry import geometry_from_args, geometry_from_hf
from megatron_long.model.rope import BaseRope


def check_starts(path: str, args: Namespace) -> None:
    """Refuse other starts next to `--next-stage-of`, and folders of the stage before as those of this one.

    Args:
        args: The flags that the user typed.
    Raises: ConfigError: names both.
    """
    if args.pretrained_checkpoint:
        raise ConfigError(
            f"--next-stage-of {path} and --pretrained-checkpoint {args.pretrained_checkpoint} are two "
            "starts; give the first to keep the optimizer, or the second for weights alone"
        )
    folder, step = split_checkpoint(Path(path))
    there = saved_iterations(folder)
    if step is not None and step not in there and not has_checkpoint(args.load):
        listed = ", ".join(map(str, sorted(there))) or "none"
        raise ConfigError(
            f"--next-stage-of {path} is no checkpoint; those of {folder}: {listed}; give one of these, or "
            "the folder for the newest"
        )
    for flag in ("load", "save"):
        value = getattr(args, flag)
        if value and Path(value).resolve() == folder.resolve():
            raise ConfigError(
                f"--next-stage-of {path} and --{flag} {value} are one folder, and a stage has checkpoints of "
                f"its own; give another --{flag}"
            )


def check_next_stage(
    path: str, choice: Choice, facts: Mapping[str, Any], data: Mapping[str, Any], args: Namespace
) -> dict[str, Any]:
    """Refuse a stage that makes no sense after the one before.

    Args:
        path: `--next-stage-of`.
        choice: Its checkpoint.
        facts: What that says of its training (`checkpoint.saving.read_facts`); empty for other programs.
        data: See `checkpoint.run_identity.describe_data`.
        args: All flags, before Megatron's validation.
    Returns: The stage before, for the record of this one.
    Raises: ConfigError: no optimizer to keep, not at its end, another model, a shorter window, a smaller RoPE
        base, or the same data again. DataError: the checkpoint is damaged.
    """
    flag = f"--next-stage-of {path}"
    if choice.iteration is None:
        raise ConfigError(
            f"{flag} holds converted weights, and no optimizer to keep; start from them with "
            f"--pretrained-checkpoint {path}"
        )
    before = read_common_state(choice.folder).get("args") or Namespace()
    if getattr(before, "no_save_optim", False):
        raise ConfigError(
            f"{flag} was saved without its optimizer (--no-save-optim); start from its weights with "
            f"--pretrained-checkpoint {path}"
        )
    steps = getattr(before, "train_iters", None)
    if steps and choice.iteration < steps and split_checkpoint(Path(path))[1] is None:
        samples = getattr(before, "train_samples", None)
        asked = f"--train-samples {samples}" if samples else f"--train-iters {steps}"
        raise ConfigError(
            f"{flag} is at step {choice.iteration} of {steps} ({asked}); resume it to its end first, or give "
            f"--next-stage-of {choice.folder} to continue from there"
        )
    _check_model(flag, choice.folder.parent / HF_CONFIG_NAME, args)
    known = facts.get("data", {})
    _check_data(flag, known, data, args)
    return {
        "folder": str(choice.folder),
        "iteration": choice.iteration,
        "seq_length": known.get("seq_length"),
        "dataset_fingerprint": known.get("dataset_fingerprint"),
        "windows": getattr(before, "consumed_train_samples", None),
    }


def _check_model(flag: str, config: Path, args: Namespace) -> None:
    if not config.is_file():  # of other programs: Megatron compares the shapes of tensors
        return
    before, now = geometry_from_hf(config), geometry_from_args(args)
    check_same_shape(before, now, flag)
    bases = before.rotary_base, now.rotary_base
    if type(before.rope) is type(now.rope) is BaseRope and bases[0] > bases[1]:
        raise ConfigError(
            f"{flag} was trained with a RoPE base of {bases[0]:,.12g}, and this stage has {bases[1]:,.12g}, "
            f"which shortens the context; give --rotary-base {bases[0]:.12g} or more"
        )


def _check_data(
    flag: str, before: Mapping[str, Any], now: Mapping[str, Any], args: Namespace
) -> None:
    windows = before.get("seq_length", 0), now["seq_length"]
    if windows[0] > windows[1]:
        raise ConfigError(
            f"{flag} was trained on windows of {windows[0]:,} tokens, and --seq-length {windows[1]} is "
            f"shorter; give --seq-length {windows[0]} or more"
        )
    fingerprint = now.get("dataset_fingerprint")
    if fingerprint and fingerprint == before.get("dataset_fingerprint") and not args.allow_repeat:
        raise ConfigError(
            f"{flag} was trained on --dataset {args.dataset}, which this stage would read again from its "
            "start; prepare another one (another --seed of tools/preprocess_mix.py), or give --allow-repeat"
        )
