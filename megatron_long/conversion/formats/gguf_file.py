"""GGUF files (llama.cpp) as a source of weights: the model's configuration, and tensors dequantized.

Two things are undone: llama.cpp permutes the rows of q and k of a Llama to its interleaved RoPE order, and
uses its own tensor names. `losses` lists what a file has lost.

Source: gguf 0.19; `convert_hf_to_gguf.py` of llama.cpp, `LlamaModel.permute` and its RoPE factors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_long.conversion.formats.weights import Weights
from megatron_long.errors import ConfigError, DataError
from megatron_long.model.families import FAMILIES
from megatron_long.model.rope import Llama3Rope

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".gguf"
_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2"}
"""GGUF's name of an architecture, and the family that its files contain; Mistral is called llama."""

_PERMUTED = ("llama",)
"""Architectures whose q and k llama.cpp reorders."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


def open_gguf(path: Path) -> Any:
    """Map a GGUF file and read its header.

    Raises: ConfigError: the gguf package is missing, or the file is.
        DataError: the file is damaged or truncated.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"{path} needs the package gguf: pip install -c constraints.txt gguf"
        ) from error
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give a GGUF file")
    try:
        return gguf.GGUFReader(path)
    except (
        Exception
    ) as error:  # truncated or foreign bytes raise nearly any exception in its parser
        raise DataError(
            f"{path} is not a complete GGUF file ({type(error).__name__}: {error}); download it again"
        ) from error


