"""What each flag of training may be: one table, applied before a GPU is taken.

Out of range, torch or numpy end in a traceback after the start, or a flag silently does nothing: `--clip-grad
nan` clips nothing. Megatron silently drops others, or trains what cannot be recorded: the model is
written next to its checkpoints as a Hugging Face Llama, Mistral or Qwen2 (`hf_config.json`), and evaluation
and export believe that file.
"""

import importlib.util
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_long.errors import ConfigError
from megatron_long.job import hang_monitor

CHECKPOINT_FORMAT = "torch_dist"
"""Megatron's format whose files are hashed when they are saved."""
LARGEST_SEED = 4_000_000_000
"""numpy takes 32 bits, and Megatron adds numbers of ranks."""


@dataclass(frozen=True)
class Rule:
    """One row: of which flags, what is said of a value that breaks it, and what to do instead."""

    flags: str
    """As they are typed, with spaces between."""
    broken: str
    """Follows the flag and its value."""
    remedy: str
    allows: Callable[[Any], bool] = lambda value: not value
    """Whether a value keeps the rule; by default only that of a flag which is not given."""
    when: str = ""
    """Flags of which one makes the rule hold; by default it always does."""
    unless: str = ""
    """Flags of which one lifts the rule."""


def unset(value: Any) -> bool:
    """Whether a flag is not given; 0 is a value."""
    return value is None or value is False


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def exists(value: str | None) -> bool:
    return not value or Path(value).exists()


def may_be_folder(value: str | None) -> bool:
    paths = [Path(value), *Path(value).parents] if value else []
    return all(path.is_dir() or not path.exists() for path in paths)


def in_range(flags: str, words: str, holds: Callable[[Any], bool]) -> Rule:
    """A rule about a number, which may be left out."""
    return Rule(
        flags, "is out of range", f"it must be {words}", lambda value: value is None or holds(value)
    )


def unsupported(
    flags: str,
    why: str = "no hf_config.json of a Llama, Mistral or Qwen2 can say it, so that evaluation and export "
    "would compute another model",
    remedy: str = "drop the flag",
    allows: Callable[[Any], bool] = unset,
    unless: str = "",
) -> Rule:
    return Rule(flags, f"is not supported: {why}", remedy, allows, unless=unless)


