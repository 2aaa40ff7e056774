"""Runs under torchrun: every rank writes what it is given of a log that only rank 0 finds."""

import os
import sys
from pathlib import Path

from megatron_long.cli import run_tool
from megatron_long.evaluation.bookqa import BookAnswer
from megatron_long.evaluation.progress_log import shared_log


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    log = folder / "log.jsonl" if rank == "0" else folder / "nowhere.jsonl"
    try:
        with shared_log(log, {"a": int(sys.argv[2])}, BookAnswer, force=False) as records:
            (folder / rank).write_text(repr(records))
    except Exception as error:
        (folder / rank).write_text(str(error))
        raise


if __name__ == "__main__":
    sys.exit(run_tool(main))
