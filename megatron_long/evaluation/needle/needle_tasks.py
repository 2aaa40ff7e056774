"""What is hidden in the haystack and how it is asked for: the paper's needle, passkey, RULER's variants.

A task is a function of a random generator that gives a `Probe`: the sentences to hide, the question,
and the words that answer it. All but the sentence of the paper draw their names and numbers anew for each
case, so that a model cannot have learnt them, and nothing is downloaded.

Source: Kamradt's needle as in Fu et al. 2024 (arXiv 2402.10171); passkey of Mohtashami and Jaggi 2023
(arXiv 2305.16300); the variants follow RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3) in what
they ask, in words of our own, and ask base models for a continuation.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from megatron_long.errors import ConfigError

NUM_VALUES = 4
"""Values, keys or links of the tasks that have several, as in RULER's defaults."""

KEY_FIRST = (
    "amber brisk calm dusty early faint gentle hollow icy jolly keen lofty misty noble".split()
)
KEY_SECOND = (
    "anchor badger canyon dolphin ember falcon glacier harbor island jacket kettle lantern".split()
)


@dataclass(frozen=True)
class Probe:
    """Sentences to hide and what is asked about them."""

    inserts: tuple[str, ...]
    """Sentences for the haystack; the first goes to the depth of the cell, unless `is_ordered`."""
    question: str
    lead: str
    """Words that begin the answer's sentence; given to the model, not scored."""
    answer: str
    is_ordered: bool = False
    """Whether the answer depends on the order in the text: the sentences then stand in this order, one of
    them (any) at the depth of the cell."""
    joint: str = " "
    """What stands between lead and answer."""
    is_quoted: bool = False
    """Whether the answer is words of the first sentence: its tokens must then be found there."""


@dataclass(frozen=True)
class NeedleTask:
    """One fixed sentence to find; by default the paper's."""

    needle: str = (
        "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park "
        "on a sunny day."
    )
    question: str = "What is the best thing to do in San Francisco?"
    answer: str = "eat a sandwich and sit in Dolores Park on a sunny day."
    """Words of the needle that the model must give."""

    def __post_init__(self) -> None:
        for name in ("needle", "question", "answer"):
            if not getattr(self, name).strip():
                raise ConfigError(f"--{name} is empty; give at least one word")
        if self.answer not in self.needle:
            raise ConfigError(
                f"--answer {self.answer!r} is not part of --needle {self.needle!r}; the answer is "
                "words of the needle, letter by letter"
            )

    def __call__(self, generator: random.Random) -> Probe:
        """Give the probe: what the needle says before the answer is the lead, joined as it is there."""
        before = self.needle[: self.needle.index(self.answer)]
        lead = before.strip()
        joint = before[len(before.rstrip()) :] if lead else " "
        return Probe((self.needle,), self.question, lead, self.answer, joint=joint, is_quoted=True)


def passkey(generator: random.Random) -> Probe:
    """One number of five digits, said twice in a row; with the full stop after it, so that it ends there."""
    key = str(generator.randrange(10_000, 100_000))
    hidden = f"The pass key is {key}. Remember it. {key} is the pass key."
    return Probe((hidden,), "What is the pass key?", "The pass key is", f"{key}.")


def multi_key(generator: random.Random) -> Probe:
    """Four keys with a number each; one of them is asked for."""
    keys, numbers = _keys(generator, NUM_VALUES), _numbers(generator, NUM_VALUES)
    pairs = zip(keys, numbers, strict=True)
    return Probe(
        tuple(f"The secret number of {key} is {number}." for key, number in pairs),
        f"What is the secret number of {keys[0]}?",
        f"The secret number of {keys[0]} is",
        f"{numbers[0]}.",
    )


def multi_value(generator: random.Random) -> Probe:
    """One key with four numbers; all are asked for, in the order of the text."""
    (key,), numbers = _keys(generator, 1), _numbers(generator, NUM_VALUES)
    return Probe(
        tuple(f"One of the secret numbers of {key} is {number}." for number in numbers),
        f"What are all the secret numbers of {key}, in the order of the text?",
        f"The secret numbers of {key} are",
        f"{', '.join(numbers)}.",
        is_ordered=True,
    )


