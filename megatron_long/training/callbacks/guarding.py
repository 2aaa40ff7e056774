"""The step guard in the loop: it checks each step before the optimizer, and may end the run.

Shapes: d data-parallel ranks, m micro-batches of a step.
"""

import logging
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor

from megatron_long.checkpoint.saving import FAULT_STATUS
from megatron_long.engine.callback import Callback, End, Gradients, Step
from megatron_long.engine.step_guard import (
    MicroLosses,
    StepGuard,
    batch_windows,
    describe_windows,
)
from megatron_long.flags.arguments import LongContextArguments
from megatron_long.training.start import Start

logger = logging.getLogger(__name__)


class GuardSteps(Callback):
    """Skips faulty steps; too many end the run with a checkpoint from before the last of them.

    Args:
        losses: Filled by the forward step.
        save: `--save`, in which `fault_0000012` is made; without it nothing is kept.
        write_sidecars: Puts the files next to checkpoints into a folder: `--load` of it repeats the step.
    """

    def __init__(
        self,
        guard: StepGuard,
        losses: "LossRecorder",
        save: Path | None,
        write_sidecars: Callable[[Path], None],
    ) -> None:
        self.guard, self.losses = guard, losses
        self.save, self.write_sidecars = save, write_sidecars

    def before_step(self, step: Step) -> None:
        """Clear the losses of the previous step."""
        self.losses.clear()

    def after_backward(self, step: Step, gradients: Gradients) -> bool:
        """Whether the step is faulty."""
        losses = self.losses.reduce()
        if gradients.lowers_loss_scale and _finite(losses):
            return False  # Megatron skips the step, and it is not a fault
        return self.guard.judge(step.iteration, losses, gradients.norm())

    def after_step(self, step: Step) -> End | None:
        """End the run if the guard requires it."""
        if self.guard.stop_reason is None:
            return None
        folder = self.save / f"fault_{step.iteration:07d}" if self.save else None
        if self.guard.reports:
            kept = f"; weights and optimizer from before it are saved in {folder}" if folder else ""
            logger.error("training ends at %s%s", self.guard.stop_reason, kept)
            if folder:
                self.write_sidecars(folder)
        return End(FAULT_STATUS, folder)


class LossRecorder:
    """Stores the loss of each micro-batch of a step on the last pipeline stage, without synchronizing."""

    def __init__(self) -> None:
        self._reports: list[Tensor] = []

    def add(self, report: Tensor) -> None:
        """Record (loss sum, tokens) [2] of this rank's shard of a micro-batch."""
        self._reports.append(report)

    def clear(self) -> None:
        """Begin a step."""
        self._reports.clear()

    def reduce(self) -> MicroLosses:
        """Add up the shards of all processes; a collective of the whole job.

        Tensor-parallel ranks each count the whole loss: sums and counts have the same factor.
        """
        ranks, count = parallel_state.get_data_parallel_world_size(), get_num_microbatches()
        table = torch.zeros(ranks, count, 2, device=torch.cuda.current_device())
        if self._reports:
            own = torch.stack(self._reports).to(table.dtype)
            table[parallel_state.get_data_parallel_rank()] = own
        torch.distributed.all_reduce(table)
        rows: list[list[list[float]]] = table.tolist()
        return [[(loss, tokens) for loss, tokens in row] for row in rows]


def _finite(losses: MicroLosses) -> bool:
    return all(math.isfinite(loss) for rank in losses for loss, _ in rank)


def make_guard(
    arguments: LongContextArguments, args: Namespace, start: Start, rank: int
) -> StepGuard:
    """The guard of this run's steps, with the history from the checkpoint it resumes."""

    def windows(data_rank: int, index: int) -> Sequence[int]:
        if args.dataloader_type != "single":
            return ()  # shuffled by Megatron's sampler, which does not expose its order
        consumed, size = args.consumed_train_samples, args.micro_batch_size
        return batch_windows(consumed, size, args.data_parallel_size, data_rank, index)

    guard = StepGuard(
        max_faulty_steps=arguments.max_faulty_steps,
        spike_deviations=arguments.spike_deviations,
        batch_windows=windows,
        describe_windows=partial(describe_windows, arguments.dataset, args.seq_length),
        reports=rank == 0,
        folder=Path(args.save) if args.save else None,
    )
    guard.restore(start.guard_state)
    return guard
