#!/usr/bin/env python3
"""`megatron-long evaluate ruler`, from the repository: see `megatron_long/commands/evaluate_ruler.py`."""

import sys

from megatron_long.cli import run_tool
from megatron_long.commands.evaluate_ruler import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
