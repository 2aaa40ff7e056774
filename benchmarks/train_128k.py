"""Training at 128K, ours against stock Megatron flags, on the same GPUs in one call.

Every arm trains some steps of the same recipe on mock data. The stock arms use Megatron's own loss
through full logits, Transformer Engine's own choice of attention kernel (in three arms FlashAttention),
and common layouts and recompute settings; the best of those that fit is the peer.

    python benchmarks/train_128k.py --gpus 4 --output-dir results/train_128k
    python benchmarks/train_128k.py --gpus 2 --num-layers 12 --arms stock_cp_full ours_fp8

Prints seconds per step, tokens/s/GPU, Megatron's TFLOP/s/GPU, peak memory and the ratio. Each arm's log
stays in the output folder; an arm that runs out of memory is listed as such.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules layernorm mlp"
FP8 = "--fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather"
STOCK = "--megatron-loss --attention-backend auto"

STEP = re.compile(
    r"elapsed time per iteration \(ms\): (?P<ms>[\d.]+).*?"
    r"throughput per GPU \(TFLOP/s/GPU\): (?P<tflops>[\d.]+).*?lm loss: (?P<loss>[\d.E+-]+)"
)
MEMORY = re.compile(r"max allocated: ([\d.]+)")


@dataclass(frozen=True)
class Figures:
    """Figures of an arm: medians of the steps after the warm-up, per GPU."""

    seconds: float
    tokens_per_second: float
    tflops: float
    """Megatron's count of model operations."""
    peak_gib: float
    losses: list[float]


def layout(tensor: int, context: int, kind: str = "a2a") -> str:
    """Flags of a layout that fills the GPUs with one replica."""
    return f"--tensor-model-parallel-size {tensor} --context-parallel-size {context} --cp-comm-type {kind}"


def arms(gpus: int) -> dict[str, str]:
    """Name -> flags of every arm on this many GPUs.

    >>> sum(name.startswith("stock") for name in arms(4))
    12
    """
    flash = "--megatron-loss --attention-backend flash"
    found = {
        "stock_cp_full": f"{STOCK} {layout(1, gpus)} {FULL}",
        "stock_cp_full_fp8": f"{STOCK} {layout(1, gpus)} {FULL} {FP8}",
        "stock_cp_selective": f"{STOCK} {layout(1, gpus)} {SELECTIVE}",
        "stock_cp_selective_fp8": f"{STOCK} {layout(1, gpus)} {SELECTIVE} {FP8}",
        "stock_cp_full_fp8_flash": f"{flash} {layout(1, gpus)} {FULL} {FP8}",
        "stock_cp_selective_fp8_flash": f"{flash} {layout(1, gpus)} {SELECTIVE} {FP8}",
        "stock_tp_full": f"{STOCK} {layout(gpus, 1)} {FULL}",
        "stock_tp_selective_fp8": f"{STOCK} {layout(gpus, 1)} {SELECTIVE} {FP8}",
    }
    if gpus >= 4:
        half = gpus // 2
        found |= {
            "stock_tp2_cp_p2p_full": f"{STOCK} {layout(2, half, 'p2p')} {FULL}",
            "stock_tp2_cp_full_fp8": f"{STOCK} {layout(2, half)} {FULL} {FP8}",
            "stock_tp2_cp_selective_fp8": f"{STOCK} {layout(2, half)} {SELECTIVE} {FP8}",
            "stock_tp2_cp_selective_fp8_flash": f"{flash} {layout(2, half)} {SELECTIVE} {FP8}",
            "ours_tp2_fp8": f"{layout(2, half)} {SELECTIVE} {FP8}",
        }
    return found | {
        "ours_bf16": f"{layout(1, gpus)} {SELECTIVE}",
        "ours_fp8": f"{layout(1, gpus)} {SELECTIVE} {FP8}",
    }


def read_log(text: str, warm_up: int, tokens_per_gpu: float) -> Figures | None:
    """Figures of a Megatron log; None if no step after the warm-up was reached."""
    steps = [match.groupdict() for match in STEP.finditer(text)][warm_up:]
    if not steps:
        return None
    seconds = statistics.median(float(step["ms"]) / 1e3 for step in steps)
    return Figures(
        seconds=seconds,
        tokens_per_second=tokens_per_gpu / seconds,
        tflops=statistics.median(float(step["tflops"]) for step in steps),
        peak_gib=max(map(float, MEMORY.findall(text)), default=0.0) / 1024,
        losses=[float(step["loss"]) for step in steps],
    )


