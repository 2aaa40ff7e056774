"""GPUs in the planner: datasheet figures, and the fraction of them that kernels reach.

The shares are fitted on measured steps of Llama-3-8B at 131,072 tokens on four H200 (docs/planner.md), and
used for the other GPUs too.
"""

from dataclasses import dataclass

from megatron_long.errors import ConfigError

TERA, GIGA, GIB = 1e12, 1e9, float(2**30)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU, dense rates without sparsity."""

    memory_gib: float
    """Memory available to a process."""
    bf16_flops: float
    fp8_flops: float
    """0 without FP8."""
    memory_bandwidth: float
    """Bytes per second."""
    nvlink_bandwidth: float
    """Bytes per second and direction, to the GPUs of its node."""
    network_bandwidth: float = 50 * GIGA
    """Bytes per second to GPUs of other nodes, with one 400 Gb/s card each."""


GPUS = {
    "h100": Gpu(
        memory_gib=79.1,
        bf16_flops=989 * TERA,
        fp8_flops=1979 * TERA,
        memory_bandwidth=3.35 * TERA,
        nvlink_bandwidth=450 * GIGA,
    ),
    "h200": Gpu(
        memory_gib=139.8,
        bf16_flops=989 * TERA,
        fp8_flops=1979 * TERA,
        memory_bandwidth=4.8 * TERA,
        nvlink_bandwidth=450 * GIGA,
    ),
    "a100-80gb": Gpu(
        memory_gib=79.1,
        bf16_flops=312 * TERA,
        fp8_flops=0.0,
        memory_bandwidth=2.04 * TERA,
        nvlink_bandwidth=300 * GIGA,
        network_bandwidth=25 * GIGA,
    ),
}
GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Fractions of the datasheet's rates that a training step reaches."""

    attention_forward: float = 564 / 989
    """cuDNN 9.19 flash kernel at 128K, of the BF16 rate."""
    attention_backward: float = 526 / 989
    ring_merge_bytes: float = 30.0
    """Read and written for each value of attention's output that `p2p` merges into the sum of earlier pieces,
    both passes; bytes, not a fraction."""
    ring: float = 0.5
    """Of `p2p` context parallelism, of NVLink's; hidden by attention and never measured, so a low value."""
    bf16_products: float = 702 / 989
    fp8_products: float = 1340 / 1979
    loss: float = 580 / 989
    """The output layer with the chunked loss."""
    full_logits_loss: float = 460 / 989
    """Megatron's own."""
    memory: float = 0.7
    """Element-wise kernels, of the memory's bandwidth."""
    tensor_parallel: float = 0.55
    """All-gather and reduce-scatter of activations, of NVLink's."""
    all_to_all: float = 92 / 450
    """Of context parallelism; waiting for the slowest rank included."""
    data_parallel: float = 185 / 450
    """Gradients and parameters of the distributed optimizer."""
    network: float = 0.8
    """Any of them between nodes, of the card's."""


ATTENTION_KERNELS = {"cudnn": 1.0, "flash3": 1.18, "flash4": 1.18}
"""Speed relative to the cuDNN kernel that Transformer Engine 2.20 selects on Hopper by default."""
SHORT_SEQUENCE = 2048
"""Length at which attention kernels lose half of their rate to their edges."""


def find_gpu(name: str) -> Gpu:
    """The GPU of a name.

    Raises: ConfigError: unknown; lists the known ones.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu {name} is unknown; choose one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
