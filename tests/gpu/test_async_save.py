"""`--async-save` on GPUs: what the writing process leaves is what saving at once leaves, bit for bit.

Without CUDA (`REHEARSE=1`) the same runs take the host backend.
"""

import os

import pytest
import torch

from megatron_long.checkpoint.choosing import check_whole, saved_iterations
from tests.gpu.test_exact_resume import DETERMINISTIC, read_tensors

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
REHEARSE = bool(os.environ.get("REHEARSE")) and NUM_GPUS == 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0 and not REHEARSE, reason="no CUDA device"),
]


def test_saving_in_the_background_gives_the_same_checkpoints(train, tmp_path):
    ranks = 1 if NUM_GPUS == 1 else 2
    losses = {}
    for name, more in (("sync", ()), ("async", ("--async-save",))):
        folder = tmp_path / name
        folder.mkdir()
        flags = (*DETERMINISTIC, "--save", str(folder), "--save-interval", "3", *more)
        losses[name] = train(ranks, folder, *flags, steps=8)
    assert losses["sync"] == losses["async"]
    assert saved_iterations(tmp_path / "async") == [8, 6, 3]
    for iteration in (3, 6, 8):
        seen, expected = (tmp_path / name / f"iter_{iteration:07d}" for name in ("async", "sync"))
        assert check_whole(seen)
        tensors = read_tensors(expected)
        found = read_tensors(seen)
        assert found.keys() == tensors.keys()
        assert [key for key in tensors if not torch.equal(found[key], tensors[key])] == []
    print(f"{len(tensors)} tensors of 3 checkpoints bit-equal")
