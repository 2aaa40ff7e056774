#!/usr/bin/env python3
"""`megatron-long plan`, from the repository: see `megatron_long/commands/plan_run.py`."""

import sys

from megatron_long.cli import run_tool
from megatron_long.commands.plan_run import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
