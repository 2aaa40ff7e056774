"""The restricted unpickler, ways round it, and that nothing in the package reads pickles without it."""

import argparse
import ast
import contextlib
import functools
import io
import json
import operator
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)

from megatron_long.checkpoint.torch_dist import COMMON_STATE, FORMAT, read_common_state
from megatron_long.errors import DataError
from megatron_long.pickles import (
    CHECKPOINT_INDEX,
    OPTIMIZER_CLASSES,
    UnpicklingError,
    read_checkpoint_index,
    read_pickle,
)

from . import hostile

REPOSITORY = Path(__file__).resolve().parents[1]


def read(content: bytes) -> Any:
    return read_pickle(io.BytesIO(content), CHECKPOINT_INDEX)


def test_what_a_checkpoint_is_made_of_is_read():
    index = Metadata(
        {"a": TensorProperties(dtype=torch.bfloat16)},  # type: ignore[dict-item]
        planner_data=OrderedDict(a=("a",)),
        storage_meta=StorageMeta(checkpoint_id=Path("x")),
    )
    assert read_checkpoint_index(io.BytesIO(pickle.dumps(index))) == index


class Calls:
    """Unpickles to a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + len(data).to_bytes(4, "little") + data


def global_of(module: str, name: str) -> bytes:
    """By the operation of protocol 4, whose names may hold dots."""
    return text(module) + text(name) + pickle.STACK_GLOBAL


def program(*words: bytes) -> bytes:
    return pickle.PROTO + b"\x04" + b"".join(words) + pickle.STOP


PLAIN = "torch.distributed.checkpoint.metadata"
COMMAND = "touch harmed"
ATTACKS: dict[str, bytes] = {
    "a command": pickle.dumps(Calls(os.system, COMMAND)),
    "in the oldest protocol": pickle.dumps(Calls(os.system, COMMAND), protocol=0),
    "eval": pickle.dumps(Calls(eval, "__import__('os').mkdir('harmed')")),
    "getattr": pickle.dumps(Calls(getattr, Metadata, "__init__")),
    "a partial": pickle.dumps(Calls(functools.partial, print)),
    "a method by name": pickle.dumps(Calls(operator.methodcaller, "mkdir")),
    "a name with a dot": program(
        global_of("torch.serialization", "os.system"),
        text(COMMAND),
        pickle.TUPLE1,
        pickle.REDUCE,
    ),
    "a name with a dot of a class": program(global_of(PLAIN, "Metadata.__init__.__globals__")),
    "a module as a name": program(global_of("torch", "os")),
    "an old name": b"c__builtin__\neval\n(Vopen('harmed','w')\ntR.",
    "an instance": b"(Vtouch harmed\nios\nsystem\n.",
    "an extension": pickle.PROTO + b"\x02" + pickle.EXT1 + b"\x01" + pickle.STOP,
    "a reference": program(text("x"), pickle.BINPERSID),
    "another storage": pickle.dumps(Calls(torch.storage._load_from_bytes, b"x")),
    "a module's loader": program(
        global_of("pickle", "loads"), text("x"), pickle.TUPLE1, pickle.REDUCE
    ),
    "a changed class": program(
        global_of(PLAIN, "StorageMeta"),
        pickle.NONE,
        pickle.EMPTY_DICT,
        text("harmed"),
        global_of("torch", "Size"),
        pickle.SETITEM,
        pickle.TUPLE2,
        pickle.BUILD,
    ),
    "a changed function": program(
        global_of("torch.serialization", "_get_layout"),
        pickle.NONE,
        pickle.EMPTY_DICT,
        text("__defaults__"),
        pickle.EMPTY_TUPLE,
        pickle.SETITEM,
        pickle.TUPLE2,
        pickle.BUILD,
    ),
    "a changed constructor": program(
        global_of(PLAIN, "Metadata"),
        pickle.EMPTY_DICT,
        text("__init__"),
        global_of("torch", "Size"),
        pickle.SETITEM,
        pickle.BUILD,
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_ways_round_the_list_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {**vars(StorageMeta)}, {**vars(Metadata)}, torch.serialization._get_layout.__defaults__
    with pytest.raises(
        (UnpicklingError, TypeError, AttributeError, ValueError, ModuleNotFoundError)
    ):
        read(ATTACKS[name])
    assert list(tmp_path.iterdir()) == []
    after = {**vars(StorageMeta)}, {**vars(Metadata)}, torch.serialization._get_layout.__defaults__
    assert before == after


@pytest.mark.parametrize("name", ["a command", "eval", "an instance", "a changed class"])
def test_the_attacks_are_real(name, tmp_path, monkeypatch):
    """Read by pickle itself they do what they say."""
    monkeypatch.chdir(tmp_path)
    if name == "a changed class":
        monkeypatch.setattr(StorageMeta, "harmed", None, raising=False)
        pickle.loads(ATTACKS[name])
        assert StorageMeta.harmed is torch.Size  # type: ignore[attr-defined]
    else:
        pickle.loads(ATTACKS[name])
        assert (tmp_path / "harmed").exists()


def test_an_index_of_files_elsewhere_is_refused():
    for path in ("/etc/passwd", "../other/__0_0.distcp"):
        index = Metadata({}, storage_data={"a": _StorageInfo(path, 0, 1)})
        with pytest.raises(UnpicklingError, match="outside of the checkpoint's folder"):
            read_checkpoint_index(io.BytesIO(pickle.dumps(index)))
    with pytest.raises(UnpicklingError, match="it holds a dict"):
        read_checkpoint_index(io.BytesIO(pickle.dumps({})))


@pytest.mark.parametrize("form", hostile.FORMS)
def test_torch_reads_nothing_else_once_guarded(form, guarded, tmp_path):
    """Whatever its caller says about `weights_only`, and whatever the environment said."""
    content, marker = form(tmp_path / "marker"), tmp_path / "marker"
    for options in ({}, {"weights_only": False}):
        with pytest.raises(Exception, match=r"."):
            torch.load(io.BytesIO(content), **options)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(Exception, match=r"."):
        FileSystemReader(tmp_path).read_metadata()
    assert not marker.exists()


def test_caches_of_stock_data_are_read_with_care(guarded, tmp_path):
    """`--data-path` has Megatron read index arrays from a cache, each with `allow_pickle=True`."""
    from megatron.core.datasets import blended_dataset, gpt_dataset
    from megatron.core.safe_globals import safe_numpy_load

    for module in (blended_dataset, gpt_dataset):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        calls = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
        loads = {name for name in calls if "load" in name.rpartition(".")[2]}
        assert loads & {"numpy.load", "np.load", "pickle.load"} == set()
        assert "safe_numpy_load" in loads
    path, marker = tmp_path / "index.npy", tmp_path / "marker"
    inner = Calls(torch.storage._load_from_bytes, hostile.saved(marker))  # which it lets through
    for content in (*(form(marker) for form in hostile.FORMS), pickle.dumps(inner)):
        path.write_bytes(content)
        with contextlib.suppress(Exception):
            safe_numpy_load(path, allow_pickle=True, mmap_mode="r")[0]  # as it is used
        assert not marker.exists(), content[:20]


@pytest.mark.parametrize("form", hostile.FORMS)
def test_the_planted_files_do_harm_without_care(form, tmp_path):
    assert hostile.was_run(form(tmp_path / "marker"), tmp_path / "marker")


def offloaded_on_the_host(gpu_class: type, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron-Core's own optimizer of `--optimizer-cpu-offload`, which wants streams even without a GPU."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return HybridDeviceOptimizer(
        [{"params": [torch.nn.Parameter(torch.ones(4))]}],
        cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=gpu_class,
        overlap_cpu_optimizer_d2h_h2d=False,
        lr=1e-5,
    )


def common_state(folder: Path, content: bytes) -> Any:
    """Read it as the conversion does, from a checkpoint that holds nothing else."""
    index = Metadata(
        {}, storage_data={MetadataIndex(COMMON_STATE): _StorageInfo("a", 0, len(content))}
    )
    (folder / "a").write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
    return read_common_state(folder)


def object_of_a_shard(content: bytes) -> Any:
    """Read it as torch does for Megatron-Core."""
    planner: Any = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    planner.load_bytes(SimpleNamespace(dest_index=MetadataIndex("a")), io.BytesIO(content))
    return planner.state_dict["a"]


@pytest.mark.parametrize("name", [*OPTIMIZER_CLASSES, "torch.optim.adam.Adam"])
def test_classes_of_an_offloaded_optimizer_are_read_as_names(name, guarded, tmp_path, monkeypatch):
    """Saved and loaded by its own class; no package is imported for a name, and other classes are refused."""
    module, _, short = name.rpartition(".")
    used = getattr(sys.modules.get(module), short, None) or type(short, (), {"__module__": module})
    optimizer = offloaded_on_the_host(used, monkeypatch)
    stream = io.BytesIO()
    with monkeypatch.context() as patch:  # Transformer Engine and Apex need not be installed
        for parent in (name[: dot.start()] for dot in re.finditer(r"\.", name)):
            stand_in: Any = SimpleNamespace(__path__=[], **{short: used})
            patch.setitem(sys.modules, parent, sys.modules.get(parent, stand_in))
        torch.save([{"optimizer": optimizer.state_dict()}], stream)
    if name not in OPTIMIZER_CLASSES:
        with pytest.raises(UnpicklingError, match=name):
            object_of_a_shard(stream.getvalue())
        return
    (read_state,) = object_of_a_shard(stream.getvalue())
    optimizer.load_state_dict(read_state["optimizer"])
    (group,) = optimizer.param_groups
    assert (group["cpu_optimizer_cls"], group["gpu_optimizer_cls"]) == (OPTIMIZER_CLASSES[0], name)
    assert group["lr"] == 1e-5
    assert common_state(tmp_path, stream.getvalue())["optimizer"]["param_groups"][0]["lr"] == 1e-5
    assert name.startswith("torch.") or module not in sys.modules


@pytest.mark.parametrize("name", OPTIMIZER_CLASSES[:2])
@pytest.mark.parametrize("operation", [pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD])
def test_classes_of_an_optimizer_are_not_called(name, operation, guarded, tmp_path, monkeypatch):
    """Neither with arguments of a file, nor to be filled by it."""
    module, _, short = name.rpartition(".")
    called: list[Any] = []
    real = getattr(sys.modules[module], short)
    for method in ("__init__", "__setstate__"):
        monkeypatch.setattr(real, method, lambda *args, **_: called.append(args))
    hostile_program = pickle.PROTO + b"\x02" + f"c{module}\n{short}\n".encode()
    hostile_program += pickle.EMPTY_TUPLE + operation + pickle.STOP
    stream = io.BytesIO()
    torch.save([1], stream)
    content = with_program(stream.getvalue(), hostile_program)
    with pytest.raises((UnpicklingError, TypeError)):
        object_of_a_shard(content)
    with pytest.raises(DataError, match="common state cannot be read"):
        common_state(tmp_path, content)
    assert called == []


def with_program(saved: bytes, content: bytes) -> bytes:
    """Put a pickle into what `torch.save` wrote."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(stream, "w") as new:
        for item in old.namelist():
            new.writestr(item, content if item.endswith("/data.pkl") else old.read(item))
    return stream.getvalue()


