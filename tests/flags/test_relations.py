"""Rules that relate several flags, with the GPU that the machine of a test lacks."""

import contextlib
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from megatron_long.errors import ConfigError
from megatron_long.flags import relations

GIB = 2**30


def flags(**changed: object) -> Namespace:
    """Llama-3-8B at 131,072 tokens with tensor parallelism of two, deterministic."""
    values = {
        "deterministic_mode": True,
        "document_masking": False,
        "transformer_impl": "transformer_engine",
        "attention_backend": SimpleNamespace(name="auto"),
        "num_attention_heads": 32,
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 1,
        "cp_comm_type": ["p2p"],
        "hierarchical_context_parallel_sizes": None,
        "micro_batch_size": 1,
        "seq_length": 131_072,
    }
    return Namespace(**values | changed)


def test_a_workspace_that_no_gpu_holds_is_refused(monkeypatch):
    """As measured: 513.01 GiB for 16 heads, of which 1 GiB is something else."""
    monkeypatch.setattr(relations, "deterministic_gpu_bytes", lambda: 140 * GIB)
    with pytest.raises(
        ConfigError, match=r"512 GiB for 131,072 tokens and 16 heads .* this GPU has 140 GiB"
    ):
        relations.check_deterministic_attention(flags())


@pytest.mark.parametrize(
    ("changed", "is_refused"),
    [
        ({"deterministic_mode": False}, False),
        ({"attention_backend": SimpleNamespace(name="fused")}, True),
        ({"attention_backend": SimpleNamespace(name="flash")}, False),
        ({"transformer_impl": "local"}, False),
        ({"document_masking": True}, False),
        ({"seq_length": 65_536}, False),  # 128 GiB
        ({"seq_length": 65_536, "micro_batch_size": 2}, True),
        ({"context_parallel_size": 2, "cp_comm_type": ["a2a"]}, True),  # 8 heads: 256 GiB
        ({"context_parallel_size": 4, "cp_comm_type": ["a2a"]}, False),  # 4 heads: 128 GiB
        ({"context_parallel_size": 2}, False),  # 65,536 tokens at a time: 128 GiB
        (
            {
                "context_parallel_size": 4,
                "cp_comm_type": ["a2a+p2p"],
                "hierarchical_context_parallel_sizes": [2, 2],
            },
            False,  # 8 heads, 65,536 tokens: 64 GiB
        ),
    ],
)
def test_what_splits_the_attention_counts(changed, is_refused, monkeypatch):
    monkeypatch.setattr(relations, "deterministic_gpu_bytes", lambda: 140 * GIB)
    if is_refused:
        with pytest.raises(ConfigError, match="--attention-backend flash"):
            relations.check_deterministic_attention(flags(**changed))
    else:
        relations.check_deterministic_attention(flags(**changed))


@pytest.mark.parametrize(
    ("capability", "is_refused"), [(None, False), ((8, 0), False), ((9, 0), True)]
)
def test_only_gpus_on_which_cudnn_is_chosen_count(capability, is_refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(total_memory=140 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    refused = pytest.raises(ConfigError) if is_refused else contextlib.nullcontext()
    with refused:
        relations.check_deterministic_attention(flags())
