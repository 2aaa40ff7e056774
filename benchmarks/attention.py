"""Comparison of causal attention kernels, at the shape of one GPU under context parallelism `a2a`.

At 131,072 tokens attention dominates a training step, so the kernel determines the speed. Each
installed implementation gets the same tensors in one process; missing ones are listed and skipped.
Rates count 4 * s^2 * n * d / 2 operations forward (causal) and 2.5 times that backward.

    python benchmarks/attention.py --seq-length 131072 --heads 8 --kv-heads 2
"""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Attention = Callable[[Any, Any, Any], Any]
"""(q [b, s, n, d], k [b, s, g, d], v [b, s, g, d]) -> output [b, s, n, d], causal."""


def transformer_engine(heads: int, kv_heads: int, head_size: int) -> Attention:
    """Transformer Engine's fused attention: cuDNN's kernel."""
    os.environ.update(NVTE_FLASH_ATTN="0", NVTE_FUSED_ATTN="1", NVTE_UNFUSED_ATTN="0")
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(
        heads,
        head_size,
        num_gqa_groups=kv_heads,
        qkv_format="bshd",
        attn_mask_type="causal",
        attention_dropout=0.0,
    )
    return lambda q, k, v: module(q, k, v).view(q.shape)


def torch_cudnn(heads: int, kv_heads: int, head_size: int) -> Attention:
    """cuDNN's kernel through `torch.nn.functional.scaled_dot_product_attention`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return dense(q, k, v)

    return attend


def dense(q: Any, k: Any, v: Any) -> Any:
    """PyTorch's own causal attention with grouped key and value heads."""
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def flash_attention_3(heads: int, kv_heads: int, head_size: int) -> Attention:
    """FlashAttention 3, the CUDA C++ kernels for Hopper."""
    from flash_attn_interface import flash_attn_func

    return lambda q, k, v: first(flash_attn_func(q, k, v, causal=True))


def flash_attention_4(heads: int, kv_heads: int, head_size: int) -> Attention:
    """FlashAttention 4, the CuTe DSL kernels (PyPI `flash-attn-4`)."""
    from flash_attn.cute import flash_attn_func

    return lambda q, k, v: first(flash_attn_func(q, k, v, causal=True))


def first(outputs: Any) -> Any:
    """The output of a kernel that may return (output, log-sum-exp)."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


IMPLEMENTATIONS: dict[str, Callable[[int, int, int], Attention]] = {
    "transformer_engine": transformer_engine,
    "torch_cudnn": torch_cudnn,
    "flash_attention_3": flash_attention_3,
    "flash_attention_4": flash_attention_4,
}


def inputs(seq_length: int, heads: int, kv_heads: int, head_size: int) -> list[Any]:
    """Random q, k, v and an output gradient [1, s, n or g, d], BF16, on the GPU."""
    import torch

    torch.manual_seed(0)
    tensors = [
        torch.randn(1, seq_length, n, head_size, device="cuda", dtype=torch.bfloat16)
        for n in (heads, kv_heads, kv_heads, heads)
    ]
    return [t.requires_grad_(i < 3) for i, t in enumerate(tensors)]


def error(attend: Attention, heads: int, kv_heads: int, head_size: int) -> dict[str, float]:
    """Relative errors against float32 on 1,024 tokens: output and the gradients of q, k and v."""
    import torch

    q, k, v, grad = inputs(1024, heads, kv_heads, head_size)
    output = attend(q, k, v)
    grads = torch.autograd.grad(output, (q, k, v), grad)
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    want = dense(*exact)
    want_grads = torch.autograd.grad(want, exact, grad.float())
    names = ("output", "dq", "dk", "dv")
    pairs = zip(names, (output, *grads), (want, *want_grads), strict=True)
    return {
        name: float((got.detach().float() - right.detach()).norm() / right.norm())
        for name, got, right in pairs
    }


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a call, by CUDA events, after two calls to warm up."""
    import torch

    times = []
    for i in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def measure(attend: Attention, tensors: list[Any], repeats: int) -> dict[str, float]:
    """Times and rates of the forward and the backward pass."""
    import torch

    q, k, v, grad = tensors
    output = attend(q, k, v)
    forward = milliseconds(lambda: attend(q, k, v), repeats)
    backward = milliseconds(
        lambda: torch.autograd.grad(output, (q, k, v), grad, retain_graph=True), repeats
    )
    s, n, d = q.shape[1:]
    operations = 4 * s * s * n * d / 2
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflops": operations / forward / 1e9,
        "backward_tflops": 2.5 * operations / backward / 1e9,
        "both_tflops": 3.5 * operations / (forward + backward) / 1e9,
    }


def versions() -> dict[str, str]:
    """The software and hardware of a measurement."""
    import torch

    found = {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version())}
    for name in ("transformer-engine", "flash-attn-3", "flash-attn-4", "nvidia-cutlass-dsl"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seq-length", type=int, default=131072, help="tokens attended together")
    parser.add_argument(
        "--heads", type=int, default=8, help="query heads of one GPU (a2a: all over --cp)"
    )
    parser.add_argument("--kv-heads", type=int, default=2, help="key and value heads of one GPU")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS)
    )
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    shape = (arguments.heads, arguments.kv_heads, arguments.head_size)
    tensors = inputs(arguments.seq_length, *shape)
    print(torch.cuda.get_device_name(), versions())
    rows: dict[str, Any] = {}
    for name in arguments.implementations:
        try:
            attend = IMPLEMENTATIONS[name](*shape)
            rows[name] = measure(attend, tensors, arguments.repeats) | {
                "error": error(attend, *shape)
            }
        except (
            Exception
        ) as problem:  # a kernel that is missing or refuses the shape is a result too
            rows[name] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
        print(
            name,
            {key: round(x, 2) if isinstance(x, float) else x for key, x in rows[name].items()},
            flush=True,
        )
    if arguments.output:
        arguments.output.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