FP8_MODULE = "transformer_engine.pytorch.module.base"


def make_fp8_module(monkeypatch) -> Any:
    """A module that asks before it unpickles, as Transformer Engine 2.20 does, and then does it unguarded."""
    for name in [FP8_MODULE.rsplit(".", number)[0] for number in (3, 2, 1)]:
        package = ModuleType(name)
        package.__spec__, package.__path__ = ModuleSpec(name, None), []
        monkeypatch.setitem(sys.modules, name, package)
    module: Any = ModuleType(FP8_MODULE)
    module.pickle = pickle

    def should_load_extra_state_pickle(data: bytes, context: str) -> bool:
        if not data:
            return False
        raise RuntimeError(f"refused for {context}")

    def set_extra_state(data: bytes) -> Any:
        if not module.should_load_extra_state_pickle(data, "Linear"):
            return None
        return module.pickle.loads(data)

    module.should_load_extra_state_pickle = should_load_extra_state_pickle
    module.set_extra_state = set_extra_state
    monkeypatch.setitem(sys.modules, FP8_MODULE, module)
    return module


def test_states_of_delayed_scaling_are_read_once_guarded(monkeypatch, request, tmp_path):
    """Transformer Engine 2.20 refuses them as released, so that no run could be resumed."""
    module = make_fp8_module(monkeypatch)
    state = {"scale_fwd": 2.0, "extra_fp8_variables": {"fp8_checkpoint": True}}
    with pytest.raises(RuntimeError, match="refused for Linear"):
        module.set_extra_state(pickle.dumps(state))
    request.getfixturevalue("guarded")
    assert module.set_extra_state(pickle.dumps(state)) == state
    assert module.set_extra_state(b"") is None
    marker = tmp_path / "marker"
    with pytest.raises(UnpicklingError):
        module.set_extra_state(hostile.raw(marker))
    assert not marker.exists()


