"""What a run writes besides its checkpoints: TensorBoard, W&B, results, standard output.

None of it may end training. A full disk, a W&B service that SLURM's signal has ended, or a `| tee` that is
gone costs figures; each is reported once, and once more when it works again.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

RETRY_AFTER_S = 60.0
"""Seconds until a writer that has failed is tried again."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def survived(what: str) -> Iterator[None]:
    """Report that something could not be written, and go on without it."""
    try:
        yield
    except OSError as error:
        logger.error("%s could not be written (%s); training goes on", what, words_of(error))


class SurvivingWriter:
    """A writer of TensorBoard or W&B whose methods never raise; what fails is lost.

    Args:
        name: What it is called in messages.
        writer: The writer.
        reopen: Gives a new one when, `RETRY_AFTER_S` after a failure, it is tried again; or raises.
    """

    def __init__(self, name: str, writer: Any, reopen: Callable[[], Any] | None = None) -> None:
        self._name = name
        self._writer = writer
        self._reopen = reopen or (lambda: writer)
        self._failed_at: float | None = None

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._writer, name)
        if not callable(value):
            return value
        return lambda *args, **kwargs: self.attempt(
            lambda: getattr(self._writer, name)(*args, **kwargs)
        )

    def attempt(self, action: Callable[[], Any]) -> Any:
        """Do something that needs the writer; None if it fails, or has failed just now."""
        failed_at = self._failed_at
        if failed_at is not None and time.monotonic() < failed_at + RETRY_AFTER_S:
            return None
        try:
            if failed_at is not None:
                self._writer = self._reopen()
            result = action()
        except Exception as error:  # whatever a package of others raises
            if self._failed_at is None:
                logger.error(
                    "%s takes no figures (%s); training goes on", self._name, words_of(error)
                )
            self._failed_at = time.monotonic()
            return None
        if failed_at is not None and self._failed_at == failed_at:
            logger.warning("%s takes figures again", self._name)
            self._failed_at = None
        return result


class SurvivingStream:
    """A text stream whose writes never raise, as standard output on a full disk would."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or lose it."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that works."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def keep_standard_streams() -> None:
    """Let no `print` end training: neither a full disk, nor a reader of the output that is gone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, SurvivingStream):
            setattr(sys, name, SurvivingStream(stream))


def words_of(error: Exception) -> str:
    """An error on one line.

    >>> words_of(OSError("No space\\nleft"))
    'OSError: No space left'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
