"""The project's own flags, and the rules that they must keep, checked before anything is built."""

import errno
import importlib.util
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_long.checkpoint.choosing import has_checkpoint, require_checkpoint
from megatron_long.errors import ConfigError
from megatron_long.job import hang_monitor
from megatron_long.model.rope import rope_from_arguments

CHECKPOINT_FORMAT = "torch_dist"
"""Megatron's format whose files are hashed when they are saved."""
SAVE_MINUTES = 30.0
NEVER = 1 << 40
"""A `--save-interval`, which Megatron insists on, that no run reaches."""
"""Set by nvidia-resiliency-ext's launcher for each rank."""


PATH_FLAGS = (
    *("--save", "--load", "--pretrained-checkpoint", "--tensorboard-dir", "--wandb-save-dir"),
    *("--dataset", "--hf-config", "--hf-checkpoint", "--export-hf", "--loss-log"),
    *("--tokenizer-model", "--data-cache-path", "--needle-haystack"),
)
"""Each followed by one path."""


@dataclass(kw_only=True)
class LongContextArguments:
    """Flags of megatron_long next to Megatron's own."""

    recipe: str | None = None
    """Recipe whose flags come before those on the command line; tools/show_recipe.py prints them."""

    hf_config: str | None = None
    """Hugging Face model folder or config.json that gives the model's shape; by default the
    hf_config.json next to the checkpoint of --load."""

    hf_checkpoint: str | None = None
    """Start from this Hugging Face model folder (or GGUF file): each rank reads its slices of the weights.
    A checkpoint in --load goes on instead."""

    export_hf: str | None = None
    """When training ends, write the model saved last as a Hugging Face folder here; needs --save."""

    dataset: str | None = None
    """Folder that tools/preprocess_mix.py wrote; windows of --seq-length tokens are read in file
    order. Instead of --data-path."""

    rope_method: str | None = None
    """How RoPE reaches the longer context: base (the recipe's or --rotary-base), linear, yarn or llama3,
    these three over the model's own base; by default base, or what the model's configuration has."""

    rope_factor: float | None = None
    """Stretch of --rope-method linear, yarn or llama3; by default --seq-length over
    --rope-original-length, rounded up."""

    rope_original_length: int | None = None
    """Tokens that the model was trained on before the stretch; by default what its configuration says."""

    allow_repeat: bool = False
    """Read the dataset again from its start when the run asks for more tokens than it holds."""

    document_masking: bool = False
    """No attention between the documents of a window, and no loss on the token that would predict
    another document's first; the windows themselves stay the same. Needs --dataset."""

    megatron_loss: bool = False
    """Take Megatron's own output layer and cross entropy, which build the full logits, instead of
    the chunked ones."""

    loss_log: str | None = None
    """JSON-lines file for the loss and gradient norm of every step, unrounded."""

    allow_dataset_change: bool = False
    """Go on from a checkpoint with another dataset, sequence length, tokenizer or --document-masking than it
    was trained on."""

    save_minutes: float | None = None
    """Minutes between checkpoints, measured from the end of one save to the start of the next; by default 30,
    or never where --save-interval counts steps. 0 leaves only the last save."""

    keep_last: int | None = None
    """Newest checkpoints of --save to keep; earlier ones are deleted after each save. By default, and with
    0, all are kept."""

    keep_every: int | None = None
    """With --keep-last, keep checkpoints whose iteration is a multiple of this too."""

    max_faulty_steps: int = 10
    """Steps with a NaN, an Inf or a loss spike that are left out within 100 steps; one more ends the run
    with a checkpoint of before it."""

    spike_deviations: float = 10.0
    """How many (robust) standard deviations of the last 100 steps a loss may lie above their median, one
    being at least 0.05 nats; 0 takes no loss for a spike."""

    hang_timeout: float = 480.0
    """Seconds that may pass between two micro-batches before a process writes its stacks and ends the job;
    four times as long for start, first step and saving. 0 waits for ever."""

    verbose: bool = False
    """Print all that Megatron says before the first step, values of all flags included. Without it that goes
    to logs/start.log in --save, or next to --loss-log."""


