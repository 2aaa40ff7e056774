"""Expected duration of a phase, from the times of an 8B model on one machine of four H100.

| | seconds |
|---|---|
| training: command to the end of the first step | 110 |
| evaluation: command to the first window, weights loaded | 60 |
| another step, 131,072 tokens, all activations recomputed | 11 |
| a checkpoint of 112 GB written, read back and hashed, and the job ended | 150 |
| its optimizer's part hashed and loaded from the page cache (from the disk 70 more) | 10 |

Measured by this walk (docs/results.md); evaluations only three at a time, so theirs is an upper bound.
"""

from dataclasses import dataclass

TRAINING_S = 110.0
EVALUATION_S = 60.0
STEP_S = 11.0
SAVE_S = 150.0
LOAD_S = 10.0
FIXED_SHARE = 0.3
"""Seconds that do not depend on the number of layers: imports, and the embedding and output layers."""


@dataclass(frozen=True)
class Cost:
    """The parts of a phase.

    >>> Cost(trainings=1, steps=1, saves=1).seconds(), Cost(other=20).words()
    (271.0, '20 other')
    """

    trainings: int = 0
    """Starts of training, each with its first step."""
    evaluations: int = 0
    """Starts of an evaluation."""
    steps: int = 0
    """Steps after the first."""
    saves: int = 0
    loads: int = 0
    other: float = 0.0
    """Seconds."""

    def parts(self) -> dict[str, float]:
        """Seconds of each existing part."""
        found = {
            "start": self.trainings * TRAINING_S + self.evaluations * EVALUATION_S,
            "steps": self.steps * STEP_S,
            "save": self.saves * SAVE_S,
            "load": self.loads * LOAD_S,
            "other": self.other,
        }
        return {name: seconds for name, seconds in found.items() if seconds}

    def seconds(self, share: float = 1.0) -> float:
        """Seconds in total.

        Args:
            share: Layers of the model over 32.
        """
        return sum(self.parts().values()) * (FIXED_SHARE + (1 - FIXED_SHARE) * share)

    def words(self) -> str:
        """The parts, as `60 start + 130 save`."""
        return " + ".join(f"{seconds:.0f} {name}" for name, seconds in self.parts().items())
