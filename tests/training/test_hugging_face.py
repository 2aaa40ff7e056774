"""Both ends of a run in Hugging Face's format: what it starts from, and what it leaves behind."""

import json
from pathlib import Path

import pytest

from megatron_long import command_line
from megatron_long.conversion.export import megatron_to_hf
from megatron_long.engine import host_backend
from megatron_long.errors import ConfigError, DataError
from megatron_long.flags.backend import HOST
from tests.fake_checkpoints import write_fake_checkpoint

host_backend.install()

FLAGS = """
--recipe tiny_debug --seq-length 128 --max-position-embeddings 128 --micro-batch-size 1
--global-batch-size 2 --train-iters 2 --lr 1e-2 --min-lr 1e-2 --save-interval 5 --rotary-base 2000000
""".split()
TOKENIZERS = ("tokenizer.model", "generation_config.json")


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory, tiny_tokenizer) -> Path:
    """A tiny Qwen2 with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("qwen2") / "hf"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer.read_bytes())
    (folder / "generation_config.json").write_text('{"do_sample": true}')
    return folder


def parse(*argv: object):
    return command_line.parse([*FLAGS, *map(str, argv), "--allow-repeat"], HOST, 1)


@pytest.mark.slow
def test_starts_straight_and_leaves_a_model(hf_model, run_job, tiny_dataset, tmp_path):
    """The export is bit for bit what the offline conversion of the saved checkpoint gives."""
    command = ["-m", "megatron_long.pretrain", *FLAGS, "--dataset", tiny_dataset]
    command += ["--hf-checkpoint", hf_model, "--tensor-model-parallel-size", 2]
    command += ["--save", tmp_path / "save", "--load", tmp_path / "save"]
    command += ["--export-hf", tmp_path / "hf", "--loss-log", tmp_path / "log.jsonl"]
    run_job(2, command)
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["lm loss"] == pytest.approx(mean_loss(hf_model, tiny_dataset), abs=1e-5)
    assert second["lm loss"] != first["lm loss"]
    megatron_to_hf(tmp_path / "save", tmp_path / "offline")
    names = sorted(path.name for path in (tmp_path / "offline").iterdir())
    assert {"config.json", "model.safetensors", *TOKENIZERS} <= set(names)
    assert names == sorted(path.name for path in (tmp_path / "hf").iterdir())
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "offline" / name).read_bytes()
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert (config["rope_theta"], config["max_position_embeddings"]) == (2_000_000, 128)
    # Started again when all is done: nothing is trained, and the export that is gone is made again.
    (tmp_path / "hf").rename(tmp_path / "moved")
    again = run_job(2, command)
    assert "nothing to train" in again.stdout
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (
        tmp_path / "moved/model.safetensors"
    ).read_bytes()


def mean_loss(folder: Path, dataset: Path) -> float:
    """Of the first two windows of the dataset, by transformers, with the RoPE that is trained."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_long.dataset.indexed import IndexedDatasetReader

    rope = {"rope_type": "default", "rope_theta": 2_000_000.0}
    model = AutoModelForCausalLM.from_pretrained(folder, rope_parameters=rope).eval()
    tokens = torch.from_numpy(
        IndexedDatasetReader(dataset / "train").read_span(0, 257).astype("int64")
    )
    windows = torch.stack([tokens[:129], tokens[128:257]])
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def test_geometry_comes_from_the_model(hf_model, tiny_dataset):
    _, args = parse("--hf-checkpoint", hf_model, "--dataset", tiny_dataset)
    assert (args.num_layers, args.hidden_size, args.padded_vocab_size) == (2, 64, 512)
    assert args.add_qkv_bias


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hf-checkpoint", "/nowhere"], "--hf-checkpoint /nowhere does not exist"),
        (["--hf-checkpoint", "MODEL", "--pretrained-checkpoint", "CKPT"], "are two starts"),
        (
            ["--export-hf", "/somewhere"],
            "--export-hf /somewhere writes the checkpoint saved last; give --save",
        ),
    ],
)
def test_bad_flags_are_refused(flags, message, hf_model, tiny_dataset, tmp_path):
    write_fake_checkpoint(tmp_path, None)
    paths = {"MODEL": hf_model, "CKPT": tmp_path}
    with pytest.raises(ConfigError, match=message):
        parse("--dataset", tiny_dataset, *(paths.get(word, word) for word in flags))


def test_an_export_is_not_written_over(tmp_path):
    from megatron_long.flags.relations import check_export

    (tmp_path / "precious").touch()
    with pytest.raises(ConfigError, match=r"--export-hf .* exists already"):
        check_export(str(tmp_path))
    check_export(str(tmp_path / "new"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be made: .*file is a file, or may not be"):
        check_export(str(tmp_path / "file" / "new" / "model"))


def test_damaged_weights_are_seen_before_training(hf_model, tiny_dataset, tmp_path):
    import shutil

    damaged = Path(shutil.copytree(hf_model, tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DataError, match="is not a complete safetensors file"):
        parse("--hf-checkpoint", damaged, "--dataset", tiny_dataset)
