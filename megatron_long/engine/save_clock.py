"""When a checkpoint is due by time."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class SaveClock:
    """Counts from the end of the last save, or from the first step of this start.

    >>> times = iter([100.0, 159.0, 160.0, 170.0, 171.0])
    >>> clock = SaveClock(60.0, now=lambda: next(times))
    >>> clock.is_due(), clock.is_due(), clock.is_due()
    (False, False, True)
    >>> clock.restart()
    >>> clock.is_due()
    False
    """

    seconds: float
    now: Callable[[], float] = time.monotonic
    _since: float | None = None

    def is_due(self) -> bool:
        """Whether the time is over on this process; asked after each step."""
        if self._since is None:
            self.restart()
            return False
        return self.now() - self._since >= self.seconds

    def restart(self) -> None:
        """Begin to count: something was saved, or has just failed to be and is tried again by itself."""
        self._since = self.now()
