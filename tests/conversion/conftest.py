"""Tiny random models of each family, made and saved by transformers, and damage done to copies."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_long.conversion import verify
from tests.conftest import has_cuda
from tests.warm_jobs import WarmJobs

VOCAB_SIZE = 1000  # no multiple of 128
MakeLlama = Callable[..., Path]


@pytest.fixture(autouse=True)
def warm_logits_check(warm_jobs: WarmJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions within a test compare logits in a forked process; those of the tool start their own."""

    def run(
        command: list[str], *, env: dict[str, str], **_: Any
    ) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        return warm_jobs.run(1, command[1:], env, 300)

    if not has_cuda():
        monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run))


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> MakeLlama:
    """Give the folder of a model: `make_llama(tied=True, dtype="bfloat16", family="qwen2")`."""
    made: dict[str, Path] = {}

    def make(
        *,
        family: str = "llama",
        tied: bool = False,
        dtype: str = "float32",
        max_shard_size: str = "5GB",
        **config: Any,
    ) -> Path:
        name = f"{family}-{tied}-{dtype}-{max_shard_size}-{json.dumps(config, sort_keys=True)}"
        if name not in made:
            made[name] = tmp_path_factory.mktemp("llama") / "hf"
            model = build(family, tied=tied, **config).to(getattr(torch, dtype))
            model.save_pretrained(made[name], max_shard_size=max_shard_size)
            (made[name] / "tokenizer.model").write_bytes(tiny_tokenizer.read_bytes())
            (made[name] / "generation_config.json").write_text(
                '{"do_sample": true, "temperature": 0.6}'
            )
        return made[name]

    return make


def build(family: str, *, tied: bool, **config: Any) -> torch.nn.Module:
    """A model with grouped queries whose every weight, norms and biases included, matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    windows = {"mistral": {"sliding_window": None}}.get(family, {})
    values = {**shape, **windows, **config, "tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def llama_copy(make_llama: MakeLlama, tmp_path: Path) -> Path:
    """A Llama's folder that a test may damage."""
    return Path(shutil.copytree(make_llama(), tmp_path / "damaged"))


@pytest.fixture
def edit_weights() -> Callable[[Path, Callable[[dict[str, torch.Tensor]], None]], None]:
    """Change the tensors of a folder in place: `edit_weights(folder, lambda tensors: ...)`."""
    from safetensors.torch import load_file, save_file

    def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


@pytest.fixture
def read_weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Read every tensor of a folder with safetensors' own reader."""
    from safetensors.torch import load_file

    def read(folder: Path) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        return tensors

    return read
