"""Logits of transformers and of Megatron are one model's, for each family and through training."""

import json
from pathlib import Path

import pytest
import torch

from megatron_long.checkpoint.megatron_folder import extra_states
from megatron_long.conversion.convert import hf_to_megatron
from megatron_long.conversion.export import megatron_to_hf
from megatron_long.conversion.options import Options
from megatron_long.conversion.stretch import Stretch
from megatron_long.errors import ConfigError
from megatron_long.model.geometry import geometry_from_hf
from megatron_long.model.mapping import checkpoint_shape, rules_of
from megatron_long.model.rope import BaseRope, LinearRope, Llama3Rope, YarnRope

TOLERANCE = 1e-4
PROGRAM = Path(__file__).with_name("megatron_logits.py")


def rope(method: BaseRope, theta: float) -> dict:
    """Hugging Face's entry for a RoPE."""
    return {"rope_parameters": {**method.to_hf(), "rope_theta": theta}}


MODELS = {
    "llama2": rope(BaseRope(), 1e4),
    "smollm2-tied": {"tied": True, **rope(BaseRope(), 1e5)},
    "llama3.1": rope(Llama3Rope(), 5e5),
    "llama3.2-tied": {"tied": True, **rope(Llama3Rope(factor=32.0), 5e5)},
    "mistral-wide-heads": {"family": "mistral", "head_dim": 16, "num_key_value_heads": 8},
    "mistral-linear": {"family": "mistral", **rope(LinearRope(factor=4), 5e5)},
    "qwen2": {"family": "qwen2", **rope(BaseRope(), 1e6)},
    "qwen2-yarn": {
        "family": "qwen2",
        **rope(YarnRope(factor=8, original_max_position_embeddings=64), 1e6),
    },
}
LENGTH = 2048
GAP = torch.cat([torch.arange(64), 100_000 + torch.arange(64)])
"""Positions between which only the slow frequencies still tell near from far."""
Cases = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def cases() -> Cases:
    """Tokens [1, s] and positions [s] of each test: a window from 0, and one with a gap in it."""
    tokens = torch.randint(0, 1000, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"window": (tokens, torch.arange(LENGTH)), "gap": (tokens[:, : GAP.numel()], GAP)}


@pytest.fixture
def megatron_run(run_job, cases, tmp_path):
    """Load a checkpoint with Megatron's training code: `megatron_run(checkpoint, *flags)`."""

    def run(checkpoint: Path, *flags: str) -> dict:
        torch.save(cases, tmp_path / "cases.pt")
        files = (checkpoint, tmp_path / "cases.pt", tmp_path / "output.pt")
        run_job(1, [PROGRAM, *files, *flags])
        return torch.load(tmp_path / "output.pt")

    return run


def hf_logits(folder: Path, cases: Cases) -> dict[str, torch.Tensor]:
    """[b, s, v] of each case by transformers, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return {
            name: model(tokens, position_ids=positions[None]).logits
            for name, (tokens, positions) in cases.items()
        }


def largest_difference(megatron: dict, expected: dict[str, torch.Tensor], name: str) -> float:
    """Over the real vocabulary."""
    logits = megatron["logits"][name][..., : expected[name].size(-1)]
    return float((logits - expected[name]).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_megatron_computes_what_transformers_does(make_llama, megatron_run, cases, tmp_path, name):
    source = make_llama(**MODELS[name])
    hf_to_megatron(source, tmp_path / "ckpt")
    seen = megatron_run(tmp_path / "ckpt")
    expected = hf_logits(source, cases)
    for case in cases:
        difference = largest_difference(seen, expected, case)
        top = float(expected[case].abs().max())
        print(f"{name}, {case}: logits up to {top:.2f}, largest difference {difference:.1e}")
        assert difference <= TOLERANCE
        assert top > 1.0
    geometry = geometry_from_hf(source)
    rules = rules_of(geometry)
    assert seen["shapes"] == {rule.megatron_key: checkpoint_shape(rule, geometry) for rule in rules}
    assert set(seen["objects"]) <= set(extra_states(geometry))
    axes = {key.replace("layers.0.", "layers."): axis for key, axis in seen["axes"].items()}
    for rule in rules:
        assert axes.get(rule.megatron_key) == rule.tensor_parallel_axis


@pytest.mark.parametrize("flags", ["--rotary-base 490000", "--rope-scaling-factor 32"])
def test_a_wrong_rope_is_noticed(make_llama, megatron_run, cases, tmp_path, flags):
    """2% off the base, or the factor of another Llama: the gap tells."""
    source = make_llama(**rope(Llama3Rope(), 5e5))
    hf_to_megatron(source, tmp_path / "ckpt")
    seen = megatron_run(tmp_path / "ckpt", *flags.split())
    assert largest_difference(seen, hf_logits(source, cases), "gap") > 100 * TOLERANCE


def test_megatron_takes_its_arguments_from_the_checkpoint(make_llama, run_job, tmp_path):
    source = make_llama()
    hf_to_megatron(
        source,
        tmp_path / "ckpt",
        stretch=Stretch(rope_theta=2_000_000),
        options=Options(dtype="bfloat16"),
    )
    program = """
