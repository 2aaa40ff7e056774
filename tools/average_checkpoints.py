#!/usr/bin/env python3
"""`megatron-long average`, from the repository: see `megatron_long/commands/average_checkpoints.py`."""

import sys

from megatron_long.cli import run_tool
from megatron_long.commands.average_checkpoints import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
