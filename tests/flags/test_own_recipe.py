"""A recipe in a file of the user, and a recipe around another model than its own."""

import json
from dataclasses import replace

import pytest

from megatron_long.command_line import parse
from megatron_long.errors import ConfigError
from megatron_long.flags.backend import GPU, HOST
from megatron_long.flags.recipe import RECIPES, build_recipe
from megatron_long.flags.recipe_flags import base_advice
from megatron_long.model.rope_stretch import ntk_rotary_base

OWN = """
from dataclasses import replace
from megatron_long.flags.recipe import ParallelLayout, build_recipe

def mistral_7b_64k():
    \"\"\"Mistral-7B from 32K to 64K.\"\"\"
    recipe = build_recipe("llama3_8b_128k")
    model = replace(recipe.model, vocab_size=32_768, padded_vocab_size=32_768, rotary_base=1_000_000)
    return replace(recipe, name="mistral_7b_64k", model=model, seq_length=65_536, rotary_base=5_000_000,
                   layout=ParallelLayout(tensor=2, context=2))

def no_recipe():
    return 7

def takes_one(x):
    return x

def fails():
    return replace(build_recipe("llama3_8b_128k"), tokens_per_batch=1)

number = 3
"""
USER = "--mock-data --tokenizer-type NullTokenizer --vocab-size 32000 --train-iters 2".split()


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my recipes.py"
    path.write_text(OWN)
    return path


def test_its_flags_are_those_of_the_run(own):
    recipe = build_recipe(f"{own}:mistral_7b_64k")
    arguments, args = parse(["--recipe", f"{own}:mistral_7b_64k", *USER], HOST, 4)
    assert arguments.recipe == f"{own}:mistral_7b_64k"
    assert (args.rotary_base, args.seq_length) == (5_000_000, 65_536)
    assert args.global_batch_size == recipe.global_batch_size == 64
    assert (args.tensor_model_parallel_size, args.context_parallel_size) == (2, 2)


def test_it_is_printed(own, run_job):
    printed = run_job(1, ["tools/show_recipe.py", f"{own}:mistral_7b_64k"])
    assert "--rotary-base 5000000" in printed.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.py:mine", "there is no file nowhere.py"),
        ("{own}", "write FILE.py:FUNCTION"),
        ("{own}:", "write FILE.py:FUNCTION"),
        ("{own}:two words", "write FILE.py:FUNCTION"),
        ("{own}:mine", "defines no function mine"),
        ("{own}:number", "defines no function number"),
        ("{own}:no_recipe", "returns int, not a megatron_long.flags.recipe.Recipe"),
        ("{own}:takes_one", "fails (TypeError"),
        ("{own}:fails", "1 tokens a batch hold no window"),
        ("{broken}:mine", "fails (SyntaxError"),
        ("mistral", "choose one of llama2_7b_80k"),
    ],
)
def test_what_is_wrong_with_it_is_told(name, words, own, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def mine(:")
    with pytest.raises(ConfigError) as refused:
        build_recipe(name.format(own=own, broken=broken))
    assert words in str(refused.value)


MISTRAL = {"rotary_base": 1_000_000, "max_position_embeddings": 32_768}


def advice(*argv: str, **model: int) -> str | None:
    recipe = build_recipe("llama3_8b_128k")
    return base_advice(replace(recipe, model=replace(recipe.model, **model)), argv)


def test_a_base_chosen_for_another_model_is_told():
    told = advice("--seq-length", "64K", **MISTRAL)
    least = ntk_rotary_base(1_000_000, 32_768, 65_536, factor=1)
    assert told is not None
    for number in (16_000_000, 500_000, 8_192, 1_000_000, 32_768, least, 65_536):
        assert f"{number:,}" in told


@pytest.mark.parametrize(
    ("argv", "model"),
    [
        ((), {}),
        (("--rotary-base", "4000000"), MISTRAL),
        (("--rope-method", "yarn"), MISTRAL),
        ((), {"num_layers": 2}),
    ],
)
def test_what_the_user_chose_or_the_recipe_is_for_is_not(argv, model):
    assert advice(*argv, **model) is None


def test_a_run_says_it(tmp_path, capsys):
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    config |= {"num_attention_heads": 4, "intermediate_size": 128, "rms_norm_eps": 1e-5}
    config |= {"max_position_embeddings": 512, "rope_theta": 250_000.0, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    parse(["--recipe", "tiny_debug", "--hf-config", str(tmp_path), *USER], HOST, 1)
    told = " ".join(capsys.readouterr().err.split())
    assert "warning: --recipe tiny_debug trains with RoPE base 91,896" in told


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"tiny_debug"}))
def test_recipes_raise_the_base_as_far_as_is_told(name):
    recipe = build_recipe(name, None)
    model = recipe.model
    least = ntk_rotary_base(
        model.rotary_base, model.max_position_embeddings, recipe.seq_length, factor=1
    )
    assert 1.9 < recipe.rotary_base / least < 15
    assert recipe.to_argv(GPU)
