"""Run as a program: the logits of a Megatron checkpoint against those of transformers, layer by layer.

    python -m megatron_long.conversion.logits_check --iteration DIR --source HF --config FILE --dtype TYPE

Both sides are the real implementations, transformers' model and Megatron's `GPTModel`, each built with one
layer that is refilled for every layer of the model, so that memory holds one layer, never the model. All
is float32 on the host. The tokens are at both ends of the context, so that a wrong RoPE is detected.
Prints one line of JSON. Legend: s sequence, h hidden, v vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_long.checkpoint.megatron_folder import merge_geometry
from megatron_long.checkpoint.torch_dist import TorchDistReader, read_common_state
from megatron_long.checkpoint.trained_model import keep_rope
from megatron_long.cli import run_tool
from megatron_long.conversion.formats.sources import open_weights
from megatron_long.conversion.formats.weights import Weights
from megatron_long.model.geometry import LlamaGeometry, geometry_from_hf
from megatron_long.model.mapping import OUTPUT_LAYER, RULES

if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE = 1e-3
"""Relative to the largest logit; float32 rounding over 30 layers gives about 1e-5, a wrong RoPE 1e-1."""
NUM_TOKENS = 16
"""At each end of the context."""
_TINY_VOCABULARY = 128
_CHUNK_ROWS = 8192


def main() -> None:
    """Compute both, print the difference."""
    args = _parse()
    stored = getattr(torch, args.dtype)
    described = geometry_from_hf(args.config)
    geometry = merge_geometry(described, read_common_state(args.iteration), args.iteration)
    if args.rope_of_config:
        geometry = keep_rope(geometry, described)
    reader = TorchDistReader(args.iteration, prefix=args.prefix)
    positions = end_positions(geometry.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, geometry.vocab_size, positions.shape, generator=generator)
    with torch.no_grad(), open_weights(args.source, allow_pickle=args.allow_pickle) as weights:
        expected = transformers_logits(args.config, weights, geometry, stored, tokens, positions)
        seen = megatron_logits(reader, geometry, stored, tokens, positions)
    difference = float((seen - expected).abs().max() / expected.abs().max())
    print(json.dumps({"relative_difference": difference, "tolerance": TOLERANCE}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--iteration", "--source", "--config"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--prefix", default="", help="of the checkpoint's keys")
    parser.add_argument("--dtype", required=True, help="in which both sides hold weights")
    parser.add_argument("--allow-pickle", action="store_true")
    parser.add_argument(
        "--rope-of-config",
        action="store_true",
        help="give Megatron the RoPE and context of --config, not those of the checkpoint",
    )
    return parser.parse_args()


def end_positions(context_length: int) -> Tensor:
    """Positions at the start and at the end of a context.

    >>> end_positions(8).tolist(), end_positions(131072)[-17:-14].tolist()
    ([0, 1, 2, 3, 4, 5, 6, 7], [15, 131056, 131057])
    """
    positions = range(context_length)
    return torch.tensor(sorted({*positions[:NUM_TOKENS], *positions[-NUM_TOKENS:]}))


def transformers_logits(
    config: Path,
    weights: Weights,
    geometry: LlamaGeometry,
    stored: torch.dtype,
    tokens: Tensor,
    positions: Tensor,
) -> Tensor:
    """Logits [s, v] by transformers, from weights as they would be in the stored type.

    Args:
        config: The `config.json`, which transformers itself reads.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    one: Any = CONFIG_MAPPING[geometry.model_type].from_pretrained(config)
    one.num_hidden_layers, one.vocab_size, one.dtype = 1, _TINY_VOCABULARY, torch.float32
    if getattr(one, "layer_types", None):
        one.layer_types = one.layer_types[:1]
    one.pad_token_id = one.bos_token_id = one.eos_token_id = None
    model = AutoModelForCausalLM.from_config(one).float().eval()
    inner = model.model
    norm, inner.norm = inner.norm, torch.nn.Identity()

    def read(name: str) -> Tensor:
        return weights.read(name).to(stored).float()

    def read_rows(name: str, rows: slice) -> Tensor:
        return weights.read_slice(name, rows, slice(0, geometry.hidden_size)).to(stored).float()

    embedding, output = RULES[0].hf_names[0], OUTPUT_LAYER.hf_names[0]
    hidden = torch.cat([read_rows(embedding, slice(t, t + 1)) for t in tokens.tolist()])[None]
    for layer in range(geometry.num_layers):
        prefix = f"model.layers.{layer}."
        for name, parameter in inner.layers[0].named_parameters():
            parameter.copy_(read(prefix + name))
        hidden = inner(inputs_embeds=hidden, position_ids=positions[None]).last_hidden_state
    norm.weight.copy_(read("model.norm.weight"))
    name = embedding if geometry.tie_embeddings else output
    return _multiply(norm(hidden)[0], geometry, lambda rows: read_rows(name, rows))


