"""Scores by transformers are of the whole model that was given; generation is plain greedy decoding."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_long.errors import ConfigError
from megatron_long.evaluation.hf_scorer import HFScorer, open_hf_scorer


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tensors, name: tensors.pop(name), r"lacks 1 tensors \(model\.norm\.weight\)"),
        (lambda tensors, name: tensors.update({name: torch.ones(8)}), "tensors of other shapes"),
        (None, "is not a model that transformers can read"),
    ],
    ids=["a tensor missing", "another shape", "cut off"],
)
def test_a_model_that_is_not_whole_is_refused(damage, words, tmp_path):
    """transformers itself fills a missing tensor with random numbers."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    open_hf_scorer(tmp_path, context_length=64)
    file = tmp_path / "model.safetensors"
    if damage is None:
        file.write_bytes(file.read_bytes()[:-4])
    else:
        tensors = load_file(file)
        damage(tensors, "model.norm.weight")
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=words):
        open_hf_scorer(tmp_path, context_length=64)


def test_settings_of_the_model_do_not_bend_greedy_decoding():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    prompt = np.arange(3, 9)
    expected = greedy(model, prompt, 12)
    assert len(set(expected)) < 12  # it repeats itself, so a penalty would show
    model.generation_config.eos_token_id = None
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.do_sample = True
    scorer = HFScorer(model, context_length=64)
    for _ in range(2):
        assert scorer.generate(prompt, 12).tolist() == expected
    model.generation_config.eos_token_id = expected[0]
    assert scorer.generate(prompt, 12).tolist() == expected[:1]


def greedy(model, prompt, number: int) -> list[int]:
    """The most likely token, again and again."""
    tokens = torch.from_numpy(prompt)[None]
    for _ in range(number):
        with torch.no_grad():
            following = model(tokens).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], 1)
    return tokens[0, len(prompt) :].tolist()
