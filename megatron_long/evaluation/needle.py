"""Needle in a haystack: can the model repeat what is hidden anywhere in a long text?

A case is one sequence, scored in one forward pass. With the paper's prompt:

    <|im_start|> This is a very long story book: <book> {haystack with the needle in it} </book>.
     Based on the content of the book, Question: {question}
    Answer: {lead} {answer}

where `lead` is what the needle says before the answer (with a space between them, or none, as there), so
that a base model, which has learnt to continue and not to answer, is asked for a continuation. Greedy
decoding gives exactly the answer if and only if every answer token is the most likely one given the answer
before it: so no decoding is needed, and the log-likelihood of the answer says how near a miss was.

Source: Fu et al. 2024, arXiv 2402.10171, section 4 and the prompt of their evaluation code (lengths by
depths grid). They generate and count words of the answer; exact match is stricter.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_long.errors import ConfigError
from megatron_long.evaluation.batches import NOT_SCORED, Row
from megatron_long.evaluation.haystack import Haystack, encode_continuations, tokenize_haystack
from megatron_long.evaluation.needle_tasks import SENTENCE, NeedleTask, Probe, Task

if TYPE_CHECKING:
    from megatron_long.data.tokenizers import Tokenizer

PROMPTS = {
    "paper": (
        "<|im_start|> This is a very long story book: <book>",
        " </book>.\n Based on the content of the book, Question: {question}\nAnswer:",
    ),
    "plain": (
        "A long text follows, then a question about it.\n\n",
        "\n\nQuestion about the text above: {question}\nAnswer:",
    ),
}
"""What comes before the haystack, and after it."""

MOST_CHARACTERS_PER_TOKEN = 64

MAX_DRAWS = 20
"""Tries to draw names and numbers that the haystack does not hold."""


@dataclass(frozen=True)
class NeedleCase:
    """One cell of the grid. Token arrays are views of the haystack, so a case is small."""

    task: str
    seed: int
    depth: float
    """Depth asked for: share of the haystack before the needle, in [0, 1]."""
    actual_depth: float
    """Depth of the sentence boundary nearest to it."""
    needle_start: int
    """Position of the first token of the sentence at that depth."""
    question_tokens: np.ndarray
    lead_tokens: np.ndarray
    answer_tokens: np.ndarray
    book: tuple[np.ndarray, ...]
    """Token ids of what comes before the question, in parts."""
    probe: Probe

    @property
    def context_length(self) -> int:
        """Length in tokens, the answer included."""
        return sum(map(len, self._pieces))

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that the model must give."""
        return len(self.answer_tokens)

    @property
    def key(self) -> tuple[str, int, int, float]:
        """What tells this cell from the others."""
        return self.task, self.seed, self.context_length, self.depth

    @property
    def _pieces(self) -> tuple[np.ndarray, ...]:
        return (*self.book, self.question_tokens, self.lead_tokens, self.answer_tokens)

    def row(self) -> Row:
        """Give the tokens, labelled where the model must produce the answer."""
        tokens = np.concatenate(self._pieces)
        labels = np.full(len(tokens), NOT_SCORED, dtype=np.int64)
        answer = slice(len(tokens) - self.num_answer_tokens, None)
        labels[answer.start - 1 : -1] = tokens[answer]
        return Row(tokens, labels)

    def prompt_tokens(self) -> np.ndarray:
        """Give the tokens up to the question, for free generation without the lead."""
        return np.concatenate([*self.book, self.question_tokens])


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which cells there are."""

    context_lengths: tuple[int, ...]
    """Tokens of the whole case, the answer included."""
    depths: tuple[float, ...]
    num_seeds: int = 1
    """Repetitions, each with another stretch of the haystack and other random names."""


def build_cases(
    text: str,
    tokenizer: Tokenizer,
    tasks: Mapping[str, Task] | NeedleTask,
    context_lengths: Sequence[int],
    depths: Sequence[float],
    *,
    num_seeds: int = 1,
    prompt: str = "paper",
) -> list[NeedleCase]:
    """Build the grid, task by task, each case exactly as long as it says.

    The haystack is trimmed, never the question. The needle goes to the sentence boundary nearest
    to the depth, so the text around it stays whole.

    Args:
        tasks: By name; a single sentence may be given as it is.
        num_seeds: Repetitions of each cell.
        prompt: One of `PROMPTS`.
    Raises: ConfigError: the haystack is too short or holds the needle already, a length leaves no
        room for the haystack, or the tokenizer cannot give the answer back.
    """
    named: Mapping[str, Task] = {SENTENCE: tasks} if isinstance(tasks, NeedleTask) else tasks
    for task in named.values():
        if isinstance(task, NeedleTask):
            _refuse_present(task(random.Random()), _plain(text))
    used = _plain(text[: MOST_CHARACTERS_PER_TOKEN * max(context_lengths) * min(num_seeds, 2)])
    drawn = [
        _Draft(
            name, seed, length, depth, _draw_probe(task, used, f"{name} {seed} {length} {depth}")
        )
        for name, task in named.items()
        for seed in range(num_seeds)
        for length in context_lengths
        for depth in depths
    ]
    fixed = _encode_probes(tokenizer, drawn, prompt)
    num_wanted = _haystack_needed(drawn, fixed)
    haystack = tokenize_haystack(text, tokenizer, num_wanted * min(num_seeds, 2))
    if len(haystack.tokens) < num_wanted:
        possible = len(haystack.tokens) + min(part.num_tokens for part in fixed)
        raise ConfigError(
            f"--haystack has {len(haystack.tokens)} tokens, too few for context length "
            f"{max(context_lengths)}; it can do lengths up to {possible}: "
            "use a longer text or shorter contexts"
        )
    return [
        _build_case(draft, parts, _from_seed(haystack, draft.seed, num_wanted))
        for draft, parts in zip(drawn, fixed, strict=True)
    ]


@dataclass(frozen=True)
class _Draft:
    """A case before anything is tokenized."""

    task: str
    seed: int
    context_length: int
    depth: float
    probe: Probe


@dataclass(frozen=True)
class _Parts:
    """Tokens of what a case holds beside the haystack."""

    opening: np.ndarray
    inserts: tuple[np.ndarray, ...]
    question: np.ndarray
    lead: np.ndarray
    answer: np.ndarray

    @property
    def num_tokens(self) -> int:
        pieces = (self.opening, *self.inserts, self.question, self.lead, self.answer)
        return sum(map(len, pieces))


def _haystack_needed(drafts: Sequence[_Draft], fixed: Sequence[_Parts]) -> int:
    """Most tokens of the haystack that a case takes; refuses lengths that leave none."""
    most_fixed = max(part.num_tokens for part in fixed)
    shortest = min(draft.context_length for draft in drafts)
    if shortest <= most_fixed:
        raise ConfigError(
            f"context length {shortest} is too short: needle, question and answer alone take "
            f"{most_fixed} tokens; give --min-length (in training --needle-min-length) or "
            f"--context-lengths above {most_fixed}"
        )
    return max(d.context_length - part.num_tokens for d, part in zip(drafts, fixed, strict=True))


def _draw_probe(task: Task, used_text: str, name: str) -> Probe:
    """Draw what is hidden, until the haystack does not hold it already."""
    generator = random.Random(name)
    if isinstance(task, NeedleTask):
        return task(generator)
    for _ in range(MAX_DRAWS):
        probe = task(generator)
        if not _present(probe, used_text):
            break
    _refuse_present(probe, used_text)
    return probe


def _present(probe: Probe, plain_text: str) -> list[str]:
    return [words for words in (*probe.inserts, probe.answer) if _plain(words) in plain_text]


def _refuse_present(probe: Probe, plain_text: str) -> None:
    present = _present(probe, plain_text)
    if present:
        flag = "--needle" if present[0] in probe.inserts else "--answer"
        raise ConfigError(
            f"--haystack already contains {flag} {present[0]!r}, so the test would prove nothing; "
            "use another text or another needle"
        )


def _plain(words: str) -> str:
    return " ".join(words.split())


def _encode_probes(tokenizer: Tokenizer, drafts: Sequence[_Draft], prompt: str) -> list[_Parts]:
    opening = np.asarray(tokenizer.encode(PROMPTS[prompt][0]), dtype=np.int64)
    if tokenizer.bos_id is not None:
        opening = np.concatenate([[tokenizer.bos_id], opening])
    known: dict[Probe, _Parts] = {}
    for probe in (draft.probe for draft in drafts):
        if probe not in known:
            known[probe] = _encode_probe(tokenizer, probe, opening, PROMPTS[prompt][1])
    return [known[draft.probe] for draft in drafts]


def _encode_probe(tokenizer: Tokenizer, probe: Probe, opening: np.ndarray, closing: str) -> _Parts:
    question_text = closing.format(question=probe.question)
    asked = f"{question_text} {probe.lead}".rstrip()
    question, prompt, whole, *inserts = encode_continuations(
        tokenizer,
        [
            question_text,
            asked,
            f"{asked}{probe.joint}{probe.answer}",
            *(f" {words}" for words in probe.inserts),
        ],
    )
    answer = whole[len(prompt) :]
    is_continued = (
        len(answer) > 0
        and np.array_equal(whole[: len(prompt)], prompt)
        and np.array_equal(prompt[: len(question)], question)
    )
    if not is_continued or tokenizer.decode(answer).strip() != probe.answer.strip():
        raise ConfigError(
            f"--answer {probe.answer!r} does not survive the tokenizer (it comes back as "
            f"{tokenizer.decode(answer)!r}); use an answer of plain words, apart from its lead by "
            "a space"
        )
    if probe.is_quoted and not _occurs(answer, inserts[0]):
        raise ConfigError(
            f"--answer {probe.answer!r} has other tokens after the question than in --needle "
            f"{probe.inserts[0]!r}, so that a model that repeats the needle would count as wrong; begin and "
            "end the answer with whole words of the needle, their punctuation included"
        )
    return _Parts(opening, tuple(inserts), question, prompt[len(question) :], answer)


def _occurs(part: np.ndarray, whole: np.ndarray) -> bool:
    """Whether token ids stand somewhere in others, in one piece."""
    places = range(len(whole) - len(part) + 1)
    return any(np.array_equal(whole[place : place + len(part)], part) for place in places)


def _from_seed(haystack: Haystack, seed: int, num_wanted: int) -> Haystack:
    """The haystack from another sentence on for each seed, as far as it is long enough."""
    starts = np.concatenate([[0], haystack.sentence_ends])
    starts = starts[starts <= len(haystack.tokens) - num_wanted]
    start = int(starts[0 if seed == 0 else random.Random(seed).randrange(len(starts))])
    ends = haystack.sentence_ends
    return Haystack(haystack.tokens[start:], ends[ends > start] - start)


def _build_case(draft: _Draft, parts: _Parts, haystack: Haystack) -> NeedleCase:
    num_tokens = draft.context_length - parts.num_tokens
    tokens, boundaries = haystack.window(num_tokens)
    places = _place(draft, len(parts.inserts), boundaries, num_tokens)
    book, done, needle_start = [parts.opening], 0, 0
    at_depth = _nearest(boundaries, draft.depth * num_tokens)
    for place, insert in sorted(zip(places, range(len(places)), strict=True)):
        book += [tokens[done:place], parts.inserts[insert]]
        done = place
        if place == at_depth and not needle_start:
            needle_start = sum(map(len, book[:-1]))
    return NeedleCase(
        task=draft.task,
        seed=draft.seed,
        depth=float(draft.depth),
        actual_depth=at_depth / num_tokens,
        needle_start=needle_start,
        question_tokens=parts.question,
        lead_tokens=parts.lead,
        answer_tokens=parts.answer,
        book=(*book, tokens[done:]),
        probe=draft.probe,
    )


def _place(draft: _Draft, number: int, boundaries: np.ndarray, num_tokens: int) -> list[int]:
    """Offset in the haystack of each sentence: one at the depth of the cell, the others anywhere."""
    generator = random.Random(f"{draft.task} {draft.seed} {draft.context_length} {draft.depth} at")
    depths = [draft.depth, *(generator.random() for _ in range(number - 1))]
    if draft.probe.is_ordered:
        depths.sort()
    return [_nearest(boundaries, depth * num_tokens) for depth in depths]


def _nearest(boundaries: np.ndarray, place: float) -> int:
    return int(boundaries[np.argmin(np.abs(boundaries - place))])
