"""Text files as rows: how they are cut, what is refused, and the tool that reads them."""

from pathlib import Path

import numpy as np
import pytest

from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.loss.plain_text import TextRows, hash_texts, open_texts

from .fakes import WordTokenizer, make_story


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(make_story(300))
    return path


@pytest.mark.parametrize("bos_id", [None, 1])
def test_rows_follow_each_other(story, bos_id):
    tokenizer = WordTokenizer(bos_id)
    whole = tokenizer.encode(story.read_text())
    documents = open_texts([story], tokenizer, 50, None)
    step = 51 - (bos_id is not None)
    assert len(documents) == len(whole) // step
    for number, document in enumerate(documents):
        assert document.source == "story"
        assert document.num_tokens(50) == 50
        row = document.row(50)
        expected = whole[number * step : (number + 1) * step]
        if bos_id is not None:
            expected = np.concatenate([[bos_id], expected])
        assert row.tokens.tolist() == expected[:-1].tolist()
        assert row.labels.tolist() == expected[1:].tolist()


def test_few_rows_need_no_whole_text(story):
    class Counting(WordTokenizer):
        longest = 0

        def encode(self, text: str) -> np.ndarray:
            self.longest = max(self.longest, len(text))
            return super().encode(text)

    tokenizer = Counting()
    few = open_texts([story], tokenizer, 20, 2)
    assert 0 < tokenizer.longest < len(story.read_text())
    all_rows = open_texts([story], WordTokenizer(), 20, None)
    assert len(few) == 2 < len(all_rows)
    for ours, theirs in zip(few, all_rows, strict=False):
        assert ours.row(20).labels.tolist() == theirs.row(20).labels.tolist()


def test_refusals(story, tmp_path):
    with pytest.raises(ConfigError, match=r"--text .*none.txt is not a file"):
        open_texts([tmp_path / "none.txt"], WordTokenizer(), 8, None)
    with pytest.raises(DataError, match=r"story.txt has [\d,]+ tokens, fewer than a row"):
        open_texts([story], WordTokenizer(), 1_000_000, None)
    other = tmp_path / "other" / "story.txt"
    other.parent.mkdir()
    other.write_text("Another story. " * 100)
    with pytest.raises(DataError, match="have the same name"):
        open_texts([story, other], WordTokenizer(), 8, None)


def test_hash_tells_texts_names_vocabularies_and_rows_apart(story, tmp_path):
    first = hash_texts([story], "a", 64)
    assert first == hash_texts([story], "a", 64)
    assert first != hash_texts([story], "b", 64)
    assert first != hash_texts([story], "a", 128)
    renamed = story.rename(tmp_path / "tale.txt")
    assert first != hash_texts([renamed], "a", 64)
    renamed.write_text("else")
    assert len({first, hash_texts([renamed], "a", 64)}) == 2


def test_text_shorter_than_a_row_gives_none():
    assert TextRows(np.arange(3), row_tokens=4, bos_id=None).lengths.tolist() == []
