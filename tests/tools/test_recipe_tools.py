"""tools/show_recipe.py and tools/check_layout.py."""

import shlex

import pytest

from megatron_long.training.backend import GPU
from megatron_long.training.recipe import RECIPES, build_recipe


def test_shown_array_is_the_recipe(run_job):
    shown = run_job(1, ["tools/show_recipe.py", "llama3_8b_128k"]).stdout
    assert shown.startswith("RECIPE_ARGS=(")
    words = shlex.split(shown.removeprefix("RECIPE_ARGS=(").rstrip().removesuffix(")"))
    assert words == build_recipe("llama3_8b_128k").to_argv(GPU)


def test_names_are_listed(run_job):
    listed = run_job(1, ["tools/show_recipe.py"]).stdout
    assert all(name in listed for name in RECIPES)


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
