"""tools/show_recipe.py and tools/check_layout.py."""

import json
import shlex
from dataclasses import replace

import pytest

from megatron_long.flags.backend import GPU
from megatron_long.flags.published import PUBLISHED
from megatron_long.flags.published_script import as_script
from megatron_long.flags.recipe import LLAMA3_8B, RECIPES, build_recipe
from megatron_long.model.rope import Llama3Rope


def test_shown_array_is_the_recipe(run_job):
    shown = run_job(1, ["tools/show_recipe.py", "llama3_8b_128k"]).stdout
    assert shown.startswith("RECIPE_ARGS=(")
    words = shlex.split(shown.removeprefix("RECIPE_ARGS=(").rstrip().removesuffix(")"))
    assert words == build_recipe("llama3_8b_128k").to_argv(GPU)


@pytest.mark.parametrize(("original", "is_warned"), [(4096, True), (8192, False)])
def test_flags_that_stock_megatron_has_not_are_named(run_job, tmp_path, original, is_warned):
    rope = Llama3Rope(factor=4.0, original_max_position_embeddings=original)
    (tmp_path / "config.json").write_text(json.dumps(replace(LLAMA3_8B, rope=rope).to_hf_config()))
    result = run_job(
        1, ["tools/show_recipe.py", "llama3_8b_128k", "--hf-config", tmp_path / "config.json"]
    )
    assert ("warning: --rope-scaling-original-length: flags of" in result.stderr) is is_warned
    assert ("--rope-scaling-original-length 4096" in result.stdout) is is_warned


def test_names_are_listed(run_job):
    listed = run_job(1, ["tools/show_recipe.py"]).stdout
    assert all(name in listed for name in (*RECIPES, *PUBLISHED))


def test_a_published_recipe_is_a_script(run_job):
    shown = run_job(1, ["tools/show_recipe.py", "prolong", "--train-tokens", "1B"]).stdout
    assert shown.rstrip("\n") == as_script(PUBLISHED["prolong"]().with_tokens(10**9))
    for flags in (["prolong", "--hf-config", "model"], ["tiny_debug", "--train-tokens", "1B"]):
        refused = run_job(1, ["tools/show_recipe.py", *flags], check=False)
        assert refused.returncode == 2
        assert f"{flags[1]} has no effect on the recipe {flags[0]}" in " ".join(
            refused.stderr.split()
        )


@pytest.mark.parametrize(("world_size", "status"), [(4, 0), (3, 2)])
def test_check_layout(run_job, tiny_dataset, world_size, status):
    command = ["tools/check_layout.py", "--world-size", world_size, "--recipe", "tiny_debug"]
    command += ["--dataset", tiny_dataset, "--context-parallel-size", "2", "--allow-repeat"]
    result = run_job(1, command, check=False)
    assert result.returncode == status, result.stderr
    if status:
        assert "start 2 or 4 processes" in " ".join(result.stderr.split())
    else:
        assert "context 2 * data 2" in result.stdout


def test_check_layout_tells_what_a_run_takes(run_job, tmp_path):
    """On a machine without GPUs, for eight H100: figures, and a layout that does not fit."""
    command = [
        "tools/check_layout.py",
        "--world-size",
        8,
        "--recipe",
        "llama3_8b_128k",
        "--mock-data",
    ]
    command += ["--tokenizer-type", "NullTokenizer", "--vocab-size", 128255, "--gpu", "h100"]
    cut = ["--tensor-model-parallel-size", 1, "--context-parallel-size", 8]
    result = run_job(1, [*command, *cut])
    assert (
        "a checkpoint takes 112 GB, of which --async-save copies 112 GB to the host"
        in result.stdout
    )
    assert "predicted peak of a GPU: 87 GiB" in result.stdout
    assert "warning: --tensor-model-parallel-size 1" in result.stderr
    assert "this fits, 65 GiB: --tensor-model-parallel-size 2" in result.stderr
    refused = run_job(1, [*command, "--compare"], check=False)
    assert refused.returncode == 2
    assert "--compare trains on this machine, whatever --gpu names" in " ".join(
        refused.stderr.split()
    )