RULES = (
    # Paths
    Rule(
        "--dataset", "does not exist", "give the --output folder of tools/preprocess_mix.py", exists
    ),
    Rule(
        "--hf-config",
        "does not exist",
        "give a Hugging Face model folder or its config.json",
        exists,
    ),
    Rule("--hf-checkpoint", "does not exist", "give a Hugging Face model folder", exists),
    Rule(
        "--tensorboard-dir",
        "is a file or lies below one, and a folder is needed",
        "give another path",
        may_be_folder,
    ),
    # Numbers
    in_range(
        "--lr --min-lr --lr-warmup-init --lr-warmup-iters --lr-warmup-samples --weight-decay "
        "--start-weight-decay --end-weight-decay --clip-grad --init-method-std --embedding-init-method-std "
        "--num-workers --eval-iters "
        "--exit-duration-in-mins --save-minutes --keep-last --max-faulty-steps --spike-deviations "
        "--hang-timeout",
        "at least 0",
        lambda value: value >= 0,
    ),
    in_range("--adam-eps --loss-scale", "above 0", lambda value: value > 0),
    in_range(
        "--adam-beta1 --adam-beta2 --attention-dropout --hidden-dropout --lr-warmup-fraction",
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
    ),
    in_range("--seed", f"1 to {LARGEST_SEED:,}", lambda value: 1 <= value <= LARGEST_SEED),
    in_range(
        "--tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size --seq-length "
        "--micro-batch-size --global-batch-size --num-layers --hidden-size --ffn-hidden-size "
        "--num-attention-heads --num-query-groups --kv-channels --padded-vocab-size "
        "--max-position-embeddings --train-iters --train-samples --log-interval --eval-interval "
        "--save-interval --exit-interval --ckpt-step --keep-every",
        "1 or more",
        lambda value: value >= 1,
    ),
    # What would make another model than a Llama
    unsupported(
        "--num-experts --qk-layernorm --qk-l2-norm --multi-latent-attention --mtp-num-layers --no-rope-freq "
        "--attention-output-gate --linear-attention-freq --experimental-attention-variant "
        "--heterogeneous-layers-config-path --apply-layernorm-1p"
    ),
    unsupported(
        "--window-size",
        "attention here always reaches every token, and hf_config.json is written without a window",
    ),
    unsupported("--normalization", remedy="give --normalization RMSNorm", allows=one_of("RMSNorm")),
    unsupported(
        "--position-embedding-type", remedy="give rope or yarn", allows=one_of("rope", "yarn")
    ),
    unsupported(
        "--use-mup",
        "muP scales the embedding, the attention scores and the logits; the chunked loss does not scale "
        "these, and no hf_config.json of a Llama can say it",
    ),
    Rule(
        "--rope-factor --rope-original-length",
        "belongs to --rope-method linear, yarn or llama3",
        "give that too",
        unset,
        unless="--rope-method",
    ),
    # What Megatron does in code that is not run here
    unsupported(
        "--enable-msc",
        "checkpoints are checked and read as files, and a storage client has a reader of its own",
        "mount the storage, or copy the checkpoint to a disk",
    ),
    unsupported(
        "--rampup-batch-size",
        "Megatron-Core 0.19 no longer reads it",
        'give --step-batch-size-schedule "0:SIZE TOKENS:SIZE ..."',
    ),
    unsupported(
        "--sft --fim-data",
        "training data here are plain windows of tokens: no prompt would be masked, and none rearranged",
    ),
    unsupported(
        "--use-checkpoint-args",
        "the arguments stored in a checkpoint are not read",
        "drop the flag: the model comes from the hf_config.json of --load anyway",
    ),
    unsupported(
        "--use-mp-args-from-checkpoint-args",
        "the arguments stored in a checkpoint are not read",
        "give the layout by its flags; any layout reads any checkpoint",
    ),
    unsupported(
        "--defer-embedding-wgrad-compute",
        "it puts off weight gradients of Megatron's output layer, which the chunked loss never calls",
        "drop the flag, or give --megatron-loss",
        unless="--megatron-loss",
    ),
    Rule(
        "--full-validation",
        "without --multiple-validation-sets ends in an error of Megatron's at the first validation",
        "give both, or only --eval-iters",
        unless="--multiple-validation-sets",
    ),
    Rule(
        "--multiple-validation-sets",
        "without --full-validation ends in an error of Megatron's at the first validation",
        "give both, or only --eval-iters",
        unless="--full-validation",
    ),
    # Data, start and end
    Rule(
        "--dataset",
        "and --data-path (or --train-data-path, --data-args-path) are both given",
        "training data come from one of them",
        when="--data-path --train-data-path --data-args-path",
    ),
    Rule(
        "--hf-checkpoint",
        "and --pretrained-checkpoint are two starts",
        "give one of them",
        when="--pretrained-checkpoint",
    ),
    Rule(
        "--hf-checkpoint",
        "fills the model when it is built, and --init-model-with-meta-device builds it empty",
        "drop one of them, or convert the checkpoint with tools/convert_checkpoint.py",
        when="--init-model-with-meta-device",
    ),
    Rule(
        "--hf-checkpoint --finetune --no-load-optim --use-checkpoint-opt-param-scheduler",
        "and --next-stage-of contradict each other: a stage keeps the weights and the optimizer of the run "
        "before it, and has a schedule of its own",
        "drop one of them; --pretrained-checkpoint starts from weights alone",
        when="--next-stage-of",
    ),
    Rule("--export-hf", "writes the checkpoint saved last", "give --save too", unless="--save"),
    # Checkpoints
    Rule(
        "--keep-every",
        "says what to keep of what --keep-last deletes",
        "give --keep-last too",
        unless="--keep-last",
    ),
    Rule(
        "--keep-last",
        "and Megatron's --save-retain-interval both delete checkpoints",
        "give one of them",
        when="--save-retain-interval",
    ),
    Rule(
        "--save-retain-interval",
        "counts steps of --save-interval, which is not given",
        "give it too, or --keep-last for checkpoints that are saved by time",
        unless="--save-interval",
    ),
    Rule(
        "--ckpt-format",
        "with --save: checkpoints of that format get no hashes, and the next start would not find them",
        f"give --ckpt-format {CHECKPOINT_FORMAT}, or drop the flag",
        one_of(CHECKPOINT_FORMAT),
        when="--save",
    ),
    unsupported(
        "--non-persistent-ckpt-type --non-persistent-save-interval",
        "Megatron would load such a checkpoint instead of the one that was checked",
        "save more often with --save-minutes or --save-interval, and give --keep-last to keep few of them",
    ),
    # Other packages
    Rule(
        "--inprocess-restart",
        "is not supported",
        "restart with --enable-ft-package and --max-restarts of megatron_long.launch",
    ),
    Rule(
        hang_monitor.MONITOR_FLAG,
        "needs nvidia-resiliency-ext",
        "pip install 'nvidia-resiliency-ext>=0.6' (Linux with glibc 2.39, Python up to 3.12), or omit the "
        "flag: --hang-timeout works without it",
        lambda value: not value or hang_monitor.is_installed(),
    ),
    Rule(
        hang_monitor.MONITOR_FLAG,
        "keeps its timeouts next to the checkpoints",
        "give --save",
        unless="--save",
    ),
    Rule(
        "--wandb-project",
        "needs wandb, which is not installed",
        "pip install wandb",
        lambda value: not value or importlib.util.find_spec("wandb") is not None,
    ),
    Rule(
        "--wandb-project",
        "needs a name for the run",
        "give --wandb-exp-name",
        unless="--wandb-exp-name",
    ),
    Rule(
        "--wandb-project",
        "keeps its files next to the checkpoints",
        "give --save or --wandb-save-dir",
        unless="--save --wandb-save-dir",
    ),
    # Masks between documents
    Rule(
        "--reset-attention-mask --reset-position-ids",
        "builds a dense mask, 64 GiB at 131072 tokens",
        "give --document-masking, or drop it (the recipe does not mask between documents)",
    ),
    Rule(
        "--dataloader-inter-document-masking",
        "is wrong under context parallelism (it cuts the whole window between ranks, while its offsets are "
        "those of documents)",
        "give --document-masking",
    ),
    Rule(
        "--document-masking",
        "needs to know where documents begin",
        "give --dataset with a folder of tools/preprocess_mix.py instead of other data",
        unless="--dataset",
    ),
    Rule(
        "--micro-batch-size --eval-micro-batch-size",
        "with --document-masking: a micro-batch is one window there",
        "give 1",
        one_of(None, 1),
        when="--document-masking",
    ),
)


