#!/usr/bin/env python3
"""`megatron-long check`, from the repository: see `megatron_long/commands/check_layout.py`."""

import sys

from megatron_long.cli import run_tool
from megatron_long.commands.check_layout import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
