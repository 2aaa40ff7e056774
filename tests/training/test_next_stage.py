"""A stage keeps the optimizer of the one before, and begins its own steps, schedule and data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_long import pretrain
from megatron_long.dataset.indexed import IndexedDatasetWriter
from megatron_long.dataset.manifest import read_manifest, write_manifest
from megatron_long.errors import ConfigError
from megatron_long.hashing import hash_file
from tests.fake_checkpoints import write_fake_checkpoint
from tests.job_fixtures import FLAGS
from tests.training.test_exact_resume import DISTRIBUTED, TOLERANCE, differing, read_state

STEPS = 10
LAYOUTS = {
    "plain": (1, ()),
    "bf16": (1, ("--bf16",)),
    "distributed": (2, DISTRIBUTED),
}


def write_rest(dataset: Path, folder: Path, tokens_read: int) -> Path:
    """Write what a run of so many tokens leaves of a dataset, as a dataset of its own."""
    shutil.copytree(dataset, folder)
    manifest = read_manifest(folder)
    tokens = np.fromfile(folder / "train.bin", "<u2")[tokens_read:]
    with IndexedDatasetWriter(folder / "train", "<u2") as writer:
        writer.add_document(tokens)
        writer.finalize()
    files = {name: hash_file(folder / name) for name in manifest.train.files}
    train = replace(manifest.train, num_tokens=len(tokens), files=files)
    write_manifest(folder, replace(manifest, train=train))
    return folder


@pytest.fixture(scope="module")
def rest(tiny_dataset, tmp_path_factory) -> Path:
    """What the first stage leaves of its dataset."""
    return write_rest(tiny_dataset, tmp_path_factory.mktemp("rest") / "data", STEPS * 4 * 128)


@pytest.fixture(scope="module")
def first(jobs, tmp_path_factory) -> Path:
    """A finished stage of 10 steps."""
    folder = tmp_path_factory.mktemp("first") / "ckpt"
    jobs.run(2, *DISTRIBUTED, "--train-iters", STEPS, "--save-interval", 5, "--save", folder)
    return folder


def losses(read_log, path: Path) -> list[float]:
    return [step["lm loss"] for step in read_log(path)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_stage_on_the_rest_of_the_data_is_the_run_that_never_stopped(
    name, jobs, rest, read_log, tmp_path
):
    """Bit for bit; weights alone lose more than a hundred times as much as the runs differ in."""
    ranks, flags = LAYOUTS[name]
    log, save = tmp_path / "log.jsonl", tmp_path / "whole"
    jobs.run(ranks, *flags, "--train-iters", 2 * STEPS, "--loss-log", log, "--save", save)
    whole = losses(read_log, log)[STEPS:]
    start = tmp_path / "first"
    jobs.run(ranks, *flags, "--train-iters", STEPS, "--save", start)
    seen = {}
    for flag in ("--next-stage-of", "--pretrained-checkpoint"):
        log, save = tmp_path / f"{flag}.jsonl", tmp_path / flag
        words = (*flags, "--dataset", rest, flag, start, "--loss-log", log, "--save", save)
        job = jobs.run(ranks, *words, "--train-iters", STEPS)
        seen[flag] = losses(read_log, log)
        stage = "weights and optimizer, from step 0 of stage 2" in job.text
        assert stage is (flag == "--next-stage-of")
    assert seen["--next-stage-of"] == whole
    expected = read_state(tmp_path / "whole" / f"iter_{2 * STEPS:07d}")
    state = read_state(tmp_path / "--next-stage-of" / f"iter_{STEPS:07d}")
    assert differing(state, expected) == []
    jump = max(a - b for a, b in zip(seen["--pretrained-checkpoint"], whole, strict=True))
    print(f"weights alone: {jump:.3f} nats above")
    assert jump > 0.1


@pytest.mark.slow
def test_longer_windows_begin_without_the_jump_of_weights_alone(
    jobs, rest, first, read_log, tmp_path
):
    """As in docs/long_context_recipe.md: 256 tokens after 128, four times the RoPE base, other data."""
    words = ("--seq-length", 256, "--max-position-embeddings", 256, "--rotary-base", 400_000)
    words += ("--global-batch-size", 2, "--train-iters", 4, "--use-distributed-optimizer")
    seen = {}
    for flag in ("--next-stage-of", "--pretrained-checkpoint"):
        log = tmp_path / f"{flag}.jsonl"
        jobs.run(1, *words, "--dataset", rest, flag, first, "--loss-log", log)
        seen[flag] = losses(read_log, log)
    kept, alone = seen.values()
    print(kept, alone)
    assert kept[0] == alone[0]
    assert kept == sorted(kept, reverse=True)
    assert alone[1] > alone[0] + 0.1


STAGE = (
    *("--seq-length", 256, "--max-position-embeddings", 256, "--rotary-base", 400_000),
    *("--lr", 5e-4, "--min-lr", 0, "--train-iters", 6),
    *("--lr-decay-style", "linear", "--lr-warmup-iters", 2, "--global-batch-size", 2),
)


@pytest.mark.slow
def test_a_stage_resumes_by_the_same_command_and_in_any_layout(
    jobs, rest, first, read_log, tmp_path
):
    stage = (*STAGE, "--use-distributed-optimizer", "--dataset", rest, "--next-stage-of", first)
    jobs.run(1, *stage, "--save", tmp_path / "whole", "--loss-log", tmp_path / "whole.jsonl")
    out, log = tmp_path / "out", tmp_path / "parts.jsonl"
    parts = (*stage, "--load", out, "--save", out, "--loss-log", log)
    jobs.run(1, *parts, "--exit-interval", 3)
    job = jobs.run(1, *parts)
    assert f"{out}/iter_0000003, resumed" in job.text
    assert losses(read_log, log) == losses(read_log, tmp_path / "whole.jsonl")
    state = read_state(out / "iter_0000006")
    assert differing(state, read_state(tmp_path / "whole" / "iter_0000006")) == []
    for step in (3, 6):
        facts = json.loads((out / f"iter_{step:07d}" / "training.json").read_text())
        (before,) = facts["stages"]
        assert before["folder"] == str(first / "iter_0000010")
        assert (before["iteration"], before["windows"], before["seq_length"]) == (10, 40, 128)
    assert json.loads((out / "hf_config.json").read_text())["rope_parameters"]["rope_theta"] == 4e5

    layout = ("--tensor-model-parallel-size", 2, "--context-parallel-size", 2)
    log = tmp_path / "layout.jsonl"
    jobs.run(4, *stage, *layout, "--loss-log", log)
    pairs = zip(losses(read_log, log), losses(read_log, tmp_path / "whole.jsonl"), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= TOLERANCE

    again = ("--next-stage-of", out, "--allow-repeat", "--exit-interval", 1)
    third = jobs.run(1, *stage, *again)
    assert "from step 0 of stage 3" in third.text


@pytest.mark.parametrize("kind", ["plain", "distributed"])
def test_the_first_step_has_the_rate_and_the_decay_of_the_stage(kind, jobs, rest, tmp_path):
    """At a rate of 0 the weights stay, whatever the optimizer's groups remember."""
    ranks, flags = LAYOUTS[kind]
    jobs.run(ranks, *flags, "--train-iters", 1, "--save", tmp_path / "first")
    words = (
        *flags,
        "--dataset",
        rest,
        "--next-stage-of",
        tmp_path / "first",
        "--lr",
        0,
        "--min-lr",
        0,
    )
    jobs.run(ranks, *words, "--train-iters", 1, "--save", tmp_path / "second")
    states = [read_state(tmp_path / name / "iter_0000001") for name in ("first", "second")]
    changed = differing(*states)
    assert [name for name in changed if not name.startswith("optimizer")] == []
    assert any("exp_avg" in name for name in changed)


