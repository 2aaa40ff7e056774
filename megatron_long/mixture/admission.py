"""Which documents are worth tokenizing: limits on their keys, for each source.

The plan takes a source's documents in the order of their keys until its budget is met, so a document
whose key is far beyond that point need not be tokenized, nor need a short one that its other
key drops. The limits affect the amount of work, never the choice: if they prove too tight, the
run repeats the stage with wider ones.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Limits:
    """Limits of one source, as probabilities of its keys."""

    order: float = 1.0
    """Documents beyond are not tokenized at all."""
    keep_short: float = 1.0
    """Short documents with a drop key beyond are not used for training."""
    valid: float = 1.0
    """Documents below may be held out for validation, so they are tokenized regardless of the drop key."""
    measure: float = 0.0
    """How many documents are tokenized only to be measured; see `measured_share`."""


def measured_share(measure: float | NDArray, size_bucket: int | NDArray) -> NDArray[np.float64]:
    """Return which share of documents of 2^k bytes and more is tokenized to estimate the tokens of others.

    It grows with the root of the size, up to 1: the errors of documents grow with their sizes, and so does
    what tokenizing them costs. Then this allocation has the least error for its cost.

    Source: Cochran 1977, "Sampling Techniques", section 5.5 (n_h proportional to N_h S_h / sqrt(c_h)).

    >>> measured_share(0.25, np.array([0, 2, 4, 20])).tolist()
    [0.25, 0.5, 1.0, 1.0]
    """
    return np.minimum(measure * np.exp2(np.asarray(size_bucket) / 2), 1.0)


@dataclass(frozen=True)
class Admission:
    """The limits of every source."""

    by_source: dict[str, Limits] = field(default_factory=dict)
    default: Limits = dataclasses.field(default_factory=Limits)
    """For sources that the survey did not see."""

    def limits(self, source: str) -> Limits:
        """Return the limits of a source."""
        return self.by_source.get(source, self.default)

    def widened(self, wider: Mapping[str, Limits]) -> "Admission":
        """Return the limits of another round."""
        return Admission(self.by_source | dict(wider), self.default)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the work folder."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Admission":
        """Parse the output of `to_json`."""
        by_source = {name: Limits(**limits) for name, limits in content["by_source"].items()}
        return cls(by_source, Limits(**content["default"]))
