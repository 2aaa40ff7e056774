"""Exact resume on GPUs: 20 steps at once, and 10, a new start and 10 more, with deterministic kernels.

Prints what the deterministic flags cost. Without CUDA (`REHEARSE=1`) the same runs take the host backend, two
or four processes, and show that the flags and the comparison are right.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
REHEARSE = bool(os.environ.get("REHEARSE")) and NUM_GPUS == 0
REPOSITORY = Path(__file__).resolve().parents[2]
DETERMINISTIC = ("--deterministic-mode", "--no-masked-softmax-fusion")
FLAGS = (
    "--recipe tiny_debug --hidden-size 256 --ffn-hidden-size 768 --kv-channels 64 --padded-vocab-size 512 "
    "--seq-length 512 --max-position-embeddings 512 --global-batch-size 4 --allow-repeat --lr 1e-3 --min-lr "
    "1e-3 --use-distributed-optimizer"
).split()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(NUM_GPUS < 2 and not REHEARSE, reason="needs two CUDA devices"),
]


def layout(cp: int, kind: str, ranks: int) -> tuple[int, tuple[str, ...]]:
    flags = ("--context-parallel-size", str(cp), "--cp-comm-type", kind)
    if kind == "a2a":  # it deals the key/value heads out, of which the recipe has 2
        flags += ("--num-query-groups", str(max(2, cp)))
    return ranks, flags


LAYOUTS = {
    "cp2-p2p": layout(2, "p2p", 2),
    "cp2-a2a": layout(2, "a2a", 2),
    "cp4-a2a": layout(4, "a2a", 4),
    "cp2-p2p-dp2": layout(2, "p2p", 4),
}


def train(dataset: Path, ranks: int, folder: Path, *flags: object) -> float:
    """Run a job, its loss log in `folder`; give the seconds of a step after the third."""
    command = [sys.executable, "-m", "megatron_long.launch", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "megatron_long.pretrain", *FLAGS]
    command += ["--dataset", dataset, "--save", folder, "--loss-log", folder / "log.jsonl"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    began = time.monotonic()
    result = subprocess.run(
        [str(word) for word in (*command, *flags)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    words = "elapsed time per iteration (ms): "
    steps = [line.split(words)[1].split()[0] for line in output.splitlines() if words in line]
    seconds = [float(step) / 1000 for step in steps[3:]]
    print(f"{time.monotonic() - began:.0f} s for {flags}")
    return sorted(seconds)[len(seconds) // 2]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict = {}
    _load_state_dict(
        state, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_resume_is_bit_exact(name, tiny_dataset, tmp_path):
    ranks, flags = LAYOUTS[name]
    if ranks > NUM_GPUS and not REHEARSE:
        pytest.skip(f"needs {ranks} CUDA devices")
    common = (*flags, *DETERMINISTIC, "--train-iters", 20, "--save-interval", 10)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    slow = train(tiny_dataset, ranks, whole, *common)
    train(tiny_dataset, ranks, parts, *common, "--exit-interval", 10)
    train(tiny_dataset, ranks, parts, *common, "--load", parts)
    assert read_log(parts) == read_log(whole)
    assert len(read_log(whole)) == 20
    expected = read_tensors(whole / "iter_0000020")
    seen = read_tensors(parts / "iter_0000020")
    assert seen.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(seen[key], expected[key])]
    assert different == []
    fast = train(tiny_dataset, ranks, tmp_path / "fast", *flags, "--train-iters", 20)
    free = read_log(tmp_path / "fast")
    same = sum(a["lm loss"] == b["lm loss"] for a, b in zip(free, read_log(whole), strict=True))
    print(
        f"{name}: {len(expected)} tensors bit-equal; a step takes {slow * 1000:.1f} ms, {fast * 1000:.1f} ms "
        f"without the deterministic flags, which gave {same} of 20 equal losses"
    )
