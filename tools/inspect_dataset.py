#!/usr/bin/env python3
"""`megatron-long inspect`, from the repository: see `megatron_long/commands/inspect_dataset.py`."""

import sys

from megatron_long.cli import run_tool
from megatron_long.commands.inspect_dataset import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
