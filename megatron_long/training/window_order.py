"""The windows of a step, dealt to data-parallel replicas so that all have about the same attention work.

With masks between documents the work of a window's attention is the sum of its documents' squared lengths,
which differs by several times between windows, and a step takes as long as the replica with the most. A
step's windows stay the same, so that training does, but for the order of sums.
"""

import heapq
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megatron_long.dataset.packed_dataset import PackedDataset


class BalancedWindows(Dataset[dict[str, Tensor]]):
    """The windows of a dataset in the order in which Megatron's sampler deals them evenly.

    Args:
        windows: In file order.
        batch: Windows of a step.
        replicas: Data-parallel replicas; position k * replicas + r of a step is the k-th of replica r, as in
            `MegatronPretrainingSampler` of megatron-core 0.19.2 with one window a micro-batch.
        consumed: Windows of the steps before this start.
    """

    def __init__(self, windows: PackedDataset, batch: int, replicas: int, consumed: int) -> None:
        self.windows, self.batch, self.replicas = windows, batch, replicas
        self.first = consumed % batch
        self.work = attention_work(windows)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.windows[self.place(index)]

    def place(self, index: int) -> int:
        """Return the number in file order of the window at a position of the run."""
        start = self.first + (index - self.first) // self.batch * self.batch
        if start < 0 or start + self.batch > len(self):
            return index  # not a whole step
        return start + int(_deal(self._work_of(start), self.replicas)[index - start])

    def slowest_replica(self) -> tuple[float, float]:
        """Return the work of the replica with the most over the mean, in file order and as dealt.

        Sums over the steps of the dataset: how much longer they take than even ones, if attention were all.
        """
        starts = range(self.first, len(self) - self.batch + 1, self.batch)
        totals = np.zeros(3)
        for start in starts:
            work = np.array(self._work_of(start))
            dealt = work[list(_deal(tuple(work), self.replicas))]
            most = [w.reshape(-1, self.replicas).sum(0).max() for w in (work, dealt)]
            totals += [*most, work.sum() / self.replicas]
        return (
            (float(totals[0] / totals[2]), float(totals[1] / totals[2])) if len(starts) else (1, 1)
        )

    def _work_of(self, start: int) -> tuple[float, ...]:
        numbers = np.arange(start, start + self.batch) % len(self.work)
        return tuple(self.work[numbers].tolist())


def attention_work(windows: PackedDataset) -> NDArray[np.float64]:
    """Return the sum of the squared lengths of the documents' parts in each window of a pass, [n]."""
    size, number = windows.seq_length, windows.samples_per_pass
    ends = np.cumsum(windows.reader.lengths, dtype=np.int64)
    cuts = np.concatenate([ends, np.arange(number + 1, dtype=np.int64) * size])
    cuts = np.unique(cuts[cuts <= number * size])
    lengths = np.diff(cuts).astype(np.float64)
    return np.bincount(cuts[:-1] // size, weights=lengths**2, minlength=number)


@lru_cache(maxsize=64)
def _deal(work: tuple[float, ...], replicas: int) -> tuple[int, ...]:
    """Return the order in which windows give each replica as many, and about the same work.

    The largest first, each to the replica with the least work that has room (Graham 1969, "Bounds on
    multiprocessing timing anomalies"); a replica computes its windows in file order.

    >>> _deal((9.0, 1.0, 1.0, 7.0, 6.0, 2.0), 2)
    (0, 2, 1, 3, 5, 4)
    """
    room = len(work) // replicas
    own: list[list[int]] = [[] for _ in range(replicas)]
    loads = [(0.0, replica) for replica in range(replicas)]
    for window in sorted(range(len(work)), key=lambda window: -work[window]):
        load, replica = heapq.heappop(loads)
        own[replica].append(window)
        if len(own[replica]) < room:
            heapq.heappush(loads, (load + work[window], replica))
    return tuple(window for turn in zip(*map(sorted, own), strict=True) for window in turn)
