"""Between the backward pass and the optimizer: what every process must know to judge a step.

Shapes: d data-parallel ranks, m micro-batches of a step.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor

from megatron_long.engine.step_guard import MicroLosses, StepGuard


class TorchJob:
    """The other processes of this job, through its default process group."""

    @property
    def rank(self) -> int:
        """This process."""
        return torch.distributed.get_rank()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up anywhere."""
        up = torch.tensor([int(flag)], device=torch.cuda.current_device())
        torch.distributed.all_reduce(up, op=torch.distributed.ReduceOp.MAX)
        return bool(up.item())

    def gather(self, item: Any) -> list[Any]:
        """What each process holds."""
        items: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(items, item)
        return items


class LossRecorder:
    """Keeps the loss of each micro-batch of a step on the last pipeline stage, without waiting for it."""

    def __init__(self) -> None:
        self._reports: list[Tensor] = []

    def add(self, report: Tensor) -> None:
        """Note (loss sum, tokens) [2] of this rank's shard of a micro-batch."""
        self._reports.append(report)

    def clear(self) -> None:
        """Begin a step."""
        self._reports.clear()

    def reduce(self) -> MicroLosses:
        """Add up the shards of all processes; a collective of the whole job.

        Tensor-parallel ranks each count the whole loss: sums and counts are multiples alike.
        """
        ranks, count = parallel_state.get_data_parallel_world_size(), get_num_microbatches()
        table = torch.zeros(ranks, count, 2, device=torch.cuda.current_device())
        if self._reports:
            own = torch.stack(self._reports).to(table.dtype)
            table[parallel_state.get_data_parallel_rank()] = own
        torch.distributed.all_reduce(table)
        rows: list[list[list[float]]] = table.tolist()
        return [[(loss, tokens) for loss, tokens in row] for row in rows]


def guard_optimizer(
    optimizer: Any, guard: StepGuard, losses: LossRecorder, iteration: Callable[[], int]
) -> None:
    """Let the guard decide in the optimizer's own place for it, where FP16 training skips an overflow.

    Args:
        optimizer: Megatron's; `prepare_grads` tells it whether to leave the step out.
        iteration: Gives the present step, from 1.
    """
    stock = optimizer.prepare_grads

    @torch.no_grad()
    def prepare_grads() -> bool:
        overflow = stock()
        micro_losses = losses.reduce()
        if overflow and _lowers_loss_scale(optimizer) and _finite(micro_losses):
            return True  # FP16 finds its loss scale so: Megatron leaves the step out, and it is no fault
        norm = optimizer.get_grad_norm()
        return guard.judge(iteration(), micro_losses, float(norm or 0.0)) or overflow

    optimizer.prepare_grads = prepare_grads


def _lowers_loss_scale(optimizer: Any) -> bool:
    """Whether the loss scale of FP16 can go down after an overflow."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        scaler: Any = getattr(part, "grad_scaler", None)
        lowest = getattr(scaler, "min_scale", None)  # a constant scaler has none
        if lowest is not None and bool(scaler.scale > lowest):
            return True
    return False


def _finite(losses: MicroLosses) -> bool:
    return all(math.isfinite(loss) for rank in losses for loss, _ in rank)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or infinite; quantized tensors are passed over.

    The tensors may be on several devices, as with `--optimizer-cpu-offload`; each device is waited for once.
    """
    checks: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        is_plain = type(tensor.data) is Tensor and tensor.is_floating_point()
        if is_plain and tensor.numel() and tensor.element_size() > 1:
            checks.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
    return all(bool(torch.stack(found).all().item()) for found in checks.values())


def state_tensors(model: Iterable[torch.nn.Module], optimizer: Any) -> Iterable[Tensor]:
    """Weights, main weights and optimizer state of this process."""
    for chunk in model:
        yield from chunk.parameters()
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
