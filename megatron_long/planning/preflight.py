"""Whether a run fits the machine: memory of each GPU, host memory of a save, disk of `--save`.

Called before training. A certain failure is an error, a probable one a warning; both with the
figures and an alternative that fits.
"""

import contextlib
import math
import os
import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_long.checkpoint.choosing import saved_iterations
from megatron_long.errors import ConfigError
from megatron_long.job import rendezvous
from megatron_long.machine import Room, free_disk, gigabytes, host_memory
from megatron_long.planning.hardware import GIB, GPUS, GPUS_PER_NODE, Gpu
from megatron_long.planning.memory import (
    MemoryParts,
    checkpoint_bytes,
    host_memory_of_save,
    predict_memory,
)
from megatron_long.planning.run_shape import RunShape, run_of_arguments
from megatron_long.planning.search import Task, find_plans, usable_gib

SHAPE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "padded_vocab_size",
    "max_position_embeddings",
    "seq_length",
    "micro_batch_size",
)
"""Megatron's arguments that give a model's shape; some stay empty until Megatron's own validation."""
UNPREDICTED = (
    "optimizer_cpu_offload",
    "use_precision_aware_optimizer",
    "use_megatron_fsdp",
    "use_torch_fsdp2",
    "grad_reduce_in_bf16",
    "fine_grained_activation_offloading",
    "cpu_offloading_num_layers",
)
"""Megatron's arguments that change GPU memory in ways that the planner does not count."""


@dataclass(frozen=True)
class Needs:
    """Resources that a run needs."""

    run: RunShape
    memory: MemoryParts
    """Of one GPU."""
    checkpoint_bytes: float
    host_bytes: float
    """Copied to the host memory of this node by each save with `--async-save`."""
    ranks_of_node: int

    def __str__(self) -> str:
        return (
            f"{self.run.parameters / 1e9:.2f}B parameters: a checkpoint takes "
            f"{gigabytes(self.checkpoint_bytes)}, of which --async-save copies {gigabytes(self.host_bytes)} "
            f"to the host memory of a node; predicted peak of a GPU: {self.memory.total_gib:.0f} GiB"
        )


def needs_of(args: Namespace, world_size: int) -> Needs | None:
    """Compute the resources that a run needs.

    Args:
        args: Megatron's parsed flags, before its own validation.
        world_size: Processes of the job.
    Returns: None if the flags do not give the model's whole shape, as without recipe and configuration.
    """
    if None in (getattr(args, name) for name in SHAPE):
        return None
    run = run_of_arguments(args, world_size)
    size = checkpoint_bytes(
        run.parameters,
        optimizer=not args.no_save_optim,
        full_precision=not (args.bf16 or args.fp16),
    )
    on_node = ranks_of_node(world_size)
    at_once = replace(run, seq_length=run.seq_length * args.micro_batch_size)
    host = host_memory_of_save(size, world_size, on_node)
    return Needs(run, predict_memory(at_once), size, host, on_node)


def check_before_training(args: Namespace) -> None:
    """Let the first process of the job compare and print warnings; every process raises its error.

    Raises: ConfigError: see `check_machine`.
    """
    rank, world_size = rendezvous.share()
    refusals: list[str] = []
    if rank == 0:
        try:
            for warning in check_machine(args, world_size, visible_gpu()):
                print(f"warning: {warning}", file=sys.stderr)
        except ConfigError as error:
            refusals = [str(error)]
    refusals = rendezvous.agree(refusals)
    if refusals:
        raise ConfigError(refusals[0])


def check_machine(args: Namespace, world_size: int, gpu: Gpu | None) -> list[str]:
    """Compare the resources that a run needs with this machine.

    Args:
        args, world_size: See `needs_of`.
        gpu: What each process trains on; None on the host backend.
    Returns: Warnings, each with figures and an alternative that fits.
    Raises: ConfigError: the model's state is larger than a GPU, or the disk cannot hold one checkpoint.
    """
    needs = needs_of(args, world_size)
    if needs is None:
        return []
    warnings = check_gpu_memory(args, needs, gpu) if gpu else []
    if args.save:
        disk, host = free_disk(Path(args.save)), host_memory()
        warnings += check_disk(args, needs, disk) if disk else []
        warnings += check_host_memory(needs, host) if host and args.async_save else []
    return warnings


