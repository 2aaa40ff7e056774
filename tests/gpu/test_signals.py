"""A signal to every process of a run on GPUs, the lasting writer of `--async-save` among them.

Without CUDA (`REHEARSE=1`) the same run takes the host backend, where writers are forked.
"""

import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

from megatron_long.checkpoint.choosing import check_whole
from tests.gpu.test_exact_resume import FLAGS
from tests.launched import (
    count_lines,
    end_all,
    start_launcher,
    tracked,
    wait_for_helpers,
)

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
REHEARSE = bool(os.environ.get("REHEARSE")) and NUM_GPUS == 0
GRACE_S = 120

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(NUM_GPUS < 2 and not REHEARSE, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_saves_and_leaves(number: signal.Signals, tiny_dataset: Path, tmp_path: Path):
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    more = ("--save", out, "--loss-log", log, "--train-iters", 100_000, "--save-interval", 20)
    launcher = start_launcher(tiny_dataset, *FLAGS, *more, "--async-save")
    try:
        processes = wait_for_helpers(launcher, out)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # a writer that is done
                process.send_signal(number)
        assert launcher.wait(GRACE_S) == 0
        assert tracked(out) == count_lines(log) < 100_000
        assert check_whole(out / f"iter_{tracked(out):07d}")
        assert psutil.wait_procs(processes, 10)[1] == []
    finally:
        end_all(launcher)
    print(f"{len(processes)} processes had {number.name}: saved at step {tracked(out)}")
