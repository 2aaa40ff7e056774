"""Make the demo's starting point: a tiny Llama with random weights, as a Hugging Face folder.

    python -m examples.tiny_demo.make_hf_model --tokenizer FILE.model --output DIR

The folder is what a download of a real Llama would be: config.json, model.safetensors, tokenizer.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_long.cli import run_tool
from megatron_long.errors import DataError
from megatron_long.files import atomic_path, refuse_overwrite


def model_config(vocab_size: int, context_length: int) -> dict[str, object]:
    """Give the keyword arguments of `LlamaConfig` for the tiny model.

    Two KV heads, so that tensor parallelism 2 splits them as it does in the real models.

    >>> config = model_config(4096, 256)
    >>> config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]
    True
    """
    return {
        "vocab_size": vocab_size,
        "hidden_size": 160,
        "intermediate_size": 432,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 32,
        "max_position_embeddings": context_length,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def make_model(tokenizer_file: Path, output: Path, *, context_length: int, seed: int) -> int:
    """Write the model and its tokenizer.

    Returns: The number of parameters.
    Raises: DataError: no tokenizer file.
    """
    if not tokenizer_file.is_file():
        raise DataError(f"--tokenizer {tokenizer_file} is not there; run train_tokenizer.py first")
    import sentencepiece
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file)).vocab_size()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**model_config(vocab_size, context_length)))
    with atomic_path(output, directory=True) as folder:
        model.save_pretrained(folder)
        LlamaTokenizer.from_pretrained(tokenizer_file.parent).save_pretrained(folder)
    return model.num_parameters()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a tiny Llama with random weights.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="SentencePiece model file")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--context-length", type=int, default=256, help="tokens (default 256)")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the weights")
    parser.add_argument("--force", action="store_true", help="replace an existing --output")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    refuse_overwrite(args.output, force=args.force)
    size = make_model(
        args.tokenizer, args.output, context_length=args.context_length, seed=args.seed
    )
    print(f"  wrote {args.output} ({size / 1e6:.2f} M parameters)")


if __name__ == "__main__":
    sys.exit(run_tool(main))
