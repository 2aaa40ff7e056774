"""A stage keeps the optimizer on GPUs: Transformer Engine's, distributed, FP8 parameters too.

Without CUDA (`REHEARSE=1`) the same runs take the host backend, and show that flags and comparison are right.
"""

import json
import os

import pytest
import torch

from tests.training.test_next_stage import write_rest

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
REHEARSE = bool(os.environ.get("REHEARSE")) and NUM_GPUS == 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS < 1 and not REHEARSE, reason="needs a CUDA device"),
]
STEPS = 3
FLAGS = (
    "--recipe tiny_debug --hidden-size 256 --ffn-hidden-size 768 --kv-channels 64 --padded-vocab-size 512 "
    "--seq-length 512 --max-position-embeddings 512 --global-batch-size 4 --lr 1e-3 --min-lr 1e-3 "
    "--use-distributed-optimizer"
).split()
FP8 = ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--fp8-param-gather")


@pytest.mark.parametrize("precision", [(), FP8], ids=["bf16", "fp8"])
def test_a_stage_goes_on_where_weights_alone_jump(precision, run_job, tiny_dataset, tmp_path):
    """The difference to the run that never stopped is at most a tenth of that of weights alone."""
    if precision and REHEARSE:
        pytest.skip("FP8 needs a GPU")
    rest = write_rest(tiny_dataset, tmp_path / "rest", STEPS * 4 * 512)
    first = tmp_path / "first"

    def losses(name: str, steps: int, *flags: object) -> list[float]:
        log = tmp_path / f"{name}.jsonl"
        words = [*FLAGS, *precision, "--train-iters", steps, "--loss-log", log, *flags]
        run_job(1, ["-m", "megatron_long.pretrain", *words])
        return [json.loads(line)["lm loss"] for line in log.read_text().splitlines()]

    whole = losses("whole", 2 * STEPS, "--dataset", tiny_dataset)[STEPS:]
    losses("first", STEPS, "--dataset", tiny_dataset, "--save", first)
    kept = losses("kept", STEPS, "--dataset", rest, "--next-stage-of", first)
    alone = losses("alone", STEPS, "--dataset", rest, "--pretrained-checkpoint", first)
    off = [max(abs(a - b) for a, b in zip(seen, whole, strict=True)) for seen in (kept, alone)]
    print(f"{precision}: with the optimizer {off[0]:.1e} off, weights alone {off[1]:.3f}")
    assert off[1] > 0.05
    assert off[0] < off[1] / 10
