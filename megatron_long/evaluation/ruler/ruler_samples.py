"""RULER's samples: for one task and length, the text of each prompt and its answers.

Numbers are drawn in the order of RULER's own generators, so that the same seed, tokenizer and files give the
same text: that of a sample depends on all draws before it, also on those that only find the size that fits.
Legend: a size is a number of words, sentences, lines or documents, as the task counts.

Source: Hsieh et al. 2024 (arXiv 2404.06654) and what `scripts/data/synthetic/*.py` of NVIDIA/RULER compute.
"""

from __future__ import annotations

import bisect
import itertools
import random
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_long.errors import ConfigError
from megatron_long.evaluation.ruler.ruler_definitions import (
    CHAT_TEMPLATES,
    DOCUMENT,
    NEEDLE,
    NOISE,
    RulerTask,
)
from megatron_long.evaluation.ruler.ruler_inputs import RulerInputs

DEPTHS_PERCENT = np.round(np.linspace(0, 100, 40)).astype(int).tolist()
SHORT_TOKENS = 4096
"""Below this length some tasks take smaller steps and easier parameters."""
MOST_TRIES = 20
"""Draws of the smallest size before a length counts as too short."""
ZETA_2 = float(np.pi**2 / 6)
ICL_TOKENS = 500
"""Length of the worked example that precedes variable tracking."""

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Sample:
    """One prompt."""

    index: int
    prompt: str
    """With the chat template and the beginning of the answer."""
    answers: tuple[str, ...]
    num_tokens: int
    """Tokens of the prompt, without BOS."""


@dataclass(frozen=True)
class Request:
    """What decides the samples of one task and length."""

    name: str
    task: RulerTask
    context_length: int
    """Tokens of prompt and answer together."""
    tokens_to_generate: int
    chat_template: str = CHAT_TEMPLATES["base"]
    seed: int = 42


def make_samples(
    request: Request, inputs: RulerInputs, count: CountTokens, number: int
) -> Iterator[Sample]:
    """Give samples one by one; the first takes longest, as the size that fits is found for it.

    Args:
        count: Gives the number of tokens of a text, without BOS.
    Raises: ConfigError: the length is too short, or there are too few questions.
    """
    longest = request.context_length - request.tokens_to_generate
    drawer = DRAWERS[request.task.kind](request, inputs, count)
    size = drawer.largest(longest)
    for index in range(number):
        yield _draw_fitting(request, drawer, count, index, size)


def _draw_fitting(
    request: Request, drawer: _Base, count: CountTokens, index: int, size: int
) -> Sample:
    longest = request.context_length - request.tokens_to_generate
    tries = 0
    while tries < MOST_TRIES:
        text, answers = drawer.draw(index, size)
        if (num_tokens := count(text)) <= longest:
            return Sample(index, text, tuple(answers), num_tokens)
        if size > drawer.step:
            size = max(size - drawer.step, drawer.smallest)
        else:
            tries += 1
    raise ConfigError(
        f"--context-lengths {request.context_length} is too short for {request.name}: its smallest "
        f"prompt takes {num_tokens} tokens, and {request.tokens_to_generate} are generated; give longer "
        "ones, or leave the task out of --tasks"
    )


class _Base:
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

    def draw(self, index: int, size: int) -> tuple[str, Sequence[str]]:
        raise NotImplementedError