def check_reliability(arguments: LongContextArguments, args: Namespace) -> None:
    """Refuse values of our flags that make no sense.

    Raises: ConfigError: the first rule broken.
    """
    for flag, value, least in (
        ("--save-minutes", arguments.save_minutes, 0),
        ("--keep-last", arguments.keep_last, 0),
        ("--keep-every", arguments.keep_every, 1),
        ("--max-faulty-steps", arguments.max_faulty_steps, 0),
        ("--spike-deviations", arguments.spike_deviations, 0),
        ("--hang-timeout", arguments.hang_timeout, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{flag} {value} is too small; at least {least}")
    if arguments.keep_every and not arguments.keep_last:
        raise ConfigError(
            f"--keep-every {arguments.keep_every} says what to keep of what --keep-last deletes; give "
            "--keep-last too"
        )
    if arguments.keep_last and args.save_retain_interval:
        raise ConfigError(
            "--keep-last and Megatron's --save-retain-interval both delete checkpoints; give one of them"
        )
    if args.save_retain_interval and args.save_interval is None:
        raise ConfigError(
            f"--save-retain-interval {args.save_retain_interval} counts steps of --save-interval, which is "
            "not given; give it too, or --keep-last for checkpoints that are saved by time"
        )
    _check_checkpoints_are_covered(args)


def choose_save_times(arguments: LongContextArguments, args: Namespace) -> None:
    """Save by time where the user names no steps."""
    if arguments.save_minutes is None:
        arguments.save_minutes = SAVE_MINUTES if args.save_interval is None else 0.0
        args.save_minutes = arguments.save_minutes
    if args.save_interval is None:
        args.save_interval = NEVER


def _check_checkpoints_are_covered(args: Namespace) -> None:
    """Refuse checkpoints that would be written or loaded without hashes."""
    if args.save and args.ckpt_format != CHECKPOINT_FORMAT:
        raise ConfigError(
            f"--ckpt-format {args.ckpt_format} with --save: checkpoints of that format get no hashes, and "
            f"the next start would not find them; give --ckpt-format {CHECKPOINT_FORMAT}, or drop the flag"
        )
    for flag in ("--non-persistent-ckpt-type", "--non-persistent-save-interval"):
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if value is not None:
            raise ConfigError(
                f"{flag} {value} is not supported: Megatron would load such a checkpoint in the place of the "
                "one that was checked; save more often with --save-minutes or --save-interval, and give "
                "--keep-last to keep few of them"
            )


def check_wandb(args: Namespace) -> None:
    """Refuse to log to W&B where Megatron could not.

    Raises: ConfigError: the package, the run's name or a folder is missing.
    """
    if not args.wandb_project:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"--wandb-project {args.wandb_project} needs wandb, which is not installed: pip install wandb"
        )
    if not args.wandb_exp_name:
        raise ConfigError(
            f"--wandb-project {args.wandb_project} needs a name for the run; give --wandb-exp-name"
        )
    if not args.wandb_save_dir and not args.save:
        raise ConfigError(
            "--wandb-project keeps its files next to the checkpoints; give --save or --wandb-save-dir"
        )


def choose_async_writer(args: Namespace) -> None:
    """Let `--async-save` alone do what it says: Megatron drops it silently without two other flags.

    Its writer is that of nvidia-resiliency-ext where a recent one is installed, else Megatron's own.
    """
    if args.async_save:
        args.use_persistent_ckpt_worker = True
        if not hang_monitor.is_installed():
            args.async_strategy = "mcore"


def check_words(argv: Sequence[str]) -> None:
    """Refuse words of the command line that cannot be written down, and paths that no file can have.

    Raises: ConfigError: names the flag and the word.
    """
    for word in argv:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(
                f"{word!a} on the command line has bytes that are not UTF-8, and each checkpoint keeps "
                "the command line as UTF-8 text; give another path, or a symbolic link to this one"
            ) from None
    flags = [word.split("=", 1) for word in argv]
    for (flag, *given), following in zip(flags, [*argv[1:], ""], strict=True):
        if flag in PATH_FLAGS:
            _check_length(flag, Path(given[0] if given else following))


def _check_length(flag: str, path: Path) -> None:
    # Files are first written as .NAME.12345678.tmp next to their place.
    written = path.with_name(f".{path.name}.12345678.tmp") if flag == "--export-hf" else path
    try:
        os.lstat(written)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"{flag} {path} is too long: file systems take names of about 255 bytes, of which "
                "--export-hf needs 14 for itself, and paths of 4,095; give a shorter one"
            ) from None


def check_paths(arguments: LongContextArguments) -> None:
    """Refuse folders of our flags that do not exist.

    Raises: ConfigError: names the flag and the path.
    """
    remedies = {
        "--dataset": (arguments.dataset, "give the --output folder of tools/preprocess_mix.py"),
        "--hf-config": (arguments.hf_config, "give a Hugging Face model folder or its config.json"),
        "--hf-checkpoint": (arguments.hf_checkpoint, "give a Hugging Face model folder"),
    }
    for flag, (value, remedy) in remedies.items():
        if value and not Path(value).exists():
            raise ConfigError(f"{flag} {value} does not exist; {remedy}")


