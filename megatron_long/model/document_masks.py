"""Masks between the documents of a window, under context parallelism.

A window is cut where documents begin; no token attends to or predicts a token across a cut. Two
attention implementations take such masks, each in its own layout:

- The portable one keeps the window unchanged: zigzag over the whole window, with separate offsets (`sbhd`).
- Transformer Engine's packed kernels (`thd`) split every document over the context-parallel ranks, and
  so need its length to be a multiple of 2*cp. Padding is at a document's end, where causal attention lets no
  real token see it, and the loss does not count it. The real tokens are those of the window, in every layout:
  the buffer grows instead.

Legend: s window, t buffer (window and padding); sizes of this rank carry `/cp`. Offsets are where documents
begin, from 0, and then the end.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_long.model.attention import zigzag_shard

AttentionFormat = Literal["sbhd", "thd"]
RANK_MULTIPLE = 16
"""The tokens of a rank are a multiple of this in the padded layout, as FP8 products require."""


@dataclass(frozen=True)
class PaddedDocuments:
    """Where the documents of a window are in a padded buffer."""

    offsets: Tensor
    """In the window [documents + 1], int64, on the CPU."""
    padded_offsets: Tensor
    """In the buffer [documents + 1], int64, on the CPU."""

    @property
    def num_padding(self) -> int:
        """Padding tokens of the buffer."""
        return int(self.padded_offsets[-1] - self.offsets[-1])

    def shard_rows(self, rank: int, cp: int) -> Tensor:
        """Return the window position of each token of a rank's part of the buffer, -1 for padding.

        Every document is cut in 2*cp chunks; rank r holds chunks r and 2*cp-1-r of each.

        Returns: [t/cp] int64.
        Source: Transformer Engine 2.20, `get_batch_on_this_cp_rank` of `context_parallel.py`.
        """
        starts, lengths = self.padded_offsets[:-1], self.padded_offsets.diff()
        documents = torch.arange(len(starts))
        if cp > 1:
            chunk = lengths // (2 * cp)
            ends = starts + (2 * cp - 1 - rank) * chunk
            starts = torch.stack([starts + rank * chunk, ends], dim=1).flatten()
            lengths, documents = chunk.repeat_interleave(2), documents.repeat_interleave(2)
        before = lengths.cumsum(0) - lengths
        rows = torch.arange(int(lengths.sum()))
        positions = rows + (starts - before).repeat_interleave(lengths)
        document = documents.repeat_interleave(lengths)
        inside = positions - self.padded_offsets[document]
        is_real = inside < self.offsets.diff()[document]
        return torch.where(is_real, self.offsets[document] + inside, -1)


def pad_documents(offsets: Tensor, cp: int, tp: int = 1) -> PaddedDocuments:
    """Make room for each document to be a multiple of 2*cp, and for whole ranks.

    The last document also takes what the buffer needs to be a multiple of `RANK_MULTIPLE` on each
    context- and sequence-parallel rank.

    Args:
        offsets: Documents of the window [documents + 1], int64.

    >>> pad_documents(torch.tensor([0, 3, 8, 30]), cp=2).padded_offsets.tolist()
    [0, 4, 12, 64]
    """
    multiple = 2 * cp if cp > 1 else 1
    lengths = _round_up(offsets.diff(), multiple)
    whole = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    whole[-1] = _round_up(whole[-1], RANK_MULTIPLE * cp * tp)
    return PaddedDocuments(offsets, whole)


def _round_up(value: Tensor, multiple: int) -> Tensor:
    return (value + multiple - 1) // multiple * multiple


def offsets_of(document_starts: Tensor) -> Tensor:
    """Offsets from the mark that each token of a window carries.

    Args:
        document_starts: Whether a document begins at a token [s]; the first always counts.
    Returns: [documents + 1] int64, on the CPU.
    """
    begins = document_starts.cpu().bool().clone()
    begins[0] = True
    end = torch.tensor([begins.numel()])
    return torch.cat([begins.nonzero().flatten(), end])


def split_batch(
    batch: dict[str, Tensor],
    offsets: Tensor,
    attention: AttentionFormat,
    *,
    rank: int,
    cp: int,
    tp: int,
) -> tuple[dict[str, Tensor], Any, int]:
    """Cut a window between context-parallel ranks, with its documents apart.

    Args:
        batch: Tensors of the whole window [1, s].
        offsets: Its documents, see `offsets_of`.
        attention: Which attention will be given the mask.
        rank: Of the context-parallel group. cp: Its size.
        tp: Tensor-parallel size under sequence parallelism, else 1.
    Returns: The rank's tensors [1, s/cp] or [1, t/cp], Megatron's `PackedSeqParams` for all layers, and the
        padding tokens among the rank's.
    """
    if attention == "sbhd":
        shards = {name: zigzag_shard(whole, rank, cp, dim=1) for name, whole in batch.items()}
        return shards, _packed_params("sbhd", offsets, int(offsets[-1])), 0
    padded = pad_documents(offsets, cp, tp)
    device = next(iter(batch.values())).device
    rows = padded.shard_rows(rank, cp).to(device)
    shards = {
        name: torch.where(rows < 0, 0, whole[:, rows.clamp(min=0)]) for name, whole in batch.items()
    }
    longest = int(padded.padded_offsets.diff().max())
    # Few different values: Megatron keeps the RoPE angles of each that it has seen.
    longest = min(1 << (longest - 1).bit_length(), int(padded.padded_offsets[-1]))
    on_device = padded.padded_offsets.to(device=device, dtype=torch.int32)
    return shards, _packed_params("thd", on_device, longest), int((rows < 0).sum())


def _packed_params(attention: AttentionFormat, offsets: Tensor, longest: int) -> Any:
    """Offsets for the attention; padding is part of its document, and behind all that is real."""
    from megatron.core.packed_seq_params import PackedSeqParams

    padded = offsets if attention == "thd" else None
    return PackedSeqParams(
        qkv_format=attention,
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        pad_between_seqs=False,
    )