import json, sys
from megatron_long.engine import host_backend
host_backend.install()
from megatron_long.engine import megatron_adapter
from megatron.training.checkpointing import load_args_from_checkpoint
args = megatron_adapter.parse_flags(["--load", sys.argv[1], "--use-checkpoint-args"])
args, _ = load_args_from_checkpoint(args)
wanted = {name: getattr(args, name) for name in sys.argv[2:]}
print(json.dumps(wanted))
"""
    geometry = geometry_from_hf(source)
    expected = {
        "num_layers": geometry.num_layers,
        "hidden_size": geometry.hidden_size,
        "ffn_hidden_size": geometry.ffn_hidden_size,
        "num_attention_heads": geometry.num_attention_heads,
        "num_query_groups": geometry.num_query_groups,
        "group_query_attention": True,
        "kv_channels": geometry.kv_channels,
        "max_position_embeddings": geometry.max_position_embeddings,
        "seq_length": geometry.max_position_embeddings,
        "padded_vocab_size": 1024,
        "position_embedding_type": "rope",
        "rotary_base": 2_000_000,
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    result = run_job(1, ["-c", program, tmp_path / "ckpt", *expected])
    assert json.loads(result.stdout.splitlines()[-1]) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        ("float32", "--tensor-model-parallel-size 2 --sequence-parallel"),
        ("bfloat16", "--pipeline-model-parallel-size 2 --use-distributed-optimizer --bf16"),
    ],
)
def test_export_after_training_in_a_layout(
    make_llama, read_weights, megatron_run, run_job, tiny_dataset, cases, tmp_path, dtype, layout
):
    """Converted, trained by two processes at another RoPE base, exported: still one model."""
    source = make_llama(tied=dtype == "bfloat16", dtype=dtype)
    hf_to_megatron(source, tmp_path / "start")
    flags = [
        *("--recipe", "tiny_debug", "--seq-length", "128", "--max-position-embeddings", "128"),
        *("--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", "2"),
        *("--lr", "1e-2", "--min-lr", "1e-2", "--save-interval", "2", "--rotary-base", "2000000"),
        *("--finetune", *layout.split()),
    ]
    folders = ("--load", tmp_path / "start", "--save", tmp_path / "trained")
    command = ["-m", "megatron_long.pretrain", *flags, *folders, "--dataset", tiny_dataset]
    run_job(2, command)
    report = megatron_to_hf(tmp_path / "trained", tmp_path / "hf", options=Options(verify=True))
    assert report.dtype == dtype
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["rope_theta"], config["max_position_embeddings"]) == (2000000.0, 128)
    exported, original = hf_logits(tmp_path / "hf", cases), hf_logits(source, cases)
    difference = largest_difference(megatron_run(tmp_path / "trained"), exported, "gap")
    print(f"trained: largest difference {difference:.1e}")
    assert difference <= TOLERANCE
    assert (exported["gap"] - original["gap"]).abs().max() > 100 * TOLERANCE
    if dtype == "bfloat16":  # the optimizer's float32 main copy, rounded, is the model
        megatron_to_hf(tmp_path / "trained", tmp_path / "main", weights="main")
        main, model = read_weights(tmp_path / "main"), read_weights(tmp_path / "hf")
        assert main.keys() == model.keys()
        assert all(torch.equal(main[name], model[name]) for name in model)
        return
    with pytest.raises(ConfigError, match="main copy in float32 is not in the checkpoint"):
        megatron_to_hf(tmp_path / "trained", tmp_path / "main", weights="main")


@pytest.mark.slow
def test_export_after_training_with_yarn(
    make_llama, megatron_run, run_job, tiny_dataset, cases, tmp_path
):
    """`--rope-method` reaches training, the sidecar, the checkpoint and the export; so does a resume."""
    source = make_llama(max_position_embeddings=64)
    hf_to_megatron(source, tmp_path / "start")
    command = ["-m", "megatron_long.pretrain", "--recipe", "tiny_debug", "--rope-method", "yarn"]
    command += ["--seq-length", "128", "--max-position-embeddings", "128", "--lr", "1e-2"]
    command += ["--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", "1"]
    command += ["--min-lr", "1e-2", "--dataset", tiny_dataset, "--save", tmp_path / "trained"]
    command += ["--pretrained-checkpoint", tmp_path / "start", "--load", tmp_path / "trained"]
    for iterations in (1, 2):  # the second goes on from the first
        more = ["--override-opt-param-scheduler", "--train-iters", iterations]
        run_job(1, [*command, *more])
    expected = YarnRope(factor=2.0, original_max_position_embeddings=64)
    assert geometry_from_hf(tmp_path / "trained/hf_config.json").rope == expected
    megatron_to_hf(tmp_path / "trained", tmp_path / "hf", options=Options(verify=True))
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["rope_parameters"] == {**expected.to_hf(), "rope_theta": 500_000.0}
    exported = hf_logits(tmp_path / "hf", cases)
    seen = megatron_run(tmp_path / "trained")
    assert largest_difference(seen, exported, "window") <= TOLERANCE
    plain = config | {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
    (tmp_path / "hf/config.json").write_text(json.dumps(plain | {"rope_scaling": None}))
    changed = hf_logits(tmp_path / "hf", cases)
    assert (exported["window"] - changed["window"]).abs().max() > 100 * TOLERANCE
