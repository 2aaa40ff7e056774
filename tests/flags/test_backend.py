"""Flags that follow from what a machine offers."""

import pytest

from megatron_long.flags.backend import HOST, Backend


@pytest.mark.parametrize(
    ("transformer_engine", "flash_attention", "expected"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_flash_attention_is_asked_for_where_transformer_engine_can_call_it(
    transformer_engine, flash_attention, expected
):
    backend = Backend(
        cuda=True,
        transformer_engine=transformer_engine,
        apex=False,
        flash_attention=flash_attention,
    )
    assert (" ".join(backend.to_argv()).count("--attention-backend flash") == 1) is expected


def test_host_has_no_cuda_kernels():
    assert "--attention-backend" not in HOST.to_argv()
