"""The bound on tokens from bytes: never broken, and known for the tokenizers of the models we train."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_long.tokenizer.length_bound import extra_tokens_bound
from megatron_long.tokenizer.loading import load_tokenizer

NASTY = [
    "",
    " ",
    "  ",
    "\n\n\n",
    "▁",
    "\x00",
    "ﷺ" * 9,
    "é",
    "e\u0301",
    "🏳️‍🌈" * 5,
    "日本語",
    "<s>",
    "\u3000",
    "\t ",
]


def train_bpe(kind):
    """Train a small tokenizer.json as Llama-2's (byte fallback) or as Llama-3's (byte level)."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    texts = ["the quick brown fox jumps over the lazy dog", "bocu dofa nulo", " ▁▁ "] * 5
    if kind == "byte-level":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        alphabet = []
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory, model_file):
    files = {"sentencepiece": model_file}
    for kind in ("byte-level", "byte-fallback"):
        files[kind] = tmp_path_factory.mktemp(kind) / "tokenizer.json"
        files[kind].write_text(json.dumps(train_bpe(kind)), "utf-8")
    return files


KINDS = ["sentencepiece", "byte-level", "byte-fallback"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_no_text_has_more_tokens_than_the_bound(kind, text, tokenizer_files):
    tokenizer = load_tokenizer(tokenizer_files[kind], "reference")
    extra = extra_tokens_bound(tokenizer_files[kind])
    assert extra is not None
    assert len(tokenizer.encode(text)) <= len(text.encode()) + extra


@pytest.mark.parametrize("kind", KINDS)
def test_nasty_texts_keep_to_the_bound(kind, tokenizer_files):
    tokenizer = load_tokenizer(tokenizer_files[kind], "reference")
    extra = extra_tokens_bound(tokenizer_files[kind])
    generator = random.Random(0)
    texts = NASTY + ["".join(generator.choices(NASTY, k=20)) for _ in range(100)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert len(ids) <= len(text.encode()) + extra


def test_the_bound_is_met(tokenizer_files):
    """A text whose characters are all unknown has as many tokens as the bound says, so it is not loose."""
    tokenizer = load_tokenizer(tokenizer_files["sentencepiece"], "reference")
    text = "日" * 50
    extra = extra_tokens_bound(tokenizer_files["sentencepiece"])
    assert len(tokenizer.encode(text)) == len(text.encode()) + extra


def test_a_model_that_rewrites_characters_has_no_bound(tmp_path, records):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(record["text"] for record in records),
        model_prefix=str(tmp_path / "t"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    assert extra_tokens_bound(tmp_path / "t.model") is None


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": None},
        {"model": {"type": "WordPiece", "vocab": {}}},
        {"pre_tokenizer": {"type": "BertPreTokenizer"}},
    ],
)
def test_other_tokenizers_have_no_bound(change, tokenizer_files, tmp_path):
    content = json.loads(tokenizer_files["byte-level"].read_text("utf-8"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content | change), "utf-8")
    assert extra_tokens_bound(path) is None