def megatron_logits(
    reader: TorchDistReader,
    geometry: LlamaGeometry,
    stored: torch.dtype,
    tokens: Tensor,
    positions: Tensor,
) -> Tensor:
    """Logits [s, v] by Megatron's `GPTModel`, from a checkpoint's weights in the stored type."""
    from megatron_long.engine import host_backend

    host_backend.install()
    model = _one_layer_model(geometry, tokens.numel())
    filled = {entry.key: entry.data for entry in _entries(model)}
    decoder: Any = model.decoder
    norm, decoder.final_layernorm = decoder.final_layernorm, torch.nn.Identity()
    embedding = reader.read(RULES[0].megatron_key, None)
    hidden = embedding[tokens].to(stored).float()[:, None]  # [s, 1, h]
    per_layer = [rule.megatron_key for rule in RULES if rule.is_per_layer]
    for layer in range(geometry.num_layers):
        for key in per_layer:
            if key in filled:
                filled[key].copy_(reader.read(key, layer).to(stored))
        with rotated_at(model.rotary_pos_emb, positions):
            hidden = model(
                None, None, None, decoder_input=hidden, output_processor=_give_hidden_states
            )
    norm.weight.copy_(reader.read("decoder.final_layernorm.weight", None).to(stored))
    if not geometry.tie_embeddings:
        embedding = reader.read(OUTPUT_LAYER.megatron_key, None)
    return _multiply(norm(hidden)[:, 0], geometry, lambda rows: embedding[rows].to(stored).float())


def _multiply(hidden: Tensor, geometry: LlamaGeometry, rows: Callable[[slice], Tensor]) -> Tensor:
    """[s, h] times the output rows -> [s, v], some rows at a time."""
    firsts = range(0, geometry.vocab_size, _CHUNK_ROWS)
    ends = [min(first + _CHUNK_ROWS, geometry.vocab_size) for first in firsts]
    parts = [rows(slice(first, end)) for first, end in zip(firsts, ends, strict=True)]
    return torch.cat([hidden @ part.t() for part in parts], dim=-1)


def _one_layer_model(geometry: LlamaGeometry, num_tokens: int) -> Any:
    from megatron_long.engine import megatron_adapter
    from megatron_long.flags.backend import HOST, join_or_start_job

    join_or_start_job()
    megatron_adapter.install_patches()
    small = replace(
        geometry, num_layers=1, vocab_size=_TINY_VOCABULARY, padded_vocab_size=_TINY_VOCABULARY
    )
    args = megatron_adapter.parse_flags(
        [
            *HOST.to_argv(),
            *small.to_argv(),
            *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(_TINY_VOCABULARY)),
            *("--micro-batch-size", "1", "--train-iters", "1", "--lr", "0", "--eval-iters", "0"),
            *("--skip-train", "--seq-length", str(num_tokens)),
        ]
    )
    megatron_adapter.validate_flags(args)
    (model,) = megatron_adapter.build_model_chunks(args)
    return model.eval()


def _entries(model: Any) -> Iterator[Any]:
    from megatron_long.conversion.straight_start import parameters_of

    return parameters_of(model)


def _give_hidden_states(*, hidden_states: Tensor, **_: Any) -> Tensor:
    return hidden_states


@contextlib.contextmanager
def rotated_at(rope: Any, positions: Tensor) -> Iterator[None]:
    """Let Megatron's RoPE, which counts from 0, rotate by these positions."""
    whole = rope.forward

    def pick(length: int, *args: Any, **kwargs: Any) -> Any:
        found = whole(int(positions.max()) + 1)
        if isinstance(found, tuple):  # YaRN gives a factor too
            return found[0][positions], found[1]
        return found[positions]

    rope.forward = pick
    try:
        yield
    finally:
        rope.forward = whole


if __name__ == "__main__":
    sys.exit(run_tool(main))
