"""Errors of checkpoints in Megatron's old format (`mp_rank_00/model_optim_rng.pt`), of other programs.

Upstream: megatron-core 0.19.2, `_load_base_checkpoint` prints what is wrong with a file and exits with
status 0.
Remove when it raises, or when the old format is no longer read.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_long.errors import DataError
from megatron_long.pickles import UnpicklingError

CHANGED_SYMBOLS = {"megatron.training.checkpointing": ("_load_base_checkpoint",)}
"""Symbols replaced while a checkpoint is loaded, by module."""


@contextlib.contextmanager
def old_format_errors_raised() -> Iterator[None]:
    """Raise an error for a bad file of the old format."""
    from megatron.training import checkpointing

    stock = checkpointing._load_base_checkpoint

    def load(load_dir: str | None, *args: Any, **kwargs: Any) -> Any:
        try:
            return stock(load_dir, *args, **kwargs)
        except SystemExit as error:
            cause = error.__context__
            if isinstance(cause, UnpicklingError) or not isinstance(cause, Exception):
                raise cause or error from None
            raise DataError(
                f"the checkpoint in --load {load_dir} cannot be read ({type(cause).__name__}: {cause}); it "
                "is damaged, or made for other software: copy it again or use another iteration"
            ) from cause

    checkpointing._load_base_checkpoint = load
    try:
        yield
    finally:
        checkpointing._load_base_checkpoint = stock
