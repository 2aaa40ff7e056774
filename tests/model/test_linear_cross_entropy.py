"""Chunked linear cross entropy against torch's own, values and gradients."""

from pathlib import Path

import pytest
import torch

from megatron_long.model import linear_cross_entropy as module
from megatron_long.model.labels import UNSCORED
from megatron_long.model.linear_cross_entropy import VocabularyShard, linear_cross_entropy

POSITIONS, HIDDEN, ROWS = 40, 16, 64
WORKER = Path(__file__).with_name("linear_cross_entropy_worker.py")


def make_inputs(vocab_size: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator, dtype=dtype)
    weight = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype)
    labels = torch.randint(0, vocab_size, (POSITIONS,), generator=generator)
    labels[5] = UNSCORED
    mask = torch.rand(POSITIONS, generator=generator).round() * 0.5
    return hidden.requires_grad_(), weight.requires_grad_(), labels, mask


def reference(hidden, weight, labels, mask, vocab_size):
    """Sum, losses and gradients by torch, with full logits in float64."""
    h, w = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    losses = torch.nn.functional.cross_entropy(
        (h @ w.t())[:, :vocab_size], labels, reduction="none", ignore_index=UNSCORED
    )
    total = (losses * mask).sum()
    (total * 3.0).backward()
    return total.detach(), losses.detach(), h.grad, w.grad


@pytest.mark.parametrize("chunk_logits", [ROWS, 7 * ROWS, 2**28])
@pytest.mark.parametrize("vocab_size", [ROWS, ROWS - 5])
def test_values_and_gradients(chunk_logits, vocab_size, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    hidden, weight, labels, mask = make_inputs(vocab_size)
    total, losses = linear_cross_entropy(
        hidden, weight, labels, mask, VocabularyShard(0, vocab_size)
    )
    (total * 3.0).backward()
    expected = reference(hidden, weight, labels, mask, vocab_size)
    for seen, value in zip((total, losses, hidden.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(seen.double(), value, rtol=1e-5, atol=1e-5)
    assert not losses.requires_grad
    assert losses[5] == 0
    assert (weight.grad[vocab_size:] == 0).all()


def test_gradient_goes_to_megatrons_buffer_in_float32():
    hidden, weight, labels, mask = make_inputs(ROWS, torch.bfloat16)
    weight.main_grad = torch.ones(ROWS, HIDDEN)
    total, _ = linear_cross_entropy(hidden, weight, labels, mask, VocabularyShard(0, ROWS))
    total.backward()
    assert weight.grad_added_to_main_grad
    _, _, _, weight_grad = reference(hidden, weight, labels, mask, ROWS)
    torch.testing.assert_close(
        weight.main_grad.double() - 1.0, weight_grad / 3.0, rtol=2e-2, atol=2e-2
    )


def test_shared_weight_keeps_the_embeddings_gradient():
    """With the embedding shared, what autograd adds up must be the embedding's gradient alone."""
    hidden, weight, labels, mask = make_inputs(ROWS)
    weight.main_grad, weight.zero_out_wgrad = torch.zeros(ROWS, HIDDEN), True
    total, _ = linear_cross_entropy(hidden, weight, labels, mask, VocabularyShard(0, ROWS))
    (total + weight[3].sum()).backward()
    expected = torch.zeros(ROWS, HIDDEN)
    expected[3] = 1.0
    assert torch.equal(weight.grad, expected)
    assert weight.main_grad.abs().sum() > 0


def test_without_gradients_nothing_is_kept():
    hidden, weight, labels, mask = make_inputs(ROWS)
    with torch.no_grad():
        total, losses = linear_cross_entropy(hidden, weight, labels, mask, VocabularyShard(0, ROWS))
    assert not total.requires_grad
    expected = reference(hidden, weight, labels, mask, ROWS)
    torch.testing.assert_close(losses.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("vocab_size", "padded", "tp", "positions"),
    [
        (32_001, 32_256, 2, 20_000),
        (32_016, 32_256, 2, 131_072),
        (32_016, 33_792, 8, 131_072),
        (128_258, 129_024, 8, 131_072),
        (100, 1024, 8, 500),  # most ranks hold nothing but padding
    ],
)
def test_all_ranks_gather_statistics_of_the_same_chunks(
    vocab_size, padded, tp, positions, monkeypatch
):
    seen: list[list[int]] = []

    def statistics(logits, labels):
        seen[-1].append(labels.numel())
        return torch.zeros(3, labels.numel())

    monkeypatch.setattr(module, "multiply", lambda hidden, columns: None)
    monkeypatch.setattr(module, "chunk_statistics", statistics)
    hidden, labels = torch.zeros(positions, 1), torch.zeros(positions, dtype=torch.int64)
    weight = torch.zeros(padded // tp, 1)
    for rank in range(tp):
        seen.append([])
        shard = VocabularyShard(rank * padded // tp, vocab_size)
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, labels, torch.ones(positions), shard)
    assert seen == [seen[0]] * tp
    assert sum(seen[0]) == positions


@pytest.mark.slow
def test_vocabulary_cut_over_two_ranks(run_job):
    run_job(2, [WORKER])
