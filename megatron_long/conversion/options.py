"""Options of a conversion, and its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_long.conversion.checks import KEEP
from megatron_long.conversion.pieces import size_of
from megatron_long.model.geometry import LlamaGeometry
from megatron_long.model.mapping import units_of
from megatron_long.model.rope import PLAIN_ROPE

if TYPE_CHECKING:
    from torch import dtype

MAX_SHARD_BYTES = 5 * 10**9

Progress = Callable[[int], object]
"""Called with the number of bytes that were just converted or verified."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every conversion."""

    dtype: str = KEEP
    """One of `DTYPES`, the type to store."""
    verify: bool = False
    """Whether to read the output back, compare it bit by bit and write the tensors' hashes."""
    check_logits: bool = False
    """Whether to compare the logits of both models too."""
    force: bool = False
    """Whether to replace an existing output."""
    dry_run: bool = False
    """Whether to check the input and write nothing."""
    allow_pickle: bool = False
    """Whether pickled weights may be read where there are no safetensors."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Largest safetensors file."""
    check_hashes: bool = True
    """Whether to compare a checkpoint's files with its hashes before it is exported."""
    progress: Progress = lambda size_bytes: None


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """Report of a conversion, or of a dry run."""

    output: Path
    num_tensors: int
    """Hugging Face tensors."""
    num_parameters: int
    size_bytes: int
    dtype: str
    geometry: LlamaGeometry
    is_verified: bool = False
    logits_difference: float | None = None
    """Relative to the largest logit; None if logits were not compared."""
    weights: str = ""
    """Which of the checkpoint's weights these are, if it has two kinds."""
    losses: tuple[str, ...] = ()
    """What the input has lost of the original model, in sentences."""

    def describe(self, *, is_dry_run: bool) -> str:
        """Say in one paragraph what was written, and what the input could not give."""
        verb = "would write" if is_dry_run else "wrote"
        verified = "; read back, every bit equal" if self.is_verified else ""
        if self.logits_difference is not None:
            difference = f"{self.logits_difference:.0e}"
            verified += f"; logits of Megatron and transformers within {difference} of the largest"
        geometry = self.geometry
        method = "" if geometry.rope == PLAIN_ROPE else f"{geometry.rope.method}, "
        said = (
            f"{verb} {self.output}: {self.num_tensors} tensors, "
            f"{self.num_parameters / 1e6:,.1f} M parameters, {self.size_bytes / 1e9:,.3f} GB of "
            f"{self.dtype}, RoPE {method}base {geometry.rotary_base:,.0f}, "
            f"up to {geometry.max_position_embeddings:,} tokens{verified}"
        )
        said += f"; from {self.weights}" if self.weights else ""
        return "\n".join([said, *(f"lost: {sentence}" for sentence in self.losses)])


def make_report(
    output: Path, geometry: LlamaGeometry, stored: dtype, losses: Sequence[str] = ()
) -> ConversionReport:
    units = list(units_of(geometry))
    size_bytes = sum(size_of(unit, geometry, stored) for unit in units)
    return ConversionReport(
        output=output,
        num_tensors=sum(len(unit.hf_names) for unit in units),
        num_parameters=size_bytes // stored.itemsize,
        size_bytes=size_bytes,
        dtype=str(stored).removeprefix("torch."),
        geometry=geometry,
        losses=tuple(losses),
    )
