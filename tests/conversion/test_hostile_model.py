"""Nothing that lies in a model folder or a converted checkpoint is run by what reads it."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_long.conversion.convert import hf_to_megatron
from megatron_long.conversion.export import gguf_to_hf, megatron_to_hf
from megatron_long.conversion.options import Options
from megatron_long.errors import DataError
from megatron_long.evaluation.hf_scorer import open_hf_scorer
from megatron_long.evaluation.input_checks import find_checkpoint, find_hf_folder, open_tokenizer
from tests import hostile
from tests.fake_checkpoints import read_geometry

UNCHECKED = Options(check_hashes=False, force=True)
MODEL = "decoder.final_layernorm.weight"


def test_a_model_folder(make_llama, read_weights, tmp_path):
    """Of safetensors, and of pickled weights read on request."""
    folder = Path(shutil.copytree(make_llama(), tmp_path / "hf"))
    (folder / "chat_template.jinja").touch()
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 384}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    options = Options(force=True, allow_pickle=True)
    readers = [
        lambda: hf_to_megatron(folder, tmp_path / "ckpt", options=options),
        lambda: open_hf_scorer(folder, context_length=64),
        lambda: open_tokenizer(None, find_hf_folder(folder)).encode_prompt("<|im_start|> a"),
    ]
    tokenizer = open_tokenizer(None, find_hf_folder(folder))
    assert tokenizer.encode_prompt("<|im_start|>").tolist() == [tokenizer.vocab_size]
    assert hostile.plant_everywhere(folder, readers) >= 60
    (folder / "model.safetensors").unlink()
    torch.save(read_weights(make_llama()), folder / "pytorch_model.bin")
    hf_to_megatron(folder, tmp_path / "ckpt", options=options)
    assert hostile.plant_everywhere(folder, readers) >= 60


def test_code_of_a_model_folder_is_not_run(make_llama, tmp_path):
    """`auto_map` names Python files next to the weights, which transformers can run."""
    folder = Path(shutil.copytree(make_llama(), tmp_path / "hf"))
    text = (folder / "config.json").read_text()
    named = '{"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},'
    (folder / "config.json").write_text(text.replace("{", named, 1))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Own: pass\n")
    open_hf_scorer(folder, context_length=64)
    hf_to_megatron(folder, tmp_path / "ckpt", options=Options(verify=True, check_logits=True))
    assert not (tmp_path / "marker").exists()


def test_a_gguf_file(tmp_path):
    path = tmp_path / "gguf" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    readers = [
        lambda: gguf_to_hf(path, tmp_path / "hf"),
        lambda: hf_to_megatron(path, tmp_path / "ckpt"),
    ]
    assert hostile.plant_everywhere(path.parent, readers) == 2 * len(hostile.FORMS)


@pytest.fixture
def checkpoint(make_llama, tmp_path) -> Path:
    """A converted checkpoint without hashes, as of another program."""
    hf_to_megatron(make_llama(), tmp_path / "ckpt")
    for path in (tmp_path / "ckpt").rglob("hashes.json"):
        path.unlink()
    (tmp_path / "ckpt/release/common.pt").touch()  # where older versions of Megatron put objects
    old_format = tmp_path / "ckpt/release/mp_rank_00/model_optim_rng.pt"
    old_format.parent.mkdir()
    old_format.touch()
    return tmp_path / "ckpt"


def test_a_checkpoint(checkpoint, tmp_path):
    readers = [
        lambda: megatron_to_hf(checkpoint, tmp_path / "hf", options=UNCHECKED),
        lambda: megatron_to_hf(checkpoint, tmp_path / "hf", options=Options(verify=True)),
        lambda: read_geometry(checkpoint),
        lambda: open_tokenizer(None, find_checkpoint(checkpoint)),
    ]
    assert hostile.plant_everywhere(checkpoint, readers) >= 150


@pytest.mark.parametrize("form", hostile.FORMS)
@pytest.mark.parametrize("key", ["common_state/shard_0_1", MODEL])
def test_an_object_within_a_checkpoint(key, form, checkpoint, tmp_path):
    """The index is right, and what it points to is hostile."""
    hostile.plant_object(checkpoint / "release", key, form(tmp_path / "marker"))
    with pytest.raises(DataError, match="cannot be read"):
        megatron_to_hf(checkpoint, tmp_path / "hf", options=UNCHECKED)
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "hf").exists()
