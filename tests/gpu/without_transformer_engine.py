"""Runs `megatron_long.pretrain` as on a GPU machine without Transformer Engine and Apex."""

import sys

HIDDEN = ("transformer_engine", "apex", "fused_weight_gradient_mlp_cuda")

if __name__ == "__main__":  # pytest imports this file too, in search of doctests
    sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]
    from megatron_long.cli import run_tool
    from megatron_long.pretrain import main

    sys.exit(run_tool(main, prints_result=False))
