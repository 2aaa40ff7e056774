"""Run Megatron on a machine without CUDA: `torch.cuda` calls are mapped to the host.

Megatron-Core uses its device through `torch.cuda` and `device="cuda"`. Without CUDA, `install`
maps both to the CPU, once, before Megatron is imported; with CUDA it does nothing, so that the
same entry points work on a laptop and on a cluster. Arithmetic is unchanged: the operators are torch's own.
"""

import collections
import contextlib
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

HOST = torch.device("cpu")


class _HostStream:
    """Replaces `torch.cuda.Stream` and `Event`: on the host everything is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _CudaToHost(TorchFunctionMode):
    """Reads `device="cuda"` as the CPU in factory functions, `Tensor.to` and `Tensor.cuda`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = HOST
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], HOST, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers compare this string with 'torch.cuda.FloatTensor'.
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


_mode: _CudaToHost | None = None


def is_installed() -> bool:
    """Whether `torch.cuda` is mapped to the host in this process."""
    return _mode is not None


def install() -> bool:
    """Map `torch.cuda` to the host unless CUDA is available; call it before importing Megatron.

    Returns: Whether the host backend is active.
    """
    global _mode
    if _mode is None and not torch.cuda.is_available():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        for name, replacement in _replacements().items():
            setattr(torch.cuda, name, replacement)
        for name in ("get_rng_state", "set_rng_state"):
            setattr(torch.cuda.random, name, getattr(torch.cuda, name))
        _mode = _CudaToHost()
        _mode.__enter__()  # stays for the life of the process
    return is_installed()


def _names_cuda(target: object) -> bool:
    if isinstance(target, str):
        return target.split(":")[0] == "cuda"
    return isinstance(target, torch.device) and target.type == "cuda"


def _nothing(*args: object, **kwargs: object) -> None:
    """A device operation that has no meaning on the host."""


def _replacements() -> dict[str, Any]:
    """The functions of `torch.cuda` that Megatron 0.19.2 calls, by name, with their host versions."""
    stream = _HostStream()
    properties = types.SimpleNamespace(major=8, minor=0, name="cpu", total_memory=0)
    return {
        "device_count": lambda: 1,
        "current_device": lambda: HOST,
        "set_device": _nothing,
        "get_device_properties": lambda *_, **__: properties,
        "memory_stats": lambda *_, **__: collections.defaultdict(int),
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "Stream": _HostStream,
        "Event": _HostStream,
        "current_stream": lambda *_, **__: stream,
        "default_stream": lambda *_, **__: stream,
        "stream": lambda *_, **__: contextlib.nullcontext(),
        # The "CUDA" generator is the default one, which dropout on the host uses.
        "manual_seed": _seed,
        "manual_seed_all": _seed,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "default_generators": {HOST: torch.default_generator},
        "_lazy_call": lambda callback, *_, **__: callback(),
    }


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
