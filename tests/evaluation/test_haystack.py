from pathlib import Path

import numpy as np
import pytest

from megatron_long.errors import ConfigError
from megatron_long.evaluation.needle.haystack import (
    Haystack,
    encode_continuations,
    read_haystack,
    split_sentences,
    tokenize_haystack,
)

from .fakes import WordTokenizer, make_story


def test_sentences_are_the_whole_text_and_abbreviations_do_not_end_one():
    # Punkt learns abbreviations from the text itself: words that hardly come without the period.
    rng = np.random.default_rng(3)
    words = [" ".join(f"w{n}" for n in rng.integers(40, size=6)) for _ in range(120)]
    text = ". ".join(f"Then Mr. Smith saw {part}" for part in words) + "."
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert len(sentences) == 120
    assert not any(sentence.endswith("Mr.") for sentence in sentences)


def test_blank_lines_end_sentences():
    lines = [f"a heading without period {number}" for number in range(20)]
    text = "\n\n" + "\n \n".join(lines) + "\n\n"
    sentences = split_sentences(text)
    assert [sentence.strip() for sentence in sentences] == lines
    assert "".join(sentences) == text.rstrip()


def test_tokens_are_those_of_running_text():
    text, tokenizer = make_story(50), WordTokenizer()
    haystack = tokenize_haystack(text, tokenizer, 10_000)
    assert haystack.tokens.tolist() == tokenizer.encode(text).tolist()
    assert len(haystack.sentence_ends) == 50
    period = tokenizer.encode(".")[0]
    assert (haystack.tokens[haystack.sentence_ends - 1] == period).all()


@pytest.mark.parametrize("num_tokens", [1, 10, 100, 399])
def test_only_as_much_text_as_needed_is_tokenized(num_tokens):
    text = make_story(2000)
    haystack = tokenize_haystack(text, WordTokenizer(), num_tokens)
    assert num_tokens <= len(haystack.tokens) <= 20 * num_tokens + 20


def test_text_of_long_words_is_read_further():
    text = " ".join("x" * 50 + f"{number}." for number in range(200))
    haystack = tokenize_haystack(text, WordTokenizer(), 300)
    assert len(haystack.tokens) >= 300


def test_windows_have_the_length_asked_and_end_with_a_sentence():
    text, tokenizer = make_story(40), WordTokenizer()
    haystack = tokenize_haystack(text, tokenizer, 10_000)
    ends = set(haystack.sentence_ends.tolist())
    for num_tokens in range(1, len(haystack.tokens) + 1):
        tokens, boundaries = haystack.window(num_tokens)
        assert len(tokens) == num_tokens == boundaries[-1]
        stop = min(end for end in ends if end >= num_tokens)
        assert tokens.tolist() == haystack.tokens[stop - num_tokens : stop].tolist()
        assert boundaries[0] == 0
        assert {int(b) + stop - num_tokens for b in boundaries[1:]} <= ends


def test_one_long_sentence_has_no_boundary_inside():
    haystack = Haystack(np.arange(100), np.array([100]))
    assert haystack.window(30)[1].tolist() == [0, 30]


def test_a_text_that_begins_within_a_word_is_tokenized_on_its_own():
    tokenizer = WordTokenizer()
    joined, apart = encode_continuations(tokenizer, ["pple pie", " pie"])
    assert tokenizer.decode(joined) == "pple pie"
    assert tokenizer.decode(apart) == " pie"


def test_bad_files(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.txt is not a file"):
        read_haystack(tmp_path / "nowhere.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_haystack(tmp_path / "latin.txt")
    (tmp_path / "blank.txt").write_text(" \n ")
    with pytest.raises(ConfigError, match="holds no text"):
        read_haystack(tmp_path / "blank.txt")


def test_chinese_sentences_end_without_white_space():
    text = "那天下雨了！？「我們在家。」他說……然後他走了…he left… and came back。"
    assert split_sentences(text) == [
        "那天下雨了！？", "「我們在家。」", "他說……", "然後他走了…he left… and came back。",
    ]  # fmt: skip


def test_lines_are_cut_where_no_sentence_ends():
    lines = [f"speaker {number % 2} says word {number}" for number in range(200)]
    pieces = split_sentences("\n".join(lines))
    assert [piece.strip() for piece in pieces] == lines
    assert split_sentences("\n".join(lines[:20]) + ".") == ["\n".join(lines[:20]) + "."]


def test_white_space_at_the_beginning_is_read_past():
    text = " \n" * 2000 + make_story(50)
    haystack = tokenize_haystack(text, WordTokenizer(), 100)
    assert len(haystack.tokens) >= 100


def test_windows_are_counted():
    haystack = tokenize_haystack(make_story(40), WordTokenizer(), 10_000)
    number = haystack.num_windows(100)
    starts = {haystack.window(100, index)[0].tobytes() for index in range(number)}
    assert len(starts) == number
    assert haystack.num_windows(len(haystack.tokens)) == 1
