"""Transformer Engine against the portable attention, in every layout that the GPUs at hand allow.

Random weights, trained a few steps at a high rate: losses move, so that agreement says something.
"""

from pathlib import Path

import pytest
import torch

from megatron_long.model.flash_attention import installed_versions

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
BF16_TOLERANCE = 0.02
"""Nats; BF16 keeps 8 bits of a loss of about 6."""
PORTABLE = ("--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="no CUDA device"),
]


def layout(tp: int = 1, pp: int = 1, cp: int = 1, kind: str = "p2p") -> tuple[str, ...]:
    return (
        *("--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)),
        *("--context-parallel-size", str(cp), "--cp-comm-type", kind),
    )


@pytest.fixture(scope="module")
def reference(train, tmp_path_factory) -> list[float]:
    """Losses with Transformer Engine in BF16 on one GPU."""
    return train(1, tmp_path_factory.mktemp("reference"), *layout())


def largest_difference(seen: list[float], expected: list[float]) -> float:
    difference = max(abs(a - b) for a, b in zip(seen, expected, strict=True))
    print(f"losses {seen[0]:.4f} to {seen[-1]:.4f}, largest difference {difference:.1e}")
    return difference


def test_portable_attention_agrees(train, reference, tmp_path):
    assert reference[-1] < reference[0] - 0.3
    seen = train(1, tmp_path, *layout(), *PORTABLE)
    assert largest_difference(seen, reference) < BF16_TOLERANCE


def test_fp8_agrees(train, reference, tmp_path):
    fp8 = ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--fp8-param-gather")
    seen = train(1, tmp_path, *layout(), *fp8)
    assert largest_difference(seen, reference) < 0.1


@pytest.mark.multi_gpu
@pytest.mark.skipif(NUM_GPUS < 2, reason="one CUDA device")
@pytest.mark.parametrize(
    "flags",
    [layout(tp=2), layout(pp=2), layout(cp=2), layout(cp=2, kind="a2a"), layout()],
    ids=["tp2", "pp2", "cp2-p2p", "cp2-a2a", "dp2"],
)
def test_layouts_agree(flags, train, reference, tmp_path):
    seen = train(2, tmp_path, *flags)
    assert largest_difference(seen, reference) < BF16_TOLERANCE


@pytest.mark.multi_gpu
@pytest.mark.skipif(NUM_GPUS < 2, reason="one CUDA device")
def test_portable_attention_cuts_sequences_over_nccl(train, reference, tmp_path):
    seen = train(2, tmp_path, *layout(cp=2), *PORTABLE)
    assert largest_difference(seen, reference) < BF16_TOLERANCE


@pytest.mark.multi_gpu
@pytest.mark.skipif(NUM_GPUS < 2, reason="one CUDA device")
@pytest.mark.skipif(not installed_versions(), reason="neither FlashAttention 3 nor 4 is installed")
@pytest.mark.parametrize("kind", ["p2p", "a2a"])
def test_flash_attention_agrees_with_cudnn(kind, train, tmp_path):
    losses = []
    for backend in ("fused", "flash"):
        flags = (*layout(cp=2, kind=kind), "--attention-backend", backend)
        losses.append(train(2, tmp_path / backend, *flags))
    assert largest_difference(*losses) < BF16_TOLERANCE


def test_checkpoint_of_transformer_engine_scores_and_exports(
    train, run_job, tiny_dataset, tmp_path: Path
):
    """Saved with Transformer Engine; scored with both attentions; exported; read by transformers."""
    save = tmp_path / "ckpt"
    train(1, tmp_path, *layout(), "--save", str(save))
    command = ["tools/evaluate_loss.py", "--checkpoint", save, "--dataset", tiny_dataset]
    command += ["--context-length", "256", "--output"]
    for name, flags in {
        "te": (),
        "portable": PORTABLE,
        "fp32": ("--precision", "fp32", *PORTABLE),
    }.items():
        run_job(1, [*command, tmp_path / f"{name}.json", *flags])

    from megatron_long.evaluation.loss.loss_report import read_loss_report

    means = {
        name: read_loss_report(tmp_path / f"{name}.json").loss.mean(0, 256)
        for name in ("te", "portable", "fp32")
    }
    print(means)
    assert abs(means["te"] - means["fp32"]) < BF16_TOLERANCE
    assert abs(means["portable"] - means["fp32"]) < BF16_TOLERANCE

    export = tmp_path / "hf"
    convert = ["tools/convert_checkpoint.py", "megatron-to-hf", "--input", save, "--output", export]
    run_job(1, convert)
    from transformers import AutoModelForCausalLM

    assert (
        AutoModelForCausalLM.from_pretrained(export).config.rope_parameters["rope_theta"] == 91_896
    )