class PairedWords(Sequence[str]):
    """All "adjective-noun" in alphabetical order, each once, without making six million strings.

    >>> list(PairedWords(["old", "blue", "blue-eyed"], ["fish", "cat"]))
    ['blue-cat', 'blue-eyed-cat', 'blue-eyed-fish', 'blue-fish', 'old-cat', 'old-fish']
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self.nouns = sorted(set(nouns))
        groups: list[list[str]] = []
        for beginning in sorted({f"{adjective}-" for adjective in adjectives}):
            if groups and beginning.startswith(groups[-1][0]):
                groups[-1].append(beginning)  # their pairs lie between those of the first
            else:
                groups.append([beginning])
        self.groups = [
            group[0] if len(group) == 1 else sorted({a + noun for a in group for noun in nouns})
            for group in groups
        ]
        sizes = [len(self.nouns) if isinstance(g, str) else len(g) for g in self.groups]
        self.starts = list(itertools.accumulate(sizes, initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        number = bisect.bisect_right(self.starts, place) - 1
        group, rest = self.groups[number], place - self.starts[number]
        return group + self.nouns[rest] if isinstance(group, str) else group[rest]


class Niah(_Base):
    """Needles: keys with values, hidden in noise, essays or among other needles."""

    def __init__(self, request: Request, inputs: RulerInputs, count: CountTokens) -> None:
        super().__init__(request, inputs, count)
        is_essay = self.options["haystack"] == "essay"
        self.step = 500 if is_essay else 25 if request.context_length >= SHORT_TOKENS else 5
        self.words = PairedWords(inputs.adjectives, inputs.nouns)
        if self.options["num_queries"] * self.options["num_values"] == 1:
            # RULER rewords the whole template, a chat template's words included.
            own = request.chat_template not in CHAT_TEMPLATES.values()
            begin, template, end, prefix = self.parts
            self.parts = (
                begin if own else _singular(begin),
                _singular(template),
                end if own else _singular(end),
                _singular(prefix),
            )

    def draw(self, index: int, size: int) -> tuple[str, Sequence[str]]:
        value_type = self.options["value_type"]
        keys: list[str] = []
        values: list[list[str]] = []
        needles: list[str] = []
        for _ in range(self.options["num_keys"]):
            keys.append(self._draw_word(self.options["key_type"]))
            values.append([])
            for _ in range(self.options["num_values"]):
                values[-1].append(self._draw_word(value_type))
                needles.append(self._needle(keys[-1], values[-1][-1]))
        self.shuffled(needles)
        context = self._hide(needles, size)
        asked = self.random.sample(range(len(keys)), self.options["num_queries"])
        queries = [keys[place] for place in asked]
        query = ", ".join(queries[:-1]) + ", and " + queries[-1] if queries[1:] else queries[0]
        answers = [value for place in asked for value in values[place]]
        shown = value_type[:-1] if len(answers) == 1 else value_type
        return self.fill(type_needle_v=shown, context=context, query=query), answers

    def _hide(self, needles: list[str], size: int) -> str:
        if self.options["haystack"] == "essay":
            sentences = self.inputs.essay_sentences(size)
            depths = self.random.sample(DEPTHS_PERCENT, len(needles))
            cuts = sorted(int(len(sentences) * (depth / 100)) for depth in depths)
            parts = []
            for needle, start, stop in zip(needles, [0, *cuts], cuts, strict=False):
                parts += [" ".join(sentences[start:stop]), needle]
            return " ".join([*parts, " ".join(sentences[cuts[-1] :])])
        if self.options["haystack"] == "noise":
            lines = [NOISE] * size
        else:
            types = self.options["key_type"], self.options["value_type"]
            lines = [self._needle(*map(self._draw_word, types)) for _ in range(size)]
        places = sorted(self.random.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=self.options["value_type"], key=key, value=value)

    def _draw_word(self, kind: str) -> str:
        if kind == "numbers":
            return str(self.random.randint(10**6, 10**7 - 1))
        if kind == "words":
            return self.random.choice(self.words)
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))


def _singular(text: str) -> str:
    for plural, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(plural, one)
    return text


class VariableTracking(_Base):
    """A number handed on from variable to variable between lines of noise, after a worked example."""

    def __init__(self, request: Request, inputs: RulerInputs, count: CountTokens) -> None:
        super().__init__(request, inputs, count)
        self.smallest = self.options["num_hops"] + 1
        self.chat_parts, self.is_example = self.parts, False
        self.example = self._draw_example()
        self.step = 10 if request.context_length >= SHORT_TOKENS else 5

    def _draw_example(self) -> str:
        """Draw the worked example as a prompt of its own, and leave what follows to the sample."""
        self.step, self.is_example = 5, True
        _, template, _, prefix = self.chat_parts
        self.parts = ("", template, "", prefix)
        size = self.largest(ICL_TOKENS)
        text, names = self._draw_chain(size)
        while self.count(text) > ICL_TOKENS and size > self.step:
            size -= self.step
            text, names = self._draw_chain(size)
        self.parts, self.is_example = self.chat_parts, False
        return f"{text} {' '.join(names)}\n"

    def _whole(self, longest: int) -> int:
        return longest if self.is_example else super()._whole(longest)

    def overhead(self) -> int:
        return 0 if self.is_example else self.count(self.example)

    def search_draw(self, size: int) -> tuple[str, Sequence[str]]:
        return self._draw_chain(size)

    def draw(self, index: int, size: int) -> tuple[str, Sequence[str]]:
        text, names = self._draw_chain(size)
        begin = self.chat_parts[0]
        return begin + self._renamed_example() + "\n" + text[len(begin) :], names

    def _draw_chain(self, size: int) -> tuple[str, list[str]]:
        number = self.options["num_hops"] + 1
        names = [self._draw_name(3 if self.is_example else 5) for _ in range(number)]
        while len(set(names)) < number:
            names.append(self._draw_name(3 if self.is_example else 5))
        names = list(dict.fromkeys(names))
        value = "12345" if self.is_example else str(self.numpy_random.randint(10000, 99999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
        lines = [NOISE] * size
        places = sorted(self.random.sample(range(size), number))
        for shift, (place, link) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + shift, link)
        context = "\n".join(lines).replace(". \n", ".\n")
        return self.fill(context=context, query=value, num_v=number), names

    def _draw_name(self, length: int) -> str:
        return "".join(self.random.choices(string.ascii_uppercase, k=length))

    def _renamed_example(self) -> str:
        """Give the example with other names and another number."""
        text = self.example
        for name in text.split()[-self.options["num_hops"] - 1 :]:
            text = text.replace(name, self._draw_name(len(name)))
        return text.replace("12345", str(self.numpy_random.randint(10000, 99999)))


class CommonWords(_Base):
    """Ten words that come more often than the others of a list, after a worked example."""

    probe_size = 4096

    def __init__(self, request: Request, inputs: RulerInputs, count: CountTokens) -> None:
        super().__init__(request, inputs, count)
        distinct = {*inputs.nouns, *inputs.adjectives, *inputs.verbs}
        self.words = self.shuffled(sorted(distinct))
        self.is_short = request.context_length < SHORT_TOKENS
        self.smallest = self.options["num_common"]

    def estimate(self, longest: int) -> int:
        text, _ = self.draw(0, self.probe_size)
        return int(self._whole(longest) // (self.count(text) / self.probe_size)) * 2

    def draw(self, index: int, size: int) -> tuple[str, Sequence[str]]:
        repeats = self.options["common_repeats"], self.options["uncommon_repeats"]
        shown, common = self._draw_list(*((20, 3, 1) if self.is_short else (40, 10, 3)))
        listed, answers = self._draw_list(size, *((6, 1) if self.is_short else repeats))
        return (
            f"{self.fill(context=shown)} {_numbered(common)}\n{self.fill(context=listed)}",
            answers,
        )

    def _draw_list(self, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
        words = self.words if size <= len(self.words) else self.inputs.more_words
        drawn, number = self.random.sample(words, size), self.options["num_common"]
        listed = self.shuffled(drawn[:number] * often + drawn[number:] * seldom)
        return _numbered(listed), drawn[:number]


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


class FrequentWords(_Base):
    """Coded words whose frequencies fall with the square of their rank; the most frequent is dots."""

    def largest(self, longest: int) -> int:
        self.longest, self.step = longest, longest // 32
        self.num_coded = longest // 50
        vocabulary = self._draw_vocabulary()
        size = longest // self.options["word_length"]
        while self.count(self._text(vocabulary, size)) < longest:
            size += self.step
        return size - self.step

    def draw(self, index: int, size: int) -> tuple[str, Sequence[str]]:
        vocabulary = self._draw_vocabulary()
        text = self._text(vocabulary, size)
        while self.count(text) > self.longest and size > self.step:
            size -= self.step
            text = self._text(vocabulary, size)
        return text, vocabulary[1:4]

    def _draw_vocabulary(self) -> list[str]:
        words = [self._draw_word() for _ in range(self.num_coded)]
        while len(set(words)) < self.num_coded:
            words.append(self._draw_word())
        return ["...", *self.shuffled(sorted(set(words)))[1:]]

    def _draw_word(self) -> str:
        letters = self.random.choices(string.ascii_lowercase, k=self.options["word_length"])
        return "".join(letters)

    def _text(self, vocabulary: Sequence[str], size: int) -> str:
        ranks = np.arange(1, len(vocabulary) + 1)
        counts = (size * (ranks ** -self.options["alpha"]) / ZETA_2).astype(int)
        words = [word for word, times in zip(vocabulary, counts, strict=True) for _ in range(times)]
        return self.fill(context=" ".join(self.shuffled(words)))


class QuestionAnswering(_Base):
    """A question with its documents among others."""

    def __init__(self, request: Request, inputs: RulerInputs, count: CountTokens) -> None:
        super().__init__(request, inputs, count)
        self.known = inputs.questions(self.options["dataset"])

    def draw(self, index: int, size: int) -> tuple[str, Sequence[str]]:
        if index >= len(self.known.questions):
            raise ConfigError(
                f"--num-samples is above the {len(self.known.questions)} questions of "
                f"--{self.options['dataset']}; give fewer"
            )
        question, documents = self.known.questions[index], self.known.documents
        if size >= len(documents):
            chosen = (list(documents) * -(-size // len(documents)))[:size]
        else:
            chosen = [
                documents[place]
                for place in self._choose(question.documents, question.related, size)
            ]
        context = "\n\n".join(
            DOCUMENT.format(i=place, document=document)
            for place, document in enumerate(self.shuffled(chosen), 1)
        )
        return self.fill(context=context, query=question.query), question.answers

    def _choose(self, own: tuple[int, ...], related: tuple[int, ...], size: int) -> list[int]:
        if size - len(own) <= len(related):
            return [*own, *self.random.sample(related, max(0, size - len(own)))]
        taken = {*own, *related}
        others = [place for place in range(len(self.known.documents)) if place not in taken]
        number = max(0, size - len(own) - len(related))
        return [*own, *related, *self.random.sample(others, number)]


DRAWERS: dict[str, type[_Base]] = {
    "niah": Niah,
    "vt": VariableTracking,
    "cwe": CommonWords,
    "fwe": FrequentWords,
    "qa": QuestionAnswering,
}