def multi_query(generator: random.Random) -> Probe:
    """Four keys with a number each; all are asked for."""
    keys, numbers = _keys(generator, NUM_VALUES), _numbers(generator, NUM_VALUES)
    pairs = list(zip(keys, numbers, strict=True))
    asked = ", ".join(keys)
    return Probe(
        tuple(f"The secret number of {key} is {number}." for key, number in pairs),
        f"What are the secret numbers of {asked}, in this order?",
        f"The secret numbers of {asked} are",
        f"{', '.join(numbers)}.",
    )


def variable_tracking(generator: random.Random) -> Probe:
    """A number handed on from variable to variable; every variable that holds it is asked for."""
    (number,) = _numbers(generator, 1)
    letters = generator.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", NUM_VALUES)
    names = [f"{letter}{generator.randrange(10, 100)}" for letter in letters]
    links = [
        f"Then variable {name} was set to the value of {source}."
        for source, name in pairwise(names)
    ]
    return Probe(
        (f"First variable {names[0]} was set to {number}.", *links),
        f"Which variables hold {number}, in the order of the text?",
        f"The variables that hold {number} are",
        f"{', '.join(names)}.",
        is_ordered=True,
    )


Task = Callable[[random.Random], Probe]
SENTENCE = "sentence"
GENERATED_TASKS: dict[str, Task] = {
    task.__name__: task
    for task in (passkey, multi_key, multi_value, multi_query, variable_tracking)
}
TASK_NAMES = (SENTENCE, *GENERATED_TASKS)


def choose_tasks(
    names: tuple[str, ...], sentence: NeedleTask, needles: Mapping[str, NeedleTask]
) -> dict[str, Task]:
    """Give the tasks of these names, with those of a file of needles in place of the sentence.

    Args:
        names: Some of `TASK_NAMES`.
        sentence: What `sentence` stands for.
        needles: Own sentences by name; where there are some, they take the place of `sentence`.
    """
    sentences: dict[str, Task] = dict(needles) if needles else {SENTENCE: sentence}
    return {
        key: task
        for name in dict.fromkeys(names)
        for key, task in (sentences if name == SENTENCE else {name: GENERATED_TASKS[name]}).items()
    }


def describe_task(task: Task) -> dict[str, str] | str:
    """Say what a task hides and asks: all that decides its cells."""
    return asdict(task) if isinstance(task, NeedleTask) else "drawn for each case"


def read_needles(path: Path) -> dict[str, NeedleTask]:
    """Read several needles from a JSON list of objects with `needle`, `question` and `answer`.

    Returns: Tasks by name: the object's `name`, or needle-1, needle-2 and so on.
    Raises: ConfigError: not such a file.
    """
    if not path.is_file():
        raise ConfigError(f"--needles {path} is not a file; give a JSON list of needles")
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        tasks = {
            str(item.get("name", f"needle-{number}")): NeedleTask(
                item["needle"], item["question"], item["answer"]
            )
            for number, item in enumerate(items, 1)
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--needles {path} is not a list of needles ({error!r}); write "
            '[{"needle": "...", "question": "...", "answer": "..."}]'
        ) from error
    if len(tasks) != len(items) or not tasks or set(tasks) & set(TASK_NAMES):
        raise ConfigError(
            f"--needles {path}: names must differ from each other and from {', '.join(TASK_NAMES)}, "
            "and there must be one at least"
        )
    return tasks


def _keys(generator: random.Random, number: int) -> list[str]:
    pairs = [f"{first} {second}" for first in KEY_FIRST for second in KEY_SECOND]
    return generator.sample(pairs, number)


def _numbers(generator: random.Random, number: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(value) for value in generator.sample(range(1_000_000, 10_000_000), number)]
