"""Round trips bit by bit, and every kind of bad input named before anything is left behind."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from megatron_long.checkpoint.hashes import files_within, find_damage, read_hashes
from megatron_long.conversion.convert import hf_to_megatron
from megatron_long.conversion.export import megatron_to_hf
from megatron_long.conversion.options import Options
from megatron_long.conversion.stretch import Stretch
from megatron_long.errors import ConfigError, DataError
from tests.fake_checkpoints import find_iteration, read_geometry

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def converted(make_llama, tmp_path_factory) -> Path:
    """A Megatron checkpoint of the untied float32 Llama."""
    output = tmp_path_factory.mktemp("megatron") / "ckpt"
    hf_to_megatron(make_llama(), output)
    return output


@pytest.fixture
def checkpoint_copy(converted, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(converted, tmp_path / "ckpt"))


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Names, types and bits are equal."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_equal(make_llama, read_weights, tmp_path, tied, dtype):
    source = make_llama(tied=tied, dtype=dtype)
    hf_to_megatron(source, tmp_path / "megatron", options=Options(verify=True))
    report = megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", options=Options(verify=True))
    assert_same_bits(read_weights(source), read_weights(tmp_path / "hf"))
    assert report.dtype == dtype
    for name in ("tokenizer.model", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.model", b"", "tokenizer.model is empty; download it again"),
        ("tokenizer.json", b"", "tokenizer.json is empty"),
        (
            "tokenizer.model",
            b"version https://git-lfs",
            r"not a SentencePiece model .* b'version https",
        ),
        ("tokenizer.json", b"<html>", "tokenizer.json is not a JSON object .* b'<html>'"),
        ("tokenizer.json", b"[" * 100_000, "tokenizer.json is not a JSON object"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json is not a JSON object"),
    ],
)
def test_a_damaged_tokenizer_is_refused(name, content, words, make_llama, tmp_path):
    source = shutil.copytree(make_llama(), tmp_path / "hf")
    (source / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        hf_to_megatron(source, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_a_tokenizer_of_another_kind_is_copied_with_a_warning(make_llama, tmp_path, caplog):
    source = shutil.copytree(make_llama(), tmp_path / "hf")
    content = '{"version": "1.0", "model": {"type": "OfTomorrow"}}'
    (source / "tokenizer.json").write_text(content)
    hf_to_megatron(source, tmp_path / "megatron")
    assert (tmp_path / "megatron/tokenizer/tokenizer.json").read_text() == content
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"{source / 'tokenizer.json'} cannot be loaded here" in warning


def test_hashes_taken_while_writing_are_those_of_the_files(converted, checkpoint_copy):
    release = checkpoint_copy / "release"
    hashed = read_hashes(release)["files"]
    assert sorted(hashed) == files_within(release)
    assert find_damage(release) == []
    for name in hashed:
        damaged = bytearray((release / name).read_bytes())
        damaged[len(damaged) // 2] ^= 1
        (release / name).write_bytes(damaged)
        assert [name in found for found in find_damage(release)] == [True], name
        shutil.copyfile(converted / "release" / name, release / name)


def test_sharded_input_and_output(make_llama, read_weights, tmp_path):
    source = make_llama(max_shard_size="300KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", options=Options(max_shard_bytes=300_000))
    assert_same_bits(read_weights(source), read_weights(tmp_path / "hf"))
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 1
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert_same_bits(dict(model.state_dict()), read_weights(source))


def test_types_are_cast_on_request(make_llama, read_weights, tmp_path):
    source = make_llama()
    hf_to_megatron(source, tmp_path / "megatron", options=Options(verify=True, dtype="bfloat16"))
    megatron_to_hf(
        tmp_path / "megatron", tmp_path / "hf", options=Options(verify=True, dtype="float32")
    )
    expected = {name: t.bfloat16().float() for name, t in read_weights(source).items()}
    assert_same_bits(expected, read_weights(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "float32"


def test_a_new_rope_base_reaches_both_spellings(make_llama, tmp_path):
    from transformers import AutoConfig

    hf_to_megatron(make_llama(), tmp_path / "megatron", stretch=Stretch(rope_theta=2_000_000))
    assert read_geometry(tmp_path / "megatron").rotary_base == 2_000_000
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["rope_theta"] == 2_000_000  # transformers 4
    assert config["rope_parameters"]["rope_theta"] == 2_000_000  # transformers 5
    assert AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters["rope_theta"] == 2_000_000


def test_dry_run_writes_nothing(make_llama, converted, tmp_path):
    report = hf_to_megatron(make_llama(), tmp_path / "megatron", options=Options(dry_run=True))
    assert report.num_tensors == 21
    assert (
        megatron_to_hf(converted, tmp_path / "hf", options=Options(dry_run=True)).num_tensors == 21
    )
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_without_force(make_llama, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").touch()
    with pytest.raises(ConfigError, match=r"--output .* exists already"):
        hf_to_megatron(make_llama(), output)
    assert (output / "precious").exists()
    hf_to_megatron(make_llama(), output, options=Options(force=True))
    assert not (output / "precious").exists()


def test_output_may_not_replace_the_input(llama_copy):
    for output in (llama_copy, llama_copy.parent):
        with pytest.raises(ConfigError, match="would replace --input"):
            hf_to_megatron(llama_copy, output, options=Options(force=True))


def expect_refusal(folder: Path, kind: type[Exception], message: str) -> None:
    """The conversion fails with these words and leaves nothing."""
    output = folder.parent / "output"
    with pytest.raises(kind, match=message):
        hf_to_megatron(folder, output)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_missing_folder_and_files(llama_copy, tmp_path):
    with pytest.raises(ConfigError, match=r"--input .*nowhere does not exist"):
        hf_to_megatron(tmp_path / "nowhere", tmp_path / "output")
    (llama_copy / "model.safetensors").rename(llama_copy / "pytorch_model.bin")
    expect_refusal(
        llama_copy, ConfigError, r"only pickled weights \(pytorch_model.bin\).*--allow-pickle"
    )
    (llama_copy / "pytorch_model.bin").unlink()
    expect_refusal(llama_copy, ConfigError, "holds neither model.safetensors nor")
    (llama_copy / "config.json").unlink()
    expect_refusal(llama_copy, ConfigError, "config.json does not exist")


def test_a_missing_shard_is_named(make_llama, tmp_path):
    folder = shutil.copytree(make_llama(max_shard_size="300KB"), tmp_path / "damaged")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    expect_refusal(folder, DataError, f"names {shard.name}, which is missing; download that file")


def test_damaged_index(make_llama, tmp_path):
    folder = shutil.copytree(make_llama(max_shard_size="300KB"), tmp_path / "damaged")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, right = next(iter(content["weight_map"].items()))
    content["weight_map"][name] = "model-00002-of-00099.safetensors"
    index.write_text(json.dumps(content))
    expect_refusal(folder, DataError, "names model-00002-of-00099.safetensors, which is missing")
    others = [path.name for path in folder.glob("*.safetensors") if path.name != right]
    content["weight_map"][name] = others[0]
    index.write_text(json.dumps(content))
    expect_refusal(folder, DataError, f"does not hold {name}, which .* says it does")
    index.write_text('{"weight_map": 3}')
    expect_refusal(folder, DataError, "is not an index of weights")


def test_unknown_architecture_lists_the_known(llama_copy):
    config = json.loads((llama_copy / "config.json").read_text())
    config["architectures"] = ["GemmaForCausalLM"]
    (llama_copy / "config.json").write_text(json.dumps(config))
    expect_refusal(llama_copy, ConfigError, "GemmaForCausalLM, .*; known: LlamaForCausalLM")


def test_truncated_safetensors(llama_copy):
    path = llama_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    expect_refusal(llama_copy, DataError, "model.safetensors is not a complete safetensors file")


def test_wrong_shape_names_tensor_seen_and_expected(llama_copy, edit_weights):
    edit_weights(llama_copy, lambda tensors: tensors.update({NORM: torch.ones(63)}))
    expect_refusal(llama_copy, DataError, rf"{NORM} has shape \[63\]; .* \[64\]")


def test_missing_and_left_over_tensors(llama_copy, edit_weights):
    edit_weights(llama_copy, lambda tensors: tensors.update(extra=torch.ones(2)))
    expect_refusal(llama_copy, DataError, "holds extra, which no llama model has")
    edit_weights(llama_copy, lambda tensors: tensors.pop(NORM))
    expect_refusal(llama_copy, DataError, f"lacks {NORM}")


def test_more_layers_than_tensors_are_refused_at_once(llama_copy):
    """The names of 10^30 layers would never be through."""
    path = llama_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**30}))
    expect_refusal(llama_copy, DataError, "too few for the 1,000,000,.* layers")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(llama_copy, edit_weights, value):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM][3:5] = value

    edit_weights(llama_copy, damage)
    expect_refusal(llama_copy, DataError, rf"tensor {NORM} holds 2 values .* of 64")


def test_mixed_and_unknown_types(llama_copy, edit_weights, tmp_path):
    edit_weights(llama_copy, lambda tensors: tensors.update({NORM: torch.ones(64).bfloat16()}))
    expect_refusal(llama_copy, ConfigError, "mixes .*choose one with --dtype")
    hf_to_megatron(llama_copy, tmp_path / "output", options=Options(verify=True, dtype="float32"))
    edit_weights(llama_copy, lambda tensors: tensors.update({NORM: torch.ones(64).to(torch.int8)}))
    with pytest.raises(DataError, match=f"{NORM} is stored as I8; known: F32, BF16, F16"):
        hf_to_megatron(llama_copy, tmp_path / "other")


def test_a_tied_model_with_its_output_layer_twice(make_llama, edit_weights, tmp_path):
    folder = shutil.copytree(make_llama(tied=True), tmp_path / "damaged")
    embedding = "model.embed_tokens.weight"
    edit_weights(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()})
    )
    hf_to_megatron(folder, tmp_path / "output", options=Options(verify=True))
    shutil.rmtree(tmp_path / "output")
    edit_weights(folder, lambda tensors: tensors["lm_head.weight"].add_(1.0))
    expect_refusal(folder, DataError, "lm_head.weight differs from model.embed_tokens.weight")


def test_fractional_rope_base_is_refused(make_llama, tmp_path):
    with pytest.raises(ConfigError, match=r"10000\.5 is not a whole number"):
        hf_to_megatron(make_llama(), tmp_path / "out", stretch=Stretch(rope_theta=10000.5))


def test_which_iteration(checkpoint_copy, caplog):
    with pytest.raises(ConfigError, match=r"--iteration 7 is not in .*; there: release"):
        find_iteration(checkpoint_copy, 7)
    shutil.copytree(checkpoint_copy / "release", checkpoint_copy / "iter_0000010")
    assert find_iteration(checkpoint_copy, 10).name == "iter_0000010"
    assert find_iteration(checkpoint_copy).name == "release"
    tracker = checkpoint_copy / "latest_checkpointed_iteration.txt"
    tracker.write_text(
        "10\n"
    )  # by hand, or by a flipped bit: the record next to it is not followed
    assert find_iteration(checkpoint_copy).name == "release"
    assert "names 10, and the newest checkpoint of this run is release" in caplog.text
    (checkpoint_copy / "hashes.json").unlink()
    tracker.write_text("20\n")
    with pytest.raises(
        DataError, match=r"names iter_0000020, and .*/iter_0000020 is missing; .*: 10"
    ):
        find_iteration(checkpoint_copy)
    tracker.write_text("soon")
    assert find_iteration(checkpoint_copy).name == "iter_0000010"  # as evaluation and training do
    assert "is damaged: it holds 'soon'" in caplog.text
    tracker.unlink()
    shutil.copytree(checkpoint_copy / "release", checkpoint_copy / "iter_0000009")
    assert find_iteration(checkpoint_copy).name == "iter_0000010"
    assert "no record in" in caplog.text
    assert (
        "10 is used, the highest of those there; to use another one, give --iteration"
        in caplog.text
    )
    with pytest.raises(ConfigError, match=r"--input .*nowhere does not exist"):
        find_iteration(checkpoint_copy / "nowhere")


def damage_short(folder: Path) -> None:
    path = max((folder / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-100])


def damage_bytes(folder: Path) -> None:
    for path in (folder / "release").glob("*.distcp"):
        path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "release/metadata.json").unlink(), "no complete metadata.json"),
        (lambda folder: (folder / "release/metadata.json").write_text("{}"), "format None"),
        (lambda folder: (folder / "release/.metadata").write_bytes(b"x"), ".metadata cannot be"),
        (lambda folder: (folder / "release/__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (damage_short, r"\.distcp has \d+ bytes; the checkpoint's index needs"),
        (damage_bytes, "common state cannot be read"),
    ],
)
def test_damaged_checkpoint(checkpoint_copy, damage, message):
    damage(checkpoint_copy)
    with pytest.raises(DataError, match=r"damaged|missing|bytes instead of|cannot be read"):
        megatron_to_hf(checkpoint_copy, checkpoint_copy.parent / "hf")
    unchecked = Options(check_hashes=False)  # as for checkpoints of other programs
    with pytest.raises(DataError, match=message):
        megatron_to_hf(checkpoint_copy, checkpoint_copy.parent / "hf", options=unchecked)
    assert [path.name for path in checkpoint_copy.parent.iterdir()] == ["ckpt"]


def edit_hf_config(folder: Path, **change: object) -> None:
    path = folder / "hf_config.json"
    (folder / "hashes.json").unlink(missing_ok=True)  # the change is meant
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_changed_file_beside_the_checkpoint(checkpoint_copy, tmp_path):
    path = checkpoint_copy / "hf_config.json"
    path.write_text(path.read_text().replace("silu", "gelu"))
    with pytest.raises(DataError, match=r"hf_config.json is damaged: its hash has changed"):
        megatron_to_hf(checkpoint_copy, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_checkpoint_that_contradicts_its_config(checkpoint_copy, make_llama, tmp_path):
    edit_hf_config(checkpoint_copy, num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"num_layers of the checkpoint is 2, .* makes it 3"):
        megatron_to_hf(checkpoint_copy, tmp_path / "hf")
    (checkpoint_copy / "hf_config.json").unlink()
    with pytest.raises(ConfigError, match="give --hf-config"):
        megatron_to_hf(checkpoint_copy, tmp_path / "hf")
    report = megatron_to_hf(
        checkpoint_copy, tmp_path / "hf", hf_config=make_llama(), options=Options(verify=True)
    )
    assert report.num_tensors == 21


def test_checkpoint_of_other_tensors(checkpoint_copy, tmp_path):
    edit_hf_config(checkpoint_copy, num_key_value_heads=4)
    with pytest.raises(DataError, match=r"linear_qkv.weight has shape \[2, 96, 64\]; .* \[2, 128,"):
        megatron_to_hf(checkpoint_copy, tmp_path / "hf")


def test_not_a_number_in_a_checkpoint_is_named(llama_copy, edit_weights, tmp_path, monkeypatch):
    from megatron_long.conversion import pieces

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM][0] = float("nan")

    edit_weights(llama_copy, damage)
    monkeypatch.setattr(pieces, "check_finite", lambda tensor, name: None)
    hf_to_megatron(llama_copy, tmp_path / "ckpt")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"linear_qkv.layer_norm_weight \(layer 1\) holds 1 values"):
        megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf")


def test_a_full_disk_is_an_error_and_leaves_nothing(make_llama, converted, tmp_path):
    """In a process whose files may not grow beyond 300 kB."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(DataError, match="cannot be written"):
            hf_to_megatron(make_llama(), tmp_path / "ckpt")
        with pytest.raises(DataError, match="cannot be written"):
            megatron_to_hf(converted, tmp_path / "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert list(tmp_path.iterdir()) == []


def test_verify_notices_a_flipped_bit(make_llama, tmp_path, monkeypatch):
    from megatron_long.conversion import convert

    write = convert.write_release

    def write_wrong(folder, geometry, stored, read, to_megatron, progress):
        def read_wrong(unit):
            return [(name, tensor + (1e-6 if name == NORM else 0)) for name, tensor in read(unit)]

        return write(folder, geometry, stored, read_wrong, to_megatron, progress)

    monkeypatch.setattr(convert, "write_release", write_wrong)
    with pytest.raises(DataError, match=f"--verify: tensor {NORM} read back differs"):
        hf_to_megatron(make_llama(), tmp_path / "ckpt", options=Options(verify=True))
    assert list(tmp_path.iterdir()) == []
