"""The export of an average is the average of the exports, bit by bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_long.checkpoint.hashes import read_hashes
from megatron_long.conversion.average import average_checkpoints
from megatron_long.conversion.convert import hf_to_megatron
from megatron_long.conversion.export import megatron_to_hf
from megatron_long.conversion.options import Options
from megatron_long.errors import ConfigError, DataError


def exported(checkpoint: Path, output: Path) -> dict[str, torch.Tensor]:
    folder, _, name = str(checkpoint).partition("/iter_")
    iteration = int(name) if name else None
    megatron_to_hf(Path(folder), output, iteration=iteration)
    return {
        k: v for path in sorted(output.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def assert_is_mean(inputs: list[Path], average: Path, folder: Path) -> None:
    parts = [exported(path, folder / f"hf{number}") for number, path in enumerate(inputs)]
    found = exported(average, folder / "mean")
    assert found.keys() == parts[0].keys()
    for name, tensor in found.items():
        total = sum(part[name].double() for part in parts)
        assert torch.equal(tensor, (total / len(parts)).to(tensor.dtype)), name
        assert tensor.dtype == parts[0][name].dtype
    assert any(not torch.equal(found[name], parts[0][name]) for name in found)


@pytest.fixture(scope="module")
def checkpoints(make_llama, tmp_path_factory):
    """A function that makes this many converted models of a type, alike but for their values."""

    def make(count: int, dtype: str = "float32") -> list[Path]:
        folder, paths = tmp_path_factory.mktemp("models"), []
        for number in range(count):
            model = shutil.copytree(make_llama(dtype=dtype), folder / f"hf{number}")
            for path in model.glob("*.safetensors"):
                torch.manual_seed(number)
                noisy = {k: v + torch.randn(v.shape).to(v) for k, v in load_file(path).items()}
                save_file(noisy, path, {"format": "pt"})
            hf_to_megatron(model, folder / f"ckpt{number}")
            paths.append(folder / f"ckpt{number}")
        return paths

    return make


@pytest.mark.parametrize(("count", "dtype"), [(2, "float32"), (3, "bfloat16")])
def test_of_converted_models(count, dtype, checkpoints, tmp_path):
    inputs = checkpoints(count, dtype)
    report = average_checkpoints(inputs, tmp_path / "out")
    assert report.dtype == dtype
    assert_is_mean(inputs, tmp_path / "out", tmp_path)
    assert set(read_hashes(tmp_path / "out")) >= {"latest"}
    assert (tmp_path / "mean" / "tokenizer.model").is_file()
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["averaged"] == [str(path / "release") for path in inputs]


@pytest.mark.slow
def test_of_checkpoints_of_a_run_in_a_layout_and_training_from_it(jobs, tmp_path):
    layout = ("--tensor-model-parallel-size", 2, "--context-parallel-size", 2, "--bf16")
    layout += ("--use-distributed-optimizer",)
    run = tmp_path / "run"
    jobs.run(4, *layout, "--train-iters", 3, "--save-interval", 1, "--save", run)
    inputs = [run / f"iter_{step:07d}" for step in (1, 2, 3)]
    average_checkpoints(inputs, tmp_path / "out")
    assert_is_mean(inputs, tmp_path / "out", tmp_path)
    start = ("--pretrained-checkpoint", tmp_path / "out", "--train-iters", 1)
    assert "weights alone, from step 0" in jobs.run(1, *start).text


def test_bad_inputs_are_refused_and_leave_nothing(checkpoints, make_llama, tmp_path):
    one, two = checkpoints(2)
    other = tmp_path / "other"
    hf_to_megatron(make_llama(tied=True), other)
    (half,) = checkpoints(1, "bfloat16")
    output = tmp_path / "out"
    for inputs, words in (
        ([one], "names 1 different checkpoints; give two or more"),
        ([one, two, one], "names 2 different checkpoints"),
        ([one, other], r"are different models \(.*tie_embeddings: False and True"),
        ([one, half], r"\(dtype: torch.float32 and torch.bfloat16\).*, or --dtype"),
        ([one, tmp_path / "none"], "does not exist"),
        ([one, two / "iter_0000007"], "does not exist"),
        ([one, output], "does not exist"),
    ):
        with pytest.raises(ConfigError, match=words):
            average_checkpoints(inputs, output)
    average_checkpoints([one, half], output, options=Options(dtype="float32", dry_run=True))
    damaged = shutil.copytree(two, tmp_path / "damaged")
    path = next((damaged / "release").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        average_checkpoints([one, damaged], output)
    assert not output.exists()
    assert not list(tmp_path.glob(".*"))
