"""Seconds of one training step, part by part: arithmetic over rates, traffic over bandwidths.

Causal attention's backward pass is 2.5 times the work of its forward pass, as flash kernels compute the
scores again; a matrix product's is twice. Only communication that is not overlapped counts: what was exposed
in a profile, and for the ring of `p2p` what takes longer than attention to a block.
"""

from dataclasses import dataclass, fields

from megatron_long.planning.hardware import (
    ATTENTION_KERNELS,
    GPUS_PER_NODE,
    SHORT_SEQUENCE,
    Efficiency,
    Gpu,
)
from megatron_long.planning.run_shape import RunShape

BF16, FP32 = 2, 4
STEP_OVERHEAD_S = 0.08
"""Launches, gradient norms and similar, once per step."""
FP8_CASTS = 0.19
"""Relative to the products' time in FP8: casts and amax."""
_MODEL_LENGTH = 131_072
"""Length at which the attention rates were measured."""


@dataclass(frozen=True)
class TimeParts:
    """Seconds of a step; all windows of a replica, and work done once."""

    attention: float
    products: float
    loss: float
    elementwise: float
    tensor_parallel: float
    context_parallel: float
    data_parallel: float
    optimizer: float
    bubble: float
    """Idle pipeline stages."""
    overhead: float = STEP_OVERHEAD_S

    @property
    def total_s(self) -> float:
        """All parts, seconds."""
        return sum(getattr(self, field.name) for field in fields(self))


def predict_time(run: RunShape, gpu: Gpu, efficiency: Efficiency | None = None) -> TimeParts:
    """Seconds of one step."""
    share = efficiency or Efficiency()
    devices = run.layout.num_devices
    loss_rate = share.full_logits_loss if run.full_logits else share.loss
    window = {
        "attention": _attention(run, gpu, share) / devices,
        "products": _products(run, gpu, share) / devices,
        "elementwise": _elementwise_bytes(run) / (share.memory * gpu.memory_bandwidth),
        "tensor_parallel": _tensor_parallel(run, gpu, share),
        "context_parallel": _context_parallel(run, gpu, share),
    }
    # The last of the pipeline's stages computes the loss, and the others wait for it.
    whole = run.layout.tensor * run.layout.context
    window["loss"] = 3 * run.output_flops() / whole / (loss_rate * gpu.bf16_flops)
    step = {name: seconds * run.num_micro_batches for name, seconds in window.items()}
    waiting = sum(window.values()) * (run.layout.pipeline - 1)
    shards = run.data_parallel * run.layout.context
    optimizer_bytes = run.parameters_per_gpu * 7 * FP32 / shards
    return TimeParts(
        **step,
        data_parallel=_data_parallel(run, gpu, share),
        optimizer=optimizer_bytes / (share.memory * gpu.memory_bandwidth),
        bubble=waiting,
    )


def _attention(run: RunShape, gpu: Gpu, share: Efficiency) -> float:
    """One window on one GPU that did all of it."""
    forward, backward = _attention_passes(run, gpu, share)
    return backward + forward * (2 if run.recompute == "full" else 1)


def _attention_passes(run: RunShape, gpu: Gpu, share: Efficiency) -> tuple[float, float]:
    """Forward and backward pass of one window on one GPU that did all of it."""
    speed = ATTENTION_KERNELS[run.attention] * gpu.bf16_flops
    speed *= _length_factor(run.seq_length) / _length_factor(_MODEL_LENGTH)
    forward = run.attention_flops() / (speed * share.attention_forward)
    return forward, 2.5 * run.attention_flops() / (speed * share.attention_backward)


def _length_factor(length: int) -> float:
    return length / (length + SHORT_SEQUENCE)


def _products(run: RunShape, gpu: Gpu, share: Efficiency) -> float:
    model = run.model
    mlp_share = 3 * model.hidden_size * model.ffn_hidden_size / run.layer_parameters
    again = {"layernorm": 0.0, "mlp": mlp_share, "full": 1.0}[run.recompute]
    flops = run.product_flops() * (3 + again)
    if not run.fp8:
        return flops / (share.bf16_products * gpu.bf16_flops)
    return flops / (share.fp8_products * gpu.fp8_flops) * (1 + FP8_CASTS)


