"""Every recipe gives flags that Megatron's parser takes, and the arithmetic of the paper."""

import pytest

from megatron_long.engine import host_backend
from megatron_long.errors import ConfigError
from megatron_long.flags.backend import GPU, HOST
from megatron_long.flags.recipe import RECIPES, ParallelLayout, Recipe, build_recipe
from megatron_long.model.rope_stretch import ntk_rotary_base

host_backend.install()

# ruff: noqa: E402
from megatron_long.engine.megatron_adapter import parse_flags
from megatron_long.flags.layout_rules import check_layout
from tests.gpu.test_exact_resume import FLAGS, LAYOUTS


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("backend", [GPU, HOST], ids=["gpu", "host"])
def test_recipe_parses_and_can_be_cut(name, backend):
    recipe = build_recipe(name)
    argv = recipe.to_argv(backend)
    flags = [word for word in argv if word.startswith("--")]
    assert len(flags) == len(set(flags))
    args = parse_flags(argv)
    assert args.seq_length == args.max_position_embeddings == recipe.seq_length
    assert args.rotary_base == recipe.rotary_base
    assert args.num_layers == recipe.model.num_layers
    assert args.bf16 is backend.cuda
    check_layout(args, recipe.layout.num_devices)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_gpu_tests_can_be_cut(name):
    ranks, flags = LAYOUTS[name]
    stock = [word for word in FLAGS if word not in ("--recipe", "tiny_debug", "--allow-repeat")]
    check_layout(parse_flags([*build_recipe("tiny_debug").to_argv(GPU), *stock, *flags]), ranks)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "tiny_debug"])
def test_schedule_is_the_papers(name):
    recipe = build_recipe(name)
    assert recipe.learning_rate == 2e-5
    assert 0.9 <= recipe.global_batch_size * recipe.seq_length / 4_194_304 <= 1.0
    assert recipe.train_iters * recipe.global_batch_size * recipe.seq_length == pytest.approx(
        5e9, rel=2e-3
    )
    args = parse_flags(recipe.to_argv(GPU))
    assert (args.lr_decay_style, args.min_lr) == ("constant", 2e-5)


def test_another_model_takes_the_place_of_the_recipes_own():
    other = build_recipe("tiny_debug").model
    assert build_recipe("llama2_7b_128k", other).model is other


def test_fp8_keeps_attention_in_bf16():
    flags = Recipe(
        name="fp8",
        model=build_recipe("tiny_debug").model,
        seq_length=2048,
        rotary_base=10_000,
        precision="fp8",
    ).to_argv(GPU)
    args = parse_flags(flags)
    assert args.fp8 == "hybrid"
    assert not getattr(args, "fp8_dot_product_attention", False)
    assert not getattr(args, "fp8_multi_head_attention", False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seq_length": 2050, "layout": ParallelLayout(context=2)}, "2 \\* context parallel size"),
        ({"tokens_per_batch": 1024}, "hold no window of 2048 tokens"),
    ],
)
def test_impossible_recipes_are_refused(changes, words):
    values = {"seq_length": 2048, "rotary_base": 10_000, "name": "bad"} | changes
    with pytest.raises(ConfigError, match=words):
        Recipe(model=build_recipe("tiny_debug").model, **values)


def test_ntk_base_stretches_the_longest_wavelength():
    """With factor 1 the longest wavelength grows exactly by the stretch."""
    base, head_size, stretch = 10_000, 64, 8
    raised = ntk_rotary_base(base, 512, 512 * stretch, factor=1, head_size=head_size)
    longest = (head_size - 2) / head_size
    assert raised**longest / base**longest == pytest.approx(stretch, rel=1e-4)


def test_nothing_to_stretch_is_refused():
    with pytest.raises(ConfigError, match="nothing to stretch"):
        ntk_rotary_base(10_000, 4096, 4096, factor=10)
