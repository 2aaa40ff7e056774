"""Failures of TensorBoard or W&B do not end training: their writers are wrapped on creation."""

import functools
import importlib
import sys
from argparse import Namespace
from typing import Any

from megatron_long.cli import USER_ERROR_STATUS
from megatron_long.job.side_output import SurvivingWriter

CHANGED_SYMBOLS = {
    "megatron.training.global_vars": ("_set_tensorboard_writer", "_set_wandb_writer"),
    "megatron.training.wandb_utils": ("on_save_checkpoint_success",),
}
"""Symbols replaced, by module."""


def install_surviving_logs() -> None:
    """Keep failures of TensorBoard or W&B from ending training."""
    variables: Any = importlib.import_module("megatron.training.global_vars")
    wandb_utils: Any = importlib.import_module("megatron.training.wandb_utils")
    set_board, set_wandb = variables._set_tensorboard_writer, variables._set_wandb_writer
    note_artifact = wandb_utils.on_save_checkpoint_success

    def set_tensorboard_writer(args):
        set_board(args)
        board = variables._GLOBAL_TENSORBOARD_WRITER
        if board is not None:
            reopen = functools.partial(_open_board, type(board), args)
            variables._GLOBAL_TENSORBOARD_WRITER = SurvivingWriter("TensorBoard", board, reopen)

    def set_wandb_writer(args):
        try:
            set_wandb(args)
        except Exception as error:  # only on the last rank, which therefore prints the error itself
            sys.stderr.write(
                f"error: W&B could not be started ({type(error).__name__}: {error}); log in with `wandb "
                "login`, write to files with WANDB_MODE=offline, or drop --wandb-project\n"
            )
            raise SystemExit(USER_ERROR_STATUS) from error
        if variables._GLOBAL_WANDB_WRITER is not None:
            variables._GLOBAL_WANDB_WRITER = SurvivingWriter("W&B", variables._GLOBAL_WANDB_WRITER)

    @functools.wraps(note_artifact)
    def on_save_checkpoint_success(*args, **kwargs):
        if variables._GLOBAL_WANDB_WRITER is not None:
            variables._GLOBAL_WANDB_WRITER.attempt(lambda: note_artifact(*args, **kwargs))

    variables._set_tensorboard_writer = set_tensorboard_writer
    variables._set_wandb_writer = set_wandb_writer
    wandb_utils.on_save_checkpoint_success = on_save_checkpoint_success


def _open_board(kind: type, args: Namespace) -> Any:
    board = kind(log_dir=args.tensorboard_dir, max_queue=args.tensorboard_queue_size)
    board.flush()
    return board
