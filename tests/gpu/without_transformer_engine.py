"""Runs `megatron_long.pretrain` as on a GPU machine without Transformer Engine and Apex."""

import sys

for name in ("transformer_engine", "apex", "fused_weight_gradient_mlp_cuda"):
    sys.modules[name] = None  # type: ignore[assignment]

if __name__ == "__main__":
    from megatron_long.cli import run_tool
    from megatron_long.pretrain import main

    sys.exit(run_tool(main, prints_result=False))
