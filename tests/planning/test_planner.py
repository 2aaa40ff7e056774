"""The planner: its arithmetic, what it was fitted on, and that its flags are what it counted."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_long.engine import host_backend
from megatron_long.errors import ConfigError
from megatron_long.flags.backend import GPU
from megatron_long.flags.recipe import LLAMA3_8B, LLAMA3_70B, RECIPES, ParallelLayout, build_recipe
from megatron_long.model.geometry import geometry_from_args
from megatron_long.planning.hardware import GPUS, find_gpu
from megatron_long.planning.memory import checkpoint_bytes, host_memory_of_save, predict_memory
from megatron_long.planning.run_shape import RunShape, run_of_arguments, run_of_recipe
from megatron_long.planning.search import NEAR_TIE, Task, find_plans, usable_gib
from megatron_long.planning.step_time import predict_time

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
TP2 = replace(CP4, layout=ParallelLayout(tensor=2, context=2, **A2A))
FULL = {"recompute": "full", "full_logits": True}
STOCK = replace(CP4, layout=ParallelLayout(tensor=2, context=2), **FULL)
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
}
LATER = {
    "ours_fp8": (replace(CP4, fp8=True, attention="flash4"), 8.89, 121),
    "ours_tp2_fp8": (replace(TP2, fp8=True, attention="flash4"), 9.05, 99),
    "stock_tp2_cp_selective_fp8_flash": (
        replace(TP2, fp8=True, full_logits=True, attention="flash4"),
        *(9.10, 118),
    ),
    "ours_fp8, cuDNN": (replace(CP4, fp8=True), 10.03, 121),
    "ours_bf16, cuDNN": (CP4, 11.00, 125),
    "stock_tp2_cp_selective_fp8": (replace(TP2, fp8=True, full_logits=True), 10.25, 118),
    "stock_cp_full_fp8": (replace(CP4, fp8=True, **FULL), 12.41, 99),
    "stock_tp2_cp_full_fp8": (replace(TP2, fp8=True, **FULL), 12.62, 77),
}
PREDICTED = {
    "A": SMALL,
    "B": replace(SMALL, layout=ParallelLayout(tensor=2)),
    "C": ONE,
    "D": replace(ONE, recompute="full"),
    "E": replace(SMALL, fp8=True),
}


@pytest.mark.parametrize("name", [*MEASURED, *LATER])
def test_what_was_measured_is_met(name):
    run, seconds, gib = (MEASURED | LATER)[name]
    assert predict_time(run, GPUS["h200"]).total_s == pytest.approx(seconds, rel=0.035)
    assert predict_memory(run).total_gib == pytest.approx(gib, rel=0.03)


def test_stock_megatron_with_a_ring():
    """Its memory is larger by another copy of the logits (docs/planner.md)."""
    assert predict_time(STOCK, GPUS["h200"]).total_s == pytest.approx(13.23, rel=0.02)


def test_what_ran_out_of_memory_does_not_fit():
    run = replace(CP4, fp8=True, full_logits=True)  # stock flags, CP4, `layernorm mlp` recomputed
    assert predict_memory(run).total_gib > usable_gib(GPUS["h200"])


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
    for (name, (run, *measured)), row in zip(LATER.items(), rows("Measured later"), strict=True):
        predicted = predict_time(run, GPUS["h200"]).total_s, predict_memory(run).total_gib
        assert (
            row[0] == f"`{name.partition(',')[0]}`{name.partition(',')[1]}{name.partition(',')[2]}"
        )
        cells = [float(cell.rstrip(" %")) for cell in row[1:]]
        assert cells[0::3] == measured
        assert cells[1::3] == pytest.approx(predicted, abs=0.51)
        assert cells[1] == pytest.approx(predicted[0], abs=0.0051)
        errors = [100 * (p / m - 1) for p, m in zip(predicted, measured, strict=True)]
        assert cells[2::3] == pytest.approx(errors, abs=0.051)
    table = {row[0][0]: row for row in rows("Predicted before they were measured")}
    assert set(table) == set(PREDICTED)
    for name, run in PREDICTED.items():
        seconds, gib = predict_time(run, GPUS["h200"]).total_s, predict_memory(run).total_gib
        assert float(table[name][8]) == pytest.approx(seconds, abs=0.0051)
        assert float(table[name][6]) == pytest.approx(seconds, rel=0.025)
        assert float(table[name][9]) == pytest.approx(gib, abs=0.51)
        assert float(table[name][7]) == pytest.approx(gib, rel=0.05)


def test_flops_are_megatrons_count():
    from megatron.training.training import num_floating_point_operations

    from megatron_long.command_line import parse

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


def test_checkpoint_and_host_memory_of_a_save():
    """112 GB for Llama-3-8B; a node of eight takes all of it, one of eight nodes an eighth."""
    size = checkpoint_bytes(CP4.parameters)
    assert size == pytest.approx(112.4e9, rel=1e-3)
    assert checkpoint_bytes(CP4.parameters, optimizer=False) == pytest.approx(size / 7)
    assert checkpoint_bytes(1, full_precision=True) == 12
    assert host_memory_of_save(size, 8, 8) == size
    assert host_memory_of_save(size, 64, 8) == size / 8


def test_memory_moves_as_it_must():
    totals = [
        predict_memory(replace(CP4, recompute=recompute)).total_gib
        for recompute in ("full", "mlp", "layernorm")
    ]
    assert totals == sorted(totals)
    assert predict_memory(replace(CP4, seq_length=64 * K)).activations == pytest.approx(
        predict_memory(CP4).activations / 2
    )
    more = replace(CP4, num_gpus=8, global_batch_size=2)
    assert predict_memory(more).optimizer == pytest.approx(predict_memory(CP4).optimizer / 2)


def test_time_moves_as_it_must():
    gpu = GPUS["h200"]
    base = predict_time(CP4, gpu)
    assert predict_time(replace(CP4, attention="flash3"), gpu).attention < base.attention
    assert predict_time(replace(CP4, recompute="full"), gpu).total_s > base.total_s
    assert predict_time(replace(CP4, recompute="layernorm"), gpu).total_s < base.total_s
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
    for plan, later in itertools.pairwise(plans):
        assert later.hours * (1 + NEAR_TIE) >= plan.hours
    assert all(plan.memory.total_gib < GPUS["h100"].memory_gib for plan in plans)
    best = plans[0]
    assert best.run.fp8
    tokens = best.tokens_per_second * 8 * best.hours * 3600
    assert tokens == pytest.approx(5e9)
    assert best.train_iters * best.run.global_batch_size * 128 * K == pytest.approx(5e9, rel=2e-3)


@pytest.mark.parametrize("name", [name for name in RECIPES if build_recipe(name).gpu])
def test_every_recipe_fits_the_gpus_that_it_names(name):
    recipe = build_recipe(name)
    gpu = GPUS[recipe.gpu]
    words = f"{recipe.num_gpus} x {recipe.gpu.upper()} ({'80 GB' if gpu.memory_gib < 80 else gpu})"
    assert words in " ".join(RECIPES[name].__doc__.split())
    run = run_of_recipe(recipe)
    assert run.num_gpus % recipe.layout.num_devices == 0
    assert predict_memory(run).total_gib <= usable_gib(gpu)
    best = find_plans(
        task(model=recipe.model, seq_length=recipe.seq_length, num_gpus=run.num_gpus)
    )[0]
    speed = run.global_batch_size / predict_time(run, gpu).total_s
    assert speed > 0.94 * best.run.global_batch_size / best.time.total_s


def test_the_layout_of_70b_is_listed_for_64_gpus():
    recipe = build_recipe("llama3_70b_128k")
    plans = find_plans(task(model=recipe.model, num_gpus=64))
    assert recipe.layout in [plan.run.layout for plan in plans]


def test_ring_between_nodes_is_charged():
    """A piece of a longer ring is attended to faster than the next one travels."""
    exposed = []
    for context in (8, 16, 32):
        layout = ParallelLayout(tensor=2, context=context)
        run = replace(CP4, num_gpus=64, global_batch_size=32, layout=layout)
        exposed.append(predict_time(run, GPUS["h100"]).context_parallel / run.num_micro_batches)
        slow = replace(GPUS["h100"], network_bandwidth=1e9)
        assert (
            predict_time(run, slow).context_parallel
            > predict_time(run, GPUS["h100"]).context_parallel
        )
    # One window on twice as many ranks takes half the time of attention; its ring does not get cheaper.
    assert exposed[1] > 0.6 * exposed[0]
    assert exposed[2] > exposed[1]


def test_between_nodes_small_context_parallelism_comes_first():
    best = find_plans(task(num_gpus=64))[0].run.layout
    assert (best.pipeline, best.context) == (1, 8)


def test_dealing_within_nodes_and_a_ring_between_them():
    """16 ranks of 8 key and value heads at TP2: 4 deal heads out, 4 groups of them form the ring."""
    plans = find_plans(task(num_gpus=64))
    mixed = {plan.run.layout.context: plan.run for plan in plans if plan.run.layout.hierarchy}
    run = next(
        plan.run
        for plan in plans
        if plan.run.layout.hierarchy == (4, 4) and plan.run.layout.tensor == 2
    )
    assert mixed
    assert (run.layout.dealing_ranks, run.layout.ring_ranks) == (4, 4)
    for plan in plans:
        layout = plan.run.layout
        for heads in (LLAMA3_8B.num_query_groups, LLAMA3_8B.num_attention_heads):
            assert heads % (layout.tensor * layout.dealing_ranks) == 0
        assert layout.tensor * layout.dealing_ranks <= 8
    ring = replace(run, layout=ParallelLayout(tensor=2, context=16))
    gpu = replace(GPUS["h100"], network_bandwidth=5e9)
    assert predict_time(run, gpu).context_parallel < predict_time(ring, gpu).context_parallel
    assert predict_memory(run).total_gib > predict_memory(ring).total_gib


def test_near_ties_are_ordered_by_simplicity():
    """A model so small that recomputing and cutting change next to nothing: nothing is done."""
    recipe = build_recipe("tiny_debug")
    small = task(model=recipe.model, seq_length=2048, batch_tokens=16 * K, num_gpus=2)
    best = find_plans(small)[0].run
    assert (best.layout.num_devices, best.recompute) == (1, "layernorm")


@pytest.mark.parametrize("recipe", ["llama3_8b_128k", "llama2_7b_80k", "llama3_70b_128k"])
def test_flags_of_every_plan_are_taken_and_mean_what_was_planned(recipe):
    from megatron_long.command_line import parse

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
        levels = args.hierarchical_context_parallel_sizes
        assert (tuple(levels) if levels else None) == run.layout.hierarchy
        assert run_of_arguments(args, run.num_gpus) == replace(
            run, model=geometry_from_args(args), global_batch_size=args.global_batch_size
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": LLAMA3_70B},
            r"no layout fits: the smallest takes \d+ GiB per GPU and 75 are available",
        ),
        ({"seq_length": 131_001}, "no layout of 8 GPUs divides|no layout fits"),
        ({"num_gpus": 0}, "--gpus 0 must be 1 or more"),
        ({"batch_tokens": 1000}, "--batch-tokens 1000 holds no window of --seq-length 131072"),
        ({"attention": "slow"}, "--attention slow is unknown; choose one of cudnn, flash3, flash4"),
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


def test_tool_plans_the_window_and_the_budget_of_a_recipe():
    """The paper's 7B recipe has windows of 80K; the table says what the flags say."""
    flags = ("--recipe", "llama2_7b_80k", "--gpus", 8, "--gpu", "h100")
    shown = run_tool(*flags).stdout
    assert "--seq-length 81920" in shown.splitlines()[-1]
    assert "A checkpoint with optimizer takes 94 GB of disk" in shown
    records = json.loads(run_tool(*flags, "--json", "--top", 50).stdout)
    table = run_tool(*flags, "--top", 50).stdout.splitlines()[1:]
    for record, line in zip(records, table, strict=False):
        words = record["flags"]
        granularity = words[words.index("--recompute-granularity") + 1]
        kind = line.split()[6]
        assert kind == "full" if granularity == "full" else kind in words
    asked = run_tool(*flags, "--seq-length", 65536, "--train-tokens", "1B").stdout.split()
    assert asked[asked.index("--seq-length") + 1] == "65536"
    steps, windows = (
        int(asked[asked.index(f) + 1]) for f in ("--train-iters", "--global-batch-size")
    )
    assert steps * windows * 65536 == pytest.approx(1e9, rel=0.01)
