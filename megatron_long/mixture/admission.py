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


@dataclass(frozen=True)
class Limits:
    """Limits of one source, as probabilities of its keys."""

    order: float = 1.0
    """Documents beyond are not tokenized at all."""
    keep_short: float = 1.0
    """Short documents with a drop key beyond are not used for training."""
    valid: float = 1.0
    """Documents below may be held out for validation, so they are tokenized regardless of the drop key."""


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
