"""Llama-3's file of ranks: the ids of tiktoken, and of a tokenizer.json made of the same ranks."""

import base64
import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_long.errors import DataError
from megatron_long.tokenizer import tiktoken_model
from megatron_long.tokenizer.engines import ENGINES, HARD_STRINGS, find_difference
from megatron_long.tokenizer.length_bound import extra_tokens_bound
from megatron_long.tokenizer.loading import load_tokenizer
from megatron_long.tokenizer.tokenizer_files import copy_tokenizer

tiktoken = pytest.importorskip("tiktoken")
WORDS = b" the quick brown fox jumps over lazy dog and runs away 12 123 the the".split()


def make_ranks(count):
    """All bytes, then parts of words that earlier tokens can make, as a trained vocabulary has them."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [word for plain in WORDS for word in (plain, b" " + plain)]
    for length in itertools.count(2):
        for word in words:
            if len(word) >= length and len(ranks) < count:
                ranks.setdefault(word[:length], len(ranks))
        if len(ranks) == count or length > 9:
            return ranks


@pytest.fixture
def ranks_file(tmp_path, monkeypatch):
    ranks = make_ranks(310)
    monkeypatch.setattr(tiktoken_model, "LLAMA3_RANKS", len(ranks))
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    return tmp_path / "tokenizer.model"


TEXTS = (*HARD_STRINGS, "the quick brown fox", " the dog runs 123 away", "<|end_of_text|> the")


def test_every_engine_gives_tiktokens_ids(ranks_file):
    reference = load_tokenizer(ranks_file, "reference")
    assert reference.engine_name == "tiktoken"
    for name in ENGINES:
        assert not find_difference(load_tokenizer(ranks_file, name).encode_batch, reference, TEXTS)
    assert load_tokenizer(ranks_file).engine_name == "gigatoken"


def test_its_json_is_the_same_vocabulary(ranks_file, tmp_path):
    reference = load_tokenizer(ranks_file, "reference")
    (tmp_path / "tokenizer.json").write_text(reference.to_json(), encoding="utf-8")
    other = load_tokenizer(tmp_path / "tokenizer.json", "reference")
    assert not find_difference(other.encode_batch, reference, TEXTS)
    assert other.vocabulary_sha256 == reference.vocabulary_sha256
    assert (other.vocab_size, other.eod_id) == (reference.vocab_size, reference.eod_id)
    names = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab(with_added_tokens=True)
    special = {"<|begin_of_text|>": 0, "<|start_header_id|>": 6, "<|eot_id|>": 9}
    special |= {"<|reserved_special_token_4|>": 8, "<|reserved_special_token_250|>": 255}
    first = reference.vocab_size - 256
    assert {name: names[name] - first for name in special} == special
    assert reference.bos_id == first


def test_special_tokens_in_text_stay_text(ranks_file):
    tokenizer = load_tokenizer(ranks_file)
    ids = tokenizer.encode("a<|end_of_text|>b")
    assert tokenizer.eod_id not in ids.tolist()
    assert tokenizer.decode(ids) == "a<|end_of_text|>b"


def test_a_copy_and_the_bound(ranks_file, tmp_path):
    copy_tokenizer(ranks_file, tmp_path / "copy")
    copied = load_tokenizer(tmp_path / "copy")
    np.testing.assert_array_equal(
        copied.encode("the dog"), load_tokenizer(ranks_file).encode("the dog")
    )
    bound = extra_tokens_bound(ranks_file)
    for text in TEXTS:
        assert len(copied.encode(text)) <= len(text.encode()) + bound


def test_other_and_damaged_ranks_are_refused(ranks_file, tmp_path, monkeypatch):
    text = ranks_file.read_bytes()
    ranks_file.write_bytes(b"".join(text.splitlines(True)[:25]))
    with pytest.raises(DataError, match=r"of 25 ranks; of these only Llama 3's"):
        load_tokenizer(ranks_file)
    ranks_file.write_bytes(text + b"!!! x\n")
    with pytest.raises(DataError, match="is damaged"):
        load_tokenizer(ranks_file)
