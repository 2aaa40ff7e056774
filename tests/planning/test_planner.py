"""The planner: its arithmetic, what it was fitted on, and that its flags are what it counted."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_long.errors import ConfigError
from megatron_long.planning.hardware import GPUS, find_gpu
from megatron_long.planning.memory import predict_memory
from megatron_long.planning.run_shape import RunShape
from megatron_long.planning.search import Task, find_plans
from megatron_long.planning.step_time import predict_time
from megatron_long.training import host_backend
from megatron_long.training.backend import GPU
from megatron_long.training.recipe import LLAMA3_8B, LLAMA3_70B, ParallelLayout, build_recipe

host_backend.install()

REPOSITORY = Path(__file__).resolve().parents[2]
K = 1024
A2A = {"context_communication": "a2a"}
CP4 = RunShape(
    model=LLAMA3_8B,
    seq_length=128 * K,
    num_gpus=4,
    global_batch_size=1,
    layout=ParallelLayout(context=4, **A2A),
)
STOCK = replace(CP4, layout=ParallelLayout(tensor=2, context=2), recompute="full", full_logits=True)
SMALL = replace(
    CP4,
    model=replace(LLAMA3_8B, num_layers=8),
    num_gpus=2,
    layout=ParallelLayout(context=2, **A2A),
)
ONE = replace(SMALL, seq_length=64 * K, num_gpus=1, layout=ParallelLayout())
MEASURED = {
    "CP4 `a2a`, BF16, MLP recomputed": (CP4, 10.83, 125),
    "the same in FP8": (replace(CP4, fp8=True), 9.90, 121),
    "the same in FP8, 8": (replace(CP4, fp8=True, global_batch_size=8), 77.4, 121),
    "stock": (STOCK, 13.23, 93),
}
PREDICTED = {
    "A": SMALL,
    "B": replace(SMALL, layout=ParallelLayout(tensor=2)),
    "C": ONE,
    "D": replace(ONE, recompute="full"),
    "E": replace(SMALL, fp8=True),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_is_met(name):
    run, seconds, gib = MEASURED[name]
    assert predict_time(run, GPUS["h200"]).total_s == pytest.approx(seconds, rel=0.03)
    assert predict_memory(run).total_gib == pytest.approx(gib, rel=0.03)


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading of docs/planner.md."""
    text = (REPOSITORY / "docs" / "planner.md").read_text()
    section = re.split(r"^## ", text.split(f"## {heading}\n")[1], flags=re.M)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_document_says_what_the_planner_does():
    """A changed constant changes predictions: those written down are today's, or the page says so."""
    for (run, _, _), row in zip(MEASURED.values(), rows("Fitted"), strict=True):
        assert float(row[3]) == pytest.approx(predict_time(run, GPUS["h200"]).total_s, abs=0.051)
        assert float(row[5]) == pytest.approx(predict_memory(run).total_gib, abs=0.51)
    table = {row[0][0]: row for row in rows("Predicted before they were measured")}
    assert set(table) == set(PREDICTED)
    for name, run in PREDICTED.items():
        assert float(table[name][3]) == pytest.approx(
            predict_time(run, GPUS["h200"]).total_s, abs=0.0051
        )
        counted = predict_memory(run).total_gib
        assert float(table[name][8]) == pytest.approx(counted, abs=0.51)
        assert float(table[name][7]) == pytest.approx(counted, rel=0.05)


def test_flops_are_megatrons_count():
    from megatron.training.training import num_floating_point_operations

    from megatron_long.training.command_line import parse

    args = parse(["--recipe", "llama3_8b_128k", "--mock-data"], GPU, 8)[1]
    counted = num_floating_point_operations(args, 1)
    assert CP4.megatron_flops() == pytest.approx(counted, rel=2e-3)


def test_parameters_are_the_models():
    one = replace(CP4, layout=ParallelLayout(), num_gpus=1)
    assert one.parameters_per_gpu == pytest.approx(8.03e9, rel=2e-3)
    large = replace(one, model=LLAMA3_70B)
    assert large.parameters_per_gpu == pytest.approx(70.6e9, rel=2e-3)
    assert replace(one, layout=ParallelLayout(tensor=4)).parameters_per_gpu == pytest.approx(
        one.parameters_per_gpu / 4
    )


def test_memory_moves_as_it_must():
    totals = [
        predict_memory(replace(CP4, recompute=recompute)).total_gib
        for recompute in ("full", "mlp", "none")
    ]
    assert totals == sorted(totals)
    assert predict_memory(replace(CP4, seq_length=64 * K)).activations == pytest.approx(
        predict_memory(CP4).activations / 2
    )
    more = replace(CP4, num_gpus=8, global_batch_size=2)
    assert predict_memory(more).optimizer == pytest.approx(predict_memory(CP4).optimizer / 2)
    assert predict_memory(replace(CP4, full_logits=True)).total_gib > 139.8  # it did not fit


