"""BookQA: the score, the cut, and the tool on a small model."""

import json

import numpy as np
import pytest

from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.bookqa import (
    MAX_NEW_TOKENS,
    BookQuestion,
    answer_question,
    f1_score,
    read_questions,
)

from .copying_model import save_copying_model
from .fakes import WordTokenizer


def test_f1_of_words():
    assert f1_score("It was Long John Silver.", "long john silver") == pytest.approx(3 / 4)
    assert f1_score("silver silver", "silver") == pytest.approx(2 / 3)
    assert f1_score("", "silver") == f1_score("gold", "silver") == 0
    assert f1_score("The Hispaniola!", "hispaniola") == 1


class Oracle:
    """Says the same to everything, and keeps what it was asked."""

    def __init__(self, tokenizer, answer):
        self.answer, self.asked = tokenizer.encode(answer), []

    def generate(self, tokens, max_new_tokens):
        assert max_new_tokens == MAX_NEW_TOKENS
        self.asked.append(tokens)
        return self.answer


def test_the_best_answer_counts_and_the_middle_is_cut():
    tokenizer = WordTokenizer()
    book = " ".join(f"w{number}" for number in range(500))
    question = BookQuestion(3, book, "Who?", ("Jim", "Jim Hawkins"))
    oracle = Oracle(tokenizer, " jim hawkins")
    answer = answer_question(oracle, tokenizer, question, 240)
    assert (answer.number, answer.f1, answer.recall) == (3, 1.0, 1.0)
    assert (answer.prompt_tokens, answer.is_cut) == (200, True)
    text = tokenizer.decode(oracle.asked[0])
    assert text.startswith("<s><|im_start|>Read the book below")
    assert text.endswith("Question: Who?\n\nAnswer:")
    assert " w20 " in text
    assert " w490 " in text
    assert " w250 " not in text
    assert not answer_question(oracle, tokenizer, question, 5000).is_cut
    assert len(oracle.asked[1]) == len(tokenizer.encode(question.prompt)) + 1


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="is not a file"):
        list(read_questions(tmp_path / "nowhere.jsonl"))
    path = tmp_path / "q.jsonl"
    path.write_text('{"context": "a", "input": "b", "answer": "c"}\n{"context": "a"}\n')
    with pytest.raises(DataError, match=r"q\.jsonl:2 is no question"):
        list(read_questions(path))


@pytest.mark.parametrize("answer", ["[]", '[""]', "[7]", '" "', "{}", '"\udcff"'])
def test_answers_that_are_none_are_refused(answer, tmp_path):
    path = tmp_path / "q.jsonl"
    line = f'{{"context": "a", "input": "b", "answer": {answer}}}'
    path.write_bytes(line.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"q\.jsonl:1 is no question"):
        list(read_questions(path))


@pytest.mark.slow
def test_tool_on_a_copying_model(run_job, tmp_path):
    """After "Answer:" it says what followed that word in the book."""
    words = "<|im_start|>Read the book below and answer a question. Question: who ? Answer:".split()
    words += [f"w{number}" for number in range(40)] + ["Jim", "Hawkins", "stop"]
    model = save_copying_model(tmp_path / "model", list(dict.fromkeys(words)))
    books = [f"w1 w2 Answer: {name} stop w3 w4" for name in ("Jim", "Hawkins", "w9")]
    lines = [
        {"context": book, "input": "who ?", "answer": [answer]}
        for book, answer in zip(books, ("Jim stop w3 w4", "Hawkins stop w3 w4", "Jim"), strict=True)
    ]
    data = tmp_path / "longbook_qa_eng.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["tools/evaluate_bookqa.py", "--checkpoint", model, "--data", data]
    command += ["--context-length", 300, "--output-dir", tmp_path / "out"]
    runs = [
        run_job(1, words, check=False, fresh=fresh)
        for words, fresh in (
            ([*command, "--stop-after-minutes", 0], False),
            (command, True),  # once as users start it
            ([*command, "--context-length", 400], False),
            (command, False),
        )
    ]
    assert [run.returncode for run in runs] == [0, 0, 2, 0], runs[1].stderr
    assert "Loading weights" in runs[1].stderr
    assert "Loading weights" not in runs[3].stderr  # nothing is left: no model is loaded
    assert "3 of 3 questions answered" in runs[3].stdout
    assert "0 of 3 questions answered" in runs[0].stdout
    assert "3 of 3 questions answered" in runs[1].stdout
    assert "context_length 300 there, 400 here" in " ".join(runs[2].stderr.split())
    report = json.loads((tmp_path / "out" / "bookqa.json").read_text())
    said = [answer["prediction"].split()[0] for answer in report["answers"]]
    assert said == ["Jim", "Hawkins", "w9"]
    f1 = [answer["f1"] for answer in report["answers"]]
    assert f1[0] == f1[1] > 0
    assert f1[2] == 0
    assert report["means_percent"]["f1"] == pytest.approx(100 * np.mean(f1))
