#!/usr/bin/env python3
"""`megatron-long doctor`, from the repository: see `megatron_long/commands/doctor.py`."""

import sys

from megatron_long.cli import run_tool
from megatron_long.commands.doctor import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
