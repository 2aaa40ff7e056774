"""Faulty steps: left out, counted, written down with their documents; too many end the run."""

import json
import math
from pathlib import Path

import pytest

from megatron_long.checkpoint.saving import FAULT_STATUS
from megatron_long.corpus.documents import canonical_source
from megatron_long.dataset.indexed import IndexedDatasetReader
from megatron_long.engine.step_guard import (
    MIN_STEPS,
    StepGuard,
    batch_windows,
    describe_windows,
)
from tests.training.test_exact_resume import differing, read_state

NAN, INF = math.nan, math.inf


def make_guard(
    folder: Path | None = None, *, limit: int = 2, deviations: float = 10.0
) -> StepGuard:
    return StepGuard(
        max_faulty_steps=limit,
        spike_deviations=deviations,
        batch_windows=lambda rank, index: batch_windows(40, 1, 2, rank, index),
        describe_windows=lambda windows: describe_windows(None, 128, windows),
        folder=folder,
    )


def judge(guard: StepGuard, iteration: int, loss: float, norm: float = 1.0) -> bool:
    """A step of two ranks with two micro-batches each."""
    return guard.judge(iteration, [[(loss * 10, 10.0)] * 2] * 2, norm)


@pytest.mark.parametrize(
    ("loss", "norm", "faulty"),
    [
        (2.0, 1.0, False),
        (NAN, 1.0, True),
        (INF, 1.0, True),
        (-INF, 1.0, True),
        (2.0, NAN, True),
        (2.0, INF, True),
        (9.0, 1.0, False),  # nothing to measure a spike against
    ],
)
def test_what_is_not_finite_is_left_out(loss, norm, faulty):
    assert judge(make_guard(), 1, loss, norm) is faulty


def test_a_spike_is_measured_against_the_last_steps(caplog):
    guard = make_guard()
    for step in range(1, MIN_STEPS + 1):
        assert not judge(guard, step, 3.0 + 0.1 * (step % 3))
    assert not judge(guard, 30, 4.0)  # falls within ten deviations of 0.148
    assert judge(guard, 31, 5.0)
    assert "loss 5.0000 is 13 deviations above 3.1000" in caplog.text
    assert not judge(guard, 32, 0.5)  # downwards nothing is a spike
    assert 5.0 not in guard.losses
    calm = make_guard(deviations=0)
    assert not any(judge(calm, step, 100.0 if step == 50 else 3.0) for step in range(1, 60))


def test_quiet_losses_have_a_least_deviation():
    guard = make_guard()
    for step in range(1, 60):
        judge(guard, step, 3.0)
    assert not judge(guard, 60, 3.49)
    assert judge(guard, 61, 3.51)


def test_the_limit_counts_the_last_hundred_steps():
    guard = make_guard(limit=2)
    for step in (1, 2, 103):
        assert judge(guard, step, NAN)
    assert guard.stop_reason is None
    assert guard.faulty == [103]
    for step in (110, 111):
        judge(guard, step, NAN)
    assert "step 111: the loss is nan; faulty steps of the last 100: 103, 110, 111" in (
        guard.stop_reason or ""
    )
    assert judge(make_guard(limit=0), 1, NAN)


def test_state_travels_with_the_checkpoint():
    guard = make_guard()
    for step in range(1, 30):
        judge(guard, step, NAN if step == 7 else 3.0 + step / 100)
    resumed = make_guard()
    resumed.restore(json.loads(json.dumps(guard.state())))
    assert resumed.state() == guard.state()
    for step in range(30, 33):
        assert judge(guard, step, 5.0) == judge(resumed, step, 5.0)
    assert resumed.stop_reason == guard.stop_reason is not None


def test_record_names_the_windows(tmp_path):
    guard = make_guard(tmp_path)
    losses = [[(20.0, 10.0), (NAN, 10.0)], [(30.0, 10.0), (10.0, 10.0)]]
    assert guard.judge(8, losses, 1.0)
    assert guard.judge(9, [[(20.0, 10.0)] * 2, [(30.0, 10.0), (10.0, 10.0)]], INF)
    first, second = map(json.loads, (tmp_path / "faults.jsonl").read_text().splitlines())
    assert first["reason"] == "the loss is nan"
    assert [window["window"] for window in first["windows"]] == [42]  # rank 0, second micro-batch
    assert [window["window"] for window in second["windows"]] == [41, 40, 42, 43]  # worst first
    assert second["reason"].startswith("the gradient norm is inf")


