"""Which weights export, evaluation and a new start take of a run with FP8 parameters, and what they say."""

from argparse import Namespace

import pytest
import torch

from megatron_long.checkpoint.megatron_folder import MAIN_PREFIXES, choose_weights
from megatron_long.checkpoint.torch_dist import COMMON_STATE
from megatron_long.checkpoint.torch_dist_writer import LazyPiece, write_torch_dist
from megatron_long.errors import ConfigError
from megatron_long.model.mapping import RULES


def write(folder, *, fp8: bool, main: bool) -> None:
    key = RULES[0].megatron_key
    pieces = [
        LazyPiece(
            key=prefix + key,
            global_shape=(2,),
            offset=(0,),
            shape=(2,),
            dtype=torch.float32,
            make=lambda: torch.zeros(2),
        )
        for prefix in ("", *([MAIN_PREFIXES[0]] if main else []))
    ]
    write_torch_dist(folder, pieces, {COMMON_STATE: {"args": Namespace(fp8_param_gather=fp8)}})


@pytest.mark.parametrize(
    ("fp8", "wanted", "prefix", "words"),
    [
        (True, "auto", MAIN_PREFIXES[0], "float32 main copy"),
        (True, "model", "", "as FP8 rounded them"),
        (False, "auto", "", ""),
        (False, "main", MAIN_PREFIXES[0], "float32 main copy"),
    ],
)
def test_the_main_copy_where_fp8_rounded(fp8, wanted, prefix, words, tmp_path):
    write(tmp_path, fp8=fp8, main=True)
    found, said = choose_weights(tmp_path, wanted)
    assert found == prefix
    assert words in said
    assert bool(words) == bool(said)


def test_no_main_copy(tmp_path):
    write(tmp_path, fp8=True, main=False)
    with pytest.raises(
        ConfigError, match=r"rounded to FP8.* --weights model uses those that are there"
    ):
        choose_weights(tmp_path, "auto")
    assert choose_weights(tmp_path / "no-torch-dist", "auto") == ("", "")
