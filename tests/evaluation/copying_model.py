"""A Llama that copies, its weights set by hand: an induction head of two layers.

Layer 1: a head attends to the position before (its query and key are constants, and RoPE turns them so
that their product peaks at distance 1) and writes that token's code next to the present one's. Layer 2: a
head asks with the present token's code for positions whose code of the token before is the same, and
writes what stands there. So after "... A B ... A" the model says B, whatever lies between.

Residual stream: token (one-hot), token before (one-hot), answer (one-hot), a constant.
"""

import json
from pathlib import Path

import numpy as np
import torch

SIZE = 96
"""Most words of the vocabulary: the channels of a head that hardly turn over the test's length."""
HEAD = 128
BASE = 10**15
TOKEN, BEFORE, ANSWER, CONSTANT = 0, SIZE, 2 * SIZE, 3 * SIZE
HIDDEN = 3 * SIZE + 32
FREE = [*range(16, 64), *range(80, 128)]
"""Channels with angles below 0.2 rad over 1,000 positions; channel i is turned together with i + 64."""


def save_copying_model(folder: Path, words: list[str], *, distance: int = 1) -> Path:
    """Write the model and its tokenizer as a Hugging Face folder.

    Args:
        words: The vocabulary, after `<unk>`, `<s>` and `</s>`.
        distance: What layer 1 takes for the position before: 1 copies, 2 is a broken model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    pieces = ["<unk>", "<s>", "</s>", *words]
    assert len(pieces) <= SIZE
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD,
        max_position_embeddings=1024,
        rope_theta=float(BASE),
        rope_parameters={"rope_type": "default", "rope_theta": float(BASE)},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        _set_weights(model, len(pieces), distance)
    model.save_pretrained(folder)
    _save_tokenizer(folder, pieces)
    return folder


def _set_weights(model, vocab_size: int, distance: int) -> None:
    token = torch.arange(vocab_size)
    model.model.embed_tokens.weight[token, TOKEN + token] = 1.0
    model.model.embed_tokens.weight[:, CONSTANT] = 1.0
    first, second = (layer.self_attn for layer in model.model.layers)
    norm = (HIDDEN / 2) ** 0.5  # what RMSNorm makes of a 1 among two
    # Distance t - j enters the product as cos(frequency * (distance - (t - j))).
    angles = distance * np.float64(BASE) ** (-np.arange(HEAD // 2) / (HEAD // 2))
    strength = 40.0 * HEAD**0.25 / norm
    first.q_proj.weight[: HEAD // 2, CONSTANT] = strength
    first.k_proj.weight[: HEAD // 2, CONSTANT] = strength * torch.from_numpy(np.cos(angles)).float()
    first.k_proj.weight[HEAD // 2 : HEAD, CONSTANT] = (
        strength * torch.from_numpy(np.sin(angles)).float()
    )
    _copy(first, TOKEN, BEFORE, vocab_size, 1 / norm)
    channels = torch.tensor(FREE[:vocab_size])
    norm = (HIDDEN / 3) ** 0.5
    strength = 12.0 * HEAD**0.25 / norm
    second.q_proj.weight[channels, TOKEN + token] = strength
    second.k_proj.weight[channels, BEFORE + token] = strength
    _copy(second, TOKEN, ANSWER, vocab_size, 100 / norm)
    model.lm_head.weight[token, ANSWER + token] = 1.0


def _copy(attention, source: int, target: int, number: int, scale: float) -> None:
    """Let the first head write what it attends to from one place of the stream to another."""
    places = torch.arange(number)
    attention.v_proj.weight[places, source + places] = 1.0
    attention.o_proj.weight[target + places, places] = scale


def _save_tokenizer(folder: Path, pieces: list[str]) -> None:
    """One token a word; words are what white space separates."""
    import tokenizers

    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
