#!/usr/bin/env python3
"""`megatron-long preprocess`, from the repository: see `megatron_long/commands/preprocess_mix.py`."""

import sys

from megatron_long.cli import run_tool
from megatron_long.commands.preprocess_mix import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
