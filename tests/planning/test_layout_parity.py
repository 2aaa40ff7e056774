"""tools/check_layout.py --compare: layouts that train alike pass, and what is cut wrongly is seen."""

import re
import subprocess
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_long.errors import ConfigError
from megatron_long.planning.layout_parity import (
    CUT_FLAGS,
    RUN_FLAGS,
    TOLERANCES,
    Steps,
    compare,
    precision_of,
    read_steps,
    run_steps,
    smallest_layout,
)

REPOSITORY = Path(__file__).resolve().parents[2]
FP32 = TOLERANCES["fp32"]
ROWS, LENGTH = 3, 64


def made(noise: float = 0.0) -> Steps:
    """Two steps of random losses, with rounding of this size."""
    truth, rounding = np.random.default_rng(0), np.random.default_rng(1)
    step, row, position = np.indices((2, ROWS, LENGTH))
    loss = truth.normal(6.0, 1.0, step.shape) + rounding.normal(0.0, noise, step.shape)
    tokens = {"step": step, "row": row, "position": position, "loss": loss}
    flat = {name: values.ravel() for name, values in tokens.items()}
    return Steps([float(loss[0].mean()), float(loss[1].mean())], [1.5, 1.4], flat)


def is_alike(seen: Steps, tolerance=FP32) -> bool:
    return all(step.is_within(tolerance) for step in compare(seen, made()))


def test_rounding_passes_and_more_does_not():
    assert is_alike(made(1e-7))
    assert not is_alike(made(1e-3))
    assert is_alike(made(1e-2), TOLERANCES["bf16"])
    assert not is_alike(made(0.3), TOLERANCES["bf16"])


def change_tokens(change) -> Steps:
    steps = made()
    loss = steps.tokens["loss"].copy().reshape(2, ROWS, LENGTH)
    return replace(steps, tokens=steps.tokens | {"loss": change(loss).ravel()})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_swapped_chunks_are_seen_though_the_mean_is_the_same(precision):
    swapped = change_tokens(lambda loss: np.roll(loss, LENGTH // 2, axis=2))
    comparisons = compare(swapped, made())
    assert comparisons[0].loss == 0.0
    assert not any(step.is_within(TOLERANCES[precision]) for step in comparisons)


def test_one_wrong_token_and_a_wrong_norm_are_seen():
    def one(loss):
        loss[0, 1, 17] += 0.5
        return loss

    first, second = compare(change_tokens(one), made())
    assert not first.is_within(FP32)
    assert second.is_within(FP32)
    assert first.worst_token == "window 1 position 17: 5.0e-01"
    assert not is_alike(replace(made(), grad_norms=[3.0, 1.4]))
    assert not is_alike(replace(made(), losses=[float("nan"), 6.0]))


def test_other_tokens_are_refused():
    other = made()
    shorter = {name: values[1:] for name, values in other.tokens.items()}
    with pytest.raises(ConfigError, match="trained on different tokens \\(383 and 384"):
        compare(replace(other, tokens=shorter), made())


def test_flags_of_the_smallest_layout():
    flags = [
        "--tensor-model-parallel-size",
        "4",
        "--num-virtual-stages-per-pipeline-rank=2",
        "--lr",
    ]
    small = smallest_layout([*flags, "1"])
    assert small[:2] == ["--lr", "1"]
    assert "--num-virtual-stages-per-pipeline-rank=2" not in small
    assert small[2:4] == ["--tensor-model-parallel-size", "1"]


def test_every_left_out_flag_is_one_of_the_training_command():
    from megatron.training.arguments import add_megatron_arguments

    from megatron_long.command_line import _add_own_flags

    parser = _add_own_flags(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    assert set(RUN_FLAGS + CUT_FLAGS) <= set(parser._option_string_actions)


def test_smallest_layout_has_no_uneven_stages():
    flags = "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"
    flags += " --account-for-loss-in-pipeline-split --cp-comm-type a2a+p2p a2a+p2p"
    flags += " --hierarchical-context-parallel-sizes 2 2 --lr 1"
    small = " ".join(smallest_layout(flags.split()))
    assert small == (
        "--lr 1 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 "
        "--context-parallel-size 1 --cp-comm-type p2p"
    )


@pytest.mark.parametrize(
    ("flags", "name"), [({"fp8": "hybrid"}, "fp8"), ({"bf16": True}, "bf16"), ({}, "fp32")]
)
def test_precision_decides_what_is_allowed(flags, name):
    assert precision_of(Namespace(**{"fp8": None, "bf16": False, "fp16": False} | flags)) == name


@pytest.mark.slow
def test_tool_compares_layouts(warm_python, tiny_dataset, tmp_path):
    """TP2 x CP2 with masked documents passes on random weights; another RoPE base is seen."""
    flags = ["--recipe", "tiny_debug", "--dataset", tiny_dataset, "--seq-length", 128]
    flags += ["--hidden-size", 64, "--kv-channels", 16, "--ffn-hidden-size", 128, "--num-layers", 2]
    flags += ["--padded-vocab-size", 512, "--global-batch-size", 2, "--document-masking"]
    flags += ["--allow-repeat"]
    layout = ["--tensor-model-parallel-size", 2, "--context-parallel-size", 2]
    command = [warm_python, REPOSITORY / "tools" / "check_layout.py", "--world-size", 4]
    command += ["--compare", "--work-dir", tmp_path, *flags, *layout, "--save", tmp_path / "no"]
    command += ["--export-hf", tmp_path / "no", "--exit-interval", 1, "--train-iters", 100]
    command += ["--lr-warmup-iters", 10, "--keep-last", 1]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the layouts train alike" in result.stdout
    assert re.search(r"window \d position \d+", result.stdout)
    assert not (tmp_path / "no").exists()
    start = ["--load", tmp_path / "start", "--finetune", "--train-iters", 2]
    words = [str(word) for word in (*flags, *start, "--rotary-base", 20_000)]
    wrong = run_steps(tmp_path / "wrong", 1, 2, words)
    comparisons = compare(wrong, read_steps(tmp_path / "smallest"))
    assert not comparisons[0].is_within(FP32)


def test_failing_job_is_told_in_one_paragraph(tmp_path):
    with pytest.raises(
        ConfigError, match=r"1 processes with --no-such-flag failed: .*no-such-flag"
    ):
        run_steps(tmp_path / "job", 1, 1, ["--no-such-flag"])
