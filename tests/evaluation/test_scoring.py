"""Token scores: the statistics of vocabulary shards, and a checkpoint in several layouts."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_long.engine import loading_hooks
from megatron_long.evaluation import pinning
from megatron_long.evaluation.scoring import combine_statistics, shard_statistics
from megatron_long.model import linear_cross_entropy
from megatron_long.model.labels import UNSCORED
from megatron_long.model.linear_cross_entropy import VocabularyShard
from tests.fake_checkpoints import write_fake_checkpoint

WORKER = Path(__file__).with_name("scoring_worker.py")


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [61, 64])
def test_shards_give_the_scores_of_whole_logits(num_shards, vocab_size, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_LOGITS", 7 * 64)
    torch.manual_seed(0)
    rows, positions = 64, 50
    hidden, weight = torch.randn(positions, 8), torch.randn(rows, 8)
    labels = torch.randint(0, vocab_size, (positions,))
    labels[3] = UNSCORED
    logits = (hidden @ weight.t())[:, :vocab_size]
    labels[4] = logits[4].argmax()
    shards = torch.stack(
        [
            shard_statistics(
                hidden, part, labels, VocabularyShard(i * rows // num_shards, vocab_size)
            )
            for i, part in enumerate(weight.chunk(num_shards))
        ]
    )
    scores = combine_statistics(shards, labels)
    asked = labels != UNSCORED
    expected = torch.nn.functional.cross_entropy(logits[asked], labels[asked], reduction="none")
    torch.testing.assert_close(scores.losses[asked], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.is_greedy[asked], (logits.argmax(-1) == labels)[asked])
    assert scores.is_greedy[4]
    assert not scores.is_greedy[asked].all()
    assert (scores.losses[3], scores.is_greedy[3]) == (0.0, True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, run_job, tiny_dataset) -> Path:
    """A Megatron checkpoint of a few steps, with its HF config."""
    folder = tmp_path_factory.mktemp("scored")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 390,  # padded to 512: the padding must get no probability
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    command = ["-m", "megatron_long.pretrain", "--recipe", "tiny_debug", "--hf-config", folder]
    command += ["--dataset", tiny_dataset, "--seq-length", "128", "--global-batch-size", "8"]
    command += ["--train-iters", "3", "--save", folder / "ckpt"]
    run_job(1, command)
    return folder / "ckpt"


@pytest.mark.slow
def test_layouts_score_alike(checkpoint, run_job, tmp_path):
    layouts = {
        "one": (1, []),
        "tp2-cp2": (4, ["--tensor-model-parallel-size", "2", "--context-parallel-size", "2"]),
        "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
        "dp2": (2, []),
    }
    seen = {}
    for name, (num_processes, flags) in layouts.items():
        output = tmp_path / f"{name}.pt"
        run_job(num_processes, [WORKER, checkpoint, output, *flags])
        seen[name] = torch.load(output)
    reference = seen.pop("one")
    assert reference["losses"].std() > 0.1
    assert (reference["losses"][0, 5:9] == 0).all()
    assert reference["short"].shape == (8, 64)
    # Rows that begin where a window begins see the same; the others have lost what came before.
    torch.testing.assert_close(reference["short"][0], reference["losses"][0, :64])
    assert not torch.allclose(reference["short"][1], reference["losses"][0, 64:128])
    assert reference["agreed"] == 0
    for name, scores in seen.items():
        for rows in ("losses", "short"):
            difference = (scores[rows] - reference[rows]).abs().max().item()
            print(f"{name}, {rows}: largest difference of a token loss {difference:.1e}")
            assert difference < 1e-5
        assert torch.equal(scores["is_greedy"], reference["is_greedy"])
    assert seen["dp2"]["gathered"] == [0, 1]


def test_the_checkpoint_that_was_chosen_is_the_one_loaded(tmp_path, monkeypatch):
    """A training run saved another one since; without a choice it is that of `--ckpt-step` or the newest."""
    for number in (None, 10, 20):
        write_fake_checkpoint(tmp_path, number)
    loaded = []
    monkeypatch.setattr(loading_hooks, "load_from", lambda choice, args: loaded.append(choice))
    for iteration, step in (("10", None), ("release", None), (None, 10), (None, None)):
        pinning.pin_checkpoint(tmp_path, Namespace(ckpt_step=step), True, iteration)
    assert [choice.iteration for choice in loaded] == [10, None, 10, 20]
    assert loaded[0].folder == tmp_path / "iter_0000010"
