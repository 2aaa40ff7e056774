"""The Triton kernels against the plain versions, and BF16 gradients against float32."""

import pytest
import torch

from megatron_long.model import linear_cross_entropy as module
from megatron_long.model.linear_cross_entropy import VocabularyShard, linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("num_columns", [1, 5, 4096, 4097, 32_000])
def test_kernels_equal_plain_versions(num_columns):
    torch.manual_seed(0)
    logits = torch.randn(33, num_columns) * 10
    labels = torch.randint(-5, num_columns + 5, (33,))
    scale = torch.rand(33)
    plain = module.chunk_statistics(logits, labels)
    fused = module.chunk_statistics(logits.cuda(), labels.cuda()).cpu()
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-5)
    arguments = (logits, plain[0], labels, scale)
    expected = module.logit_gradient(*arguments, torch.float32)
    seen = module.logit_gradient(*(tensor.cuda() for tensor in arguments), torch.float32).cpu()
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_logits", [2**18, 2**28])
def test_bf16_gradients(chunk_logits, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    hidden = torch.randn(1000, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(1024, 256, device="cuda") * 0.1).bfloat16().requires_grad_()
    weight.main_grad = torch.zeros(1024, 256, device="cuda")
    labels, mask = torch.randint(0, 1000, (1000,), device="cuda"), torch.rand(1000, device="cuda")
    total, losses = linear_cross_entropy(hidden, weight, labels, mask, VocabularyShard(0, 1000))
    total.backward()
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy((h @ w.t())[:, :1000], labels, reduction="none")
    (expected * mask).sum().backward()
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-4)
    for seen, wanted in ((hidden.grad, h.grad), (weight.main_grad, w.grad)):
        assert ((seen - wanted).norm() / wanted.norm()).item() < 5e-3
