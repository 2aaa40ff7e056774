"""Generation by transformers is plain greedy decoding, whatever the model's own settings ask for."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_long.evaluation.hf_scorer import HFScorer


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
