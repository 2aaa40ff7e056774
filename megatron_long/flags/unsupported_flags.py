"""Megatron's flags that a run here would drop without a word, or that no run can keep: refused by name.

The model is written next to its checkpoints as a Hugging Face Llama, Mistral or Qwen2 (`hf_config.json`), and
evaluation and export believe that file: what it cannot say must not be trained.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_long.errors import ConfigError

NO_LLAMA = (
    "no hf_config.json of a Llama, Mistral or Qwen2 can say it, so that evaluation and export would "
    "compute another model"
)
DROP = "drop the flag"


@dataclass(frozen=True)
class Rule:
    """One of Megatron's arguments, and what it may be."""

    flag: str
    name: str
    """Of the argument."""
    allowed: tuple[Any, ...]
    why: str = NO_LLAMA
    remedy: str = DROP


MODEL_RULES = (
    Rule("--num-experts", "num_experts", (None,)),
    Rule("--qk-layernorm", "qk_layernorm", (False,)),
    Rule("--qk-l2-norm", "qk_l2_norm", (False,)),
    Rule(
        "--window-size",
        "window_size",
        (None,),
        "attention here always reaches every token, and hf_config.json is written without a window",
    ),
    Rule("--normalization", "normalization", ("RMSNorm",), remedy="give --normalization RMSNorm"),
    Rule(
        "--position-embedding-type",
        "position_embedding_type",
        ("rope", "yarn"),
        remedy="give rope or yarn",
    ),
    Rule("--multi-latent-attention", "multi_latent_attention", (False,)),
    Rule("--mtp-num-layers", "mtp_num_layers", (None,)),
    Rule("--no-rope-freq", "no_rope_freq", (None,)),
    Rule("--attention-output-gate", "attention_output_gate", (False,)),
    Rule("--linear-attention-freq", "linear_attention_freq", (None,)),
    Rule("--experimental-attention-variant", "experimental_attention_variant", (None,)),
    Rule("--heterogeneous-layers-config-path", "heterogeneous_layers_config_path", (None,)),
    Rule("--apply-layernorm-1p", "layernorm_zero_centered_gamma", (False,)),
    Rule(
        "--use-mup",
        "use_mup",
        (False,),
        "muP scales the embedding, the attention scores and the logits; the chunked loss does not scale "
        "these, and no hf_config.json of a Llama can say it",
    ),
)
"""What would make another model than a Llama."""

LOOP_RULES = (
    Rule(
        "--enable-msc",
        "enable_msc",
        (False,),
        "checkpoints are checked and read as files, and a storage client has a reader of its own",
        "mount the storage, or copy the checkpoint to a disk",
    ),
    Rule(
        "--rampup-batch-size",
        "rampup_batch_size",
        (None,),
        "Megatron-Core 0.19 reads it no more",
        'give --step-batch-size-schedule "0:SIZE TOKENS:SIZE ..."',
    ),
    Rule(
        "--sft",
        "sft",
        (False,),
        "training data here are plain windows of tokens, and no prompt would be masked",
    ),
    Rule(
        "--fim-data",
        "fim_data",
        (False,),
        "training data here are plain windows of tokens, and none would be rearranged for it",
    ),
    Rule(
        "--use-checkpoint-args",
        "use_checkpoint_args",
        (False,),
        "the arguments stored in a checkpoint are not read",
        "drop the flag: the model comes from the hf_config.json of --load anyway",
    ),
    Rule(
        "--use-mp-args-from-checkpoint-args",
        "use_mp_args_from_checkpoint_args",
        (False,),
        "the arguments stored in a checkpoint are not read",
        "give the layout by its flags; any layout reads any checkpoint",
    ),
)
"""What Megatron does in code that is not run here."""

CHUNKED_LOSS_RULES = (
    Rule(
        "--defer-embedding-wgrad-compute",
        "defer_embedding_wgrad_compute",
        (False,),
        "it puts off weight gradients of Megatron's output layer, which the chunked loss never calls",
        "drop the flag, or give --megatron-loss",
    ),
)

SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "padded_vocab_size",
    "max_position_embeddings",
    "train_iters",
    "train_samples",
    "log_interval",
    "eval_interval",
    "save_interval",
    "exit_interval",
    "ckpt_step",
)
"""Arguments that are divided by, or are the size of something."""


def check_supported(args: Namespace, *, megatron_loss: bool) -> None:
    """Refuse flags of Megatron's that would be dropped silently, or that end in an error without a name.

    Args:
        args: Megatron's parsed flags, before its own validation.
        megatron_loss: Whether Megatron's own output layer and loss are taken.
    Raises: ConfigError: the first rule broken: the flag, why, and what to give instead.
    """
    for rule in (*MODEL_RULES, *LOOP_RULES, *(() if megatron_loss else CHUNKED_LOSS_RULES)):
        value = getattr(args, rule.name)
        if value not in rule.allowed:
            given = rule.flag if value is True else f"{rule.flag} {value}"
            raise ConfigError(f"{given} is not supported: {rule.why}; {rule.remedy}")
    _check_sizes(args)
    _check_validation(args)
    _check_warmup(args)
    _check_tensorboard(args.tensorboard_dir)


def _check_sizes(args: Namespace) -> None:
    for name in SIZES:
        value = getattr(args, name)
        if value is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {value} must be 1 or more; give a positive number")


def _check_validation(args: Namespace) -> None:
    if args.full_validation == args.multiple_validation_sets:
        return
    given, other = "--full-validation", "--multiple-validation-sets"
    if args.multiple_validation_sets:
        given, other = other, given
    raise ConfigError(
        f"{given} without {other} ends in an error of Megatron's at the first validation; give both, or "
        "only --eval-iters"
    )


def _check_warmup(args: Namespace) -> None:
    """Megatron warms up within the steps over which the rate decays, by default all."""
    for unit in ("iters", "samples"):
        steps = getattr(args, f"train_{unit}")
        if not steps:
            continue
        decay = getattr(args, f"lr_decay_{unit}")
        last = f"--train-{unit} {steps}" if decay is None else f"--lr-decay-{unit} {decay}"
        warmup = getattr(args, f"lr_warmup_{unit}")
        fraction = args.lr_warmup_fraction
        if fraction is not None and fraction >= 1:
            raise ConfigError(
                f"--lr-warmup-fraction {fraction} leaves nothing of the run after the warmup; give less "
                "than 1"
            )
        if fraction is None and warmup >= (steps if decay is None else decay):
            raise ConfigError(
                f"--lr-warmup-{unit} {warmup} is not below {last}: the warmup must end before the schedule "
                f"does; lower --lr-warmup-{unit}, or raise {last.split()[0]}"
            )
        return


def _check_tensorboard(folder: str | None) -> None:
    if not folder:
        return
    for path in (Path(folder), *Path(folder).parents):
        if path.is_dir():
            return
        if path.exists():
            raise ConfigError(
                f"--tensorboard-dir {folder}: {path} is a file, and a folder is needed; give another path"
            )