def test_time_moves_as_it_must():
    gpu = GPUS["h200"]
    base = predict_time(CP4, gpu)
    assert predict_time(replace(CP4, attention="flash3"), gpu).attention < base.attention
    assert predict_time(replace(CP4, recompute="full"), gpu).total_s > base.total_s
    assert predict_time(replace(CP4, recompute="none"), gpu).total_s < base.total_s
    assert predict_time(CP4, GPUS["a100-80gb"]).total_s > 3 * base.total_s
    staged = replace(CP4, layout=ParallelLayout(pipeline=4), global_batch_size=4)
    assert predict_time(staged, gpu).bubble > 0
    across = replace(CP4, num_gpus=16, layout=ParallelLayout(tensor=16))
    within = replace(CP4, num_gpus=8, layout=ParallelLayout(tensor=8))
    assert predict_time(across, gpu).tensor_parallel > 5 * predict_time(within, gpu).tensor_parallel


def task(**changes) -> Task:
    values = {"model": LLAMA3_8B, "seq_length": 128 * K, "num_gpus": 8, "gpu": GPUS["h100"]}
    return Task(**(values | changes))


def test_plans_fit_and_come_fastest_first():
    plans = find_plans(task(precisions=("bf16", "fp8")))
    assert len(plans) > 5
    hours = [round(plan.hours, 2) for plan in plans]
    assert hours == sorted(hours)
    assert all(plan.memory.total_gib < GPUS["h100"].memory_gib for plan in plans)
    best = plans[0]
    assert best.run.fp8
    tokens = best.tokens_per_second * 8 * best.hours * 3600
    assert tokens == pytest.approx(5e9)
    assert best.train_iters * best.run.global_batch_size * 128 * K == pytest.approx(5e9, rel=2e-3)


@pytest.mark.parametrize("recipe", ["llama3_8b_128k", "llama2_7b_80k", "llama3_70b_128k"])
def test_flags_of_every_plan_are_taken_and_mean_what_was_planned(recipe):
    from megatron_long.training.command_line import parse

    made = build_recipe(recipe)
    plans = find_plans(
        task(model=made.model, seq_length=made.seq_length, num_gpus=64, precisions=("bf16", "fp8"))
    )
    for plan in plans[:: max(1, len(plans) // 6)]:
        run = plan.run
        argv = ["--recipe", recipe, "--mock-data", *plan.to_argv()]
        args = parse(argv, GPU, run.num_gpus)[1]
        assert args.tensor_model_parallel_size == run.layout.tensor
        assert args.cp_comm_type == [run.layout.context_communication]
        assert args.global_batch_size % run.data_parallel == 0
        assert args.train_iters == plan.train_iters
        assert (args.fp8 == "hybrid") is run.fp8
        assert args.recompute_granularity == ("full" if run.recompute == "full" else "selective")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": LLAMA3_70B},
            r"no layout fits: the smallest takes \d+ GiB a GPU and 75 are there",
        ),
        ({"seq_length": 131_001}, "no layout of 8 GPUs divides|no layout fits"),
        ({"num_gpus": 0}, "--gpus 0 must be 1 or more"),
        ({"batch_tokens": 1000}, "--batch-tokens 1000 holds no window of --seq-length 131072"),
        ({"attention": "slow"}, "--attention slow is unknown; choose one of cudnn, flash3"),
        (
            {"gpu": GPUS["a100-80gb"], "precisions": ("fp8",)},
            "--precision fp8: this GPU has no FP8",
        ),
        (
            {"gpu": GPUS["a100-80gb"], "precisions": ("bf16", "fp8")},
            "--precision both: this GPU has no FP8 arithmetic; give --precision bf16",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        find_plans(task(**changes))


def test_unknown_gpu_lists_the_known():
    with pytest.raises(ConfigError, match="--gpu b300 is unknown; choose one of h100, h200, a100"):
        find_gpu("b300")


def run_tool(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tools" / "plan_run.py", *argv]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def test_tool_plans_a_hugging_face_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B.to_hf_config()))
    flags = ("--hf-config", tmp_path, "--seq-length", 131072, "--gpus", 8, "--gpu", "h100")
    table = run_tool(*flags).stdout.splitlines()
    assert "GiB" in table[0]
    assert "--context-parallel-size" in table[-1]
    records = json.loads(run_tool(*flags, "--json", "--top", 3).stdout)
    assert len(records) == 3
    assert table[-1].split() == records[0]["flags"]
    parts = [value for name, value in records[0]["peak_gib"].items() if name != "total"]
    assert sum(parts) == pytest.approx(records[0]["peak_gib"]["total"])
    assert "note:" not in run_tool(*flags).stderr
    small = replace(LLAMA3_8B, hidden_size=1024, ffn_hidden_size=4096).to_hf_config()
    (tmp_path / "config.json").write_text(json.dumps(small))
    assert "hidden size 1024 is below 2048" in run_tool(*flags).stderr
    assert table[-2].endswith("after --recipe (with --hf-config for another model):")
    for top in (0, -1):
        refused = run_tool(*flags, "--top", top)
        assert refused.returncode == 2
        assert f"--top {top} lists no layout; give 1 or more" in refused.stderr
    refused = run_tool(*flags[2:])
    assert refused.returncode == 2
    assert "one of --hf-config and --recipe" in " ".join(refused.stderr.split())
