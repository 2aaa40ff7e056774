"""Greedy generation on shards against `transformers`, token by token, in several layouts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_long.evaluation.generation.key_value_cache import CachedAttention, CacheState
from megatron_long.evaluation.generation.shard_generator import top_tokens
from megatron_long.evaluation.hf_scorer import HFScorer
from megatron_long.model.linear_cross_entropy import VocabularyShard

from .generation_worker import CONTEXT, LENGTHS, NUM_NEW, make_prompts

WORKER = Path(__file__).with_name("generation_worker.py")
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", 2]),
    "cp2": (2, ["--context-parallel-size", 2]),
    "pp2": (2, ["--pipeline-model-parallel-size", 2]),
    "tp2-cp2": (4, ["--tensor-model-parallel-size", 2, "--context-parallel-size", 2]),
    "cp2-pp2": (4, ["--context-parallel-size", 2, "--pipeline-model-parallel-size", 2]),
}


class Alone:
    """A context-parallel group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


class Recorder(torch.nn.Module):
    def forward(self, query, key, value, mask):
        return query.flatten(2)


def test_the_cache_attends_to_real_tokens_alone():
    """Two rows of different length, three tokens one by one, against attention over the whole rows."""
    torch.manual_seed(0)
    lengths, padded, heads, groups, size = torch.tensor([4, 7]), 8, 4, 2, 16
    state = CacheState(Alone())
    layer = CachedAttention(Recorder(), state)
    query, key, value = (
        torch.randn(padded + 3, 2, number, size) for number in (heads, groups, groups)
    )
    state.begin(lengths, torch.arange(padded), 3)
    layer(query[:padded], key[:padded], value[:padded], None)
    for step in range(padded, padded + 3):
        state.take_token()
        seen = layer(*(part[step : step + 1] for part in (query, key, value)), None)
        for row, length in enumerate(lengths.tolist()):
            places = [*range(length), *range(padded, step + 1)]
            keys, values = (part[places, row].transpose(0, 1) for part in (key, value))
            expected = torch.nn.functional.scaled_dot_product_attention(
                query[step, row][:, None], keys, values, enable_gqa=True
            )
            torch.testing.assert_close(seen[0, row], expected.flatten(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_the_likeliest_token_of_whole_logits(num_shards, monkeypatch):
    """Rows beyond the vocabulary never win, and of equal logits the first does."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8), torch.randn(64, 8)
    weight[60:] = 100 * torch.sign(hidden[0])
    weight[50] = weight[3]
    best = []
    for part in range(num_shards):
        rows = weight.chunk(num_shards)[part]
        logits = hidden @ rows[: max(0, min(60 - part * len(rows), len(rows)))].t()
        best.append(torch.stack([*(logits.max(-1))]))
        best[-1][1] += part * len(rows)
    from megatron_long.evaluation.generation import shard_generator

    monkeypatch.setattr(shard_generator, "gather_statistics", lambda own, group: torch.stack(best))
    seen = top_tokens(hidden, weight.chunk(num_shards)[0], VocabularyShard(0, 60))
    assert torch.equal(seen.long(), (hidden @ weight[:60].t()).argmax(-1))


def save_llama(folder: Path, run_job, **rope: object) -> list[list[int]]:
    """A Llama of random weights that says many tokens, as `folder`/hf and `folder`/megatron; what it says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=390,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        **rope,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    command = ["tools/convert_checkpoint.py", "hf-to-megatron", "--input", folder / "hf"]
    run_job(1, [*command, "--output", folder / "megatron"])
    model = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    scorer = HFScorer(model, context_length=CONTEXT)
    model.generation_config.eos_token_id = None
    return [scorer.generate(prompt, NUM_NEW).tolist() for prompt in make_prompts()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def expected(folder: Path, run_job) -> list[list[int]]:
    """What `transformers` says, a row at a time, with no token that ends an answer."""
    return save_llama(folder, run_job)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_stretched_rope_turns_new_tokens_too(rope, run_job, tmp_path):
    expected = save_llama(tmp_path, run_job, rope_parameters=rope | {"rope_theta": 10_000.0})
    words = [WORKER, tmp_path / "megatron", tmp_path / "seen.pt", -1, "fp32"]
    run_job(2, [*words, "--context-parallel-size", 2])
    assert torch.load(tmp_path / "seen.pt")["together"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_those_of_transformers(layout, folder, expected, run_job, tmp_path):
    num_processes, flags = LAYOUTS[layout]
    stop = expected[0][6]
    run_job(
        num_processes, [WORKER, folder / "megatron", tmp_path / "seen.pt", stop, "fp32", *flags]
    )
    seen = torch.load(tmp_path / "seen.pt")
    assert [len(row) for row in expected] == [NUM_NEW] * len(LENGTHS)
    assert len({token for row in expected for token in row}) > NUM_NEW
    assert seen["together"] == expected
    assert seen["alone"] == expected
    cut = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert seen["stopped"] == cut
    assert len(cut[0]) <= 6
    from transformers import LlamaForCausalLM

    tokens = torch.from_numpy(make_prompts()[2])[None]
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)(
            tokens[:, :-8]
        ).logits
    losses = torch.nn.functional.cross_entropy(logits[0], tokens[0, 8:], reduction="none")
    np.testing.assert_allclose(seen["losses"][0], losses.numpy(), atol=1e-4)
