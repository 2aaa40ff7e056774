"""What the machine offers (CUDA, Transformer Engine, Apex), and the Megatron flags that follow from it."""

import importlib.util
import os
from dataclasses import dataclass

from megatron_long.flags.argv import Argv
from megatron_long.model.flash_attention import installed_versions

HOST_ARGV = Argv.of(
    "--distributed-backend gloo",
    "--use-cpu-initialization",
    "--transformer-impl local",
    "--disable-jit-fuser",
    "--no-persist-layer-norm",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-create-attention-mask-in-dataloader",
    "--num-workers 0",
)
"""Flags under which Megatron uses no CUDA kernel; loader workers would only contend for the cores."""

ALWAYS_ARGV = Argv.of(
    "--rerun-mode disabled",
    "--no-check-for-nan-in-loss-and-grad",
    "--calculate-per-token-loss",
)
"""Flags of every run. Our step guard replaces Megatron's checks, which let a NaN of the first step pass and
end the run at any later one. Each token weighs the same: averages of averages over ranks and micro-batches
that hold different numbers of masked tokens would depend on the layout."""

GPU_ARGV = Argv.of("--distributed-backend nccl", "--no-create-attention-mask-in-dataloader")

GPU_TRAINING_ARGV = Argv.of(
    "--use-distributed-optimizer",
    "--overlap-grad-reduce",
    "--overlap-param-gather",
)

PRECISION_ARGV = {
    "fp32": Argv(),
    "bf16": Argv.of("--bf16"),
    # Attention stays BF16: FP8 attention lets later values change earlier outputs.
    "fp8": Argv.of(
        "--bf16", "--fp8-format hybrid", "--fp8-recipe tensorwise", "--fp8-param-gather"
    ),
}

PORTABLE_GPU_ARGV = Argv.of(
    "--transformer-impl local", "--no-persist-layer-norm", "--no-rope-fusion"
)
"""A GPU without Transformer Engine: Megatron's own layers with the portable attention."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What a run computes with."""

    cuda: bool
    """CUDA devices; otherwise the host backend (gloo, CPU)."""
    transformer_engine: bool
    """Transformer Engine's layers, fused attention and FP8."""
    apex: bool
    """Apex's kernel that adds weight gradients in place; Megatron's own output layer needs it for that."""
    flash_attention: bool = False
    """FlashAttention 3 or 4 on a Hopper GPU, where both beat the cuDNN kernel that Transformer Engine
    picks by itself (docs/results.md)."""

    @property
    def portable(self) -> bool:
        """Whether layers are Megatron's local ones with our context-parallel attention."""
        return not self.transformer_engine

    def to_argv(self, *, own_loss: bool = False) -> list[str]:
        """Megatron's flags for this backend.

        Args:
            own_loss: Whether `training.loss` stands for Megatron's output layer, which is the one layer
                that cannot add its weight gradient in place without Apex.
        """
        if not self.cuda:
            return list(HOST_ARGV)
        flags = list(GPU_ARGV)
        if self.portable:
            flags += PORTABLE_GPU_ARGV
        if not (self.apex or (self.transformer_engine and own_loss)):
            flags.append("--no-gradient-accumulation-fusion")
        if self.transformer_engine and self.flash_attention:
            flags += ("--attention-backend", "flash")
        return flags


GPU = Backend(cuda=True, transformer_engine=True, apex=False)
HOST = Backend(cuda=False, transformer_engine=False, apex=False)


def detect_backend() -> Backend:
    """The backend of this machine; imports torch."""
    import torch

    if not torch.cuda.is_available():
        return HOST
    return Backend(
        cuda=True,
        transformer_engine=_has("transformer_engine"),
        apex=_has("fused_weight_gradient_mlp_cuda"),
        flash_attention=bool(installed_versions()) and torch.cuda.get_device_capability() == (9, 0),
    )


def join_or_start_job() -> int:
    """Give the number of processes of this job; without torchrun, set the environment of a job of one.

    Megatron also wants one hardware queue a device where it overlaps communication with computation.

    Returns: World size.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "RANK" not in os.environ:
        # Port 0: the system gives a free one at the moment it is taken; one that was looked for before may
        # belong to another job of this machine by then.
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in alone.items()})
        os.environ["MASTER_ADDR"] = "localhost"
    return int(os.environ["WORLD_SIZE"])


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
