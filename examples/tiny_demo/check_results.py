"""The demo's two checks, each with exit status 1 when it fails.

python -m examples.tiny_demo.check_results drop --before A.json --after B.json ...
python -m examples.tiny_demo.check_results export --hf DIR --dataset DIR --loss B.json ...
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_long.cli import run_tool
from megatron_long.dataset.indexed import IndexedDatasetReader
from megatron_long.errors import DataError
from megatron_long.evaluation.loss.loss_report import LossReport, read_loss_report
from megatron_long.tokenizer.loading import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class LossDrop:
    """Loss beyond the old length of the same documents, before and after the stretch."""

    before: float
    after: float
    required: float

    @property
    def is_enough(self) -> bool:
        """Whether the loss fell by the stated threshold (NaN never passes)."""
        return self.before - self.after >= self.required


def split_loss(report: LossReport, old_length: int) -> tuple[float, float]:
    """Mean loss up to `old_length` and from there on, all sources together, nats per token.

    Raises: DataError: `old_length` is not where two of the report's intervals meet.
    """
    edges = list(report.loss.edges)
    if old_length not in edges[1:-1]:
        raise DataError(
            f"--old-length {old_length} is not an edge of the report's intervals ({edges}); measure "
            f"with --training-length {old_length}"
        )
    cut = edges.index(old_length)
    sums = np.sum(list(report.loss.loss_sums.values()), axis=0)
    counts = np.sum(list(report.loss.token_counts.values()), axis=0)
    return (
        float(sums[:cut].sum() / counts[:cut].sum()),
        float(sums[cut:].sum() / counts[cut:].sum()),
    )


def check_drop(args: argparse.Namespace) -> int:
    """Compare two reports of evaluate_loss.py."""
    within, beyond = zip(
        split_loss(read_loss_report(args.before, "--before"), args.old_length),
        split_loss(read_loss_report(args.after, "--after"), args.old_length),
        strict=True,
    )
    drop = LossDrop(before=beyond[0], after=beyond[1], required=args.required)
    print(
        f"loss up to {args.old_length} tokens: {within[0]:.3f} nats before the stretch, "
        f"{within[1]:.3f} after; fell by {within[0] - within[1]:.3f} (no context there is longer "
        "than before: so much comes from more training, not from longer windows)"
    )
    print(
        f"loss beyond {args.old_length} tokens: {drop.before:.3f} nats before the stretch, "
        f"{drop.after:.3f} after; fell by {drop.before - drop.after:.3f}, promised at least "
        f"{drop.required}: {'PASS' if drop.is_enough else 'FAIL'}"
    )
    return 0 if drop.is_enough else 1


def hf_loss(hf: Path, documents: Sequence[np.ndarray]) -> float:
    """Mean loss of documents of one length in transformers, nats per token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    losses = []
    with torch.inference_mode():
        for document in documents:
            tokens = torch.from_numpy(document.astype(np.int64))[None]
            logits = model(tokens[:, :-1]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item())
    return float(np.mean(losses))


def check_export(args: argparse.Namespace) -> int:
    """Compare the exported model in transformers with Megatron's figure for one source."""
    from transformers import AutoTokenizer

    report = read_loss_report(args.loss, "--loss")
    settings = report.settings
    source = min(report.loss.num_documents, key=lambda name: report.loss.num_documents[name])
    reader = IndexedDatasetReader(args.dataset / "valid" / source)
    length = settings.context_length
    lengths = np.asarray(reader.lengths)
    documents = [
        reader.read(int(index))[: length + 1] for index in np.flatnonzero(lengths >= length + 1)
    ]
    expected = report.loss.loss_sums[source].sum() / report.loss.token_counts[source].sum()
    found = hf_loss(args.hf, documents)
    tokenizer = AutoTokenizer.from_pretrained(args.hf)
    config = json.loads((args.hf / "config.json").read_text())
    print(f"transformers loaded {args.hf}: {config['max_position_embeddings']} positions")
    text = tokenizer.decode(documents[0].tolist(), skip_special_tokens=True)
    own = load_tokenizer(args.dataset / "tokenizer", "reference")
    is_same = tokenizer(text, add_special_tokens=False)["input_ids"] == own.encode(text).tolist()
    print(f"its tokenizer reads back: {text[:60]!r}")
    print(f"and gives the training data's tokens for that text: {'PASS' if is_same else 'FAIL'}")
    passed = abs(found - expected) <= args.max_difference and is_same
    print(
        f"loss of {len(documents)} held-out documents ({source}): {found:.5f} nats in "
        f"transformers, {expected:.5f} in Megatron, at most {args.max_difference} apart: "
        f"{'PASS' if passed else 'FAIL'}"
    )
    return 0 if passed else 1


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check what the demo promised.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    drop = commands.add_parser("drop", help="the loss fell by enough")
    drop.add_argument("--before", type=Path, required=True, help="JSON of evaluate_loss.py")
    drop.add_argument("--after", type=Path, required=True, help="JSON of evaluate_loss.py")
    drop.add_argument("--old-length", type=int, required=True, help="tokens")
    drop.add_argument("--required", type=float, required=True, help="nats per token")
    drop.set_defaults(check=check_drop)
    export = commands.add_parser("export", help="transformers agrees with Megatron")
    export.add_argument("--hf", type=Path, required=True, help="exported Hugging Face folder")
    export.add_argument("--dataset", type=Path, required=True, help="dataset folder")
    export.add_argument("--loss", type=Path, required=True, help="JSON of evaluate_loss.py")
    export.add_argument("--max-difference", type=float, required=True, help="nats per token")
    export.set_defaults(check=check_export)
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    return int(args.check(args))


if __name__ == "__main__":
    sys.exit(run_tool(main))
