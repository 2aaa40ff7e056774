"""Peak memory of one GPU in a training step, in bytes, part by part.

Weights in BF16 (or FP8 twice, for both directions of a product), gradients in FP32, the distributed
optimizer's three FP32 values per parameter over data- and context-parallel ranks. Activations are counted
tensor by tensor, as Transformer Engine's layers keep them. Legend: h hidden, f MLP's inner size, d head
size; tensor parallelism divides everything in a layer, because sequence parallelism is on.
"""

from dataclasses import dataclass, fields

from megatron_long.planning.hardware import GIB
from megatron_long.planning.run_shape import RunShape

BF16, FP32 = 2, 4
CHUNKED_LOSS = 4.3 * GIB
"""Buffers of the chunked loss, measured beyond its inputs; they do not grow with the sequence."""
OTHER = 0.5 * GIB
"""Workspaces and fragmentation of the allocator."""
FP8_SAVED = 0.75
"""Of a product's saved input, against BF16; fitted."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of one GPU at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept from forward to backward pass."""
    transient: float
    """The largest temporary: a layer's backward pass, or the loss."""
    other: float = OTHER

    @property
    def total_gib(self) -> float:
        """All parts, GiB."""
        return sum(getattr(self, field.name) for field in fields(self)) / GIB


def predict_memory(run: RunShape) -> MemoryParts:
    """Bytes of the GPU that holds most."""
    parameters = run.parameters_per_gpu
    shards = run.data_parallel * run.layout.context if run.shards_optimizer else 1
    windows_kept = min(run.layout.pipeline, run.num_micro_batches)  # 1F1B: the first stage's
    kept = saved_bytes_per_token(run) * run.tokens_per_gpu * run.layers_per_gpu
    return MemoryParts(
        weights=BF16 * parameters,
        gradients=FP32 * parameters,
        optimizer=3 * FP32 * parameters / shards,
        activations=kept * windows_kept,
        transient=max(_layer_bytes(run), _loss_bytes(run)),
    )


def saved_bytes_per_token(run: RunShape) -> float:
    """What a layer keeps of each token of a context-parallel rank."""
    model, tp = run.model, run.layout.tensor
    hidden = BF16 * model.hidden_size
    if run.recompute == "full":
        return hidden / tp
    product = FP8_SAVED if run.fp8 else 1.0
    heads = BF16 * model.num_attention_heads * model.kv_channels
    keys_and_values = 2 * BF16 * model.num_query_groups * model.kv_channels
    # Input, its norm, queries, keys, values, attention's output, and the sum that enters the MLP.
    saved = hidden + product * hidden + heads + keys_and_values + product * heads + hidden
    if run.layout.dealing_ranks > 1:
        saved += heads  # the output before the exchange between ranks
    if run.recompute == "layernorm":
        saved += product * hidden + BF16 * (2 + product) * model.ffn_hidden_size
    return saved / tp


def _layer_bytes(run: RunShape) -> float:
    """A layer's backward pass: the MLP's values, their gradients, what a full recompute makes again."""
    model = run.model
    # MLP: input, gate and up, their product; and the gradient of each, with the residual's.
    mlp = BF16 * (3 * model.hidden_size + 6 * model.ffn_hidden_size)
    again = 0.0
    if run.recompute == "full":
        heads = 3 * model.num_attention_heads + 2 * model.num_query_groups
        again = BF16 * (2 * model.hidden_size + heads * model.kv_channels)
    return (mlp + again) * run.tokens_per_gpu / run.layout.tensor


def _loss_bytes(run: RunShape) -> float:
    hidden = 2 * BF16 * run.tokens_per_gpu * run.model.hidden_size
    if not run.full_logits:
        return CHUNKED_LOSS + hidden
    columns = run.model.padded_vocab_size / run.layout.tensor
    return (BF16 + FP32) * run.tokens_per_gpu * columns  # logits, and once in FP32


def checkpoint_bytes(
    parameters: float, *, optimizer: bool = True, full_precision: bool = False
) -> float:
    """Size of a checkpoint: weights, and with the optimizer its FP32 main parameters and two moments.

    14 bytes per parameter: BF16 weights and 12 bytes of optimizer. FP8 weights are written as BF16
    (Megatron-Core 0.19.2, `dist_checkpointing`), so such runs need as much.

    Args:
        parameters: Of the whole model.
        optimizer: False with `--no-save-optim`.
        full_precision: FP32 weights (the host backend), which are their own main parameters.
    """
    weights = FP32 if full_precision else BF16
    state = (2 if full_precision else 3) * FP32
    return parameters * (weights + (state if optimizer else 0))


def host_memory_of_save(checkpoint: float, num_ranks: int, ranks_of_node: int) -> float:
    """Host memory that `--async-save` takes on one node, bytes: each rank copies its own share once.

    `checkpoint / num_ranks * ranks_of_node`, until it is written. The memory of the processes themselves is
    not counted. For 8B on one node of four GPUs it predicts 112.4 GB; 106 were measured (docs/results.md).
    Other saves copy one tensor of each file at a time (`checkpoint.shard_writer`).

    Args:
        checkpoint: Bytes, see `checkpoint_bytes`.
        num_ranks: Processes of the job.
        ranks_of_node: Of these, on the node.
    """
    return checkpoint / num_ranks * ranks_of_node
