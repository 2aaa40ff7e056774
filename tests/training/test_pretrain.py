"""The entry: flags in their order, bad input refused in one paragraph, files next to the checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_long import command_line, pretrain
from megatron_long.conversion.run_model import write_sidecars
from megatron_long.dataset.manifest import read_manifest
from megatron_long.engine import host_backend
from megatron_long.errors import ConfigError
from megatron_long.flags.backend import GPU, HOST
from megatron_long.flags.recipe import LLAMA3_8B, build_recipe
from megatron_long.model.geometry import geometry_from_hf
from tests.fake_checkpoints import write_fake_checkpoint

host_backend.install()

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    return tmp_path


def parse(*argv: object, backend=HOST, world_size: int = 1, repeat: bool = True):
    words = [*map(str, argv), *(["--allow-repeat"] if repeat else [])]
    return command_line.parse(words, backend, world_size)[1]


def test_command_line_wins_over_recipe_and_model(tiny_dataset, hf_folder):
    args = parse(
        *("--recipe", "llama3_8b_128k", "--hf-config", hf_folder, "--dataset", tiny_dataset),
        *("--lr", "1e-4", "--context-parallel-size", "2", "--tensor-model-parallel-size", "1"),
        backend=GPU,
        world_size=2,
    )
    assert (args.num_layers, args.padded_vocab_size, args.layernorm_epsilon) == (2, 384, 1e-6)
    assert (args.seq_length, args.rotary_base, args.bf16) == (131_072, 16_000_000, True)
    assert (args.lr, args.context_parallel_size, args.tensor_model_parallel_size) == (1e-4, 2, 1)
    assert args.untie_embeddings_and_output_weights


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], True), (["--transformer-impl", "local"], False), (["--megatron-loss"], False)],
)
def test_weight_gradients_in_place_need_no_apex_with_our_loss(flags, expected, tiny_dataset):
    """Transformer Engine's layers can; Megatron's own, and its output layer, would miss Apex's kernel."""
    args = parse("--recipe", "tiny_debug", "--dataset", tiny_dataset, *flags, backend=GPU)
    assert args.gradient_accumulation_fusion is expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "flash"),
        (["--deterministic-mode"], "auto"),
        (["--document-masking"], "auto"),
        (["--deterministic-mode", "--attention-backend", "fused"], "fused"),
        (["--deterministic-mode", "--attention-backend=fused"], "fused"),
        (["--attention-backend", "fused"], "fused"),
    ],
)
def test_special_runs_leave_the_attention_kernel_to_transformer_engine(
    flags, expected, tiny_dataset
):
    backend = replace(GPU, flash_attention=True)
    args = parse("--recipe", "tiny_debug", "--dataset", tiny_dataset, *flags, backend=backend)
    assert args.attention_backend.name == expected


def test_model_comes_from_the_checkpoint_folder(tiny_dataset, tmp_path):
    write_fake_checkpoint(tmp_path, None)
    (tmp_path / "hf_config.json").write_text(json.dumps(HF_CONFIG))
    args = parse("--load", tmp_path, "--dataset", tiny_dataset, "--seq-length", 128)
    assert (args.num_layers, args.hidden_size, args.rotary_base) == (2, 64, 10_000)


@pytest.mark.parametrize(
    ("argv", "world_size", "words"),
    [
        (
            ["--recipe", "llama3_9b"],
            1,
            "--recipe llama3_9b is unknown; choose one of llama2_7b_80k",
        ),
        (["--seq-length", "131000", "--context-parallel-size", "8"], 8, "use 130992 or 131008"),
        (["--context-parallel-size", "2"], 3, "takes 2 each; start 2 or 4 processes"),
        (
            ["--tensor-model-parallel-size", "2"],
            1,
            "1 process (--nproc-per-node * nodes) cannot hold",
        ),
        (["--train-iters", "100000"], 1, "800,000 windows of --seq-length 2048, and one pass over"),
        (
            ["--tensor-model-parallel-size", "3", "--seq-length", "256"],
            3,
            "--num-attention-heads 4 is not a multiple",
        ),
        (["--global-batch-size", "7"], 2, "--global-batch-size 7 is not a multiple"),
        (["--pipeline-model-parallel-size", "3"], 3, "--num-layers 4 is not a multiple"),
        (
            ["--load", "/nowhere"],
            1,
            "--load /nowhere does not exist; give the folder that a training run (--save)",
        ),
        (["--hf-config", "/nowhere"], 1, "/nowhere"),
        (
            ["--data-path", "x"],
            1,
            "--data-path (or --train-data-path, --data-args-path) are both given",
        ),
        (["--reset-attention-mask"], 1, "--reset-attention-mask"),
        (["--yaml-cfg", "x.yaml"], 1, "--yaml-cfg would replace all other flags"),
        (["--inprocess-restart"], 1, "--inprocess-restart is not supported"),
    ],
)
def test_bad_flags_are_refused(argv, world_size, words, tiny_dataset):
    with pytest.raises(ConfigError) as refused:
        parse(
            *("--recipe", "tiny_debug", "--dataset", tiny_dataset, *argv),
            world_size=world_size,
            repeat="--train-iters" not in argv,
        )
    assert words in str(refused.value)


