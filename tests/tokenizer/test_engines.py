"""Fast engines give the ids of the packages they stand in for, or are not used."""

import json
import logging
import os
import random
import sysconfig
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_long.dataset.manifest import read_manifest
from megatron_long.errors import ConfigError
from megatron_long.machine import Room
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess.preprocess import PreprocessConfig, preprocess
from megatron_long.tokenizer import engines, gigatoken_engine
from megatron_long.tokenizer.character_classes import CharacterClasses
from megatron_long.tokenizer.engines import (
    ENGINES,
    HARD_STRINGS,
    FastTokenizer,
    check_sample,
    find_difference,
    unreadable,
)
from megatron_long.tokenizer.loading import load_tokenizer
from megatron_long.tokenizer.sentencepiece_json import NotConvertible, sentencepiece_to_json

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALPHABETS = ["ab", "ab ", " \n", "aeé ", "▁ a", "<s>/ ", "0123. ", "the quick\n\t"]


@pytest.fixture(scope="session")
def real_texts():
    """A megabyte or two of code and prose: modules and texts of Python's own library."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(library.glob("*.py")), *sorted(library.glob("pydoc_data/*.py"))]
    return [text for file in files if (text := file.read_text("utf-8", "replace"))][:80]


@pytest.fixture(scope="session")
def llama_like(tmp_path_factory, real_texts):
    """A vocabulary of 4,000 pieces made as Llama's was."""
    prefix = tmp_path_factory.mktemp("llama_like") / "tokenizer"
    lines = chain.from_iterable(text[:8000].splitlines() for text in real_texts)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in lines if line.strip()),
        model_prefix=str(prefix),
        vocab_size=4000,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def llama3_like(tmp_path_factory, real_texts):
    """A byte-level vocabulary of 4,000 pieces with Llama 3's way of cutting words."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=sorted(pre_tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[:8000] for text in real_texts), trainer)
    path = tmp_path_factory.mktemp("llama3_like") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(params=["llama_like", "llama3_like"])
def vocabulary(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", ENGINES)
def test_ids_of_real_text_are_those_of_the_reference(name, vocabulary, real_texts):
    fast, reference = load_tokenizer(vocabulary, name), load_tokenizer(vocabulary, "reference")
    assert fast.engine_name == name
    assert fast.engine_name != reference.engine_name
    assert find_difference(fast.encode_batch, reference, real_texts) == ""
    tokens, lengths = fast.encode_flat(real_texts)
    assert tokens.dtype == np.int32
    assert lengths.dtype == np.int64
    assert int(lengths.sum()) == len(tokens) > 100_000


@pytest.mark.parametrize("name", ENGINES)
def test_ids_of_short_alphabets_are_those_of_the_reference(name, llama_like):
    """Repetitions are where equal merges compete: the order of merging shows."""
    fast, reference = load_tokenizer(llama_like, name), load_tokenizer(llama_like, "reference")
    texts = st.sampled_from(ALPHABETS).flatmap(lambda letters: st.text(letters, max_size=300))

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.lists(texts, max_size=5))
    def check(batch):
        assert find_difference(fast.encode_batch, reference, batch) == ""

    check()


def test_byte_level_ids_are_those_of_tiktoken(llama3_like, real_texts):
    tiktoken = pytest.importorskip("tiktoken")
    letters = {letter: byte for byte, letter in enumerate(_byte_letters())}
    vocabulary = json.loads(llama3_like.read_text("utf-8"))["model"]["vocab"]
    ranks = {
        bytes(letters[letter] for letter in piece): index
        for piece, index in vocabulary.items()
        if "|" not in piece or len(piece) < 10
    }
    reference = tiktoken.Encoding(
        "test", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens={}
    )
    fast = load_tokenizer(llama3_like, "auto")
    assert fast.engine_name in ENGINES
    for text in [*HARD_STRINGS, *real_texts]:
        np.testing.assert_array_equal(
            fast.encode(text), np.array(reference.encode_ordinary(text), np.int32)
        )


def test_literal_special_tokens_stay_text(vocabulary):
    tokenizer = load_tokenizer(vocabulary, "auto")
    assert tokenizer.engine_name in ENGINES
    text = "a<s>b</s><|begin_of_text|>c<|end_of_text|>"
    ids = tokenizer.encode(text)
    assert not {0, 1, 2 if vocabulary.suffix == ".model" else 1} & set(ids.tolist())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("texts", [[], [""], ["", "a", ""], ["a"]])
def test_flat_batches_of_few_texts(texts, vocabulary):
    expected = [load_tokenizer(vocabulary, "reference").encode(text).tolist() for text in texts]
    for name in ["reference", *ENGINES]:
        tokens, lengths = load_tokenizer(vocabulary, name).encode_flat(texts)
        assert lengths.tolist() == [len(ids) for ids in expected]
        assert tokens.tolist() == list(chain.from_iterable(expected))
        assert (tokens.dtype, lengths.dtype) == (np.int32, np.int64)


RECENT = {"gigatoken": "\U00032ed5", "tuetoken": "\u1c89"}
"""Letters of Unicode 16 and 17 to tokenizers 0.23.3, and not to the engine."""


@pytest.mark.parametrize("name", ENGINES)
def test_characters_that_an_engine_classifies_differently(name, llama3_like):
    """Texts that contain them go to the reference, the others do not."""
    fast, reference = load_tokenizer(llama3_like, name), load_tokenizer(llama3_like, "reference")
    assert isinstance(fast, FastTokenizer)
    odd = f"{RECENT[name]}(self"
    assert not np.array_equal(fast.encode_by_engine([odd])[0], reference.encode(odd))
    assert (
        find_difference(fast.encode_batch, reference, ["plain", odd, "café", "", f"x {odd}"]) == ""
    )
    assert fast.encode(odd).tolist() == reference.encode(odd).tolist()
    assert fast.num_by_reference == 3
    blocks = ((0x800, 0x1000), (0x1C00, 0x1D00), (0xA700, 0xA800), (0x2EB00, 0x2EF00))
    each = [
        f"{chr(code)}(self 1{chr(code)}1 a{chr(code)}'{chr(code)} "
        for block in (*blocks, (0x33000, 0x33600))
        for code in range(*block)
    ]
    texts = ["".join(each[start : start + 8]) for start in range(0, len(each), 8)]
    assert find_difference(fast.encode_batch, reference, texts) == ""
    assert 3 < fast.num_by_reference < len(texts) // 2


def test_each_character_is_compared_once():
    compared = []

    def engine(texts):
        compared.extend(texts)
        return [np.array([len(text)], np.int32) for text in texts]

    def reference(texts):
        return [np.array([len(text) - ("\u00df" in text)], np.int32) for text in texts]

    classes = CharacterClasses(engine, reference)
    texts = ["plain", "caf\u00e9", "", "\u00df", "\u00e9 \U0001f600 \ud800", "\u00e9\u00df"]
    assert classes.differing(texts) == [3, 5]
    assert len(compared) == 3
    assert classes.differing(texts[::-1]) == [0, 2]
    assert len(compared) == 3


def test_the_manifest_counts_them(llama3_like, tmp_path):
    odd, meta = f"{RECENT['gigatoken']}(self", {"redpajama_set_name": "RedPajamaBook"}
    texts = [f"{'word ' * 50}{odd if number % 3 == 0 else number}" for number in range(30)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text, "meta": meta}) for text in texts))
    mixture = Mixture(train_tokens=600, short_keep_ratio=1.0, valid_tokens_per_source=0)
    preprocess(
        PreprocessConfig(inputs=[corpus], tokenizer=llama3_like, mixture=mixture), tmp_path / "out"
    )
    made_by = read_manifest(tmp_path / "out").made_by
    assert made_by["engine"] == "gigatoken"
    assert made_by["engine_notes"] == (
        "10 documents were tokenized by the reference: they contain characters that gigatoken classifies "
        "differently"
    )


class WrongEngine(engines.TuetokenEngine):
    """Differs on texts that hold a "q" and a tab, which no hard string does."""

    def encode_flat(self, texts):
        return super().encode_flat([text.replace("q\t", "q ") for text in texts])


class WrongEverywhere(engines.TuetokenEngine):
    def encode_flat(self, texts):
        tokens, lengths = super().encode_flat(texts)
        return tokens + 1, lengths


def test_wrong_engine_is_passed_over_with_a_warning(llama_like, monkeypatch, caplog):
    monkeypatch.setitem(ENGINES, "gigatoken", WrongEverywhere)
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(llama_like, "auto")
    assert tokenizer.engine_name == "tuetoken"
    assert "gigatoken is not used: it differs from sentencepiece in token 0" in caplog.text
    assert [note.split(":")[0] for note in tokenizer.engine_notes] == ["gigatoken is not used"]
    with pytest.raises(ConfigError, match="tokenizer engine gigatoken is not used: it differs"):
        load_tokenizer(llama_like, "gigatoken")


def test_missing_packages_leave_the_reference(llama_like, monkeypatch):
    def missing(tokenizer_json):
        raise ImportError

    for name in ENGINES:
        monkeypatch.setitem(ENGINES, name, missing)
    tokenizer = load_tokenizer(llama_like, "auto")
    assert tokenizer.engine_name == "sentencepiece"
    assert len(tokenizer.engine_notes) == len(ENGINES)
    assert "pip install gigatoken" in tokenizer.engine_notes[0]


def test_vocabulary_without_a_byte_is_refused_in_plain_words():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet.remove("\u0104")  # what byte 0x04 is called
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(RuntimeError) as caught:
        ENGINES["gigatoken"](tokenizer.to_str())
    message = unreadable("gigatoken", caught.value)
    assert (
        message == "its vocabulary lacks bytes that gigatoken needs as tokens of their own (0x04)"
    )


def test_no_line_of_an_engine_s_own_code_is_shown():
    error = RuntimeError("cannot\nread\n\nLocation:\n    src/bpe/mod.rs:88:24")
    assert unreadable("gigatoken", error) == "it cannot read this vocabulary (cannot read)"
    assert unreadable("x", ValueError()) == "it cannot read this vocabulary (ValueError)"


def test_sample_of_the_corpus_decides_too(llama_like, real_texts, monkeypatch, caplog):
    monkeypatch.setitem(ENGINES, "gigatoken", WrongEngine)
    tokenizer = load_tokenizer(llama_like, "auto")
    assert tokenizer.engine_name == "gigatoken"
    assert check_sample(tokenizer, real_texts[:3]) is tokenizer
    checked = check_sample(tokenizer, [real_texts[0], "seq\ttwo"])
    assert checked.engine_name == "tuetoken"
    assert "on the corpus it differs from sentencepiece" in checked.engine_notes[0]
    assert "gigatoken is not used" in caplog.text
    monkeypatch.setitem(ENGINES, "tuetoken", WrongEngine)
    assert check_sample(tokenizer, ["seq\ttwo"]).engine_name == "sentencepiece"


def test_sample_reads_no_more_than_it_needs(llama_like):
    texts = iter(["some words of text " * 10_000] * 1000)
    check_sample(load_tokenizer(llama_like, "auto"), texts)
    assert len(list(texts)) > 900


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "it is not a BPE model"),
        ({"byte_fallback": False}, "it has no byte fallback"),
        ({"normalization_rule_name": "nfkc"}, "it normalizes text"),
        ({"remove_extra_whitespaces": True}, "it removes spaces"),
        ({"user_defined_symbols": ["[x]"]}, "it has user-defined or unused pieces"),
    ],
)
def test_other_sentencepiece_models_keep_sentencepiece(options, reason, tmp_path, real_texts):
    model = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=islice(real_texts[0].splitlines() + real_texts[1].splitlines(), 400),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=600,
        hard_vocab_limit=False,
        minloglevel=2,
        **model | options,
    )
    path = tmp_path / "tokenizer.model"
    with pytest.raises(NotConvertible, match=reason):
        sentencepiece_to_json(path.read_bytes())
    tokenizer = load_tokenizer(path, "auto")
    assert tokenizer.engine_name == "sentencepiece"
    assert reason in tokenizer.engine_notes[0]


def test_unknown_engine_is_refused(llama_like):
    with pytest.raises(ConfigError, match="choose one of auto, gigatoken, tuetoken, reference"):
        load_tokenizer(llama_like, "fastest")


def test_name_of_the_reference_is_an_engine(vocabulary):
    name = load_tokenizer(vocabulary, "reference").engine_name
    assert load_tokenizer(vocabulary, name).engine_name == name


def test_cache_is_bounded(llama3_like, monkeypatch):
    """Random words fill the cache; the engine is made anew and its ids stay the same."""
    monkeypatch.setattr(gigatoken_engine, "CACHE_CHECK_BYTES", 200_000)
    monkeypatch.setattr(gigatoken_engine, "CACHE_GROWTH_BYTES", (1 << 20, 1 << 20))
    generator = random.Random(0)
    engine = ENGINES["gigatoken"](engines.plain_json(load_tokenizer(llama3_like, "reference")))
    texts = ["".join(generator.choices("abcdefgh ", k=100_000)) for _ in range(40)]
    parts = [engine.encode_flat([text])[0] for text in texts]
    assert 1 <= engine.num_rebuilds <= 20
    fresh = ENGINES["gigatoken"](engines.plain_json(load_tokenizer(llama3_like, "reference")))
    np.testing.assert_array_equal(np.concatenate(parts), fresh.encode_flat(texts)[0])


@pytest.mark.parametrize(
    ("free_gb", "megabytes"), [(64, 384), (4, 256), (1, 96), (0, 96), (None, 96)]
)
def test_cache_gets_a_share_of_the_memory_left(free_gb, megabytes, monkeypatch):
    room = None if free_gb is None else Room(free_gb * 2**30, "here")
    monkeypatch.setattr(gigatoken_engine, "host_memory", lambda: room)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2, 3, 5})
    assert gigatoken_engine.growth_limit() == megabytes << 20


def test_words_are_divided_only_at_characters_that_never_merge():
    """Digits merge in the second vocabulary; a vocabulary of another kind is left alone."""
    content = {
        "normalizer": gigatoken_engine.LLAMA_NORMALIZER,
        "pre_tokenizer": None,
        "added_tokens": [],
        "model": {
            "byte_fallback": True,
            "vocab": {"<0x0A>": 0, "▁": 1, "a": 2, "1": 3, "2": 4, "12": 5, "▁a": 6},
            "merges": [["▁", "a"]],
        },
    }
    found, has_no_prefix = gigatoken_engine.separate_characters(json.dumps(content))
    tokens = {token["content"]: token["id"] for token in json.loads(found)["added_tokens"]}
    assert (tokens, has_no_prefix) == ({"\n": 0, "1": 3, "2": 4}, True)
    content["model"]["merges"].append(["1", "2"])
    found, _ = gigatoken_engine.separate_characters(json.dumps(content))
    assert [token["content"] for token in json.loads(found)["added_tokens"]] == ["\n"]
    text = json.dumps(content | {"normalizer": None})
    assert gigatoken_engine.separate_characters(text) == (text, False)


def test_a_released_engine_is_made_anew(llama_like):
    tokenizer = load_tokenizer(llama_like, "gigatoken")
    before = tokenizer.encode("the quick brown fox")
    engines.release_engine(tokenizer)
    np.testing.assert_array_equal(tokenizer.encode("the quick brown fox"), before)


def _byte_letters():
    """The letters that byte-level vocabularies write bytes with (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]
