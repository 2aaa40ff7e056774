#!/usr/bin/env python3
"""Output layer and loss, forward and backward: ours against Megatron-Core's own, on one GPU.

    python benchmarks/linear_cross_entropy.py --positions 32768 --vocab-size 128256 --hidden-size 4096

Both use the same hidden states and weight, and their losses and gradients are compared first.
Prints milliseconds (median), peak memory beyond the inputs, and the ratio.
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_long.flags.backend import join_or_start_job
from megatron_long.model.linear_cross_entropy import VocabularyShard, linear_cross_entropy

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(labels.numel(), device=labels.device)
    shard = VocabularyShard(0, weight.size(0))
    return linear_cross_entropy(hidden, weight, labels, mask, shard)[0]


def megatron(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = torch.matmul(hidden[:, None], weight.t())
    return vocab_parallel_cross_entropy(logits, labels[:, None]).sum()


def megatron_fused(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    logits = torch.matmul(hidden[:, None], weight.t())
    group = parallel_state.get_tensor_model_parallel_group()
    return fused_vocab_parallel_cross_entropy(logits, labels[:, None], group).sum()


def step(loss: Loss, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Forward and backward; the weight's gradient ends in its float32 buffer, as in training."""
    hidden, weight, labels = inputs
    hidden.grad = weight.grad = None
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    total = loss(hidden, weight, labels)
    total.backward()
    if not weight.grad_added_to_main_grad:  # type: ignore[attr-defined]
        weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined]
    return total.detach()


def measure(loss: Loss, inputs: tuple[torch.Tensor, ...], repeats: int) -> dict[str, float]:
    """Median milliseconds and peak GiB beyond what is allocated before."""
    for _ in range(2):
        step(loss, inputs)
    inputs[0].grad = inputs[1].grad = None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(loss, inputs)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"milliseconds": statistics.median(times), "peak_gib": peak}


def compare(inputs: tuple[torch.Tensor, ...]) -> None:
    """Print how far losses and gradients are apart on a part of the positions, against float32."""
    hidden, weight, labels = inputs
    part = hidden[:1024].detach().float().requires_grad_()
    whole = weight.detach().float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(part @ whole.t(), labels[:1024], reduction="sum")
    expected.backward()
    for loss in (ours, megatron):
        small = hidden[:1024].detach().requires_grad_()
        weight.main_grad.zero_()  # type: ignore[attr-defined]
        total = step(loss, (small, weight, labels[:1024]))
        assert small.grad is not None
        assert part.grad is not None
        assert whole.grad is not None
        errors = {
            "loss": abs(total.item() - expected.item()) / expected.item(),
            "hidden": ((small.grad - part.grad).norm() / part.grad.norm()).item(),
            "weight": ((weight.main_grad - whole.grad).norm() / whole.grad.norm()).item(),  # type: ignore[attr-defined]
        }
        print(f"{loss.__name__:16} relative error against float32: {errors}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=32_768, help="positions of one rank")
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", help="JSON file")
    arguments = parser.parse_args()
    join_or_start_job()
    dist.init_process_group("nccl")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(arguments.positions, arguments.hidden_size, **options).requires_grad_()  # type: ignore[call-overload]
    weight = torch.randn(arguments.vocab_size, arguments.hidden_size, **options) * 0.02  # type: ignore[call-overload]
    weight.requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    labels = torch.randint(0, arguments.vocab_size, (arguments.positions,), device="cuda")
    inputs = (hidden, weight, labels)
    compare(inputs)
    results = {}
    for loss in (ours, megatron, megatron_fused):
        try:
            results[loss.__name__] = measure(loss, inputs, arguments.repeats)
        except torch.OutOfMemoryError:
            results[loss.__name__] = {"milliseconds": float("nan"), "peak_gib": float("nan")}
            hidden.grad = weight.grad = None
            gc.collect()
            torch.cuda.empty_cache()
    flops = 6 * arguments.positions * arguments.vocab_size * arguments.hidden_size
    print(torch.cuda.get_device_name(), vars(arguments))
    for name, result in results.items():
        rate = flops / result["milliseconds"] / 1e9
        ratio = result["milliseconds"] / results["ours"]["milliseconds"]
        print(
            f"{name:16} {result['milliseconds']:8.1f} ms  {rate:6.0f} TFLOP/s of three products  "
            f"{result['peak_gib']:6.1f} GiB  {ratio:5.2f} x ours"
        )
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