def test_torch_still_has_the_readers_that_are_guarded():
    """What `guard_checkpoints` relies on, in torch as it is installed."""
    import inspect

    assert "weights_only=False" in inspect.getsource(DefaultLoadPlanner.load_bytes)
    source = inspect.getsource(torch.load)
    assert 'getenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD"' in source
    assert callable(FileSystemReader._get_metadata_path)


def test_arguments_of_an_evaluated_run_are_plain():
    """`argparse.Namespace`, which holds them, is allowed nowhere but in objects that torch reads."""
    with pytest.raises(UnpicklingError, match=r"argparse\.Namespace, which is not allowed"):
        read(pickle.dumps(argparse.Namespace()))


UNGUARDED = {
    "pickle": ("load", "loads", "Unpickler"),
    "cPickle": ("load", "loads"),
    "_pickle": ("load", "loads", "Unpickler"),
    "dill": ("load", "loads"),
    "cloudpickle": ("load", "loads"),
    "joblib": ("load",),
    "marshal": ("load", "loads"),
    "shelve": ("open",),
    "pandas": ("read_pickle",),
    "yaml": ("load", "load_all", "full_load", "unsafe_load"),
}
"""Functions that run what they read, by module."""


def unguarded_loads(source: str) -> list[int]:
    """Lines that read pickles, or what may hold some, without care."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(_with_full_names(tree)):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found += [node.lineno] * bool(names & set(UNGUARDED.get(node.module or "", ())))
        if not isinstance(node, ast.Attribute | ast.Call):
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [node.lineno] * (node.attr in UNGUARDED.get(node.value.id, ()))
        if isinstance(node, ast.Call):
            found += [node.lineno] * _is_careless(node)
    return found


def _with_full_names(tree: ast.Module) -> ast.Module:
    """Put back what `import ... as ...` and `from torch import load` have shortened."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    known = {}
    for node in imports:
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        known |= {alias.asname or alias.name: prefix + alias.name for alias in node.names}
    for name in (node for node in ast.walk(tree) if isinstance(node, ast.Name)):
        name.id = known.get(name.id, name.id)
    return tree


