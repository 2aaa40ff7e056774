"""Make the demo's starting point: a tiny Llama with random weights, as a Hugging Face folder.

    python -m examples.tiny_demo.make_hf_model --tokenizer FILE.model --output DIR

The folder is what a download of a real Llama would be: config.json, model.safetensors, tokenizer.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_long.cli import run_tool
from megatron_long.errors import DataError
from megatron_long.files import atomic_path, refuse_overwrite


def model_config(vocab_size: int, context_length: int) -> dict[str, object]:
    """Return the keyword arguments of `LlamaConfig` for the tiny model.

    Two KV heads, so that tensor parallelism 2 splits them as it does in the real models.

    >>> config = model_config(4096, 256)
    >>> config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]
    True
    """
    return {
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
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
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file)).vocab_size()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**model_config(vocab_size, context_length)))
    with atomic_path(output, directory=True) as folder:
        model.save_pretrained(folder)
        save_tokenizer(tokenizer_file, folder)
    return model.num_parameters()


def save_tokenizer(tokenizer_file: Path, folder: Path) -> None:
    """Write the tokenizer in both forms a Llama folder has: SentencePiece's and `tokenizers`'.

    `LlamaTokenizer` takes only vocabulary and merges over. The two normalizers are those of Llama
    2's own tokenizer.json; with them both forms agree on texts that start with spaces too.
    """
    from tokenizers import normalizers
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as alone:
        shutil.copy(tokenizer_file, Path(alone) / "tokenizer.model")
        backend = LlamaTokenizer.from_pretrained(alone).backend_tokenizer
    space = "\u2581"
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    backend.pre_tokenizer = None
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    shutil.copy(tokenizer_file, folder / "tokenizer.model")


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