def start(stage: Path, dataset: Path, *flags: object):
    argv = [*FLAGS, "--use-distributed-optimizer", "--dataset", dataset, "--train-iters", STEPS]
    argv += ["--next-stage-of", stage, *flags]
    return pretrain.prepare([str(word) for word in argv])[2]


def test_what_makes_no_sense_is_refused(first, rest, tiny_dataset, base, tmp_path):
    cases: list[tuple[Path, Path, tuple, str]] = [
        (first, rest, ("--num-layers", 4), r"trained another model \(--num-layers: 2 before, 4 now\)"),
        (first, rest, ("--seq-length", 64), "windows of 128 tokens, and --seq-length 64 is shorter"),
        (first, rest, ("--rotary-base", 10_000), "base of 91,896, and this stage has 10,000"),
        (first, tiny_dataset, (), "which this stage would read again from its start"),
        (first, rest, ("--pretrained-checkpoint", base), "are two starts"),
        (first, rest, ("--finetune",), "--finetune and --next-stage-of contradict"),
        (first, rest, ("--no-load-optim",), "--no-load-optim and --next-stage-of contradict"),
        (first, rest, ("--ckpt-step", 5), f"give --next-stage-of {first}/iter_0000005"),
        (first, rest, ("--load", first), "are one folder"),
        (first, rest, ("--save", f"{first}/."), "are one folder"),
        (tmp_path, rest, (), f"--next-stage-of {tmp_path} holds no Megatron checkpoint"),
        (tmp_path / "none", rest, (), f"--next-stage-of {tmp_path}/none does not exist"),
        (first / "iter_0000007", rest, (), f"iter_0000007 is no checkpoint; those of {first}: 5, 10;"),
    ]  # fmt: skip
    for stage, dataset, flags, words in cases:
        with pytest.raises(ConfigError, match=words):
            start(stage, dataset, *flags)
    assert start(first, rest).iteration == 0
    assert start(first, tiny_dataset, "--allow-repeat").begins_stage


def test_a_stage_before_its_end_is_named(jobs, first, rest, tmp_path):
    part = tmp_path / "part"
    save = ("--save", part, "--exit-interval", 1, "--use-distributed-optimizer")
    jobs.run(1, "--train-iters", 2, *save)
    with pytest.raises(
        ConfigError, match=r"is at step 1 of 2 \(--train-iters 2\); resume it to its end"
    ):
        start(part, rest)
    assert start(part / "iter_0000001", rest).begins_stage
    jobs.run(1, "--train-samples", 8, *save[2:], "--save", tmp_path / "samples")
    with pytest.raises(ConfigError, match=r"is at step 1 of 2 \(--train-samples 8\)"):
        start(tmp_path / "samples", rest)
    again = ("--load", tmp_path / "samples", "--save", tmp_path / "samples", *save[4:])
    jobs.run(1, "--train-samples", 8, *again)
    done = jobs.run(1, "--train-samples", 8, *again)
    assert "is at --train-samples 8 already: nothing to train" in done.text
    assert start(tmp_path / "samples", rest).begins_stage
    middle = start(first / "iter_0000005", rest)
    assert middle.choice
    assert middle.choice.iteration == 5
    jobs.run(1, "--train-iters", 1, "--save", tmp_path / "weights", "--no-save-optim")
    with pytest.raises(ConfigError, match="saved without its optimizer"):
        start(tmp_path / "weights", rest)
    write_fake_checkpoint(tmp_path / "converted", None)
    with pytest.raises(ConfigError, match="holds converted weights, and no optimizer to keep"):
        start(tmp_path / "converted", rest)
