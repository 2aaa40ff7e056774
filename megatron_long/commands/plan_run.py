"""List the layouts in which a model can be trained on these GPUs: memory, speed, hours, flags.

Nothing is started and no GPU is needed. How far the predictions were from measurements: docs/planner.md.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from megatron_long.cli import length_tokens
from megatron_long.errors import ConfigError
from megatron_long.machine import gigabytes
from megatron_long.planning.hardware import ATTENTION_KERNELS, GPUS, GPUS_PER_NODE
from megatron_long.planning.memory import checkpoint_bytes, host_memory_of_save
from megatron_long.planning.run_shape import RunShape
from megatron_long.planning.search import PRECISIONS, Plan, find_plans, read_task

SMALLEST_HIDDEN_SIZE = 2048
"""The rates were fitted on 4,096."""


def main() -> int:
    arguments = build_parser().parse_args()
    if arguments.top < 1:
        raise ConfigError(f"--top {arguments.top} lists no layout; give 1 or more")
    task = read_task(arguments)
    plans = find_plans(task)[: arguments.top]
    if task.model.hidden_size < SMALLEST_HIDDEN_SIZE:
        print(
            f"note: hidden size {task.model.hidden_size} is below {SMALLEST_HIDDEN_SIZE}, where starting "
            "kernels takes much of a step and is not predicted: expect more hours",
            file=sys.stderr,
        )
    if arguments.json:
        print(json.dumps([plan.record() for plan in plans], indent=2))
    else:
        print(as_table(plans))
        print(storage(plans[0].run))
        print("\nFlags of the first, after --recipe (with --hf-config for another model):")
        print(shlex.join(plans[0].to_argv()))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--hf-config", type=Path, help="Hugging Face model folder or config.json")
    add(
        "--recipe",
        help="recipe whose model, window and budgets are planned, instead of --hf-config",
    )
    add("--seq-length", type=length_tokens, help="tokens of a window (the recipe's, or 128K)")
    add("--gpus", type=int, required=True, help="number of GPUs")
    add("--gpu", required=True, help=f"kind of GPU: {', '.join(GPUS)}")
    add("--train-tokens", help="token budget (the recipe's, or 5B)")
    add("--batch-tokens", help="tokens of an optimizer step (the recipe's, or 4194304)")
    add("--precision", choices=PRECISIONS, default="bf16", help="of the linear layers (bf16)")
    add("--attention", choices=ATTENTION_KERNELS, default="cudnn", help="kernel (cudnn)")
    add("--top", type=int, default=10, help="layouts to list (10)")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def storage(run: RunShape) -> str:
    """What the checkpoints of a run take, whatever its layout."""
    size = checkpoint_bytes(run.parameters)
    host = host_memory_of_save(size, run.num_gpus, min(run.num_gpus, GPUS_PER_NODE))
    return (
        f"\nA checkpoint with optimizer takes {gigabytes(size)} of disk; --async-save copies "
        f"{gigabytes(host)} to the host memory of each node."
    )


def as_table(plans: list[Plan]) -> str:
    """One line a plan."""
    lines = ["   tp  cp  pp  dp  cp by    recompute  precision    GiB  s/step  TFLOP/s/GPU  hours"]
    for rank, plan in enumerate(plans, 1):
        run, layout = plan.run, plan.run.layout
        kind = layout.context_communication if layout.context > 1 else "-"
        lines.append(
            f"{rank:2}{layout.tensor:3}{layout.context:4}{layout.pipeline:4}{run.data_parallel:4}"
            f"  {kind:7}  {run.recompute:9}  {'fp8' if run.fp8 else 'bf16':9}"
            f"{plan.memory.total_gib:7.0f}{plan.time.total_s:8.1f}{plan.tflops:13.0f}{plan.hours:7.1f}"
        )
    return "\n".join(lines)
