"""Time of the paper's needle grid: 40 lengths by 10 depths up to 128K tokens, 8B, random weights.

No input is needed: haystack, tokenizer and config are created in --workdir. After a kill or stop, the same
command resumes; `times.jsonl` there sums the time of all commands.

    python benchmarks/needle_grid.py --workdir runs/needle_grid --gpus 4 --stop-after-minutes 9
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_long.evaluation.batches import plan_batches
from megatron_long.evaluation.work import count_work
from megatron_long.flags.recipe import LLAMA3_8B
from megatron_long.model.geometry import geometry_from_hf

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_SENTENCES = 40_000
NUM_ANSWER_TOKENS = 24
"""Approximate; the output layer is applied to these positions only."""


def make_inputs(workdir: Path, context_length: int) -> None:
    """Write haystack, tokenizer and config, unless they exist."""
    if (workdir / "config.json").exists():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    syllables = "ka lo mi ne ru ta vi so pe da fu gi ho ja ly mo".split()
    words = ["".join(generator.choices(syllables, k=generator.randrange(1, 4))) for _ in range(900)]
    sentences = [
        " ".join(generator.choices(words, k=generator.randrange(5, 20))).capitalize() + "."
        for _ in range(NUM_SENTENCES)
    ]
    (workdir / "haystack.txt").write_text(" ".join(sentences))
    _train_tokenizer(workdir / "tokenizer", sentences[:5000])
    config = LLAMA3_8B.to_hf_config() | {"max_position_embeddings": context_length}
    (workdir / "config.json").write_text(json.dumps(config))


def _train_tokenizer(prefix: Path, sentences: list[str]) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(prefix),
        vocab_size=2000,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )


def num_done(cells: Path) -> int:
    """Finished cells on disk."""
    return max(0, len(cells.read_text().splitlines()) - 1) if cells.exists() else 0


def describe(args: argparse.Namespace) -> str:
    """The work of the whole grid and the rate it was done at."""
    import numpy as np

    lengths = np.linspace(1024, args.context_length, args.num_lengths).round().astype(int)
    rows = lengths.repeat(args.num_depths).tolist()
    longest = args.context_length
    batches = plan_batches(rows, tokens_per_batch=longest, longest=longest, step=128)
    config = args.hf_config or args.workdir / "config.json"
    work = count_work(geometry_from_hf(config), batches, rows, NUM_ANSWER_TOKENS)
    times = [json.loads(line) for line in (args.workdir / "times.jsonl").read_text().splitlines()]
    seconds = sum(entry["seconds"] for entry in times)
    done = num_done(args.workdir / "needle" / "cells.jsonl")
    text = f"{done} of {len(rows)} cells in {seconds:.0f} s of {len(times)} commands; grid: {work}"
    if done == len(rows):
        device_seconds = sum(entry["seconds"] * entry["processes"] for entry in times)
        rate = work.flops / device_seconds / 1e12
        text += f"; {rate:.0f} TFLOP/s per device, including startup and loading"
    return text


def main() -> int:
    """Create the inputs, run the tool once, and sum up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="folder for everything")
    add("--gpus", type=int, default=1, help="processes, each with the whole model")
    add("--stop-after-minutes", type=float, default=9.0)
    add("--context-length", type=int, default=131_072)
    add("--num-lengths", type=int, default=40)
    add("--num-depths", type=int, default=10)
    add("--hf-config", type=Path, help="another model than Llama-3-8B")
    args, megatron_argv = parser.parse_known_args()
    make_inputs(args.workdir, args.context_length)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(args.gpus)]
    command = [
        *launcher,
        *("tools/evaluate_needle.py", "--random-weights"),
        *("--hf-config", str((args.hf_config or args.workdir / "config.json").resolve())),
        *("--tokenizer", str((args.workdir / "tokenizer.model").resolve())),
        *("--haystack", str((args.workdir / "haystack.txt").resolve())),
        *("--output-dir", str((args.workdir / "needle").resolve())),
        *("--context-length", str(args.context_length), "--training-length", "81920"),
        *("--num-lengths", str(args.num_lengths), "--num-depths", str(args.num_depths)),
        *("--min-length", "1024", "--stop-after-minutes", str(args.stop_after_minutes)),
        *megatron_argv,
    ]
    cells, start = args.workdir / "needle" / "cells.jsonl", time.monotonic()
    before = num_done(cells)
    status = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    entry = {"seconds": time.monotonic() - start, "processes": args.gpus, "before": before}
    with (args.workdir / "times.jsonl").open("a") as file:
        file.write(json.dumps(entry | {"after": num_done(cells), "status": status}) + "\n")
    print(describe(args))
    return status


if __name__ == "__main__":
    sys.exit(main())
