"""Rules that relate several flags of training, or ask the disk; `flags.rules` has those of one flag."""

import errno
import os
import sys
from argparse import Namespace
from pathlib import Path

from megatron_long.checkpoint.choosing import has_checkpoint, require_checkpoint
from megatron_long.errors import ConfigError
from megatron_long.flags.argv import Argv
from megatron_long.flags.layout_rules import check_layout
from megatron_long.flags.rules import check_rules, flag_of
from megatron_long.model.rope import rope_from_arguments

PATH_FLAGS = (
    *("--save", "--load", "--pretrained-checkpoint", "--next-stage-of"),
    *("--tensorboard-dir", "--wandb-save-dir"),
    *("--dataset", "--hf-config", "--hf-checkpoint", "--export-hf", "--loss-log"),
    *("--tokenizer-model", "--data-cache-path", "--needle-haystack"),
)
"""Each followed by one path."""


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
    check_deterministic_attention(args)


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


def check_samples(args: Namespace) -> None:
    """No more samples than Python's `len` of a dataset can give."""
    batch = args.global_batch_size or args.micro_batch_size or 1
    for name, each in (("train_iters", batch), ("train_samples", 1)):
        value = getattr(args, name)
        if value is not None and value * each > sys.maxsize:
            raise ConfigError(
                f"{flag_of(name)} {value} asks for more than {sys.maxsize:,} windows in all; give at most "
                f"{sys.maxsize // each}"
            )


def check_random_weights(args: Namespace) -> None:
    """Weights that are all 0 have gradients of 0 at every step."""
    if args.load or args.pretrained_checkpoint or args.hf_checkpoint:
        return
    for name in ("init_method_std", "embedding_init_method_std"):
        if getattr(args, name) == 0:
            raise ConfigError(
                f"{flag_of(name)} 0 gives random weights that are all 0, whose gradients are 0 at every "
                "step; give one above 0, or start from a checkpoint"
            )


def check_deterministic_attention(args: Namespace) -> None:
    """cuDNN's deterministic backward pass of attention needs memory that grows with the square of the length.

    Measured with cuDNN 9.19 on an H200: 513.01 GiB requested for 16 heads and 131,072 tokens, which is two
    bytes per head and pair of tokens, and 1 GiB. Transformer Engine 2.20 does not choose cuDNN for padded
    documents of such sizes.
    """
    may_use_cudnn = (
        args.transformer_impl == "transformer_engine"
        and args.attention_backend.name in ("auto", "fused")
        and not args.document_masking
    )
    memory_bytes = deterministic_gpu_bytes()
    if not (args.deterministic_mode and may_use_cudnn and memory_bytes):
        return
    by_heads, by_tokens = _split_of_attention(args)
    heads = args.num_attention_heads // (args.tensor_model_parallel_size * by_heads)
    tokens = args.seq_length // by_tokens
    workspace_bytes = 2 * args.micro_batch_size * heads * tokens**2
    if workspace_bytes > memory_bytes:
        raise ConfigError(
            "--deterministic-mode makes cuDNN's attention request a workspace of "
            f"{workspace_bytes / 2**30:,.0f} GiB for {tokens:,} tokens and {heads} heads on each GPU, "
            f"and this GPU has {memory_bytes / 2**30:.0f} GiB; give --attention-backend flash with "
            "FlashAttention installed, a shorter --seq-length, or a larger --context-parallel-size with "
            "--cp-comm-type p2p"
        )


def _split_of_attention(args: Namespace) -> tuple[int, int]:
    """Over how many context-parallel ranks attention splits the heads, and over how many the tokens."""
    size, kind = args.context_parallel_size, (args.cp_comm_type or ["p2p"])[0]
    if kind == "a2a":
        return size, 1
    if kind == "a2a+p2p":
        heads = args.hierarchical_context_parallel_sizes[0]
        return heads, size // heads
    return 1, size


def deterministic_gpu_bytes() -> int | None:
    """Memory of this process's GPU, if Transformer Engine may choose cuDNN for deterministic attention on it.

    Source: Transformer Engine 2.20, `get_attention_backend`: compute capability 9.0 and later.
    """
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


RELATIONS = (check_warmup, check_samples, check_random_weights, check_data, check_start, check_rope)


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


def check_words(argv: Argv) -> None:
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
    for flag, values in argv.pairs():
        if flag in PATH_FLAGS and values:
            _check_length(flag, Path(values[0]))


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
