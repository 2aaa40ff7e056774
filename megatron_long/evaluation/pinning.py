"""The checkpoint and the weights that Megatron loads to be scored: the same on every rank, and checked."""

import sys
from argparse import Namespace
from pathlib import Path

from megatron_long.checkpoint import choosing
from megatron_long.checkpoint.megatron_folder import choose_weights
from megatron_long.checkpoint.opening import EVALUATION, open_checkpoint
from megatron_long.engine import loading_hooks
from megatron_long.job import rendezvous


def pin_checkpoint(
    folder: Path, args: Namespace, check_hashes: bool, iteration: str | None
) -> Path:
    """Let Megatron load one checkpoint, the same on every rank, checked; gives its own folder."""
    # A run that saves here meanwhile gives the ranks different newest ones.
    (agreed,) = rendezvous.from_first(
        lambda: [iteration or open_checkpoint(folder, args.ckpt_step, reader=EVALUATION).name]
    )
    number = None if agreed == choosing.RELEASE else int(agreed)
    path = choosing.iteration_folder(folder, number)
    if check_hashes:
        choosing.check_whole(path, share=rendezvous.share(), agree=rendezvous.agree)
    loading_hooks.load_from(choosing.Choice(number, path), args)
    return path


def pin_weights(iteration: Path, wanted: str) -> None:
    """Let Megatron load the weights that are wanted, the same on every rank, and say which they are."""
    prefix, said = rendezvous.from_first(lambda: list(choose_weights(iteration, wanted)))
    if prefix:
        loading_hooks.load_main_copy(iteration, prefix)
    if said and rendezvous.share()[0] == 0:
        print(f"{iteration}: scoring {said}", file=sys.stderr)