def _elementwise_bytes(run: RunShape) -> float:
    """Norms, residuals, RoPE and SwiGLU of one window on one GPU: bytes read and written."""
    model = run.model
    recomputed = 6 if run.recompute != "layernorm" else 0
    per_token = 40 * model.hidden_size + (16 + recomputed) * model.ffn_hidden_size
    if run.recompute == "full":
        per_token += 14 * model.hidden_size
    return per_token * run.tokens_per_gpu / run.layout.tensor * run.layers_per_gpu


def _tensor_parallel(run: RunShape, gpu: Gpu, share: Efficiency) -> float:
    """All-gathers and reduce-scatters of one window, none of them hidden."""
    tp = run.layout.tensor
    if tp == 1:
        return 0.0
    times = 10 + {"layernorm": 0, "mlp": 2, "full": 4}[run.recompute]
    size = BF16 * run.tokens_per_gpu * run.model.hidden_size * (tp - 1) / tp
    bandwidth = _bandwidth(tp, gpu, share, share.tensor_parallel)
    return times * size * run.layers_per_gpu / bandwidth


def _context_parallel(run: RunShape, gpu: Gpu, share: Efficiency) -> float:
    """One window: `a2a` is exposed; for the ring, merges and what attention does not hide."""
    layout, model = run.layout, run.model
    if layout.context == 1:
        return 0.0
    heads = 2 * model.num_attention_heads + 2 * model.num_query_groups
    per_token = 2 * BF16 * heads * model.kv_channels / layout.tensor  # forward and backward
    dealing = layout.dealing_ranks
    size = per_token * run.tokens_per_gpu * (dealing - 1) / dealing
    bandwidth = _bandwidth(layout.tensor * dealing, gpu, share, share.all_to_all)
    dealt = size * run.layers_per_gpu / bandwidth
    return dealt + _ring(run, gpu, share) if layout.ring_ranks > 1 else dealt


def _ring(run: RunShape, gpu: Gpu, share: Efficiency) -> float:
    """A ring of n ranks: each attends to n blocks, one after the other, while the next is transferred.

    In the backward pass, keys and values are sent with their gradients. Each block's output is merged into
    the sum of those before it, so that all ranks together merge as many tokens as n windows have.
    """
    layout, model = run.layout, run.model
    steps = layout.ring_ranks - 1
    cut = layout.tensor * layout.dealing_ranks
    tokens = run.seq_length / layout.ring_ranks
    piece = 2 * BF16 * model.num_query_groups * model.kv_channels * tokens / cut
    travel = piece / _bandwidth(layout.tensor * layout.context, gpu, share, share.ring)
    pieces = layout.num_devices * run.layers_per_gpu * layout.ring_ranks
    forward, backward = (seconds / pieces for seconds in _attention_passes(run, gpu, share))
    passes = 2 if run.recompute == "full" else 1
    alone = passes * max(0.0, travel - forward) + max(0.0, 2 * travel - backward)
    merged = share.ring_merge_bytes * tokens * model.num_attention_heads * model.kv_channels / cut
    return steps * run.layers_per_gpu * (alone + merged / (share.memory * gpu.memory_bandwidth))


def _data_parallel(run: RunShape, gpu: Gpu, share: Efficiency) -> float:
    """Gradients scattered in FP32 and weights gathered in BF16, once per step."""
    ranks = run.data_parallel * run.layout.context
    if ranks == 1:
        return 0.0
    size = (FP32 + BF16) * run.parameters_per_gpu * (ranks - 1) / ranks
    return size / _bandwidth(ranks * run.layout.tensor, gpu, share, share.data_parallel)


def _bandwidth(span: int, gpu: Gpu, share: Efficiency, nvlink_share: float) -> float:
    """Bandwidth of a group whose ranks are within this many neighbors."""
    if span <= GPUS_PER_NODE:
        return nvlink_share * gpu.nvlink_bandwidth
    return min(nvlink_share * gpu.nvlink_bandwidth, share.network * gpu.network_bandwidth)