def check_rules(args: Namespace) -> None:
    """Refuse a value that breaks a rule; a rule that names flags which `args` does not hold is left out.

    Args:
        args: Parsed flags, before Megatron's own validation.
    Raises: ConfigError: the first rule broken: flag, value, rule and remedy.

    >>> check_rules(Namespace(hf_checkpoint="model", pretrained_checkpoint="saved"))
    Traceback (most recent call last):
    megatron_long.errors.ConfigError: --hf-checkpoint model does not exist; give a Hugging Face model folder
    """
    values = {flag_of(name): value for name, value in vars(args).items()}
    for flag, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag} {value} is not a finite number; give one")
    for rule in RULES:
        when, unless = rule.when.split(), rule.unless.split()
        is_known = values.keys() >= {*when, *unless}
        is_lifted = any(map(values.get, unless)) or (when and not any(map(values.get, when)))
        if is_lifted or not is_known:
            continue
        for flag in rule.flags.split():
            if flag in values and not rule.allows(values[flag]):
                raise ConfigError(f"{_typed(flag, values[flag])} {rule.broken}; {rule.remedy}")


def flag_of(name: str) -> str:
    """The flag of an argument, as it is typed."""
    if name == "layernorm_zero_centered_gamma":
        return "--apply-layernorm-1p"
    return "--" + name.replace("_", "-")


def _typed(flag: str, value: Any) -> str:
    if value is True:
        return flag
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"
