"""Seconds of one training step, part by part: arithmetic over rates, traffic over bandwidths.

Causal attention's backward pass is 2.5 times the work of its forward pass, as flash kernels compute the
scores again; a matrix product's is twice. The ring of `p2p` overlaps with attention and costs but its smaller
kernels; what was seen to stand alone in a profile is counted.
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
"""Launches, norms of gradients and the like, once a step."""
FP8_CASTS = 0.19
"""Of the products' time in FP8: casts and the search for largest values."""
_MODEL_LENGTH = 131_072
"""Length at which the attention rates were measured."""


@dataclass(frozen=True)
class TimeParts:
    """Seconds of a step; all windows of a replica, and what comes once."""

    attention: float
    products: float
    loss: float
    elementwise: float
    tensor_parallel: float
    context_parallel: float
    data_parallel: float
    optimizer: float
    bubble: float
    """Pipeline stages that wait."""
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
    speed = ATTENTION_KERNELS[run.attention] * gpu.bf16_flops
    speed *= _length_factor(run.seq_length) / _length_factor(_MODEL_LENGTH)
    if run.layout.context > 1 and run.layout.context_communication == "p2p":
        speed *= share.ring_attention
    forward = run.attention_flops() / (speed * share.attention_forward)
    backward = 2.5 * run.attention_flops() / (speed * share.attention_backward)
    return backward + forward * (2 if run.recompute == "full" else 1)


def _length_factor(length: int) -> float:
    return length / (length + SHORT_SEQUENCE)


def _products(run: RunShape, gpu: Gpu, share: Efficiency) -> float:
    model = run.model
    mlp_share = 3 * model.hidden_size * model.ffn_hidden_size / run.layer_parameters
    again = {"none": 0.0, "mlp": mlp_share, "full": 1.0}[run.recompute]
    flops = run.product_flops() * (3 + again)
    if not run.fp8:
        return flops / (share.bf16_products * gpu.bf16_flops)
    return flops / (share.fp8_products * gpu.fp8_flops) * (1 + FP8_CASTS)


def _elementwise_bytes(run: RunShape) -> float:
    """Norms, residuals, RoPE and SwiGLU of one window on one GPU: bytes read and written."""
    model = run.model
    recomputed = 6 if run.recompute != "none" else 0
    per_token = 40 * model.hidden_size + (16 + recomputed) * model.ffn_hidden_size
    if run.recompute == "full":
        per_token += 14 * model.hidden_size
    return per_token * run.tokens_per_gpu / run.layout.tensor * run.layers_per_gpu


def _tensor_parallel(run: RunShape, gpu: Gpu, share: Efficiency) -> float:
    """All-gathers and reduce-scatters of one window, none of them hidden."""
    tp = run.layout.tensor
    if tp == 1:
        return 0.0
    times = 10 + {"none": 0, "mlp": 2, "full": 4}[run.recompute]
    size = BF16 * run.tokens_per_gpu * run.model.hidden_size * (tp - 1) / tp
    bandwidth = _bandwidth(tp, gpu, share, share.tensor_parallel)
    return times * size * run.layers_per_gpu / bandwidth


def _context_parallel(run: RunShape, gpu: Gpu, share: Efficiency) -> float:
    """`a2a` of one window; the ring of `p2p` hides behind attention."""
    layout, model = run.layout, run.model
    if layout.context == 1 or layout.context_communication == "p2p":
        return 0.0
    heads = 2 * model.num_attention_heads + 2 * model.num_query_groups
    per_token = 2 * BF16 * heads * model.kv_channels / layout.tensor  # forward and backward
    size = per_token * run.tokens_per_gpu * (layout.context - 1) / layout.context
    bandwidth = _bandwidth(layout.tensor * layout.context, gpu, share, share.all_to_all)
    return size * run.layers_per_gpu / bandwidth


def _data_parallel(run: RunShape, gpu: Gpu, share: Efficiency) -> float:
    """Gradients scattered in FP32 and weights gathered in BF16, once a step."""
    ranks = run.data_parallel * run.layout.context
    if ranks == 1:
        return 0.0
    size = (FP32 + BF16) * run.parameters_per_gpu * (ranks - 1) / ranks
    return size / _bandwidth(ranks * run.layout.tensor, gpu, share, share.data_parallel)


def _bandwidth(span: int, gpu: Gpu, share: Efficiency, nvlink_share: float) -> float:
    """Of a group whose ranks lie within so many neighbours."""
    if span <= GPUS_PER_NODE:
        return nvlink_share * gpu.nvlink_bandwidth
    return min(nvlink_share * gpu.nvlink_bandwidth, share.network * gpu.network_bandwidth)
