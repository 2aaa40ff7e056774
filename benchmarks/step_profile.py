"""The time of a training step by kind of kernel, from a PyTorch profiler trace.

Record a trace with Megatron's flags, then sum it:

    torchrun ... -m megatron_long.pretrain ... --profile --use-pytorch-profiler --profile-step-start 4 \\
        --profile-step-end 5 --tensorboard-dir DIR
    python benchmarks/step_profile.py DIR
"""

import argparse
import gzip
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import orjson

KINDS = {
    "communication": r"nccl",
    "attention backward": r"(flash|fmha|sdpa|attention).*(bwd|bprop|backward)",
    "attention forward": r"(flash|fmha|sdpa|attention).*(fwd|fprop|forward)",
    "attention, around it": r"flash|fmha|sdpa|thd_|attn",
    "loss": r"cross_entropy|softmax|logsumexp",
    "matrix products": r"gemm|cutlass|nvjet|xmma|wgmma",
    "FP8 casts": r"cast|amax|quantize|transpose",
    "activation": r"swiglu|silu|glu|gated",
    "norm": r"norm",
    "position embedding": r"rope|rotary",
    "optimizer": r"adam|multi_tensor",
    "copies": r"memcpy|memset|copy|cat",
}
"""Kind of kernel -> pattern of its name (any case); the first that matches counts."""


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name.

    >>> kind_of("ncclDevKernel_SendRecv"), kind_of("sm90_xmma_gemm_bf16"), kind_of("add_kernel")
    ('communication', 'matrix products', 'other')
    """
    return next(
        (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.I)), "other"
    )


def union_us(spans: Iterable[tuple[float, float]]) -> float:
    """Length covered by spans (start, end) that may overlap.

    >>> union_us([(0, 2), (1, 3), (5, 6)])
    4.0
    """
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def read_trace(path: Path) -> list[tuple[str, float, float]]:
    """Kernels of a trace: (name, start, end) in microseconds."""
    data = path.read_bytes()
    events = orjson.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"}
    return [
        (event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in kinds and "dur" in event
    ]


def report(kernels: list[tuple[str, float, float]], names: int) -> str:
    """A table of kinds, with the largest kernels of each, and the time without kernels."""
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    by_name: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for name, start, end in kernels:
        spans[kind_of(name)].append((start, end))
        by_name[name][0] += end - start
        by_name[name][1] += 1
    first, last = min(k[1] for k in kernels), max(k[2] for k in kernels)
    busy = union_us((start, end) for _, start, end in kernels)
    compute = union_us(
        (s, e) for kind, found in spans.items() for s, e in found if kind != "communication"
    )
    lines = [
        f"{(last - first) / 1e3:9.1f} ms from the first to the last kernel",
        f"{(last - first - busy) / 1e3:9.1f} ms of it without any kernel",
        f"{(busy - compute) / 1e3:9.1f} ms of it with only communication",
    ]
    for kind, found in sorted(spans.items(), key=lambda item: -sum(e - s for s, e in item[1])):
        lines.append(f"{sum(e - s for s, e in found) / 1e3:9.1f} ms  {kind} ({len(found)} kernels)")
    lines.append("")
    for name, (time_us, count) in sorted(by_name.items(), key=lambda item: -item[1][0])[:names]:
        lines.append(f"{time_us / 1e3:9.1f} ms {count:6.0f} x  {kind_of(name)}: {name[:110]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="trace file, or a folder searched for one")
    parser.add_argument("--names", type=int, default=30, help="kernels listed one by one")
    arguments = parser.parse_args()
    found = [arguments.folder]
    if arguments.folder.is_dir():
        found = sorted(p for p in arguments.folder.rglob("*.json*") if p.is_file())
    if not found or not found[0].is_file():
        print(
            f"{arguments.folder} holds no trace (*.json, *.json.gz); record one with --profile",
            file=sys.stderr,
        )
        return 2
    print(report(read_trace(found[0]), arguments.names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