def test_finished_run_ends_well(tiny_dataset, tmp_path, capsys):
    """As after a late requeue; without hashes, as here, the tracker file is believed."""
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    flags = ["--recipe", "tiny_debug", "--dataset", tiny_dataset, "--load", tmp_path]
    flags += ["--train-iters", 4, "--allow-repeat"]
    for iteration, expected in (("4", 4), ("3", 3), ("release", 0)):
        write_fake_checkpoint(tmp_path, None if iteration == "release" else int(iteration))
        assert pretrain.prepare([str(word) for word in flags])[2].iteration == expected
    tracker.write_text("4")
    assert pretrain.main([str(word) for word in flags]) == 0
    assert "is at --train-iters 4 already: nothing to train" in capsys.readouterr().out


def test_missing_data_is_refused(hf_folder):
    with pytest.raises(ConfigError, match="no training data: give --dataset"):
        parse("--recipe", "tiny_debug", "--hf-config", hf_folder)


def test_vocabulary_larger_than_the_model_is_refused(tiny_dataset):
    with pytest.raises(ConfigError, match=r"vocabulary of \d+, and the model has 128 embedding"):
        parse("--recipe", "tiny_debug", "--dataset", tiny_dataset, "--padded-vocab-size", "128")


def test_another_tokenizer_is_refused(tiny_dataset, tiny_tokenizer):
    manifest = read_manifest(tiny_dataset)
    args = parse(
        "--recipe", "tiny_debug", "--dataset", tiny_dataset, "--tokenizer-model", tiny_tokenizer
    )
    command_line.check_dataset(manifest, args)
    other = replace(manifest, tokenizer=replace(manifest.tokenizer, vocabulary_sha256="0" * 64))
    with pytest.raises(ConfigError, match=r"the tokenizer of --tokenizer-model .* is not the one"):
        command_line.check_dataset(other, args)


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_checkpoint_with_another_tokenizer_is_refused(flag, tiny_dataset, tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "tokenizer").mkdir(parents=True)
    write_fake_checkpoint(folder, None)
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    model = {"type": "BPE", "vocab": pieces, "merges": [], "unk_token": "<unk>"}
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": model}))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"the tokenizer of {flag} "):
        parse("--recipe", "tiny_debug", "--dataset", tiny_dataset, flag, folder)


def test_command_exits_with_2_and_one_paragraph(run_job, tiny_dataset, tmp_path):
    command = ["-m", "megatron_long.pretrain", "--recipe", "tiny_debug", "--dataset", tiny_dataset]
    save = tmp_path / "save"
    result = run_job(1, [*command, "--context-parallel-size", "2", "--save", save], check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "error: 1 process (--nproc-per-node * nodes) cannot hold whole" in result.stderr
    assert not save.exists()


def test_sidecars_without_a_hugging_face_model(tiny_dataset, tmp_path):
    """A model that only flags describe: what is written reads back as those flags."""
    argv = ["--recipe", "tiny_debug", "--dataset", str(tiny_dataset), "--num-layers", "2"]
    argv.append("--allow-repeat")
    ours, args = command_line.parse(argv, HOST, 1)
    write_sidecars(tmp_path, ours, args, argv)
    seen = geometry_from_hf(tmp_path / "hf_config.json")
    recipe = build_recipe("tiny_debug")
    assert seen == replace(
        recipe.model,
        num_layers=2,
        rotary_base=float(recipe.rotary_base),
        max_position_embeddings=recipe.seq_length,
    )


def test_sidecars_say_what_is_trained(tiny_dataset, hf_folder, tmp_path):
    argv = ["--hf-config", str(hf_folder), "--dataset", str(tiny_dataset), "--seq-length", "256"]
    argv += ["--max-position-embeddings", "256", "--rotary-base", "50000"]
    ours, args = command_line.parse(argv, HOST, 1)
    folder = tmp_path / "save"
    write_sidecars(folder, ours, args, argv)
    config = json.loads((folder / "hf_config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50_000
    assert config["max_position_embeddings"] == 256
    run = json.loads((folder / "run.json").read_text())
    assert run["argv"] == argv
    assert run["dataset_fingerprint"] == read_manifest(tiny_dataset).fingerprint
    assert list((folder / "tokenizer").iterdir())


def test_llama3_geometry_is_the_published_one():
    assert LLAMA3_8B.padded_vocab_size == LLAMA3_8B.vocab_size == 128_256
