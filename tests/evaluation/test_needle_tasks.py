import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_long.errors import ConfigError
from megatron_long.evaluation.needle.cases import build_cases
from megatron_long.evaluation.needle.needle_scores import Deadline, free_answers, score_cases
from megatron_long.evaluation.needle.needle_tasks import (
    GENERATED_TASKS,
    NeedleTask,
    Probe,
    choose_tasks,
    read_needles,
)
from megatron_long.evaluation.needle.probes import UsedText

from .fakes import FakeScorer, WordTokenizer, copy_predictions, make_story

STORY = make_story(400)


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


def texts_of(case, tokenizer) -> tuple[str, str]:
    """The book with what is hidden in it, and the answer."""
    book = tokenizer.decode(case.prompt_tokens())
    return book, tokenizer.decode(case.answer_tokens).strip()


@pytest.mark.parametrize("name", GENERATED_TASKS)
def test_everything_is_hidden_once_at_sentence_boundaries(name, tokenizer):
    cases = build_cases(STORY, tokenizer, only(name), [400, 900], [0.0, 0.5, 1.0], num_seeds=2)
    assert [case.context_length for case in cases] == [400] * 3 + [900] * 3 + [400] * 3 + [900] * 3
    assert len({case.probe for case in cases}) == len(cases)  # drawn anew for each
    for case in cases:
        book, answer = texts_of(case, tokenizer)
        assert answer == case.probe.answer
        for insert in case.probe.inserts:
            assert book.count(f" {insert}") == 1
        before = tokenizer.decode(case.row().tokens[: case.needle_start])
        assert before.endswith((".", "<book>"))
        assert abs(case.actual_depth - case.depth) < 0.1
        if not case.probe.is_ordered:
            after = tokenizer.decode(case.row().tokens[case.needle_start :])
            assert after.startswith(f" {case.probe.inserts[0]}")


def only(name):
    return {name: GENERATED_TASKS[name]}


@pytest.mark.parametrize("name", ["multi_value", "variable_tracking"])
def test_answers_stand_in_the_order_of_the_text(name, tokenizer):
    for case in build_cases(STORY, tokenizer, only(name), [900], [0.0, 0.3, 1.0]):
        book, _ = texts_of(case, tokenizer)
        places = [book.index(insert) for insert in case.probe.inserts]
        assert places == sorted(places)
        names = [
            insert.rstrip(".").split()[-1 if name == "multi_value" else 2]
            for insert in case.probe.inserts
        ]
        assert case.probe.answer == ", ".join(names) + "."


def test_multi_key_asks_for_the_one_at_the_depth():
    probe = GENERATED_TASKS["multi_key"](random.Random(0))
    assert len(probe.inserts) == 4
    number = probe.answer.rstrip(".")
    assert [number in insert for insert in probe.inserts] == [True, False, False, False]
    key = probe.lead.removeprefix("The secret number of ").removesuffix(" is")
    assert key in probe.inserts[0]
    assert key in probe.question


def test_a_copying_model_finds_the_passkey(tokenizer):
    cases = build_cases(STORY, tokenizer, only("passkey"), [300, 600], [0.0, 0.5, 1.0])
    assert all(r.is_exact for r in score_cases(FakeScorer(copy_predictions, 600), cases))


def test_a_longer_number_is_not_the_passkey(tokenizer):
    """A model that says a further digit, where the passkey ends, has not found it."""
    (case,) = build_cases(STORY, tokenizer, only("passkey"), [300], [0.5])
    key = case.probe.answer.removesuffix(".")
    assert f"The pass key is {key}. " in case.probe.inserts[0]
    assert tokenizer.decode(case.answer_tokens).strip() == f"{key}."
    digit = tokenizer.encode("1")[0]

    def go_on(tokens: np.ndarray) -> np.ndarray:
        predicted = copy_predictions(tokens)
        predicted[-2] = digit  # instead of the full stop
        return predicted

    (right,) = score_cases(FakeScorer(copy_predictions, 300), [case])
    (longer,) = score_cases(FakeScorer(go_on, 300), [case])
    assert (right.is_exact, longer.is_exact) == (True, False)


def test_seeds_take_other_stretches_of_the_haystack(tokenizer):
    cases = build_cases(STORY, tokenizer, NeedleTask(), [300], [0.5], num_seeds=5)
    assert [case.seed for case in cases] == list(range(5))
    books = {tokenizer.decode(case.prompt_tokens()) for case in cases}
    assert len(books) > 2
    assert len({case.probe for case in cases}) == 1
    again = build_cases(STORY, tokenizer, NeedleTask(), [300], [0.5], num_seeds=5)
    for case, other in zip(cases, again, strict=True):
        assert case.row().tokens.tolist() == other.row().tokens.tolist()


