"""What RULER's generators share: their random numbers, and the search for the largest prompt that fits.

Numbers are drawn in the order of RULER's own generators, so that the same seed, tokenizer and files give the
same text: that of a sample depends on all draws before it, also on those that only find the size that fits.
Legend: a size is a number of words, sentences, lines or documents, as the task counts.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_long.evaluation.ruler.ruler_definitions import CHAT_TEMPLATES, DEFAULT_SEED, RulerTask
from megatron_long.evaluation.ruler.ruler_inputs import RulerInputs

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Request:
    """What decides the samples of one task and length."""

    name: str
    task: RulerTask
    context_length: int
    """Tokens of prompt and answer together."""
    tokens_to_generate: int
    chat_template: str = CHAT_TEMPLATES["base"]
    seed: int = DEFAULT_SEED


class Drawer(ABC):
    """A generator with its random numbers, and the search for the size that fits."""

    step = 10
    """By how much a prompt that is too long shrinks; the search begins with it."""
    smallest = 1
    slack = 3
    """The search begins in the middle of so many times the estimated size."""

    def __init__(self, request: Request, inputs: RulerInputs, count: CountTokens) -> None:
        self.request, self.inputs, self.count = request, inputs, count
        self.options = dict(request.task.options)
        self.random = random.Random(request.seed)
        self.numpy_random = np.random.RandomState(request.seed)
        kind = request.task.shared
        # Not by str.format: a chat template may hold braces of its own.
        begin, _, end = request.chat_template.partition("{task_template}")
        self.parts = (begin, kind.template, end, kind.answer_prefix)

    def shuffled(self, items: list) -> list:
        """Shuffle as RULER does: by the seed alone, whatever was drawn before."""
        random.Random(self.request.seed).shuffle(items)
        return items

    def fill(self, **fields: object) -> str:
        begin, template, end, prefix = self.parts
        return begin + template.format(**fields) + end + prefix.format(**fields)

    def estimate(self, longest: int) -> int:
        """Give an upper bound of the size."""
        text, _ = self.search_draw(self.step)
        return int(self._whole(longest) / (self.count(text) / self.step) * self.slack)

    def _whole(self, longest: int) -> int:
        return longest + self.request.tokens_to_generate

    def overhead(self) -> int:
        """Give tokens that come with each prompt beyond the text that `draw` gives."""
        return 0

    def largest(self, longest: int) -> int:
        """Find the largest size that fits, by halving."""
        best, low, high = None, self.step, max(self.estimate(longest), 2 * self.step)
        while low <= high:
            middle = (low + high) // 2
            text, _ = self.search_draw(middle)
            if self.count(text) + self.overhead() <= longest:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return self.step if best is None else best

    def search_draw(self, size: int) -> tuple[str, Sequence[str]]:
        """Draw while the size is searched for."""
        return self.draw(0, size)

    @abstractmethod
    def draw(self, index: int, size: int) -> tuple[str, Sequence[str]]:
        """Draw a prompt of a size, and give its answers."""
