"""RULER's samples: for one task and length, the text of each prompt and its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_long.errors import ConfigError
from megatron_long.evaluation.ruler.drawing import Drawer, Request
from megatron_long.evaluation.ruler.ruler_drawers import DRAWERS
from megatron_long.evaluation.ruler.ruler_inputs import RulerInputs

Encode = Callable[[str], Sequence[int] | np.ndarray]
MOST_TRIES = 20
"""Draws of the smallest size before a length counts as too short."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt."""

    index: int
    prompt: str
    """With the chat template and the beginning of the answer."""
    answers: tuple[str, ...]
    tokens: np.ndarray
    """Token ids of the prompt, without a BOS that the tokenizer adds."""


def make_samples(
    request: Request, inputs: RulerInputs, encode: Encode, number: int
) -> Iterator[Sample]:
    """Give samples one by one; the first takes longest, as the size that fits is found for it.

    Args:
        encode: Gives the token ids of a text, without BOS.
    Raises: ConfigError: the length is too short, or there are too few questions.
    """
    longest = request.context_length - request.tokens_to_generate
    drawer = DRAWERS[request.task.kind](request, inputs, lambda text: len(encode(text)))
    size = drawer.largest(longest)
    for index in range(number):
        yield _draw_fitting(request, drawer, encode, index, size)


def _draw_fitting(
    request: Request, drawer: Drawer, encode: Encode, index: int, size: int
) -> Sample:
    longest = request.context_length - request.tokens_to_generate
    tries = 0
    while tries < MOST_TRIES:
        text, answers = drawer.draw(index, size)
        tokens = np.asarray(encode(text))
        if len(tokens) <= longest:
            return Sample(index, text, tuple(answers), tokens)
        if size > drawer.step:
            size = max(size - drawer.step, drawer.smallest)
        else:
            tries += 1
    raise ConfigError(
        f"--context-lengths {request.context_length} is too short for {request.name}: its smallest "
        f"prompt takes {len(tokens)} tokens, and {request.tokens_to_generate} are generated; give longer "
        "ones, or leave the task out of --tasks"
    )
