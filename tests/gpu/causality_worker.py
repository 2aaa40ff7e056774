"""Runs under torchrun: score windows that differ only in their second half, compare the first halves."""

import sys
from pathlib import Path

import torch

from megatron_long.evaluation.scoring import open_scorer

LENGTH = 512
VOCABULARY = 390


def main(checkpoint: str, output: str, *flags: str) -> None:
    scorer = open_scorer(Path(checkpoint), context_length=LENGTH, megatron_argv=flags)
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, VOCABULARY, (1, LENGTH + 1), generator=generator)
    losses = []
    for _ in range(4):
        window = first.clone()
        tail = window[:, LENGTH // 2 + 1 :]
        tail.copy_(torch.randint(0, VOCABULARY, tail.shape, generator=generator))
        losses.append(scorer.score(window[:, :-1], window[:, 1:]).losses[0, : LENGTH // 2])
    if scorer.is_writer:
        torch.save(torch.stack(losses), output)
    scorer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
