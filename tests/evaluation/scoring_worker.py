"""Runs under torchrun: score random rows of two lengths with a checkpoint, write the scores of rank 0."""

import sys
from pathlib import Path

import torch

from megatron_long.evaluation.scoring import open_scorer
from megatron_long.model.labels import UNSCORED


def main(checkpoint: str, output: str, *flags: str) -> None:
    scorer = open_scorer(Path(checkpoint), context_length=256, megatron_argv=flags)
    windows = torch.randint(0, 390, (2, 257), generator=torch.Generator().manual_seed(0))
    labels = windows[:, 1:].clone()
    labels[0, 5:9] = UNSCORED
    scores = scorer.score(windows[:, :-1], labels)
    short = scorer.score(windows[:, :-1].reshape(8, 64), labels.reshape(8, 64))
    gathered = scorer.gather(scorer.data_parallel_rank)
    agreed = scorer.agree(torch.distributed.get_rank())
    seen = {"gathered": gathered, "agreed": agreed, "short": short.losses}
    if scorer.is_writer:
        torch.save({"losses": scores.losses, "is_greedy": scores.is_greedy, **seen}, output)
    scorer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
