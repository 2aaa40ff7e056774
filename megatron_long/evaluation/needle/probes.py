"""What is hidden is drawn until the haystack does not hold it already: a model must not find it by chance."""

import random
import re
from collections.abc import Sequence

from megatron_long.errors import ConfigError
from megatron_long.evaluation.needle.needle_tasks import NeedleTask, Probe, Task

DIGITS = re.compile(r"\d+")
MAX_DRAWS = 20
"""Tries to draw names and numbers that the haystack does not hold."""


class UsedText:
    """The text of the haystack, in which words are looked up many times.

    Most words that are drawn are not there, and that is seen from a set of its words or of its digits.
    """

    def __init__(self, text: str) -> None:
        self.text = one_line(text)
        self._words = set(self.text.split(" "))
        self._digits: dict[int, set[str]] = {}

    def __contains__(self, words: str) -> bool:
        inner = words.split(" ")[1:-1]  # the first and the last may be parts of longer words
        return (
            self._words.issuperset(inner)
            and all(run in self._digits_of(len(run)) for run in DIGITS.findall(words))
            and words in self.text
        )

    def _digits_of(self, length: int) -> set[str]:
        """All digits of this length in a row, within longer rows too."""
        if length not in self._digits:
            self._digits[length] = {
                run[start : start + length]
                for run in set(DIGITS.findall(self.text))
                for start in range(len(run) - length + 1)
            }
        return self._digits[length]


def draw_probe(task: Task, used: UsedText, name: str) -> Probe:
    """Draw what is hidden, until the haystack does not hold it already."""
    generator = random.Random(name)
    if isinstance(task, NeedleTask):
        return task(generator)
    for _ in range(MAX_DRAWS):
        probe = task(generator)
        present = find_present(probe, used)
        if not present:
            break
    refuse_present(probe, present)
    return probe


def find_present(probe: Probe, text: str | UsedText) -> list[str]:
    """What a probe hides or asks for that the text holds already."""
    return [words for words in (*probe.inserts, probe.answer) if one_line(words) in text]


def refuse_present(probe: Probe, present: Sequence[str]) -> None:
    if present:
        flag = "--needle" if present[0] in probe.inserts else "--answer"
        raise ConfigError(
            f"--haystack already contains {flag} {present[0]!r}, so the test would prove nothing; "
            "use another text or another needle"
        )


def one_line(words: str) -> str:
    return " ".join(words.split())
