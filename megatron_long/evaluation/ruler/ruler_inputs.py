"""The files that RULER's tasks are made of, which the user has downloaded: essays, SQuAD, HotpotQA, words."""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.fingerprint import sha256_of
from megatron_long.evaluation.needle.haystack import read_haystack
from megatron_long.evaluation.ruler.ruler_definitions import RulerTask

SQUAD_SOURCE = "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json"
HOTPOTQA_SOURCE = "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json"
ENGLISH_WORDS_SOURCE = (
    "scripts/data/synthetic/json/english_words.json of github.com/NVIDIA/RULER (Git LFS)"
)
TRAINING_CHARACTERS = 1_000_000
"""Of the essays, from which Punkt learns sentence ends."""


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and which documents go with it."""

    query: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    """Those that must be there: numbers of `QuestionSet.documents`."""
    related: tuple[int, ...] = ()
    """Those taken before all others."""


@dataclass(frozen=True)
class QuestionSet:
    """A data set of questions, and all its documents, sorted."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


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


@dataclass(frozen=True)
class RulerInputs:
    """Paths as the user gave them; what is not asked for need not be there."""

    haystack: Path | None = None
    """Essays: a text file, a folder of `*.txt`, or RULER's PaulGrahamEssays.json."""
    squad: Path | None = None
    hotpotqa: Path | None = None
    english_words: Path | None = None

    def check(self, tasks: Sequence[RulerTask]) -> None:
        """See that what the tasks need is there and can be read.

        Raises: ConfigError: a flag is missing, or a file. DataError: a file is another one.
        """
        for task in tasks:
            if task.options.get("haystack") == "essay":
                _ = self.essay
            if "dataset" in task.options:
                self.questions(task.options["dataset"])
            if task.kind in ("niah", "cwe"):
                _ = self.nouns
            if task.kind == "cwe" and self.english_words is not None:
                _ = self.more_words

    def fingerprint(self, tasks: Sequence[RulerTask]) -> dict[str, str]:
        """Give what tells the inputs of these tasks from others: SHA-256 of files and words."""
        used, kinds = [task.options for task in tasks], {task.kind for task in tasks}
        known: dict[str, str] = {}
        if any(options.get("haystack") == "essay" for options in used):
            known["haystack"] = sha256(" ".join(self.essay).encode()).hexdigest()
            known["sentences"] = "punkt_tab" if has_english_model() else "trained on the haystack"
        files = {options["dataset"] for options in used if "dataset" in options}
        files |= {"english_words"} if "cwe" in kinds and self.english_words else set()
        known |= {name: sha256_of(getattr(self, name)) for name in sorted(files)}
        if kinds & {"niah", "cwe"}:
            words = "\n".join([*self.nouns, *self.adjectives, *self.verbs])
            known["wonderwords"] = sha256(words.encode()).hexdigest()
        return known

    @cached_property
    def essay(self) -> list[str]:
        """Words of the essays."""
        if self.haystack is None:
            raise ConfigError(
                "--haystack is missing, for the tasks that hide needles in essays; give a long text file, a "
                "folder of *.txt, or RULER's PaulGrahamEssays.json"
            )
        return re.sub(r"\s+", " ", _read_essays(self.haystack)).split(" ")

    def questions(self, name: str) -> QuestionSet:
        """Give SQuAD or HotpotQA."""
        path = getattr(self, name)
        if path is None:
            source = SQUAD_SOURCE if name == "squad" else HOTPOTQA_SOURCE
            task = "qa_1" if name == "squad" else "qa_2"
            raise ConfigError(
                f"--{name} is missing, for the task {task}; download {source} and give its path, or leave "
                f"{task} out of --tasks"
            )
        return read_questions(path, name)

    @cached_property
    def nouns(self) -> list[str]:
        """Nouns of the package wonderwords."""
        return _wonderwords("nounlist")

    @cached_property
    def adjectives(self) -> list[str]:
        """Adjectives of the package wonderwords."""
        return _wonderwords("adjectivelist")

    @cached_property
    def pairs(self) -> PairedWords:
        """All adjectives with all nouns."""
        return PairedWords(self.adjectives, self.nouns)

    @cached_property
    def verbs(self) -> list[str]:
        """Verbs of the package wonderwords."""
        return _wonderwords("verblist")

    @cached_property
    def more_words(self) -> list[str]:
        """English words, for lists that need more of them than wonderwords has.

        Raises: ConfigError: they are needed and not given.
        """
        if self.english_words is None:
            raise ConfigError(
                "--english-words is missing: at this length the task cwe takes more words than the package "
                f"wonderwords has; give {ENGLISH_WORDS_SOURCE}, or leave cwe out of --tasks"
            )
        return _read_json(
            self.english_words,
            "--english-words",
            lambda content: [str(x) for x in content.values()],
        )

    def essay_sentences(self, num_words: int) -> list[str]:
        """Give the sentences of so many words of the essays, which begin again where they end.

        The end of a sentence depends on the word after it alone, so that longer texts are split once.
        """
        text, spans, word_ends = self._split(1 << num_words.bit_length())
        stop = int(word_ends[num_words - 1])
        number = bisect.bisect_left(spans, (stop, 0))
        return [text[start : min(end, stop)].strip() for start, end in spans[:number]]

    @lru_cache(maxsize=2)  # noqa: B019 - there is one such object
    def _split(self, num_words: int) -> tuple[str, list[tuple[int, int]], np.ndarray]:
        """Give a text of so many words, where its sentences are, and where each word ends."""
        words = (self.essay * -(-num_words // len(self.essay)))[:num_words]
        text = " ".join(words)
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        return text, list(self.splitter.span_tokenize(text)), ends

    @cached_property
    def splitter(self) -> Any:
        """NLTK's English Punkt, which RULER takes, if it is installed; else Punkt trained on the essays."""
        from nltk.tokenize import punkt

        if has_english_model():
            return punkt.PunktTokenizer("english")
        text = " ".join(self.essay)[:TRAINING_CHARACTERS]
        return punkt.PunktSentenceTokenizer(punkt.PunktTrainer(text).get_params())


def has_english_model() -> bool:
    """Whether NLTK's English model is installed."""
    import nltk

    try:
        return bool(nltk.data.find("tokenizers/punkt_tab/english/"))
    except LookupError:
        return False


def _read_essays(path: Path) -> str:
    if path.is_dir():
        texts = sorted(path.glob("*.txt"))
        if not texts:
            raise ConfigError(f"--haystack {path} holds no *.txt; give a folder of text files")
        return "".join(read_haystack(text) for text in texts)
    if path.suffix != ".json":
        return read_haystack(path)
    text = _read_json(path, "--haystack", lambda content: content["text"])
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f'--haystack {path}: "text" is no text; give RULER\'s PaulGrahamEssays.json'
        )
    return text


@lru_cache(maxsize=2)
def read_questions(path: Path, name: str) -> QuestionSet:
    """Read `squad` (dev-v2.0.json) or `hotpotqa` (hotpot_dev_distractor_v1.json).

    Raises: ConfigError: no such file. DataError: another file.
    """
    found: QuestionSet = _read_json(path, f"--{name}", _squad if name == "squad" else _hotpotqa)
    if not found.questions:
        raise DataError(f"--{name} {path} holds no question; download it again")
    for question in found.questions:
        known = [isinstance(text, str) and text.strip() for text in question.answers]
        if not known or not all(known):
            raise DataError(
                f"--{name} {path}: the question {question.query!r} has no answer; download it again"
            )
    return found


def _squad(content: Any) -> QuestionSet:
    articles = [list(article["paragraphs"]) for article in content["data"]]
    documents = sorted({part["context"] for parts in articles for part in parts})
    number = {document: place for place, document in enumerate(documents)}
    questions = []
    for parts in articles:
        together = [number[part["context"]] for part in parts]
        for part in parts:
            own = number[part["context"]]
            related = tuple(other for other in together if other != own)
            questions += [
                Question(
                    item["question"], tuple(a["text"] for a in item["answers"]), (own,), related
                )
                for item in part["qas"]
                if not item["is_impossible"]
            ]
    return QuestionSet(tuple(questions), tuple(documents))


def _hotpotqa(content: Any) -> QuestionSet:
    texts = [[f"{title}\n{''.join(lines)}" for title, lines in item["context"]] for item in content]
    documents = sorted({text for parts in texts for text in parts})
    number = {document: place for place, document in enumerate(documents)}
    questions = (
        Question(item["question"], (item["answer"],), tuple(number[text] for text in parts))
        for item, parts in zip(content, texts, strict=True)
    )
    return QuestionSet(tuple(questions), tuple(documents))


def _read_json[T](path: Path, flag: str, take: Callable[[Any], T]) -> T:
    if not path.is_file():
        raise ConfigError(f"{flag} {path} is not a file; give the downloaded JSON")
    try:
        return take(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{flag} {path} is not the file that is wanted ({error!r}); download it again"
        ) from error


def _wonderwords(name: str) -> list[str]:
    try:
        text = files("wonderwords").joinpath("assets", f"{name}.txt").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        raise ConfigError(
            "the package wonderwords, whose words RULER hides, is not installed: "
            "pip install -c constraints.txt wonderwords"
        ) from None
    return [line.rstrip() for line in text.splitlines()]
