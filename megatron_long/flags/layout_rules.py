"""The rules that a parallel layout must keep, checked before anything is built."""

from argparse import Namespace

from megatron_long.errors import ConfigError

UNEVEN_STAGES = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)
"""Megatron's arguments that cut the layers unevenly; it checks them itself."""


def check_layout(args: Namespace, world_size: int) -> None:
    """Refuse a layout that cannot be cut, in the words of the flags.

    Args:
        args: Megatron's parsed flags, before its own validation.
        world_size: Processes of the job.
    Raises: ConfigError: the first rule broken.
    """
    tp = args.tensor_model_parallel_size
    pp = args.pipeline_model_parallel_size
    cp = args.context_parallel_size
    _check_world_size(world_size, tp, pp, cp)
    _check_parts(args, tp, pp)
    _check_sequence(args.seq_length, tp if args.sequence_parallel else 1, cp)
    data_parallel = world_size // (tp * pp * cp)
    if args.global_batch_size and args.micro_batch_size:
        step = args.micro_batch_size * data_parallel
        if args.global_batch_size % step:
            raise ConfigError(
                f"--global-batch-size {args.global_batch_size} is not a multiple of "
                f"--micro-batch-size {args.micro_batch_size} * data parallel size {data_parallel} "
                f"({step}); {_neighbours(args.global_batch_size, step)}"
            )
    if cp > 1 and "a2a" in args.cp_comm_type:
        _check_dealt_heads(args, "a2a", f"--context-parallel-size {cp}", cp)
    if cp > 1 and "a2a+p2p" in args.cp_comm_type:
        sizes = _two_levels(args.hierarchical_context_parallel_sizes, cp)
        named = f"the first of --hierarchical-context-parallel-sizes {sizes[0]} {sizes[1]}"
        _check_dealt_heads(args, "a2a+p2p", named, sizes[0])


def _check_parts(args: Namespace, tp: int, pp: int) -> None:
    """What tensor and pipeline parallelism cut must have as many parts."""
    for flag, size, parts, by in (
        ("--num-attention-heads", args.num_attention_heads, tp, "--tensor-model-parallel-size"),
        ("--num-query-groups", args.num_query_groups, tp, "--tensor-model-parallel-size"),
        (
            "--num-layers",
            None if any(getattr(args, name) for name in UNEVEN_STAGES) else args.num_layers,
            pp,
            "--pipeline-model-parallel-size",
        ),
        ("--padded-vocab-size", args.padded_vocab_size, tp, "--tensor-model-parallel-size"),
    ):
        shared = (
            flag == "--num-query-groups" and parts % (size or 1) == 0
        )  # heads are then repeated
        if size and size % parts and not shared:
            raise ConfigError(
                f"{flag} {size} is not a multiple of {by} {parts}; "
                f"choose a {by} that divides {size}"
            )


def _two_levels(sizes: list[int] | None, cp: int) -> list[int]:
    """The sizes of a2a and p2p groups."""
    if sizes and len(sizes) == 2 and min(sizes) > 0 and sizes[0] * sizes[1] == cp:
        return sizes
    given = "is missing" if sizes is None else f"{' '.join(map(str, sizes))} does not fit"
    example = f"{cp // 2} 2" if cp % 2 == 0 else f"{cp} 1"
    raise ConfigError(
        f"--hierarchical-context-parallel-sizes {given}: --cp-comm-type a2a+p2p needs two sizes, of its a2a "
        f"and its p2p groups, whose product is --context-parallel-size {cp}; give for example {example}"
    )


def _check_dealt_heads(args: Namespace, kind: str, named: str, parts: int) -> None:
    """`a2a` deals the heads of each tensor-parallel rank out over the ranks of its group.

    Args:
        kind: Of --cp-comm-type.
        named: What gives the ranks of a group, in the user's words.
        parts: That number.
    Source: Transformer Engine, `AttnFuncWithCPAndQKVOA2A` and `AttnFuncWithCPAndKVP2P`.
    """
    tp = args.tensor_model_parallel_size
    for flag, heads in (
        ("--num-attention-heads", args.num_attention_heads),
        ("--num-query-groups", args.num_query_groups if args.group_query_attention else None),
    ):
        if heads and heads % (tp * parts):
            raise ConfigError(
                f"{flag} {heads} is not a multiple of --tensor-model-parallel-size {tp} * {named} "
                f"({tp * parts}), which --cp-comm-type {kind} needs; give --cp-comm-type p2p"
            )


def _check_world_size(world_size: int, tp: int, pp: int, cp: int) -> None:
    devices = tp * pp * cp
    if world_size % devices == 0:
        return
    raise ConfigError(
        f"{world_size} process{'' if world_size == 1 else 'es'} (--nproc-per-node * nodes) cannot hold "
        f"whole replicas: --tensor-model-parallel-size {tp} * "
        f"--pipeline-model-parallel-size {pp} * --context-parallel-size {cp} takes {devices} each; "
        f"start {_neighbours(world_size, devices).removeprefix('use ')} processes, "
        "or change the layout"
    )


def _check_sequence(seq_length: int | None, sequence_parallel: int, cp: int) -> None:
    if seq_length is None:
        raise ConfigError("--seq-length is missing: give the tokens of a window, or a --recipe")
    divisor = (2 * cp if cp > 1 else 1) * sequence_parallel
    if seq_length % divisor == 0:
        return
    rule = f"2 * --context-parallel-size {cp}" if cp > 1 else ""
    if sequence_parallel > 1:
        shard = f"--tensor-model-parallel-size {sequence_parallel} (--sequence-parallel)"
        rule = f"{rule} * {shard}" if rule else shard
    raise ConfigError(
        f"--seq-length {seq_length} is not a multiple of {rule} ({divisor}); "
        f"{_neighbours(seq_length, divisor)}"
    )


def _neighbours(value: int, step: int) -> str:
    """The multiples of `step` around a value.

    >>> _neighbours(131000, 16), _neighbours(3, 4)
    ('use 130992 or 131008', 'use 4')
    """
    below, above = value // step * step, -(-value // step) * step
    return f"use {below} or {above}" if below else f"use {above}"
