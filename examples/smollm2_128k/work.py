"""Shared by all phases: paths, the mixtures, a checkpoint that is measured."""

import sys
from dataclasses import dataclass
from pathlib import Path

from examples.smollm2_128k.settings import Settings

MIXTURES: dict[str, tuple[int, tuple[str, ...]]] = {
    "original": (0, ("original",)),
    "cut": (0, ("cut",)),
    "upsample-book": (0, ("upsample-sources", "Book=0.5")),
    "per-source-seed1": (1, ("per-source",)),
}
"""Seed and strategy of each run that is compared; `per-source` itself is the main run on its way."""


@dataclass(frozen=True)
class Work:
    """Paths of the run, and how it is run."""

    folder: Path
    settings: Settings
    gpus: int
    python: str = sys.executable
    corpus: Path | None = None
    """Folder of the corpus: *.jsonl, and heldout/*.txt."""
    gguf: Path | None = None
    """The model, where it is on the disk already."""
    minutes: int | None = None
    """Training saves and exits after this time."""

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def books(self) -> list[Path]:
        """Long texts that no run reads."""
        return [self.folder / "corpus" / "books" / name for name in self.settings.books]

    def dataset(self, name: str) -> Path:
        return self.folder / "data" / name

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def processes(self, gpus: int) -> tuple[str, ...]:
        """The start of a command on this many GPUs."""
        if gpus <= 1:
            return (self.python,)
        launch = (self.python, "-m", "megatron_long.launch", "--standalone")
        return (*launch, "--nproc-per-node", str(gpus))


@dataclass(frozen=True)
class Model:
    """A checkpoint that is measured."""

    name: str
    """Of its results."""
    folder: Path
    step: int | None = None
    """Which checkpoint; one that training has not reached is an error."""
    argv: tuple[str, ...] = ()
    """Flags for Megatron."""

    @property
    def flags(self) -> tuple[str, ...]:
        step = () if self.step is None else ("--ckpt-step", str(self.step))
        return (*step, *self.argv)
