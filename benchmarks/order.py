"""How evenly the sources are spread over a dataset, against a plain shuffle of the same documents.

    python benchmarks/order.py --dataset dataset --window-tokens 4M

For every window: the absolute difference of each source's share from its share of the whole.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, as the tools are

from megatron_long.cli import run_tool  # noqa: E402
from megatron_long.dataset.manifest import DOCUMENTS_FILE, read_manifest  # noqa: E402
from megatron_long.mixture.ordering import measure_evenness  # noqa: E402
from megatron_long.mixture.shares import parse_token_count  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--window-tokens", default="4M", metavar="N", help="default: %(default)s")
    parser.add_argument("--shuffles", type=int, default=5, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    window = parse_token_count(args.window_tokens, "--window-tokens")
    manifest = read_manifest(args.dataset)
    tokens = [manifest.sources[name].tokens_kept for name in manifest.source_names]
    rows = np.load(args.dataset / DOCUMENTS_FILE)
    generator = np.random.default_rng(0)
    orders = [("dataset", rows)]
    orders += [(f"shuffle {i}", generator.permutation(rows)) for i in range(args.shuffles)]
    for name, order in orders:
        even = measure_evenness([order], tokens, window)
        print(
            f"{name}: {even.num_windows} windows of {window:,} tokens; shares off by "
            f"{even.mean_deviation:.4f} on average, {even.largest_deviation:.4f} at most"
        )


if __name__ == "__main__":
    sys.exit(run_tool(main))
