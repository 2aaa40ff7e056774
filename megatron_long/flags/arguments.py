"""The project's own flags, and what follows from those that are not given."""

from argparse import Namespace
from dataclasses import dataclass

from megatron_long.job import hang_monitor

SAVE_MINUTES = 30.0
NEVER = 1 << 40
"""A `--save-interval`, which Megatron insists on, that no run reaches."""


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
    A checkpoint in --load is resumed instead."""

    next_stage_of: str | None = None
    """Start from this finished run (its --save folder, or one checkpoint of it, iter_N) with its optimizer,
    at step 0 of a new schedule and of another dataset; windows and RoPE base may grow. A checkpoint in --load
    is resumed instead."""

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

    keep_window_order: bool = False
    """With --document-masking, give data-parallel replicas the windows of a step in file order; by default
    they are dealt so that all have about the same attention work. A step's windows are the same."""

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


def choose_save_times(arguments: LongContextArguments, args: Namespace) -> None:
    """Save by time where the user names no steps."""
    if arguments.save_minutes is None:
        arguments.save_minutes = SAVE_MINUTES if args.save_interval is None else 0.0
        args.save_minutes = arguments.save_minutes
    if args.save_interval is None:
        args.save_interval = NEVER


def choose_async_writer(args: Namespace) -> None:
    """Let `--async-save` alone do what it says: Megatron drops it silently without two other flags.

    Its writer is that of nvidia-resiliency-ext where a recent one is installed, else Megatron's own.
    """
    if args.async_save:
        args.use_persistent_ckpt_worker = True
        if not hang_monitor.is_installed():
            args.async_strategy = "mcore"
