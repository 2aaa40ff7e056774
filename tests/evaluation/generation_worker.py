"""Runs under torchrun: generate from prompts of several lengths, write the tokens of rank 0."""

import sys
from pathlib import Path

import torch

from megatron_long.evaluation.generation.shard_generator import ShardGenerator
from megatron_long.evaluation.scoring import open_scorer

LENGTHS, NUM_NEW, CONTEXT = (5, 17, 64, 100), 24, 128


def make_prompts() -> list:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 380, (length,), generator=generator).numpy() for length in LENGTHS]


def main(checkpoint: str, output: str, stop: str, precision: str, *flags: str) -> None:
    model = open_scorer(
        Path(checkpoint),
        context_length=CONTEXT,
        megatron_argv=flags,
        precision=precision,
        kind=ShardGenerator,
    )
    assert isinstance(model, ShardGenerator)
    prompts = make_prompts()
    together = model.generate_rows(prompts, NUM_NEW)
    alone = [model.generate_rows([prompt], NUM_NEW)[0] for prompt in prompts]
    tokens = torch.from_numpy(prompts[2])[None]
    scores = model.score(tokens[:, :-8], tokens[:, 8:])  # and scores are those of a plain scorer
    model.stop_ids = {int(stop)}
    stopped = model.generate_rows(prompts, NUM_NEW)
    if model.is_writer:
        seen = {"together": together, "alone": alone, "stopped": stopped, "losses": scores.losses}
        torch.save({key: [part.tolist() for part in value] for key, value in seen.items()}, output)
    model.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
