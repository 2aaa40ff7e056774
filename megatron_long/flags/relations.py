"""Rules that relate several flags of training, or ask the disk; `flags.rules` has those of one flag."""

from argparse import Namespace
from pathlib import Path

from megatron_long.checkpoint.choosing import has_checkpoint, require_checkpoint
from megatron_long.errors import ConfigError
from megatron_long.flags.layout_rules import check_layout
from megatron_long.flags.rules import check_rules
from megatron_long.model.rope import rope_from_arguments


def check_flags(args: Namespace, world_size: int) -> None:
    """Refuse flags that a run could not keep, in the words that the user typed.

    Args:
        args: All flags, ours and Megatron's, before Megatron's own validation.
        world_size: Processes of the job.
    Raises: ConfigError, DataError: the first rule broken.
    """
    check_rules(args)
    for check in RELATIONS:
        check(args)
    check_layout(args, world_size)


def check_warmup(args: Namespace) -> None:
    """Megatron warms up within the steps over which the rate decays, by default all."""
    unit = "iters" if args.train_iters else "samples"
    names = (f"{name}_{unit}" for name in ("train", "lr_decay", "lr_warmup"))
    steps, decay, warmup = (getattr(args, name) for name in names)
    flag, last = ("train", steps) if decay is None else ("lr-decay", decay)
    if steps and args.lr_warmup_fraction is None and warmup >= last:
        raise ConfigError(
            f"--lr-warmup-{unit} {warmup} is not below --{flag}-{unit} {last}: the warmup must end before "
            f"the schedule does; lower --lr-warmup-{unit}, or raise --{flag}-{unit}"
        )


def check_data(args: Namespace) -> None:
    """Training needs data."""
    stock = args.data_path or args.train_data_path or args.data_args_path or args.mock_data
    if not (args.dataset or stock):
        raise ConfigError(
            "no training data: give --dataset with a folder of tools/preprocess_mix.py, or Megatron's own "
            "--data-path"
        )


def check_start(args: Namespace) -> None:
    """With another start, that is where Megatron begins until --load has a checkpoint."""
    has_start = args.pretrained_checkpoint is not None or args.hf_checkpoint is not None
    if args.load is None or (has_start and not has_checkpoint(args.load)):
        return
    is_saved_to = args.save and Path(args.save).absolute() == Path(args.load).absolute()
    require_checkpoint(Path(args.load), "--load", is_saved_to=bool(is_saved_to))


def check_rope(args: Namespace) -> None:
    """RoPE flags that contradict each other, or that no Hugging Face Llama can carry."""
    if args.position_embedding_type in ("rope", "yarn"):
        rope_from_arguments(args).to_arguments()


RELATIONS = (check_warmup, check_data, check_start, check_rope)


def check_export(folder: str | None) -> None:
    """Refuse to train for an export that has no place.

    Raises: ConfigError: something lies there.
    """
    path = Path(folder) if folder else None
    if path and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"--export-hf {path} exists already; results are never overwritten silently: give another "
            "path, or remove it"
        )
