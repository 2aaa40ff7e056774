"""Training windows cut from an indexed dataset in file order.

Sample i is tokens [i*S, i*S + S + 1) of the concatenated documents: there is no index to build, the
same file serves every sequence length, and the position to resume at is arithmetic. Shapes: s sequence.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megatron_long.dataset.indexed import IndexedDatasetReader
from megatron_long.errors import ConfigError


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Windows of `seq_length` tokens and their next tokens.

    Args:
        prefix: Path of the .bin and .idx without suffix.
        seq_length: Tokens of a sample, s.
        num_samples: Samples to serve; None for one pass.
        eod_id: End-of-document token. Given, the loss skips positions that hold it, whose label is the
            first token of an unrelated document; None counts every position.
        mask_documents: Also return where documents begin (`document_starts`), for attention that does not
            cross these positions; the loss then skips each document's last token, whose label is in another.
        allow_repeat: Start over after the last whole window instead of raising an error.
    Raises: ConfigError: `num_samples` is more than one pass holds. DataError: damaged files.
    """

    def __init__(
        self,
        prefix: Path,
        seq_length: int,
        num_samples: int | None = None,
        eod_id: int | None = None,
        *,
        mask_documents: bool = False,
        allow_repeat: bool = False,
    ) -> None:
        self.reader = IndexedDatasetReader(Path(prefix))
        self.seq_length = seq_length
        self.eod_id = eod_id
        self.mask_documents = mask_documents
        self.samples_per_pass = max(self.reader.num_tokens - 1, 0) // seq_length
        if self.samples_per_pass == 0:
            raise ConfigError(
                f"{prefix} has {self.reader.num_tokens:,} tokens, too few for one sample of "
                f"--seq-length {seq_length} (and one token more); use a shorter --seq-length or a "
                "larger dataset"
            )
        self.num_samples = self.samples_per_pass if num_samples is None else num_samples
        if self.num_samples > self.samples_per_pass and not allow_repeat:
            raise ConfigError(
                f"training asks for {self.num_samples:,} samples of --seq-length {seq_length}, but one "
                f"pass over {prefix} holds {self.samples_per_pass:,}; use fewer iterations, a larger "
                "dataset, or --allow-repeat"
            )

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `tokens`, `labels`, `position_ids` [s] int64 and `loss_mask` [s] float32.

        With `mask_documents` also `document_starts` [s] uint8.
        """
        start = self._start_token(index)
        span = self.reader.read_span(start, self.seq_length + 1).astype(np.int64)
        tokens, labels = torch.from_numpy(span[:-1].copy()), torch.from_numpy(span[1:].copy())
        loss_mask = torch.ones(self.seq_length)
        if self.eod_id is not None:
            loss_mask[tokens == self.eod_id] = 0.0
        sample = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": torch.arange(self.seq_length),
        }
        if self.mask_documents:
            begins = torch.zeros(self.seq_length + 1, dtype=torch.uint8)
            begins[self.reader.document_starts(start, self.seq_length + 1)] = 1
            loss_mask[begins[1:] == 1] = 0.0
            sample["document_starts"] = begins[:-1]
        return sample

    def document_starts(self, index: int) -> NDArray[np.int64]:
        """Return the offsets at which documents begin inside sample `index`; the first is always 0.

        With `seq_length` appended they are the sample's `cu_seqlens`.
        """
        return self.reader.document_starts(self._start_token(index), self.seq_length)

    def _start_token(self, index: int) -> int:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        return index % self.samples_per_pass * self.seq_length
