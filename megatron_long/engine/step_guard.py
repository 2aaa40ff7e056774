"""Steps that must not reach the weights: NaN or Inf in the loss or the gradients, and loss spikes.

After the backward pass and before the optimizer every process learns the loss of each micro-batch of the
step. A faulty step is skipped (weights, optimizer and schedule stay unchanged, the data advance), counted
and written to `faults.jsonl` with the documents it read; too many end the run.
"""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_long.dataset.indexed import IndexedDatasetReader
from megatron_long.dataset.manifest import DOCUMENTS_FILE, TRAIN_PREFIX, read_manifest
from megatron_long.files import append_whole
from megatron_long.job.side_output import survived

FAULTS_NAME = "faults.jsonl"
MEMORY_STEPS = 100
"""Length of the history, for the losses to compare with and the faults to count."""
MIN_STEPS = 20
"""Minimum history for detecting a spike."""
MIN_DEVIATION = 0.05
"""Nats; smaller deviations of the loss from step to step count as this much."""
MAX_WINDOWS = 64
"""Windows of a faulty step that are described."""

logger = logging.getLogger(__name__)

MicroLosses = list[list[tuple[float, float]]]
"""(loss sum, tokens) by data-parallel rank and micro-batch."""


@dataclass(kw_only=True)
class StepGuard:
    """Judges each step by its losses and its gradient norm."""

    max_faulty_steps: int
    spike_deviations: float
    batch_windows: Callable[[int, int], Sequence[int]]
    """Returns the windows that a data-parallel rank reads in a micro-batch of the current step."""
    describe_windows: Callable[[Sequence[int]], list[dict[str, Any]]]
    reports: bool = True
    """Whether this process reports faulty steps; one does."""
    folder: Path | None = None
    """Folder of `faults.jsonl`; None only logs."""
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY_STEPS))
    faulty: list[int] = field(default_factory=list)
    """Iterations of the faulty steps within the last `MEMORY_STEPS`."""
    stop_reason: str | None = None

    def judge(self, iteration: int, losses: MicroLosses, grad_norm: float) -> bool:
        """Whether a step is faulty; to be called by all processes with the same figures.

        Args:
            iteration: Of the step, from 1.
            grad_norm: Before clipping.
        """
        total = sum(loss for rank in losses for loss, _ in rank)
        count = sum(tokens for rank in losses for _, tokens in rank)
        mean = total / count if count else 0.0
        reason = self._reason(mean, grad_norm)
        if reason is None:
            self.losses.append(mean)
            return False
        self.faulty = [n for n in self.faulty if n > iteration - MEMORY_STEPS] + [iteration]
        windows = self._describe(losses)
        if len(self.faulty) > self.max_faulty_steps:
            self.stop_reason = (
                f"step {iteration}: {reason}; faulty steps of the last {MEMORY_STEPS}: "
                f"{', '.join(map(str, self.faulty))} (--max-faulty-steps {self.max_faulty_steps})"
            )
        if self.reports:
            self._record(iteration, reason, mean, grad_norm, windows)
        return True

    def state(self) -> dict[str, Any]:
        """State for the checkpoint, so that a resumed run decides as an uninterrupted one."""
        return {"losses": list(self.losses), "faulty": self.faulty}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.losses.extend(state.get("losses", ()))
        self.faulty = list(state.get("faulty", ()))

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm} (loss {loss:.4f})"
        if not self.spike_deviations or len(self.losses) < MIN_STEPS:
            return None
        median = statistics.median(self.losses)
        spread = statistics.median(abs(other - median) for other in self.losses)
        deviation = max(1.4826 * spread, MIN_DEVIATION)  # the standard deviation of a normal sample
        if loss <= median + self.spike_deviations * deviation:
            return None
        return (
            f"the loss {loss:.4f} is {(loss - median) / deviation:.0f} deviations above {median:.4f}, the "
            f"median of the last {len(self.losses)} steps (--spike-deviations {self.spike_deviations:g})"
        )

    def _describe(self, losses: MicroLosses) -> list[dict[str, Any]]:
        """The windows of the step with their documents: those that are not finite, or the worst first."""
        if not self.reports:
            return []
        found: list[tuple[float, Sequence[int]]] = []
        for rank, micro_batches in enumerate(losses):
            for index, (loss, tokens) in enumerate(micro_batches):
                mean = loss / tokens if tokens else math.nan
                found.append((mean, self.batch_windows(rank, index)))
        found.sort(key=lambda item: -item[0] if math.isfinite(item[0]) else -math.inf)
        bad = [item for item in found if not math.isfinite(item[0])] or found
        described = []
        for mean, windows in bad:
            described += [item | {"loss": str(mean)} for item in self.describe_windows(windows)]
        return described[:MAX_WINDOWS]

    def _record(
        self, iteration: int, reason: str, loss: float, grad_norm: float, windows: list[dict]
    ) -> None:
        record = {
            "iteration": iteration,
            "reason": reason,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "stopped": self.stop_reason is not None,
            "windows": windows,
        }
        if self.folder is not None:
            path = self.folder / FAULTS_NAME
            with survived(str(path)):
                self.folder.mkdir(parents=True, exist_ok=True)
                append_whole(path, json.dumps(record) + "\n")
        documents = [doc for window in windows for doc in window["documents"]]
        names = [f"{doc['source']} {doc['id']}" for doc in documents[:5]]
        logger.warning(
            "step %d is skipped: %s; it read %s%s%s",
            *(iteration, reason, ", ".join(names) or "documents that are not known"),
            f" and {len(documents) - 5} more" if len(documents) > 5 else "",
            f"; details in {self.folder / FAULTS_NAME}" if self.folder else "",
        )


def describe_windows(
    dataset: str | None, seq_length: int, windows: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the documents in training windows.

    Args:
        dataset: Folder of `preprocess_mix`; None gives windows without documents.
        windows: Sample numbers; after the last one of a pass they start over.
    Returns: `window` and `documents` of each: `source`, `id` (file:line of the corpus) and `document`,
        its row in `documents.npy`.
    """
    if dataset is None:
        return [{"window": window, "documents": []} for window in windows]
    folder = Path(dataset)
    manifest, reader = read_manifest(folder), IndexedDatasetReader(folder / TRAIN_PREFIX)
    rows = np.load(folder / DOCUMENTS_FILE, mmap_mode="r")
    per_pass = max(reader.num_tokens - 1, 0) // seq_length
    described = []
    for window in windows:
        first, last = reader.documents_between(window % per_pass * seq_length, seq_length + 1)
        documents = [
            {
                "source": manifest.source_names[int(rows[row]["source"])],
                "id": f"{manifest.inputs[int(rows[row]['file'])].name}:{int(rows[row]['line'])}",
                "document": row,
            }
            for row in range(first, last)
        ]
        described.append({"window": window, "documents": documents})
    return described


def batch_windows(
    consumed: int, micro_batch_size: int, data_parallel_size: int, rank: int, index: int
) -> list[int]:
    """Windows of one micro-batch, as assigned by Megatron's sequential sampler.

    Args:
        consumed: Windows read before this step.
        rank, index: Data-parallel rank, micro-batch of the step.

    >>> batch_windows(100, 2, 4, rank=1, index=3)
    [126, 127]

    Source: megatron-core 0.19.2, training/datasets/data_samplers.py, `MegatronPretrainingSampler`.
    """
    start = consumed + (index * data_parallel_size + rank) * micro_batch_size
    return list(range(start, start + micro_batch_size))
