"""GGUF files: configuration, weights, tokenizer; written here with the gguf package, read by us."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_long.conversion.convert import hf_to_megatron
from megatron_long.conversion.export import gguf_to_hf, megatron_to_hf
from megatron_long.conversion.formats import gguf_file, sources
from megatron_long.conversion.formats.gguf_file import _NAMES
from megatron_long.conversion.options import Options
from megatron_long.errors import ConfigError, DataError
from megatron_long.model.geometry import geometry_from_hf
from megatron_long.model.rope import BaseRope, Llama3Rope

gguf = pytest.importorskip("gguf")

SENTENCE = "context window 2024, it's   token\n\nlayer naïve 日本"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to q and k of a Llama: halves of a head become pairs."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder: Path, path: Path, weights: dict[str, torch.Tensor], **change: Any) -> Path:
    """Write a model folder as a GGUF file.

    Args:
        change: `kind`, the type of matrices; `architecture`; `rope_freqs`; `tokenizer`, a function that
            adds one.
    """
    geometry = geometry_from_hf(folder)
    architecture = change.get("architecture", geometry.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(geometry.num_layers)
    writer.add_embedding_length(geometry.hidden_size)
    writer.add_feed_forward_length(geometry.ffn_hidden_size)
    writer.add_head_count(geometry.num_attention_heads)
    writer.add_head_count_kv(geometry.num_query_groups)
    writer.add_key_length(geometry.kv_channels)
    writer.add_context_length(geometry.max_position_embeddings)
    writer.add_layer_norm_rms_eps(geometry.norm_epsilon)
    writer.add_rope_freq_base(geometry.rotary_base)
    writer.add_vocab_size(geometry.vocab_size)
    if "tokenizer" in change:
        change["tokenizer"](writer)
    if "rope_freqs" in change:
        writer.add_tensor("rope_freqs.weight", change["rope_freqs"])
    names = {theirs: ours for ours, theirs in _NAMES.items()}
    heads = {"q": geometry.num_attention_heads, "k": geometry.num_query_groups}
    for name, tensor in weights.items():
        stem, _, end = name.rpartition(".")
        _, is_layer, rest = stem.partition("model.layers.")
        number, _, inner = rest.partition(".")
        stem = f"blk.{number}.{names[inner]}" if is_layer else names[stem]
        value = tensor.float().numpy()
        projection = stem.rpartition("attn_")[2]
        if architecture == "llama" and projection in heads:
            value = permute(value, heads[projection])
        kind = change.get("kind", gguf.GGMLQuantizationType.F32) if value.ndim > 1 else None
        if kind is not None:
            writer.add_tensor(f"{stem}.{end}", gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stem}.{end}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_full_precision_comes_back_bit_for_bit(make_llama, read_weights, tmp_path, family):
    folder = make_llama(family=family, tied=True)
    weights = read_weights(folder)
    path = write_gguf(folder, tmp_path / "model.gguf", weights)
    report = gguf_to_hf(path, tmp_path / "hf", options=Options(verify=True))
    back = read_weights(tmp_path / "hf")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    expected = replace(geometry_from_hf(folder), init_method_std=0.02)  # which a GGUF file lacks
    assert geometry_from_hf(tmp_path / "hf") == expected
    assert report.is_verified
    assert not any("rounded" in sentence for sentence in report.losses)


def test_quantized_weights_are_what_transformers_reads(make_llama, read_weights, tmp_path):
    """A reader of another hand, which undoes the permutation too; and straight to Megatron and back."""
    from transformers import AutoModelForCausalLM

    folder = make_llama(vocab_size=512)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(folder, tmp_path / "model.gguf", read_weights(folder), kind=kind)
    report = gguf_to_hf(path, tmp_path / "hf")
    assert any("rounded when the file was made" in sentence for sentence in report.losses)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    seen, exact = read_weights(tmp_path / "hf"), read_weights(folder)
    for name, tensor in seen.items():
        assert torch.equal(tensor, peer[name]), name
        assert (tensor - exact[name]).abs().max() < 0.02 * exact[name].abs().max()
    hf_to_megatron(path, tmp_path / "ckpt")
    megatron_to_hf(tmp_path / "ckpt", tmp_path / "back")
    back = read_weights(tmp_path / "back")
    assert all(torch.equal(back[name], seen[name]) for name in seen)


def test_slices_are_cut_from_the_same_rows(make_llama, read_weights, tmp_path):
    folder = make_llama(tied=True)
    path = write_gguf(folder, tmp_path / "model.gguf", read_weights(folder))
    name = "model.layers.1.self_attn.q_proj.weight"
    with sources.open_weights(path) as weights:
        part = weights.read_slice(name, slice(5, 20), slice(3, 9))
    assert torch.equal(part, read_weights(folder)[name][5:20, 3:9])


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_in_its_result(make_llama, read_weights, tmp_path, factor):
    rope = Llama3Rope(factor=factor)
    config = {"rope_parameters": {**rope.to_hf(), "rope_theta": 500_000.0}, "head_dim": 64}
    folder = make_llama(tied=True, **config)
    plain = BaseRope().inverse_frequencies(5e5, 64)
    divisors = (plain / rope.inverse_frequencies(5e5, 64)).numpy()
    weights = read_weights(folder)
    path = write_gguf(folder, tmp_path / "model.gguf", weights, rope_freqs=divisors)
    assert sources.read_source_geometry(path).rope == rope
    other = write_gguf(folder, tmp_path / "other.gguf", weights, rope_freqs=divisors[::-1].copy())
    with pytest.raises(ConfigError, match=r"rope_freqs.weight is not Llama-3.1's scaling"):
        sources.read_source_geometry(other)


def add_sentencepiece(model: Path) -> Any:
    """Gives the function that puts a SentencePiece model into a GGUF file, as llama.cpp does."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    numbers = range(pieces.get_piece_size())
    kinds = [
        (pieces.is_unknown, 2),
        (pieces.is_control, 3),
        (pieces.is_byte, 6),
        (lambda number: True, 1),
    ]

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([pieces.id_to_piece(n) for n in numbers])
        writer.add_token_scores([pieces.get_score(n) for n in numbers])
        types = [next(kind for is_kind, kind in kinds if is_kind(n)) for n in numbers]
        writer.add_token_types(types)
        writer.add_bos_token_id(pieces.bos_id())
        writer.add_eos_token_id(pieces.eos_id())
        writer.add_unk_token_id(pieces.unk_id())

    return add


