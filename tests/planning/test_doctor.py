"""The doctor: it describes a machine without GPUs, and sees what silently costs speed."""

import importlib.metadata
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_long import machine
from megatron_long.errors import ConfigError
from megatron_long.planning import diagnosis
from megatron_long.planning.diagnosis import KEPT, compare_cudnn, examine

REPOSITORY = Path(__file__).resolve().parents[2]
WHEEL = "9.19.0.56"
OWN = ["/venv/lib/python3.12/site-packages/nvidia/cudnn/lib/libcudnn.so.9"]


def by_name(findings) -> dict:
    return {finding.name: finding for finding in findings}


def test_machine_without_gpu_is_described(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = by_name(examine())
    assert found["python"].state == "ok"
    assert found["megatron-core"].value == importlib.metadata.version("megatron-core")
    assert "none" in found["GPU"].value
    assert "CUDA_VISIBLE_DEVICES is empty" in found["GPU"].remedy
    assert found["backend"].value == "host, portable attention"
    assert "--distributed-backend gloo" in found["backend"].remedy
    assert not [finding for finding in found.values() if finding.state == "problem"]


@pytest.mark.parametrize(
    ("loaded", "version", "home", "state", "words"),
    [
        (OWN, 91_900, "/venv/cudnn", "ok", "9.19.0"),
        (OWN, 91_900, None, "note", "CUDNN_HOME is not set"),
        (["/usr/lib/x86_64-linux-gnu/libcudnn.so.9"], 90_100, None, "problem", "9.1.0 from /usr"),
        (OWN, 90_800, "/usr", "problem", "9.8.0 is loaded, torch came with 9.19"),
    ],
)
def test_cudnn_of_the_system_is_seen(loaded, version, home, state, words):
    (finding,) = compare_cudnn(version, WHEEL, loaded, home)
    assert finding.state == state
    assert words in finding.value
    assert ("export CUDNN_HOME" in finding.remedy) is (state != "ok")


def test_missing_package_and_settings_are_problems(monkeypatch):
    stock = diagnosis._version
    monkeypatch.setattr(diagnosis, "_version", lambda name: None if "core" in name else stock(name))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    found = by_name(examine())
    for name in ("megatron-core", "CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_FUSED_ATTN"):
        assert found[name].state == "problem"
        assert found[name].remedy


@pytest.mark.parametrize(
    ("free", "recipe", "state"),
    [
        (452e9, None, "ok"),
        (446e9, None, "note"),
        (3e9, None, "note"),
        (120e9, "llama3_8b_128k", "note"),
        (112e9, "llama3_8b_128k", "problem"),
        (112e9, "llama2_7b_80k", "note"),
    ],
)
def test_disk_is_compared_with_checkpoints(free, recipe, state, monkeypatch, tmp_path):
    """112.4 GB each for Llama-3-8B; four lie there at once."""
    usage = namedtuple("usage", "total used free")

    def disk_usage(path):
        if not path.exists():
            raise FileNotFoundError(path)
        return usage(0, 0, free)

    monkeypatch.setattr(machine.shutil, "disk_usage", disk_usage)
    found = by_name(examine(tmp_path / "not" / "yet" / "there", recipe))["free disk"]
    assert found.state == state
    assert found.value == f"{free / 1e9:.0f} GB at {tmp_path}" if free > 9e9 else True
    if recipe != "llama2_7b_80k":
        assert "8.0B parameters with optimizer: 112 GB a checkpoint" in found.remedy
        assert (
            "4 of them exist at the same time with the launch script's --keep-last 3"
            in found.remedy
        )


def test_the_launch_script_keeps_as_many_as_the_doctor_counts():
    script = REPOSITORY / "examples" / "pretrain_llama_128k.sh"
    assert f"KEEP_LAST:-{KEPT}" in script.read_text()


@pytest.mark.parametrize(("free", "state"), [(112.5e9, "ok"), (112e9, "note")])
def test_little_host_memory_is_noted(free, state, monkeypatch):
    monkeypatch.setattr(diagnosis, "host_memory", lambda: machine.Room(free, "memory.max"))
    found = by_name(examine(recipe="llama3_8b_128k"))["host memory"]
    assert found.state == state
    assert "on 8 GPUs copies 112 GB to the host memory of each node" in found.remedy


def test_unknown_recipe_is_refused():
    with pytest.raises(ConfigError, match="--recipe llama9 is unknown"):
        examine(recipe="llama9")


def test_gpus_are_described(monkeypatch):
    import torch

    facts = namedtuple("facts", "name major minor")("NVIDIA H200", 9, 0)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda _: facts,
        "mem_get_info": lambda index: ((140 - 90 * index) * 2**30, 141 * 2**30),
        "get_device_capability": lambda _=0: (9, 0),
        "can_device_access_peer": lambda a, b: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(diagnosis, "_run", lambda *_: "GPU0 X NV18\nGPU1 NV18 X")
    found = by_name(diagnosis._gpus())
    assert found["GPU 0"].state == "ok"
    assert "91.0 GiB in use" in found["GPU 1"].value
    assert found["FP8"].state == "ok"
    assert found["NCCL"].value == "2.28.9"
    assert found["peer access"].value == "none between 1-0"
    assert found["NVLink"].value == "NV18"


def test_tool_prints_table_and_json():
    command = [sys.executable, str(REPOSITORY / "tools" / "doctor.py")]
    table = subprocess.run(command, capture_output=True, text=True)
    assert table.returncode == 0, table.stderr
    assert "megatron-core" in table.stdout
    records = json.loads(subprocess.run([*command, "--json"], capture_output=True).stdout)
    assert {"name", "state", "value", "remedy"} == set(records[0])
