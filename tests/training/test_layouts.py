"""Every layout resumed from a 1-process checkpoint trains as one process does, in float32."""

import json
from pathlib import Path

import pytest

TOLERANCE = 2e-6
BASE_STEPS, STEPS = 2, 10
LAYOUTS = {
    "tp2-sp": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-vpp2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "dp2": (2, "--overlap-grad-reduce --overlap-param-gather"),
    "megatrons-own-loss": (1, "--megatron-loss"),
    "cp2": (2, "--context-parallel-size 2"),
    "cp4": (4, "--context-parallel-size 4"),
    "tp2-pp2-cp2": (
        8,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --context-parallel-size 2",
    ),
}
FLAGS = """
--recipe tiny_debug --hidden-size 64 --kv-channels 16 --ffn-hidden-size 128 --padded-vocab-size 512
--seq-length 128 --max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 8 --lr 2e-3
--min-lr 2e-3 --use-distributed-optimizer --override-opt-param-scheduler --save-interval 1000
""".split()


def train(
    run_job, dataset: Path, num_processes: int, log: Path, steps: int, *flags: object
) -> list:
    """Losses and gradient norms of each step."""
    command = ["-m", "megatron_long.pretrain", *FLAGS, "--dataset", dataset, "--loss-log", log]
    run_job(num_processes, [*command, "--train-iters", steps, *flags])
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def base_checkpoint(tmp_path_factory, run_job, tiny_dataset) -> Path:
    """A checkpoint with optimizer state after two steps on one process."""
    folder = tmp_path_factory.mktemp("base")
    train(run_job, tiny_dataset, 1, folder / "log.jsonl", BASE_STEPS, "--save", folder / "ckpt")
    return folder / "ckpt"


@pytest.fixture(scope="module")
def reference(tmp_path_factory, run_job, tiny_dataset, base_checkpoint) -> list:
    """Ten more steps on one process."""
    log = tmp_path_factory.mktemp("reference") / "log.jsonl"
    flags = ("--load", base_checkpoint)
    return train(run_job, tiny_dataset, 1, log, BASE_STEPS + STEPS, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_one_process(
    name, tmp_path, run_job, tiny_dataset, base_checkpoint, reference
):
    num_processes, layout = LAYOUTS[name]
    log = tmp_path / "log.jsonl"
    flags = ("--load", base_checkpoint, *layout.split())
    steps = train(run_job, tiny_dataset, num_processes, log, BASE_STEPS + STEPS, *flags)
    assert [step["iteration"] for step in steps] == list(
        range(BASE_STEPS + 1, BASE_STEPS + STEPS + 1)
    )
    differences = [
        abs(step["lm loss"] - other["lm loss"])
        for step, other in zip(steps, reference, strict=True)
    ]
    print(f"{name}: largest difference of a loss {max(differences):.1e}")
    assert max(differences) <= TOLERANCE, differences
    norms = [
        (step["grad_norm"], other["grad_norm"])
        for step, other in zip(steps, reference, strict=True)
    ]
    for seen, expected in norms:
        assert seen == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_losses_fall_and_differ_without_the_checkpoint(reference):
    """The comparison above is of something that moves: losses fall from step to step."""
    losses = [step["lm loss"] for step in reference]
    assert losses[-1] < losses[0] - 0.05
    assert len(set(losses)) == STEPS