def test_each_length_takes_its_own_stretches(tokenizer, caplog):
    """A text just as long as the longest case: only that one repeats, and it is said."""
    with pytest.raises(ConfigError, match="lengths up to") as info:
        build_cases(STORY, tokenizer, NeedleTask(), [100_000], [0.5])
    length = int(str(info.value).split("lengths up to ")[1].split(":")[0])
    cases = build_cases(STORY, tokenizer, NeedleTask(), [300, length], [0.5], num_seeds=5)
    for context_length, expected in ((300, 5), (length, 1)):
        books = {c.row().tokens.tobytes() for c in cases if c.context_length == context_length}
        assert len(books) == expected
    assert "--num-seeds 5" in caplog.text
    caplog.clear()
    build_cases(STORY, tokenizer, NeedleTask(), [300], [0.5], num_seeds=5)
    assert caplog.text == ""


@pytest.mark.parametrize("words", ["1234567", "key 1234567 is", "55 x", "Pass  key", "ay 1", "z"])
def test_words_are_looked_up_as_in_the_text_itself(words):
    text = "The pass\nkey 91234567 is 1234567 today 155 x. Pass key"
    plain = " ".join(text.split())
    for part in (words, " ".join(words.split()), words.upper()):
        assert (part in UsedText(text)) == (part in plain)


def test_numbers_that_the_haystack_holds_are_drawn_again(tokenizer):
    draws = iter(["w1", "w2", "fresh"])

    def task(generator: random.Random) -> Probe:
        word = next(draws)
        return Probe((f"The word is {word}.",), "Which word?", "The word is", f"{word}.")

    text = "They said w1. The word is w2. " + STORY
    (case,) = build_cases(text, tokenizer, {"word": task}, [300], [0.5])
    assert case.probe.answer == "fresh."
    with pytest.raises(ConfigError, match="already contains"):
        build_cases(
            text,
            tokenizer,
            {"word": lambda g: Probe(("Now w1.",), "What?", "Now", "w1.")},
            [300],
            [0.5],
        )


def test_several_needles_from_a_file(tmp_path: Path):
    path = tmp_path / "needles.json"
    item = {"needle": "The cat sleeps.", "question": "What does it do?", "answer": "sleeps."}
    path.write_text(json.dumps([item, {**item, "name": "cat"}]))
    needles = read_needles(path)
    assert list(needles) == ["needle-1", "cat"]
    tasks = choose_tasks(("passkey", "sentence", "passkey"), NeedleTask(), needles)
    assert list(tasks) == ["passkey", "needle-1", "cat"]
    assert list(choose_tasks(("sentence",), NeedleTask(), {})) == ["sentence"]
    for text, words in (
        ("{", "is not a list of needles"),
        ('[{"needle": "a"}]', "is not a list of needles"),
        ("[]", "at least|one at least"),
        (json.dumps([{**item, "name": "x"}] * 2), "names must differ"),
        (json.dumps([{**item, "name": "passkey"}]), "names must differ"),
        (json.dumps([{**item, "answer": "barks"}]), "not part of --needle"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_needles(path)


def test_free_answers_are_scored_as_the_authors_do(tokenizer):
    pytest.importorskip("rouge_score")
    case = build_cases(STORY, tokenizer, NeedleTask(), [300], [0.5])[0]
    (result,) = score_cases(FakeScorer(copy_predictions, 300), [case])

    class Model:
        said = ""

        def generate(self, tokens, max_new_tokens):
            assert max_new_tokens == 50
            assert tokenizer.decode(tokens).endswith("\nAnswer:")
            return tokenizer.encode(self.said)

    model = Model()
    answer = free_answers(model, tokenizer)
    model.said = f" {NeedleTask().needle}"
    assert (answer(case, result).rouge1, answer(case, result).answer_words) == (1.0, 1.0)
    model.said = " eat a sandwich"
    scored = answer(case, result)
    assert scored.generated == "eat a sandwich"
    assert scored.rouge1 == pytest.approx(2 * 3 / (21 + 3))  # F1 of 3 words of 21
    assert scored.answer_words == pytest.approx(3 / 11)  # "a" counts once
    assert scored.is_exact == result.is_exact
    model.said = " something else"
    assert answer(case, result).rouge1 == 0


def test_a_deadline_leaves_time_for_a_round(monkeypatch):
    from megatron_long.evaluation.needle import needle_scores

    clock = iter([0.0, 1.0, 4.0, 7.0, 10.0])
    monkeypatch.setattr(needle_scores.time, "monotonic", lambda: next(clock))
    deadline = Deadline(10.0)
    scorer = FakeScorer(copy_predictions, 10)
    assert [deadline.may_go_on(scorer) for _ in range(4)] == [True, True, True, False]
    assert deadline.is_over
