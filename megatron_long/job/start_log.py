"""Megatron's output before the first step: in a file, or on the screen with `--verbose`.

Megatron prints 800 flags, every parameter's name and dozens of timings before the first loss. Here a start is
a few lines of ours, and the rest is kept: rank 0 writes it to a file at once, other ranks buffer it and
print its end if the start fails. Errors, and all that follows the first step, are shown unchanged.
"""

import contextlib
import logging
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megatron_long.errors import UserError

FILE_NAME = "start.log"
FOLDER_NAME = "logs"
"""In the folder of --save."""
SHOWN_LINES = 40
"""Number of buffered lines that are printed if the start fails."""


class StartLog:
    """Replaces standard output until `end`.

    Args:
        verbose: Show everything instead.
    """

    def __init__(self, *, verbose: bool) -> None:
        self.verbose = verbose
        self._stream: Any = sys.stdout
        self._held: list[str] = []
        self._file: TextIO | None = None
        self._path: Path | None = None
        self._is_over = verbose
        self._filtered: list[Any] = []

    def __enter__(self) -> "StartLog":
        if not self.verbose:
            sys.stdout = self
            self._show_warning, warnings.showwarning = warnings.showwarning, self._keep_warning
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = error is not None and not isinstance(error, (UserError, KeyboardInterrupt))
        if isinstance(error, SystemExit) and not error.code:
            failed = False
        if failed and not self._is_over:
            self._tell_failure()
        self.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Keep a text, or print it once the start is over."""
        if self._is_over:
            return self._stream.write(text)
        self._held.append(text)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(text)
                self._file.flush()
        return len(text)

    def say(self, text: str) -> None:
        """Print a line of ours now."""
        self._stream.write(text + "\n")
        self._stream.flush()

    def write_to(self, path: Path) -> None:
        """Write buffered and following text to a file; on a full disk continue without it."""
        if self.verbose:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
            self._path = path
            self._file.write("".join(self._held))
            self._file.flush()

    def take_logging(self) -> None:
        """Keep records of other packages that are not errors; call it after Megatron has set up logging."""
        if self.verbose:
            return
        for handler in logging.root.handlers:
            if isinstance(handler, logging.StreamHandler):
                if handler.stream is self:
                    handler.setStream(self._stream)
                self._filter(handler)

    def end(self) -> None:
        """Show everything from now on."""
        if self.verbose or self._is_over:
            return
        self._is_over = True
        if sys.stdout is self:
            sys.stdout = self._stream
        warnings.showwarning = self._show_warning
        for handler in self._filtered:
            del handler.filter  # that of its class again
        self._filtered.clear()
        self._held.clear()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _filter(self, handler: Any) -> None:
        """Megatron's handler has its own `filter` method, which ignores the list of filters."""
        stock = handler.filter
        handler.filter = lambda record: stock(record) and self._takes(record)
        self._filtered.append(handler)

    def _takes(self, record: logging.LogRecord) -> bool:
        ours = record.name.startswith("megatron_long") or record.name == "__main__"
        if self._is_over or ours or record.levelno >= logging.ERROR:
            return True
        self.write(f"{record.levelname}:{record.name}:{record.getMessage()}\n")
        return False

    def _keep_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        self.write(warnings.formatwarning(message, category, filename, lineno, line))

    def _tell_failure(self) -> None:
        lines = "".join(self._held).splitlines()
        shown = lines[-SHOWN_LINES:]
        where = f"; all of it: {self._path}" if self._path else ""
        print(
            f"the start failed; the last {len(shown)} of {len(lines)} lines that Megatron wrote before"
            f"{where}",
            *shown,
            sep="\n",
            file=sys.stderr,
        )


def start_log_path(save: str | None, loss_log: str | None) -> Path | None:
    """Where rank 0 writes it; None without a folder of the run.

    >>> start_log_path("out", "losses/loss.jsonl").as_posix(), start_log_path(None, "a/b.jsonl").as_posix()
    ('out/logs/start.log', 'a/start.log')
    """
    if save:
        return Path(save) / FOLDER_NAME / FILE_NAME
    return Path(loss_log).parent / FILE_NAME if loss_log else None


def describe_start(args: Namespace, checkpoint: Path | None, how: str) -> list[str]:
    """Describe what is about to be trained.

    Args:
        args: Flags after Megatron's validation.
        checkpoint: What the weights are loaded from; None for random ones or a Hugging Face folder.
        how: What of it is loaded besides the weights.
    """
    tokens = args.global_batch_size * args.seq_length
    steps = args.train_iters or -(-args.train_samples // args.global_batch_size)
    heads = f"{args.num_attention_heads} heads, {args.num_query_groups or args.num_attention_heads} groups"
    start = args.hf_checkpoint or "random weights"
    if checkpoint is not None:
        start = f"{checkpoint}, {how}"
    times = [f"every {args.save_minutes:g} minutes"] if args.save_minutes else []
    times += [f"every {args.save_interval} steps"] if args.save_interval < steps else []
    kept = f"the last {args.keep_last} are kept" if args.keep_last else "all are kept"
    saves = (
        f"{' and '.join([*times, 'at the end'])} in {args.save}; {kept}" if args.save else "none"
    )
    return [
        f"model: {args.num_layers} layers of {args.hidden_size}, {heads}; "
        f"{args.position_embedding_type} base {args.rotary_base:g}, {args.seq_length:,} tokens",
        f"layout: {args.world_size} processes = tensor {args.tensor_model_parallel_size} * pipeline "
        f"{args.pipeline_model_parallel_size} * context {args.context_parallel_size} * data "
        f"{args.data_parallel_size}; {args.params_dtype}{' with FP8' if args.fp8 else ''}",
        f"steps: {steps:,} of {args.global_batch_size} windows ({tokens:,} tokens), {steps * tokens:,} "
        f"tokens in all; rate {args.lr:g}, {args.lr_decay_style}",
        f"data: {args.dataset or args.data_path or args.train_data_path or 'mock data'}",
        f"start: {start}",
        f"checkpoints: {saves}",
    ]
