"""The capabilities of this machine for training, what is missing, and the remedy.

Each check returns findings and does not raise: a machine that lacks everything is described too. Packages
that may be missing are not imported at module level.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_long.flags.recipe import build_recipe
from megatron_long.machine import free_disk, gigabytes, host_memory
from megatron_long.planning.hardware import GPUS_PER_NODE
from megatron_long.planning.memory import checkpoint_bytes, host_memory_of_save
from megatron_long.planning.run_shape import RunShape, run_of_recipe

State = Literal["ok", "note", "problem"]
DEFAULT_RECIPE = "llama3_8b_128k"
KEPT = 3
"""Checkpoints that `examples/pretrain_llama_128k.sh` keeps."""
VERSIONS = {
    "torch": "pip install -c constraints.txt -e .",
    "megatron-core": "pip install -c constraints.txt -e .",
    "transformers": "pip install -c constraints.txt -e .",
    "numpy": "pip install -c constraints.txt -e .",
}
FUSED_PACKAGES = {
    "transformer-engine": 'fused layers, FP8, attention: pip install -c constraints.txt -e ".[gpu]"',
    "apex": "not needed: only Megatron's own layers and loss (--megatron-loss) would be faster",
    "flash-attn": "not needed: Transformer Engine includes cuDNN's attention",
    "flash-attn-3": "faster attention than cuDNN's on Hopper, if it is built for this torch",
    "nvidia-resiliency-ext": "not needed: checkpoints are written in the background without it too",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    value: str
    remedy: str = ""
    """The remedy of a problem, or the purpose of an optional package."""


def examine(output: Path = Path(), recipe: str | None = None) -> list[Finding]:
    """Run every check.

    Args:
        output: Folder that checkpoints will be written to.
        recipe: What is to be trained; by default `DEFAULT_RECIPE`, whose shortfalls are only notes.
    Raises: ConfigError: no such recipe.
    """
    needs = run_of_recipe(build_recipe(recipe or DEFAULT_RECIPE))
    findings = [*_versions(), *_fused_packages()]
    if importlib.util.find_spec("torch"):
        findings += [*_gpus(), *_cudnn(), *_flags()]
    findings += [*_environment(), *_disk(output, needs, is_asked=recipe is not None)]
    return [*findings, *_host_memory(needs)]


def _versions() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    state: State = "ok" if sys.version_info >= (3, 12) else "problem"
    yield Finding("python", state, version, "" if state == "ok" else "install Python 3.12 or 3.13")
    for package, remedy in VERSIONS.items():
        found = _version(package)
        yield Finding(package, "ok" if found else "problem", found or "missing", remedy)
    megatron = _version("megatron-core") or ""
    if megatron and not megatron.startswith("0.19."):
        yield Finding("megatron-core", "problem", megatron, "install 0.19: " + VERSIONS["torch"])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fused_packages() -> Iterator[Finding]:
    for package, use in FUSED_PACKAGES.items():
        found = _version(package)
        yield Finding(package, "ok" if found else "note", found or "not installed", use)


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding(
            "GPU",
            "note",
            "none: training would run on the host backend (CPU, float32)",
            _why_none(),
        )
        return
    count = torch.cuda.device_count()
    for index in range(count):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        value = f"{facts.name}, {facts.major}.{facts.minor}, {total / 2**30:.0f} GiB"
        busy = free < 0.95 * total
        used = f", {(total - free) / 2**30:.1f} GiB in use" if busy else ""
        remedy = "end the processes that use its memory (nvidia-smi)" if busy else ""
        yield Finding(f"GPU {index}", "problem" if busy else "ok", value + used, remedy)
    capability = torch.cuda.get_device_capability(0)
    has_fp8 = capability >= (8, 9)
    yield Finding(
        "FP8",
        "ok" if has_fp8 else "note",
        f"compute capability {capability[0]}.{capability[1]}",
        "" if has_fp8 else "FP8 needs 8.9 or more: train in BF16",
    )
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("NCCL", "ok", nccl)
    if count > 1:
        yield from _links(count)


def _why_none() -> str:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty: unset it to see the GPUs"
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi: NVIDIA's driver is not installed"
    return "nvidia-smi is present: check its driver against torch.version.cuda"


def _links(count: int) -> Iterator[Finding]:
    import torch

    apart = [
        f"{a}-{b}"
        for a in range(count)
        for b in range(a)
        if not torch.cuda.can_device_access_peer(a, b)
    ]
    yield Finding(
        "peer access",
        "problem" if apart else "ok",
        f"none between {', '.join(apart)}" if apart else f"between all {count} GPUs",
        "tensor and context parallelism will be slow: check IOMMU and container settings",
    )
    matrix = _run("nvidia-smi", "topo", "-m")
    links = sorted(set(re.findall(r"\bNV\d+\b", matrix)))
    yield Finding(
        "NVLink",
        "ok" if links else "note",
        ", ".join(links) or "none seen",
        "" if links else "keep tensor parallelism small and prefer p2p context parallelism",
    )


def _cudnn() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        return
    version = torch.backends.cudnn.version()
    wheel = _version("nvidia-cudnn-cu13") or _version("nvidia-cudnn-cu12")
    yield from compare_cudnn(version, wheel, _loaded("libcudnn"), os.environ.get("CUDNN_HOME"))


def compare_cudnn(
    version: int | None, wheel: str | None, loaded: list[str], home: str | None
) -> Iterator[Finding]:
    """Report whether the cuDNN in use is torch's own.

    Transformer Engine prefers a system cuDNN to torch's; with an older one its fused attention is silently
    disabled, and long windows no longer fit.

    Args:
        version: As torch counts, 91900 for 9.19.0.
        wheel: Version of the package that came with torch.
        loaded: Paths of the libraries in this process.
        home: `CUDNN_HOME`.
    """
    seen = f"{version // 10_000}.{version // 100 % 100}.{version % 100}" if version else "none"
    strangers = [path for path in loaded if "/nvidia/cudnn/" not in path]
    old = wheel is not None and not wheel.startswith(seen)
    remedy = "export CUDNN_HOME=$(python -c 'import nvidia.cudnn as c; print(c.__path__[0])')"
    if strangers and wheel is not None:
        yield Finding("cuDNN", "problem", f"{seen} from {strangers[0]}, torch has {wheel}", remedy)
    elif old:
        yield Finding("cuDNN", "problem", f"{seen} is loaded, torch came with {wheel}", remedy)
    elif wheel is not None and home is None:
        value = f"{seen}; CUDNN_HOME is not set"
        yield Finding("cuDNN", "note", value, f"a system cuDNN would be loaded first: {remedy}")
    else:
        yield Finding("cuDNN", "ok", f"{seen}, CUDNN_HOME={home}")


def _loaded(name: str) -> list[str]:
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return []
    return sorted(set(re.findall(rf"(/\S*{name}\.so\S*)", maps)))


def _flags() -> Iterator[Finding]:
    from megatron_long.flags.backend import detect_backend

    backend = detect_backend()
    kind = "Transformer Engine" if backend.transformer_engine else "portable attention"
    name = f"{'CUDA' if backend.cuda else 'host'}, {kind}"
    yield Finding("backend", "ok", name, " ".join(backend.to_argv(own_loss=True)))


def _environment() -> Iterator[Finding]:
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if connections not in (None, "1"):
        yield Finding(
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "problem",
            connections or "empty",
            "set it to 1: Megatron's overlap of communication relies on it",
        )
    if os.environ.get("NVTE_FUSED_ATTN") == "0":
        yield Finding("NVTE_FUSED_ATTN", "problem", "0", "unset it: fused attention is off")


def _disk(output: Path, run: RunShape, *, is_asked: bool) -> Iterator[Finding]:
    """Disk space for the checkpoints that the launch script keeps, and the one being written."""
    room, size = free_disk(output), checkpoint_bytes(run.parameters)
    if room is None:
        yield Finding("free disk", "note", f"unknown at {output}", "check it with df")
        return
    state: State = "ok" if room.free_bytes >= (KEPT + 1) * size else "note"
    if is_asked and room.free_bytes < size:
        state = "problem"
    words = f"{run.parameters / 1e9:.1f}B parameters with optimizer: {gigabytes(size)} a checkpoint"
    remedy = f"{words}, {KEPT + 1} of them exist at the same time with the launch script's --keep-last {KEPT}"
    value = f"{gigabytes(room.free_bytes)} at {room.where}"
    yield Finding("free disk", state, value, remedy)


def _host_memory(run: RunShape) -> Iterator[Finding]:
    room = host_memory()
    if room is None:
        return
    ranks = min(run.num_gpus, GPUS_PER_NODE)
    size = host_memory_of_save(checkpoint_bytes(run.parameters), run.num_gpus, ranks)
    yield Finding(
        "host memory",
        "ok" if room.free_bytes >= size else "note",
        f"{gigabytes(room.free_bytes)} ({room.where})",
        f"with --async-save a save of {run.parameters / 1e9:.1f}B parameters on {run.num_gpus} GPUs copies "
        f"{gigabytes(size)} to the host memory of each node; SLURM gives all of it with --mem=0",
    )


def _run(*command: str) -> str:
    run: Callable = subprocess.run
    try:
        return run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
