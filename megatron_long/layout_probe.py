"""A short training run that writes the loss of every token: `python -m ...layout_probe DIR N [flags]`.

Takes the number of micro-batches a step and the flags of megatron_long.pretrain after the folder. Every
rank that computes losses leaves `DIR/rank-N.npz` with the step, the row of the global batch, the position
and the loss of each of its tokens that count; `DIR/loss.jsonl` holds what the run logged.
`planning.layout_parity` puts the ranks together.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_long.engine import host_backend

host_backend.install()

# ruff: noqa: E402
import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_long import pretrain
from megatron_long.cli import run_tool
from megatron_long.training import batch, loss


class Recorder:
    """Records the token losses of each micro-batch of this rank."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.parts: list[dict[str, np.ndarray]] = []
        self.losses: Tensor | None = None
        self.tensors: dict[str, Any] = {}

    def forward_step(self, settings: Any, iterator: Iterator | None, model: Any) -> tuple:
        """Megatron's forward step, listened to."""
        self.losses = None
        output, loss_function = STOCK_STEP(settings, iterator, model)
        if self.tensors.get("labels") is not None and parallel_state.is_pipeline_last_stage():
            losses = output.detach() if output.dim() == 2 else self._chunked()
            self._keep(losses.float().cpu().numpy())
        return output, loss_function

    def get_batch(self, *arguments: Any) -> batch.Batch:
        """The batch that the step is about to use."""
        made = STOCK_BATCH(*arguments)
        self.tensors = made.tensors
        return made

    def linear_cross_entropy(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """The chunked loss, whose token losses are otherwise unused."""
        total, losses = STOCK_LOSS(*arguments, **named)
        self.losses = losses
        return total, losses

    def _chunked(self) -> Tensor:
        assert self.losses is not None
        rows = self.tensors["labels"].size(0)
        return self.losses.detach().view(-1, rows).t()  # hidden states run sequence first

    def _keep(self, losses: np.ndarray) -> None:
        step, micro_batch = divmod(len(self.parts), self.micro_batches)
        rows = losses.shape[0]
        replica = parallel_state.get_data_parallel_rank()
        replicas = parallel_state.get_data_parallel_world_size()
        row = (micro_batch * replicas + replica) * rows + np.arange(rows)
        positions = self.tensors["position_ids"].cpu().numpy()
        mask = self.tensors["loss_mask"].cpu().numpy()
        self.parts.append(
            {
                "step": np.full(losses.shape, step),
                "row": np.broadcast_to(row[:, None], losses.shape),
                "position": positions,
                "loss": losses,
                "mask": mask,
            }
        )

    def write(self, folder: Path) -> None:
        """Write the counted tokens that this rank is responsible for."""
        if not self.parts or parallel_state.get_tensor_model_parallel_rank():
            return
        whole = {
            name: np.concatenate([part[name].ravel() for part in self.parts])
            for name in self.parts[0]
        }
        counted = whole.pop("mask") > 0
        rank = torch.distributed.get_rank()
        arrays: dict[str, Any] = {name: values[counted] for name, values in whole.items()}
        np.savez(folder / f"rank-{rank}.npz", **arrays)


STOCK_STEP, STOCK_BATCH, STOCK_LOSS = (
    batch.forward_step,
    batch.get_batch,
    loss.linear_cross_entropy,
)


def main() -> int:
    folder, micro_batches, *argv = sys.argv[1:]
    recorder = Recorder(int(micro_batches))
    for module, name in (
        (batch, "forward_step"),
        (batch, "get_batch"),
        (loss, "linear_cross_entropy"),
    ):
        setattr(module, name, getattr(recorder, name))
    from megatron_long.engine import megatron_adapter

    leave = megatron_adapter.leave_process_group

    def write_and_leave() -> None:
        recorder.write(Path(folder))
        leave()

    megatron_adapter.leave_process_group = write_and_leave
    return pretrain.main([*argv, "--loss-log", str(Path(folder) / "loss.jsonl")])


if __name__ == "__main__":
    sys.exit(run_tool(main))
