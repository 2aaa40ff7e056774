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

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from megatron_long.errors import ConfigError
from megatron_long.evaluation.batches import Row
from megatron_long.evaluation.needle.haystack import (
    Haystack,
    encode_continuations,
    tokenize_haystack,
)
from megatron_long.evaluation.needle.needle_tasks import SENTENCE, NeedleTask, Probe, Task
from megatron_long.evaluation.needle.probes import (
    UsedText,
    draw_probe,
    find_present,
    one_line,
    refuse_present,
)
from megatron_long.job.rendezvous import is_first_process
from megatron_long.model.labels import UNSCORED

if TYPE_CHECKING:
    from megatron_long.tokenizer.tokenizer_types import Tokenizer

_log = logging.getLogger(__name__)

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

FEWEST_TOKENS_TO_CUT = 64
"""A sentence whose end is nearer than this to where the needle should be stays whole."""

LONE_DEPTH_TOLERANCE = 0.05
"""How far a needle may be from its depth where there is no other depth to mistake it for."""


@dataclass(frozen=True)
class NeedleCase:
    """One cell of the grid. Token arrays are views of the haystack, so a case is small."""

    task: str
    seed: int
    depth: float
    """Depth asked for: share of the haystack before the needle, in [0, 1]."""
    actual_depth: float
    """Depth of the sentence boundary nearest to it, where one is near."""
    needle_start: int
    """Position of the first token of what is hidden at that depth."""
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
        labels = np.full(len(tokens), UNSCORED, dtype=np.int64)
        answer = slice(len(tokens) - self.num_answer_tokens, None)
        labels[answer.start - 1 : -1] = tokens[answer]
        return Row(tokens, labels)

    def prompt_tokens(self) -> np.ndarray:
        """Give the tokens up to the question, for free generation without the lead."""
        return np.concatenate([*self.book, self.question_tokens])


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
    to the depth, so the text around it stays whole; where none is near, a sentence is cut.

    Args:
        tasks: By name; a single sentence may be given as it is.
        num_seeds: Repetitions of each cell.
        prompt: One of `PROMPTS`.
    Raises: ConfigError: the haystack is too short or holds the needle already, a length leaves no
        room for the haystack, or the tokenizer cannot give the answer back.
    """
    named: Mapping[str, Task] = {SENTENCE: tasks} if isinstance(tasks, NeedleTask) else tasks
    sentences = [task for task in named.values() if isinstance(task, NeedleTask)]
    whole = one_line(text) if sentences else ""
    for sentence in sentences:
        refuse_present(sentence(random.Random()), find_present(sentence(random.Random()), whole))
    haystack = tokenize_haystack(text, tokenizer, max(context_lengths) * min(num_seeds, 2))
    used = UsedText(haystack.text)
    drawn = [
        _Draft(name, seed, length, depth, draw_probe(task, used, f"{name} {seed} {length} {depth}"))
        for name, task in named.items()
        for seed in range(num_seeds)
        for length in context_lengths
        for depth in depths
    ]
    fixed = _encode_probes(tokenizer, drawn, prompt)
    num_wanted = _haystack_needed(drawn, fixed)
    if len(haystack.tokens) < num_wanted:
        possible = len(haystack.tokens) + min(part.num_tokens for part in fixed)
        raise ConfigError(
            f"--haystack has {len(haystack.tokens)} tokens, too few for context length "
            f"{max(context_lengths)}; it can do lengths up to {possible}: "
            "use a longer text or shorter contexts"
        )
    tolerance = _depth_tolerance(depths)
    cases = [
        _build_case(draft, parts, haystack, num_seeds, tolerance)
        for draft, parts in zip(drawn, fixed, strict=True)
    ]
    if is_first_process():
        _warn_of_depths(cases, tolerance)
        _warn_of_seeds(haystack, num_wanted, num_seeds)
    return cases


def _depth_tolerance(depths: Sequence[float]) -> float:
    """Half of the depths' spacing: beyond it a needle is nearer to another cell's depth."""
    gaps = [after - before for before, after in pairwise(sorted(set(depths)))]
    return min(gaps) / 2 if gaps else LONE_DEPTH_TOLERANCE


def _warn_of_depths(cases: Sequence[NeedleCase], tolerance: float) -> None:
    far = [case for case in cases if abs(case.actual_depth - case.depth) > tolerance]
    if far:
        worst = max(far, key=lambda case: abs(case.actual_depth - case.depth))
        _log.warning(
            "--haystack: %d of %d needles stand farther from their depth than half of the depths' spacing "
            "(the worst at %.0f%% instead of %.0f%%, context length %d), as sentences are long there; "
            "use fewer depths, longer contexts or a text of shorter sentences",
            len(far),
            len(cases),
            100 * worst.actual_depth,
            100 * worst.depth,
            worst.context_length,
        )


def _warn_of_seeds(haystack: Haystack, num_tokens: int, num_seeds: int) -> None:
    found = haystack.num_windows(num_tokens)
    if found < num_seeds:
        _log.warning(
            "--haystack has %d tokens and so only %d different stretches of %d for --num-seeds %d: the "
            "longest cells repeat their text; use a longer text or fewer seeds",
            len(haystack.tokens),
            found,
            num_tokens,
            num_seeds,
        )


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
    """Tokens of what a case holds besides the haystack."""

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


def _encode_probes(tokenizer: Tokenizer, drafts: Sequence[_Draft], prompt: str) -> list[_Parts]:
    opening = np.asarray(tokenizer.encode_prompt(PROMPTS[prompt][0]), dtype=np.int64)
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


def _window_number(draft: _Draft, number: int, num_seeds: int) -> int:
    """Which of so many windows a seed takes: the first one, then others, each once while there are some."""
    others = range(1, number)
    drawn = random.Random(draft.context_length).sample(others, min(num_seeds - 1, len(others)))
    return [0, *drawn][draft.seed % (1 + len(drawn))]


def _build_case(
    draft: _Draft, parts: _Parts, haystack: Haystack, num_seeds: int, tolerance: float
) -> NeedleCase:
    num_tokens = draft.context_length - parts.num_tokens
    number = _window_number(draft, haystack.num_windows(num_tokens), num_seeds)
    tokens, boundaries = haystack.window(num_tokens, number)
    cut_beyond = max(FEWEST_TOKENS_TO_CUT, tolerance * num_tokens)
    places = _place(draft, len(parts.inserts), boundaries, num_tokens, cut_beyond)
    book, done, needle_start = [parts.opening], 0, 0
    at_depth = _nearest(boundaries, draft.depth * num_tokens, cut_beyond)
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


def _place(
    draft: _Draft, number: int, boundaries: np.ndarray, num_tokens: int, cut_beyond: float
) -> list[int]:
    """Offset in the haystack of each sentence: one at the depth of the cell, the others anywhere."""
    generator = random.Random(f"{draft.task} {draft.seed} {draft.context_length} {draft.depth} at")
    depths = [draft.depth, *(generator.random() for _ in range(number - 1))]
    if draft.probe.is_ordered:
        depths.sort()
    return [_nearest(boundaries, depth * num_tokens, cut_beyond) for depth in depths]


def _nearest(boundaries: np.ndarray, place: float, cut_beyond: float) -> int:
    """The boundary nearest to a place; the place itself, in a sentence, if none is near enough."""
    nearest = int(boundaries[np.argmin(np.abs(boundaries - place))])
    return nearest if abs(nearest - place) <= cut_beyond else round(place)
