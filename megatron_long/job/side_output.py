"""Output of a run other than checkpoints: TensorBoard, W&B, results, standard output.

No failure of it may end training. A full disk, a W&B service that SLURM's signal has ended, or a closed
`| tee` loses figures; each is reported once, and once more when it works again.
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
    """Report that something could not be written, and continue without it."""
    try:
        yield
    except OSError as error:
        logger.error("%s could not be written (%s); training continues", what, words_of(error))


class SurvivingWriter:
    """A writer of TensorBoard or W&B whose methods never raise; what fails is lost.

    Args:
        name: Its name in messages.
        writer: The writer.
        reopen: Returns a new one for the next try, `RETRY_AFTER_S` after a failure; or raises.
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
        """Do something that needs the writer; None if it fails, or failed recently."""
        failed_at = self._failed_at
        if failed_at is not None and time.monotonic() < failed_at + RETRY_AFTER_S:
            return None
        try:
            if failed_at is not None:
                self._writer = self._reopen()
            result = action()
        except Exception as error:  # any exception of a third-party package
            if self._failed_at is None:
                logger.error(
                    "%s accepts no figures (%s); training continues", self._name, words_of(error)
                )
            self._failed_at = time.monotonic()
            return None
        if failed_at is not None and self._failed_at == failed_at:
            logger.warning("%s accepts figures again", self._name)
            self._failed_at = None
        return result


class SurvivingStream:
    """A text stream whose writes never raise, unlike standard output on a full disk."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write; a failed write is lost."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; failures are ignored."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def keep_standard_streams() -> None:
    """Keep `print` from ending training on a full disk or a closed output."""
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
