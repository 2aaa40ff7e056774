"""Comparison of old and new values: every value that differs, with its name, before and now."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """A value that has changed; None if it is missing."""

    name: str
    before: Any
    now: Any


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str] | None = None
) -> list[Difference]:
    """Return what differs, in the order of `names` (None: of `before`, then of what `now` has more).

    >>> differences({"seed": 0, "size": 1}, {"seed": 5, "size": 1, "new": True})
    [Difference(name='seed', before=0, now=5), Difference(name='new', before=None, now=True)]
    """
    compared = dict.fromkeys([*before, *now]) if names is None else names
    found = (Difference(name, before.get(name), now.get(name)) for name in compared)
    return [item for item in found if item.before != item.now]


def format_differences(
    found: Iterable[Difference],
    show: Callable[[Any], str] = str,
    pattern: str = "{}: {} before, {} now",
) -> str:
    """Format differences for a message.

    >>> format_differences([Difference("seed", 0, 5), Difference("engine", "a", "b")])
    'seed: 0 before, 5 now; engine: a before, b now'
    """
    return "; ".join(pattern.format(name, show(before), show(now)) for name, before, now in found)
