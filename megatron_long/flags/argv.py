"""What the user has typed: the one reader of the words of a command line, before or without a parser."""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator

from megatron_long.errors import ConfigError

IS_FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)
"""A negative number is a value."""


class Argv(tuple[str, ...]):
    """The words of a command line, among which a later flag wins.

    Values follow their flag, up to the next one, or stand in its word after `=`.

    >>> argv = Argv("--lr 1e-5 --bf16 --min-lr=-1 --lr 2e-5".split())
    >>> argv.value("--lr"), argv.value("--min-lr"), argv.value("--bf16"), argv.value("--save")
    ('2e-5', '-1', '', None)
    """

    __slots__ = ()

    @classmethod
    def of(cls, *flags: str) -> "Argv":
        """The words of flags that are written with their values.

        >>> Argv.of("--bf16", "--fp8-format hybrid")
        ('--bf16', '--fp8-format', 'hybrid')
        """
        return cls(word for flag in flags for word in flag.split())

    def groups(self) -> Iterator[tuple[str, ...]]:
        """Each flag with the words of its values; words before the first flag are a group too."""
        group: list[str] = []
        for word in self:
            if group and IS_FLAG.fullmatch(word):
                yield tuple(group)
                group = []
            group.append(word)
        if group:
            yield tuple(group)

    def pairs(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each flag and its values; the flag of words before the first one is empty.

        >>> list(Argv(["x", "--sizes", "2", "-2", "--save=a=b", "--bf16"]).pairs())
        [('', ('x',)), ('--sizes', ('2', '-2')), ('--save', ('a=b',)), ('--bf16', ())]
        """
        for first, *rest in self.groups():
            flag, is_joined, value = first.partition("=")
            if IS_FLAG.fullmatch(first):
                yield flag, (value, *rest) if is_joined else tuple(rest)
            else:
                yield "", (first, *rest)

    def given(self, *flags: str) -> bool:
        """Whether one of these flags is among the words."""
        return any(flag in flags for flag, _ in self.pairs())

    def values(self, flag: str) -> tuple[str, ...] | None:
        """All values of a flag where it stands last; None where it is not given."""
        return dict(self.pairs()).get(flag)

    def value(self, flag: str) -> str | None:
        """The first value of a flag where it stands last; empty if it has none, None if it is not given."""
        values = self.values(flag)
        return None if values is None else "".join(values[:1])

    def parsed[Kind](self, flag: str, kind: Callable[[str], Kind]) -> Kind | None:
        """A flag's value as another type.

        Raises: ConfigError: it is not of that type.
        """
        text = self.value(flag)
        try:
            return None if text is None else kind(text)
        except (ValueError, argparse.ArgumentTypeError) as error:
            what = f"invalid {kind.__name__} value: {text!r}"
            what = what if isinstance(error, ValueError) else str(error)
            raise ConfigError(
                f"argument {flag}: {what}; `--help` lists the flags, ours and Megatron's"
            ) from None

    def without(self, *flags: str) -> "Argv":
        """The words that are not of these flags, nor their values.

        >>> Argv("--save x --lr -1 --finetune --load=y".split()).without("--save", "--finetune", "--load")
        ('--lr', '-1')
        """
        return self._where(lambda flag: flag not in flags)

    def only(self, *flags: str) -> "Argv":
        """The words of these flags, with their values."""
        return self._where(lambda flag: flag in flags)

    def replaced(self, flag: str, value: object) -> "Argv":
        """The words with one value of a flag, at their end."""
        return Argv((*self.without(flag), flag, str(value)))

    def before(self, word: str) -> "Argv":
        """The words before another, all where it is not there."""
        return Argv(self[: self.index(word)] if word in self else self)

    def _where(self, keeps: Callable[[str], bool]) -> "Argv":
        groups: Iterable[tuple[str, ...]] = self.groups()
        return Argv(word for group in groups if keeps(group[0].partition("=")[0]) for word in group)
