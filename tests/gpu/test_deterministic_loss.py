"""The chunked loss gives the same bits each time: its kernels add in a fixed order."""

import pytest
import torch

from megatron_long.model.linear_cross_entropy import VocabularyShard, linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_loss_and_gradients_repeat_bit_for_bit():
    torch.manual_seed(0)
    hidden = torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(32_000, 512, device="cuda") * 0.1).bfloat16()
    labels = torch.randint(0, 32_000, (4096,), device="cuda")
    mask = torch.ones(4096, device="cuda")
    first = None
    for _ in range(5):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        w.main_grad = torch.zeros(w.shape, device="cuda")
        total, losses = linear_cross_entropy(h, w, labels, mask, VocabularyShard(0, 32_000))
        total.backward()
        seen = (total.detach(), losses.detach(), h.grad, w.main_grad)
        first = first or seen
        assert all(torch.equal(a, b) for a, b in zip(seen, first, strict=True))