def check_gpu_memory(args: Namespace, needs: Needs, gpu: Gpu) -> list[str]:
    """Compare the predicted peak of a step with a GPU.

    Raises: ConfigError: weights, gradients and optimizer alone are larger.
    """
    if not (args.bf16 or args.fp16) or any(getattr(args, name, None) for name in UNPREDICTED):
        return []
    run, memory = needs.run, needs.memory
    state = (memory.weights + memory.gradients + memory.optimizer) / GIB
    layout = run.layout
    asked = (
        f"--tensor-model-parallel-size {layout.tensor} --pipeline-model-parallel-size {layout.pipeline} "
        f"--context-parallel-size {layout.context} on {run.num_gpus} GPUs"
    )
    if state > gpu.memory_gib:
        raise ConfigError(
            f"{asked} cannot hold the model: of {run.parameters / 1e9:.1f}B parameters, weights, gradients "
            f"and optimizer take {state:.0f} GiB of each GPU, which has {gpu.memory_gib:.0f}; "
            f"{_fitting(run, gpu)}"
        )
    limit = usable_gib(gpu)
    if memory.total_gib <= limit:
        return []
    return [
        f"{asked} probably runs out of GPU memory: {memory.total_gib:.0f} GiB at the peak of a step are "
        f"predicted, and {limit:.0f} of {gpu.memory_gib:.0f} can be used; {_fitting(run, gpu)}"
    ]


def check_disk(args: Namespace, needs: Needs, room: Room) -> list[str]:
    """Compare the checkpoints that exist on a disk at the same time with its free space.

    Raises: ConfigError: not even one fits.
    """
    folder, size = Path(args.save), needs.checkpoint_bytes
    free = room.free_bytes + _bytes_of_leftovers(folder)
    parameters = needs.run.parameters
    kind = "" if args.no_save_optim else " with its optimizer"
    figures = (
        f"a checkpoint of {parameters / 1e9:.2f}B parameters{kind} takes {gigabytes(size)}, and "
        f"{gigabytes(free)} are free at {room.where}"
    )
    if free < size:
        small = checkpoint_bytes(parameters, optimizer=False)
        weights = f", or give --no-save-optim (weights alone, {gigabytes(small)})"
        raise ConfigError(
            f"--save {folder} has no room: {figures}; free {gigabytes(size - free)}, or give a folder on "
            f"another disk{weights if small <= free and not args.no_save_optim else ''}"
        )
    at_once = (args.keep_last or 1) + 1
    missing = at_once - len(saved_iterations(folder))
    if free >= size * missing:
        return []
    why = f"--keep-last {args.keep_last}" if args.keep_last else "the newest"
    return [
        f"--save {folder} has room for {int(free // size)} of the {missing} checkpoints that will "
        f"exist at the same time ({why}, and the one being written): {figures}; free "
        f"{gigabytes(size * missing - free)}, or give a folder on another disk"
    ]


def check_host_memory(needs: Needs, room: Room) -> list[str]:
    """Compare the host memory that a save in the background needs with the memory that is available."""
    if needs.host_bytes <= room.free_bytes:
        return []
    times = math.ceil(needs.host_bytes / max(room.free_bytes, 1.0))
    ranks = needs.run.num_gpus
    return [
        f"with --async-save each save copies {gigabytes(needs.host_bytes)} to the host memory of a node "
        f"({needs.ranks_of_node} of {ranks} ranks), and {gigabytes(room.free_bytes)} are available here "
        f"({room.where}); leave --async-save out, ask for more (SLURM: --mem=0), or spread the run over "
        f"{times} times as many nodes"
    ]


def _bytes_of_leftovers(folder: Path) -> float:
    """Partial checkpoints of a killed process; the next start removes them."""
    total = 0
    with contextlib.suppress(OSError):
        for leftover in folder.glob(".iter_*"):
            total += sum(path.lstat().st_size for path in leftover.rglob("*") if path.is_file())
    return float(total)


def ranks_of_node(world_size: int) -> int:
    """Processes on this node: from torchrun, else its number of GPUs, or that of a usual node."""
    import torch

    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    if told.isdecimal():
        return min(world_size, int(told))
    here = torch.cuda.is_available()  # the host backend counts itself as one device
    return min(world_size, torch.cuda.device_count() if here else GPUS_PER_NODE)


def visible_gpu() -> Gpu | None:
    """The GPU of this process, by its name and its actual memory; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    names = [name for name in GPUS if name.split("-")[0] in facts.name.lower()]
    # Rates of another kind order the layouts that fit; this GPU's memory decides which fit.
    return replace(GPUS[names[0] if names else "h100"], memory_gib=facts.total_memory / GIB)


def _fitting(run: RunShape, gpu: Gpu) -> str:
    task = Task(
        model=run.model,
        seq_length=run.seq_length,
        num_gpus=run.num_gpus,
        gpu=gpu,
        batch_tokens=run.seq_length * run.global_batch_size,
        precisions=("fp8",) if run.fp8 and gpu.fp8_flops else ("bf16",),
    )
    try:
        best = find_plans(task)[0]
    except ConfigError as error:
        return str(error)
    flags = " ".join(best.run.layout_argv())
    return f"this fits, {best.memory.total_gib:.0f} GiB: {flags} (tools/plan_run.py lists more)"
