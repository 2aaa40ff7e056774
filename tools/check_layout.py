#!/usr/bin/env python3
"""Check the flags of a training run without starting it: names, files, layout, dataset, tokenizer.

Takes the flags of megatron_long.pretrain and the number of processes; exits with 2 and one paragraph
where a rule is broken, else prints what a step will be.
"""

import argparse
import sys
from argparse import Namespace

from megatron_long.cli import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.epilog = "All flags of megatron_long.pretrain, ours and Megatron's, are taken."
    parser.add_argument("--world-size", type=int, required=True, help="processes of the job")
    arguments, argv = parser.parse_known_args()

    from megatron_long.training import host_backend

    host_backend.install()
    from megatron_long.pretrain import parse
    from megatron_long.training.backend import detect_backend
    from megatron_long.training.megatron_adapter import check_version

    check_version()
    _, args = parse(argv, detect_backend(), arguments.world_size)
    print(describe(args, arguments.world_size))
    return 0


def describe(args: Namespace, world_size: int) -> str:
    """One line about replicas and the optimizer step."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp = args.context_parallel_size
    replicas = world_size // (tp * pp * cp)
    windows = args.global_batch_size or args.micro_batch_size * replicas
    tokens = windows * args.seq_length
    return (
        f"layout ok: {world_size} processes = tensor {tp} * pipeline {pp} * context {cp} * data "
        f"{replicas}; a step is {windows} windows of {args.seq_length} tokens ({tokens:,} tokens), "
        f"{args.seq_length // cp:,} tokens of a window on each rank; {args.train_iters} steps"
    )


if __name__ == "__main__":
    sys.exit(run_tool(main))
