import os
import shutil

from megatron_long.checkpoint.sidecars import TRACKER_NAME
from megatron_long.evaluation.fingerprint import fingerprint
from megatron_long.evaluation.input_checks import find_checkpoint, find_hf_folder
from tests.fake_checkpoints import write_fake_checkpoint

from .fakes import write_checkpoint_folder


def test_hf_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_text("one")
    (tmp_path / "README.md").write_text("nothing that counts")
    first = fingerprint(find_hf_folder(tmp_path))
    (tmp_path / "README.md").write_text("changed")
    assert fingerprint(find_hf_folder(tmp_path)) == first
    os.utime(weights, ns=(1, 1))
    second = fingerprint(find_hf_folder(tmp_path))
    (tmp_path / "config.json").write_text('{"rope_theta": 5}')
    assert len({first, second, fingerprint(find_hf_folder(tmp_path))}) == 3


def test_a_checkpoint_with_hashes_may_be_copied_and_grow(tmp_path):
    folder = write_checkpoint_folder(tmp_path / "ckpt")
    (folder / "iter_0000010" / "hashes.json").write_text("{}")
    first = fingerprint(find_checkpoint(folder))
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    write_fake_checkpoint(tmp_path / "copy", 20)
    (tmp_path / "copy" / TRACKER_NAME).write_text("10")
    assert fingerprint(find_checkpoint(tmp_path / "copy")) == first
    (tmp_path / "copy" / "iter_0000010" / "hashes.json").write_text("{ }")
    assert fingerprint(find_checkpoint(tmp_path / "copy")) != first
