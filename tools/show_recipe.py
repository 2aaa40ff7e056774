#!/usr/bin/env python3
"""`megatron-long recipe`, from the repository: see `megatron_long/commands/show_recipe.py`."""

import sys

from megatron_long.cli import run_tool
from megatron_long.commands.show_recipe import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