def test_documents_of_a_window(tiny_dataset, tiny_corpus):
    """Against the corpus itself: the documents named hold the window's text."""
    lines = tiny_corpus.read_text().splitlines()
    reader = IndexedDatasetReader(tiny_dataset / "train")
    from megatron_long.tokenizer.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_dataset / "tokenizer", "reference")
    windows = describe_windows(str(tiny_dataset), 128, list(range(126)))
    assert windows[-1]["documents"] == describe_windows(str(tiny_dataset), 128, [1])[0]["documents"]
    assert max(len(window["documents"]) for window in windows) > 1
    for window in windows[:124]:
        for document in window["documents"]:
            name, _, line = document["id"].rpartition(":")
            record = json.loads(lines[int(line) - 1])
            assert name == "corpus.jsonl"
            assert canonical_source(record["meta"]["redpajama_set_name"]) == document["source"]
            tokens = reader.read(document["document"])
            assert list(tokens[1:9]) == list(tokenizer.encode(record["text"]))[:8]
        starts = [reader._pointers[d["document"]] // 2 for d in window["documents"]]
        begin = window["window"] * 128
        first = window["documents"][0]["document"]
        assert starts[0] <= begin < starts[0] + int(reader.lengths[first])
        assert all(begin < start <= begin + 128 for start in starts[1:])
    named = {document["document"] for window in windows[:124] for document in window["documents"]}
    assert named == set(range(len(reader)))


@pytest.mark.slow
def test_faulty_steps_do_not_reach_the_weights(jobs, read_log, tmp_path):
    """NaN on one of two ranks, an Inf in one gradient, a spike: weights and optimizer stay the same."""
    faults = [
        {"kind": "loss", "ranks": [1], "steps": [5], "factor": "nan"},
        {"kind": "gradient", "ranks": [0], "steps": [7]},
        {"kind": "loss", "ranks": [0, 1], "steps": [29], "factor": "10"},
        {"kind": "hash", "ranks": [0], "path": str(tmp_path / "hashes")},
    ]
    flags = ("--train-iters", 30, "--save", tmp_path / "ckpt")
    flags += ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
    job = jobs.run(2, *flags, "--loss-log", tmp_path / "log.jsonl", faults=faults)
    records = [
        json.loads(line) for line in (tmp_path / "ckpt" / "faults.jsonl").read_text().splitlines()
    ]
    assert [record["iteration"] for record in records] == [5, 7, 29]
    reasons = [record["reason"] for record in records]
    assert reasons[0] == "the loss is nan"
    assert reasons[1].startswith("the gradient norm is inf (loss 5.")
    assert "deviations above" in reasons[2]
    assert all(window["documents"] for record in records for window in record["windows"])
    assert {window["window"] for window in records[0]["windows"]} == {17, 19}  # those of rank 1
    assert "step 5 is skipped: the loss is nan; it read " in job.text
    hashes = (tmp_path / "hashes").read_text().split()
    same = [step for step in range(2, 31) if hashes[step - 1] == hashes[step - 2]]
    assert same == [5, 7, 29]
    losses = [step["lm loss"] for step in read_log(tmp_path / "log.jsonl")]
    assert losses[29] < losses[3]


@pytest.mark.slow
def test_too_many_end_the_run_with_a_snapshot(jobs, read_log, tmp_path):
    faults = [{"kind": "loss", "ranks": [0], "steps": list(range(4, 12)), "factor": "nan"}]
    flags = ("--train-iters", 12, "--save-interval", 3, "--save", tmp_path / "ckpt")
    flags += ("--max-faulty-steps", 2)
    job = jobs.run(2, *flags, faults=faults, status=FAULT_STATUS)
    assert (
        "training ends at step 6: the loss is nan; faulty steps of the last 100: 4, 5, 6"
        in job.text
    )
    last = json.loads((tmp_path / "ckpt" / "faults.jsonl").read_text().splitlines()[-1])
    assert last["stopped"]
    assert last["iteration"] == 6
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "3"
    snapshot = tmp_path / "ckpt" / "fault_0000006"
    good = read_state(tmp_path / "ckpt" / "iter_0000003")
    assert differing(read_state(snapshot / "iter_0000005"), good) == []
    # The same step again, from the snapshot, without the fault.
    log = tmp_path / "log.jsonl"
    jobs.run(2, "--train-iters", 12, "--load", snapshot, "--loss-log", log)
    steps = read_log(log)
    assert steps[0]["iteration"] == 6
    assert all(math.isfinite(step["lm loss"]) for step in steps)


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(jobs, tmp_path):
    faults = [{"kind": "weights", "ranks": [1], "steps": [4]}]
    flags = ("--train-iters", 12, "--save-interval", 2, "--save", tmp_path / "ckpt")
    job = jobs.run(2, *flags, faults=faults, status=FAULT_STATUS)
    assert "NaN or Inf in the weights or the optimizer after step 4: they are not saved" in job.text
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not (tmp_path / "ckpt" / "iter_0000004").exists()


def test_state_on_several_devices_is_checked_on_each(monkeypatch):
    """As `--optimizer-cpu-offload` keeps it; once the first save ended in an error."""
    import torch

    from megatron_long.engine.state_tensors import all_finite

    stacked, stock = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda found: stacked.append(found) or stock(found))
    here, there = torch.ones(3), torch.ones(3, device="meta")
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: True, raising=False)
    assert all_finite([here, there, here])
    assert [{t.device.type for t in found} for found in stacked] == [{"cpu"}, {"meta"}]