def test_sentencepiece_tokenizer_comes_back(make_llama, read_weights, tiny_corpus, tmp_path):
    """One that leaves text as it is, as Llama's does."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(json.loads(line)["text"] for line in tiny_corpus.open()),
        model_prefix=str(tmp_path / "trained"),
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=100_000,
        minloglevel=2,
    )
    trained = tmp_path / "trained.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained))
    folder = make_llama(tied=True, vocab_size=processor.get_piece_size())
    add = add_sentencepiece(trained)
    path = write_gguf(folder, tmp_path / "model.gguf", read_weights(folder), tokenizer=add)
    gguf_to_hf(path, tmp_path / "hf")
    back = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "hf/tokenizer.model"))
    for text in (SENTENCE, " loss  depth needle.", "page 12"):
        assert back.encode(text) == processor.encode(text)
    settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_byte_level_tokenizer_comes_back(make_llama, read_weights, tiny_corpus, tmp_path, pre):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"]
    )
    trained.train([str(tiny_corpus)], trainer)
    content = json.loads(trained.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3, *[1] * (len(tokens) - 1)])
        writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
        writer.add_eos_token_id(0)

    folder = make_llama(tied=True, vocab_size=len(tokens))
    path = write_gguf(folder, tmp_path / "model.gguf", read_weights(folder), tokenizer=add)
    gguf_to_hf(path, tmp_path / "hf")
    from transformers import AutoTokenizer

    back = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert back.decode(back(SENTENCE + "<|end|>").input_ids) == SENTENCE + "<|end|>"
    assert back("<|end|>").input_ids == [0]
    digits = {len(word) for word in back.tokenize("2024") if word.isdigit()}
    assert digits == {1}  # no number was in the corpus
    if pre == "gpt-2":
        assert back(SENTENCE).input_ids == trained.encode(SENTENCE).ids
    text = "layer ''' stretch"
    if pre in ("llama-bpe", "qwen2"):
        assert back.decode(back(text).input_ids) == text


def test_a_lost_window_is_said_of_a_mistral_alone(make_llama, read_weights, tmp_path):
    folder = make_llama(tied=True)

    def lost(*, name: str | None = None, window: int | None = None) -> str:
        def add(writer: Any) -> None:
            if name is not None:
                writer.add_name(name)
            if window is not None:
                writer.add_sliding_window(window)

        path = write_gguf(folder, tmp_path / "model.gguf", {}, tokenizer=add)
        return "; ".join(gguf_file.losses(path))

    for other in (None, "SmolLM2 135M", "Meta Llama 3.1 8B"):
        assert "window" not in lost(name=other)
    said = "a Mistral's sliding window is not in a GGUF file: attention is full"
    assert said in lost(name="Mistral 7B v0.1")
    assert "its sliding window of 64 tokens: attention is full" in lost(name="SmolLM2", window=64)


def test_bad_files_are_named(make_llama, read_weights, tmp_path):
    folder = make_llama(tied=True)
    path = write_gguf(folder, tmp_path / "model.gguf", read_weights(folder))
    short = tmp_path / "short.gguf"
    short.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"short.gguf is not a complete GGUF file"):
        gguf_to_hf(short, tmp_path / "hf")
    other = write_gguf(folder, tmp_path / "other.gguf", {}, architecture="gemma")
    with pytest.raises(ConfigError, match="unknown architecture gemma; known: llama, qwen2"):
        gguf_to_hf(other, tmp_path / "hf")
    with pytest.raises(ConfigError, match="does not exist"):
        gguf_to_hf(tmp_path / "nowhere.gguf", tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"is not a GGUF file"):
        gguf_to_hf(folder, tmp_path / "hf")

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("unheard-of")
        writer.add_token_list(["a"] * 1000)

    strange = write_gguf(folder, tmp_path / "strange.gguf", read_weights(folder), tokenizer=add)
    with pytest.raises(ConfigError, match="unknown pre-tokenization rule 'unheard-of'"):
        gguf_to_hf(strange, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.skipif("GGUF_MODEL" not in os.environ, reason="GGUF_MODEL names no real model")
def test_a_real_model_talks_sense(tmp_path):
    """With GGUF_MODEL=SmolLM2-135M-Instruct.Q4_1.gguf: the next words of a well-known text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf_to_hf(Path(os.environ["GGUF_MODEL"]), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0])
