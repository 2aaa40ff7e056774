#!/usr/bin/env python3
"""`megatron-long convert`, from the repository: see `megatron_long/commands/convert_checkpoint.py`."""

import sys

from megatron_long.cli import run_tool
from megatron_long.commands.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