def metadata(reader: Any) -> dict[str, Any]:
    """Return the key-value pairs of a file's header."""
    return {key: field.contents() for key, field in reader.fields.items()}


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Return the Hugging Face configuration that a GGUF file's header describes.

    Raises: ConfigError: another architecture, or a RoPE that the header does not explain.
        DataError: the file is damaged, or a value is missing.
    """
    return _config(path, open_gguf(path))


def _config(path: Path, reader: Any) -> dict[str, Any]:
    values = metadata(reader)
    architecture = str(values.get("general.architecture"))
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{path}: unknown architecture {architecture}; known: {', '.join(_ARCHITECTURES)}"
        )
    family = next(f for f in FAMILIES if f.model_type == _ARCHITECTURES[architecture])
    names = {tensor.name for tensor in reader.tensors}

    def need(key: str) -> Any:
        if f"{architecture}.{key}" not in values:
            raise DataError(f"{path} lacks {architecture}.{key} in its header; use another file")
        return values[f"{architecture}.{key}"]

    heads = need("attention.head_count")
    head_size = values.get(
        f"{architecture}.attention.key_length", need("embedding_length") // heads
    )
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "num_hidden_layers": need("block_count"),
        "hidden_size": need("embedding_length"),
        "intermediate_size": need("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.get(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": head_size,
        "vocab_size": len(values.get("tokenizer.ggml.tokens", [])) or need("vocab_size"),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _short(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(values.get(f"{architecture}.rope.freq_base", 10_000.0)),
        "rope_scaling": None,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in names,
    }
    for word in ("bos", "eos"):
        config[f"{word}_token_id"] = values.get(f"tokenizer.ggml.{word}_token_id")
    config["rope_scaling"] = _rope_scaling(path, reader, values, architecture, config)
    return config


def _short(value: float) -> float:
    """The shortest decimal that is this float32: headers hold 1e-05 as 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _rope_scaling(
    path: Path, reader: Any, values: Mapping[str, Any], architecture: str, config: dict[str, Any]
) -> dict[str, Any] | None:
    factors = next((t for t in reader.tensors if t.name == _ROPE_FACTORS), None)
    if factors is not None:
        return _llama3_scaling(path, _dequantize(factors), config)
    prefix = f"{architecture}.rope.scaling."
    kind = values.get(prefix + "type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _short(values.get(prefix + "factor", 1.0))}
    if prefix + "original_context_length" in values:
        original = values[prefix + "original_context_length"]
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_scaling(path: Path, divisors: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Find the parameters of Llama-3.1's scaling, of which the file holds only the result."""
    import numpy as np

    rope = Llama3Rope(factor=_short(divisors.max()))
    base, size = config["rope_theta"], config["head_dim"]
    plain = rope_without_scaling(base, size)
    expected = plain / rope.inverse_frequencies(base, size).numpy()
    if not np.allclose(divisors, expected, rtol=1e-4):
        raise ConfigError(
            f"{path}: its {_ROPE_FACTORS} is not Llama-3.1's scaling with low_freq_factor 1, "
            "high_freq_factor 4 and 8192 original tokens, and a GGUF file does not say what else it is; "
            "give the model's Hugging Face folder"
        )
    return rope.to_hf()


def rope_without_scaling(base: float, head_size: int) -> Any:
    """Return the frequencies of plain RoPE [d/2]."""
    from megatron_long.model.rope import PLAIN_ROPE

    return PLAIN_ROPE.inverse_frequencies(base, head_size).numpy()


def _dequantize(tensor: Any, rows: Any = None) -> Any:
    """Return a tensor, or rows of it, in float32."""
    import gguf
    import numpy as np

    data = tensor.data if rows is None else tensor.data[rows]
    return np.asarray(gguf.quants.dequantize(data, tensor.tensor_type), dtype=np.float32)


class GgufWeights(Weights):
    """The tensors of a GGUF file under Hugging Face's names, in float32."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises: ConfigError, DataError: see `read_gguf_config`.
        """
        self.location = path
        reader = open_gguf(path)
        config = _config(path, reader)
        is_permuted = str(metadata(reader)["general.architecture"]) in _PERMUTED
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
        self._heads = heads if is_permuted else {}
        self._tensors = {
            _hf_name(tensor.name): tensor
            for tensor in reader.tensors
            if tensor.name != _ROPE_FACTORS
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; GGUF counts its axes from the last."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def stored_dtype(self, name: str) -> str:
        """Return the type that `read` returns: float32, which holds the values of every stored type."""
        return "F32"

    def read(self, name: str) -> Tensor:
        """Return a tensor, dequantized."""
        return self.read_slice(name, slice(None), None)

    def read_slice(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        """Return a part of a tensor; only its rows are dequantized."""
        import torch

        tensor = self._tensors[name]
        projection = name.rpartition("_proj.")[0].rpartition(".")[2]
        chosen: Any = rows
        if projection in self._heads:
            chosen = _unpermuted(self.shape(name)[0], self._heads[projection])[rows]
        part = torch.from_numpy(_dequantize(tensor, chosen).copy())
        return part if columns is None else part[:, columns].contiguous()


def _unpermuted(num_rows: int, heads: int) -> Any:
    """The row of the file that holds each Hugging Face row: pairs (i, i + d/2) are adjacent."""
    import numpy as np

    return np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _hf_name(name: str) -> str:
    """Return Hugging Face's name; a tensor without one keeps its own, and is later refused as unexpected.

    >>> _hf_name("blk.3.attn_q.bias"), _hf_name("token_embd.weight")
    ('model.layers.3.self_attn.q_proj.bias', 'model.embed_tokens.weight')
    """
    words = name.split(".")
    if words[0] == "blk" and words[2] in _NAMES:
        return ".".join(["model.layers", words[1], _NAMES[words[2]], *words[3:]])
    return ".".join([_NAMES[words[0]], *words[1:]]) if words[0] in _NAMES else name


def losses(path: Path) -> list[str]:
    """Describe in sentences what a GGUF file has lost of the original model."""
    reader = open_gguf(path)
    exact = {"F32", "F16", "BF16"}
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    rounded = {kind: count for kind, count in kinds.items() if kind not in exact}
    said = []
    if rounded:
        counts = ", ".join(f"{count} tensors {kind}" for kind, count in rounded.items())
        said.append(
            f"weights were rounded when the file was made ({counts}); the original values are lost"
        )
    said.append("generation settings and initializer_range are not in a GGUF file")
    return said + _lost_window(metadata(reader))


def _lost_window(values: Mapping[str, Any]) -> list[str]:
    """Report a sliding window that is not computed, if the file has one or its model may have had one.

    llama.cpp calls Mistral's architecture `llama` too, so only the names distinguish them.
    """
    window = values.get(f"{values['general.architecture']}.attention.sliding_window")
    if window:
        return [f"its sliding window of {window} tokens: attention is full"]
    names = (str(value).lower() for key, value in values.items() if key.startswith("general."))
    if any("mistral" in name for name in names):
        return ["a Mistral's sliding window is not in a GGUF file: attention is full"]
    return []
