"""RULER's five generators: one prompt of a size, drawn as its own scripts draw it.

Source: Hsieh et al. 2024 (arXiv 2404.06654) and what `scripts/data/synthetic/*.py` of NVIDIA/RULER compute.
"""

from __future__ import annotations

import itertools
import string
import uuid
from collections.abc import Sequence

import numpy as np

from megatron_long.errors import ConfigError
from megatron_long.evaluation.ruler.drawing import CountTokens, Drawer, Request
from megatron_long.evaluation.ruler.ruler_definitions import (
    CHAT_TEMPLATES,
    DOCUMENT,
    NEEDLE,
    NOISE,
)
from megatron_long.evaluation.ruler.ruler_inputs import RulerInputs

DEPTHS_PERCENT = np.round(np.linspace(0, 100, 40)).astype(int).tolist()
SHORT_TOKENS = 4096
"""Below this length some tasks take smaller steps and easier parameters."""
ZETA_2 = float(np.pi**2 / 6)
ICL_TOKENS = 500
"""Length of the worked example that precedes variable tracking."""


class Niah(Drawer):
    """Needles: keys with values, hidden in noise, essays or among other needles."""

    def __init__(self, request: Request, inputs: RulerInputs, count: CountTokens) -> None:
        super().__init__(request, inputs, count)
        is_essay = self.options["haystack"] == "essay"
        self.step = 500 if is_essay else 25 if request.context_length >= SHORT_TOKENS else 5
        self.words = inputs.pairs
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


class VariableTracking(Drawer):
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


class CommonWords(Drawer):
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
        if size > len(words):
            raise ConfigError(
                f"--english-words {self.inputs.english_words} holds {len(words)} words, and a list of this "
                f"length takes {size}; give RULER's english_words.json"
            )
        drawn, number = self.random.sample(words, size), self.options["num_common"]
        listed = self.shuffled(drawn[:number] * often + drawn[number:] * seldom)
        return _numbered(listed), drawn[:number]


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


class FrequentWords(Drawer):
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


class QuestionAnswering(Drawer):
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


DRAWERS: dict[str, type[Drawer]] = {
    "niah": Niah,
    "vt": VariableTracking,
    "cwe": CommonWords,
    "fwe": FrequentWords,
    "qa": QuestionAnswering,
}