def check_start_and_end(arguments: LongContextArguments, args: Namespace) -> None:
    """Refuse two starts, and an export that could not be made.

    Raises: ConfigError: names the flags.
    """
    if arguments.hf_checkpoint and args.pretrained_checkpoint:
        raise ConfigError(
            "--hf-checkpoint and --pretrained-checkpoint are two starts; give one of them"
        )
    if arguments.hf_checkpoint and args.init_model_with_meta_device:
        raise ConfigError(
            "--hf-checkpoint fills the model when it is built, and --init-model-with-meta-device builds "
            "it empty; drop one of them, or convert the checkpoint with tools/convert_checkpoint.py"
        )
    if arguments.export_hf and not args.save:
        raise ConfigError("--export-hf writes the checkpoint saved last; give --save too")


def check_export(folder: str | None) -> list[str]:
    """Refuse to train for an export that has no place; for the process that writes it.

    Returns: Nothing, for `rendezvous.from_first`.
    Raises: ConfigError: something lies there, or nothing can be made there.
    """
    path = Path(folder).absolute() if folder else None
    above = next((parent for parent in path.parents if parent.exists()), path) if path else None
    if above and not (above.is_dir() and os.access(above, os.W_OK)):
        raise ConfigError(
            f"--export-hf {path} cannot be made: {above} is a file, or may not be written to; give "
            "another path"
        )
    if path and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"--export-hf {path} exists already; results are never overwritten silently: give another "
            "path, or remove it"
        )
    return []


def check_files(arguments: LongContextArguments, args: Namespace) -> None:
    """Refuse paths that are not there, and data given twice.

    Raises: ConfigError: names the flag and the path.
    """
    stock_data = [args.data_path, args.train_data_path, args.data_args_path]
    if arguments.dataset and any(stock_data):
        raise ConfigError(
            "--dataset and --data-path (or --train-data-path, --data-args-path) are both given; "
            "training data come from one of them"
        )
    if not arguments.dataset and not any(stock_data) and not args.mock_data:
        raise ConfigError(
            "no training data: give --dataset with a folder of tools/preprocess_mix.py, or Megatron's "
            "own --data-path"
        )
    # With another start, that is where Megatron begins until --load has a checkpoint.
    has_start = args.pretrained_checkpoint is not None or arguments.hf_checkpoint is not None
    if not has_start or has_checkpoint(args.load):
        check_checkpoint(args.load, "--load", args.save)


def check_documents(arguments: LongContextArguments, args: Namespace) -> None:
    """Refuse masks between documents that cannot be had, and Megatron's own flags for them.

    Raises: ConfigError: names the flag and what to give instead.
    """
    if args.reset_attention_mask or args.reset_position_ids:
        raise ConfigError(
            "--reset-attention-mask and --reset-position-ids build a dense mask, 64 GiB at 131072 "
            "tokens; give --document-masking, or drop them (the recipe does not mask between documents)"
        )
    if args.dataloader_inter_document_masking:
        raise ConfigError(
            "--dataloader-inter-document-masking is wrong under context parallelism (it cuts the whole "
            "window between ranks, while its offsets are those of documents); give --document-masking"
        )
    if not arguments.document_masking:
        return
    if not arguments.dataset:
        raise ConfigError(
            "--document-masking needs to know where documents begin: give --dataset with a folder of "
            "tools/preprocess_mix.py in the place of other data"
        )
    for flag in ("micro_batch_size", "eval_micro_batch_size"):
        size = getattr(args, flag)
        if size not in (None, 1):
            raise ConfigError(
                f"--{flag.replace('_', '-')} {size} with --document-masking: a micro-batch is one window "
                "there; give 1"
            )


def check_rope(args: Namespace) -> None:
    """Refuse RoPE flags that contradict each other, or that no Hugging Face Llama can carry.

    Raises: ConfigError: see `rope_from_arguments`.
    """
    if args.position_embedding_type in ("rope", "yarn"):
        rope_from_arguments(args).to_arguments()


def check_checkpoint(folder: str | None, flag: str, save: str | None = None) -> None:
    """Refuse a folder that holds no Megatron checkpoint; Megatron would start from random weights.

    Raises: ConfigError, DataError: see `require_checkpoint`.
    """
    if folder is not None:
        is_saved_to = save is not None and Path(save).absolute() == Path(folder).absolute()
        require_checkpoint(Path(folder), flag, is_saved_to=is_saved_to)