def run_arm(name: str, flags: str, arguments: argparse.Namespace, extra: Sequence[str]) -> str:
    """Train one arm; returns its log, which also stays in the output folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(arguments.gpus), "-m", "megatron_long.pretrain"]
    command += ["--recipe", arguments.recipe, "--mock-data", "--tokenizer-type", "NullTokenizer"]
    command += ["--vocab-size", "128255", "--eval-iters", "0", "--log-memory-interval", "1"]
    command += ["--global-batch-size", str(arguments.windows)]
    command += ["--train-iters", str(arguments.steps)]
    if arguments.num_layers:
        command += ["--num-layers", str(arguments.num_layers)]
    environment = {
        "OMP_NUM_THREADS": "4",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        **os.environ,
    }
    try:
        done = subprocess.run(
            [*command, *flags.split(), *extra],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            timeout=arguments.timeout,
        )
        text = done.stdout
    except subprocess.TimeoutExpired as expired:
        text = (expired.stdout or b"").decode() + f"\nstopped after {arguments.timeout} s\n"
    (arguments.output_dir / f"{name}.log").write_text(text)
    return text


def why_not(log: str) -> str:
    """The reason for an arm without figures.

    >>> why_not("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 15 GiB.")
    'out of memory'
    """
    if "out of memory" in log:
        return "out of memory"
    first = re.search(r"(\w*(?:Error|Exception): .*|error: .*|stopped after .*)", log)
    return first[0].strip()[:100] if first else "failed"


def best(found: dict[str, Figures], side: str) -> str | None:
    """The fastest arm of a side, `stock` or `ours`."""
    names = [name for name in found if name.startswith(side)]
    return max(names, key=lambda name: found[name].tokens_per_second, default=None)


def report(found: dict[str, Figures], missing: dict[str, str]) -> str:
    """A table of all arms, and the ratio of the best of ours to the best of stock."""
    rows = ["| arm | s a step | tokens/s/GPU | TFLOP/s/GPU | peak GiB |", "|---|---|---|---|---|"]
    rows += [
        f"| {name} | {x.seconds:.2f} | {x.tokens_per_second:,.0f} | {x.tflops:.0f} | {x.peak_gib:.0f} |"
        for name, x in found.items()
    ]
    rows += [f"| {name} | {reason} | | | |" for name, reason in missing.items()]
    ours, stock = best(found, "ours"), best(found, "stock")
    if ours and stock:
        ratio = found[ours].tokens_per_second / found[stock].tokens_per_second
        rows.append(f"\n{ours} / {stock}: {ratio:.2f}")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of this node; one replica")
    parser.add_argument("--recipe", default="llama3_8b_128k")
    parser.add_argument("--num-layers", type=int, help="fewer layers, if the model does not fit")
    parser.add_argument("--windows", type=int, default=1, help="windows a step (1)")
    parser.add_argument("--steps", type=int, default=5, help="steps of each arm (5)")
    parser.add_argument("--warm-up", type=int, default=2, help="of these, skipped (2)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds an arm may take (600)")
    parser.add_argument("--seq-length", type=int, default=131_072, help="tokens of a window")
    parser.add_argument("--arms", nargs="+", help="these arms only")
    parser.add_argument("--output-dir", type=Path, default=Path("train_128k"), help="logs, JSON")
    arguments, extra = parser.parse_known_args()
    known = arms(arguments.gpus)
    unknown = set(arguments.arms or ()) - set(known)
    if unknown:
        parser.error(f"--arms {' '.join(sorted(unknown))}: choose from {' '.join(known)}")
    if arguments.warm_up >= arguments.steps:
        parser.error(f"--warm-up {arguments.warm_up} leaves none of --steps {arguments.steps}")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    extra += ["--seq-length", str(arguments.seq_length)]
    tokens_per_gpu = arguments.windows * arguments.seq_length / arguments.gpus
    found: dict[str, Figures] = {}
    missing: dict[str, str] = {}
    for name in arguments.arms or known:
        log = run_arm(name, known[name], arguments, extra)
        figures = read_log(log, arguments.warm_up, tokens_per_gpu)
        if figures:
            found[name] = figures
        else:
            missing[name] = why_not(log)
        print(name, figures or missing[name], flush=True)
    print(report(found, missing))
    figures_json = {name: asdict(figures) for name, figures in found.items()}
    (arguments.output_dir / "figures.json").write_text(
        json.dumps({"figures": figures_json, "missing": missing}, indent=1)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
