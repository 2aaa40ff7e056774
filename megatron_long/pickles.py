"""The only code that reads pickles: classes by exact name from a list, and nothing else.

A pickle is a program: it may import any module and call anything that it finds there. `read_pickle` lets it
name only what the caller lists, so it can create only plain values and those classes. `guard_checkpoints`
makes all other readers in this process, those of torch, Megatron-Core and Transformer Engine, do the same.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, NoReturn

AllowList = Mapping[str, tuple[str, ...]]
"""Names that a pickle may use, by module. A name with a dot in it never matches."""

UnpicklingError = pickle.UnpicklingError
"""Exceptions of a pickle that is damaged, or requests something that is not allowed."""

_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
CHECKPOINT_INDEX: AllowList = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
    ),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *_DTYPES),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # of Python 3.13
}
"""Classes in `.metadata` of a `torch_dist` checkpoint (plans: `--ckpt-assume-constant-structure`)."""

OPTIMIZER_CLASSES = (
    "torch.optim.adamw.AdamW",
    "torch.optim.sgd.SGD",
    *(
        f"{package}.optimizers.{module}.{name}"
        for package in ("transformer_engine.pytorch", "apex")
        for module, name in (("fused_adam", "FusedAdam"), ("fused_sgd", "FusedSGD"))
    ),
)
"""Classes of which Megatron-Core 0.19.2's `HybridDeviceOptimizer` (`--optimizer-cpu-offload`) names two in
every parameter group, as `cpu_optimizer_cls` and `gpu_optimizer_cls`."""

_FORCE, _FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_TRANSFORMER_ENGINE_READERS = (
    "transformer_engine.pytorch.module.base",
    "transformer_engine.pytorch.attention",
    "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention",
    "transformer_engine.pytorch.ops.op",
)


def read_pickle(file: IO[bytes], allowed: AllowList) -> Any:
    """Read a pickle that may name only what is allowed.

    Args:
        file: Opened for reading.
        allowed: Classes and functions that it may call; they must be harmless with any arguments.
    Raises: UnpicklingError, or nearly any other exception for a damaged pickle.
    """
    return _Unpickler(file, allowed).load()


class _Unpickler(pickle.Unpickler):
    """Finds allowed names, wrapped so that a pickle can call but not change them."""

    def __init__(self, file: IO[bytes], allowed: AllowList) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """Look up a name without pickle's own mapping of old names, and without dots."""
        if name not in self._allowed.get(module, ()):
            raise UnpicklingError(f"it names {module}.{name}, which is not allowed")
        found = getattr(importlib.import_module(module), name)
        if isinstance(found, type):
            return _Fixed(name, (), {"real": found, "__new__": _make_new(found)})
        return _Function(found) if callable(found) else found


class _Fixed(type):
    """A wrapper of a class: BUILD, which sets attributes, cannot reach the real one."""

    real: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.real(*args, **kwargs)

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise UnpicklingError(f"it would change the class {cls.__name__}")


def _make_new(real: type) -> Callable[..., Any]:
    return lambda cls, *args, **kwargs: real.__new__(real, *args, **kwargs)


class _Function:
    """A function that can be called, and nothing else."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise UnpicklingError("it would change a function")


def read_checkpoint_index(file: IO[bytes]) -> Any:
    """Read `.metadata` of a `torch_dist` checkpoint.

    Raises: UnpicklingError: it holds anything but an index, or names files outside the checkpoint's folder.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    index = read_pickle(file, CHECKPOINT_INDEX)
    if not isinstance(index, Metadata):
        raise UnpicklingError(f"it holds a {type(index).__name__}; it must be a checkpoint's index")
    for place in (index.storage_data or {}).values():
        path = PurePosixPath(place.relative_path)
        if path.is_absolute() or ".." in path.parts:
            raise UnpicklingError(f"it names {path}, which is outside of the checkpoint's folder")
    return index


def guard_checkpoints() -> None:
    """Keep readers of checkpoints, in this process and those it starts, from calling what a file names.

    Three readers do, as released: torch 2.11's `FileSystemReader.read_metadata` (`pickle.load`) and
    `DefaultLoadPlanner.load_bytes` (`weights_only=False`, for every object of a checkpoint), which
    Megatron-Core 0.19.2 calls, and `set_extra_state` of Transformer Engine's modules (`pickle.loads`).
    Transformer Engine 2.20 refuses states of delayed scaling unless NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE is
    1; with the restricted unpickler they are read without it.
    """
    from torch.distributed.checkpoint import FileSystemReader

    os.environ.pop(_FORBID, None)
    os.environ[_FORCE] = "1"  # every torch.load, regardless of its arguments
    _read_optimizer_classes_as_names()
    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign, assignment]
    if importlib.util.find_spec("transformer_engine") is not None:
        for name in _TRANSFORMER_ENGINE_READERS:
            _guard_transformer_engine(name)


def _read_optimizer_classes_as_names() -> None:
    """Make torch's restricted unpickler return the name of such a class if a file refers to it.

    The loaded state does not use the class (the optimizer has its own); a string can be neither called nor
    modified, and no package is imported for it.
    """
    from torch.serialization import add_safe_globals

    # torch's types accept only classes
    named: list[Any] = [(name, name) for name in OPTIMIZER_CLASSES]
    add_safe_globals(named)


def _read_metadata(reader: Any, *args: Any, **kwargs: Any) -> Any:
    """`FileSystemReader.read_metadata` of torch 2.11, with a restricted unpickler."""
    from torch.distributed.checkpoint.metadata import StorageMeta

    path = reader._get_metadata_path(kwargs.get("rank"))
    with reader.fs.create_stream(path, "rb") as file:
        index = read_checkpoint_index(file)
    if getattr(index, "storage_meta", None) is None:
        index.storage_meta = StorageMeta()
    index.storage_meta.load_id = reader.load_id
    return index


def _guard_transformer_engine(name: str) -> None:
    """Restrict a module that unpickles FP8 states to the list that Megatron-Core has for them."""
    with contextlib.suppress(ImportError):  # modules differ by version
        importlib.import_module(name)
    module: Any = sys.modules.get(name)
    if getattr(module, "pickle", None) is pickle:
        module.pickle = SimpleNamespace(**{**vars(pickle), "loads": _read_fp8_state})
        _permit_transformer_engine(module)


def _permit_transformer_engine(module: Any) -> None:
    """Let a module whose unpickler is restricted use it; 2.20 asks first whether it may."""
    may_load = getattr(module, "should_load_extra_state_pickle", None)
    if may_load is None:
        return

    @functools.wraps(may_load)
    def should_load_extra_state_pickle(data: bytes, context: str) -> bool:
        try:
            return may_load(data, context)  # False for a state without content
        except RuntimeError:
            return True

    module.should_load_extra_state_pickle = should_load_extra_state_pickle
    module.unsafe_pickle_extra_state_enabled = lambda: True


def _read_fp8_state(data: bytes) -> Any:
    from megatron.core.safe_globals import SafeUnpickler

    return SafeUnpickler(io.BytesIO(data)).load()