def _is_careless(call: ast.Call) -> bool:
    options = {word.arg: ast.unparse(word.value) for word in call.keywords}
    name = ast.unparse(call.func)
    if name in ("torch.load", "jit.load", "torch.jit.load"):
        return options.get("weights_only") != "True" or name != "torch.load"
    if options.get("allow_pickle", "False") != "False" and ("load" in name or "read" in name):
        return True
    is_remote = options.get("trust_remote_code", "False") != "False"
    return is_remote or name in ("eval", "exec", "builtins.eval", "builtins.exec")


@pytest.mark.parametrize(
    "line",
    [
        "import pickle\npickle.load(file)",
        "from pickle import loads",
        "import pickle as p\np.load(file)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "read_array(file, allow_pickle=True)",
        "pickle_load = pickle.loads",
        "class A(pickle.Unpickler): pass",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.jit.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "eval(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_search_finds(line):
    assert unguarded_loads(line)


def test_nothing_is_read_without_care():
    """In the whole repository but for its tests; the one unpickler stands in `pickles.py`."""
    found, searched = [], 0
    for folder in ("megatron_long", "tools", "examples", "benchmarks"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            searched += 1
            found += [
                f"{path.relative_to(REPOSITORY)}:{line}"
                for line in unguarded_loads(path.read_text())
            ]
    assert searched > 100
    lines = (REPOSITORY / "megatron_long/pickles.py").read_text().splitlines()
    own = lines.index("class _Unpickler(pickle.Unpickler):") + 1
    assert found == [f"megatron_long/pickles.py:{own}"]
