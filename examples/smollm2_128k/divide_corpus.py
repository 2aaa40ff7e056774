"""Take the held-out documents of a dataset out of its corpus, so that no run reads them.

    python -m examples.smollm2_128k.divide_corpus --corpus CORPUS --dataset held-out --output divided

All mixtures are made of the rest, in OUTPUT/train: one held-out set then serves runs of any mixture and
seed. Long texts that are not part of the corpus (CORPUS/heldout/*.txt) are copied to OUTPUT/books.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

from megatron_long.cli import run_tool, tool_parser
from megatron_long.dataset.manifest import documents_path, read_manifest
from megatron_long.errors import DataError
from megatron_long.files import atomic_path


def held_out_lines(dataset: Path) -> dict[str, set[int]]:
    """Return the lines (from 1) that the dataset held out of each input file, by the file's name."""
    manifest = read_manifest(dataset)
    lines: dict[str, set[int]] = {entry.name: set() for entry in manifest.inputs}
    for split in manifest.valid.values():
        for row in np.load(documents_path(dataset / split.prefix)):
            lines[manifest.inputs[int(row["file"])].name].add(int(row["line"]))
    return lines


def write_rest(source: Path, target: Path, dropped: set[int]) -> int:
    """Copy a jsonl file but for these lines; gives how many were left out."""
    count = 0
    with source.open("rb") as read, target.open("wb") as write:
        for number, line in enumerate(read, 1):
            if number in dropped:
                count += 1
            else:
                write.write(line)
    return count


def main() -> None:
    """Parse, copy, print."""
    parser = tool_parser(__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="*.jsonl and heldout/*.txt")
    parser.add_argument("--dataset", type=Path, required=True, help="dataset made of *.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    lines = held_out_lines(args.dataset)
    texts = sorted((args.corpus / "heldout").glob("*.txt"))
    if not texts:
        raise DataError(f"--corpus {args.corpus} has no heldout/*.txt; put long texts there")
    total = 0
    with atomic_path(args.output, directory=True) as folder:
        (folder / "train").mkdir()
        (folder / "books").mkdir()
        for name in lines:
            path = args.corpus / name
            if not path.is_file():
                raise DataError(
                    f"--corpus {args.corpus} has no {name}, which --dataset {args.dataset} was made of"
                )
            total += write_rest(path, folder / "train" / name, lines[name])
        for path in texts:
            shutil.copyfile(path, folder / "books" / path.name)
    print(f"{args.output}: {len(lines)} files without {total:,} held-out documents")


if __name__ == "__main__":
    sys.exit(run_tool(main))
