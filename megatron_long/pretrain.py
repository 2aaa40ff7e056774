"""Continual pretraining on long windows: `torchrun -m megatron_long.pretrain` (or `python -m`).

Flags, the start, the callbacks, then Megatron's own loop. Megatron's flags work, but for those that
`flags.rules` refuses; ours are those of `LongContextArguments` and `EvaluationArguments`
(`command_line` puts them together).
"""

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM_START = time.time()

# ruff: noqa: E402
from megatron_long.job import signals

if __name__ == "__main__":
    signals.leave_before_training()  # the imports below take a while
    signals.leave_with_launcher()

from megatron_long.checkpoint.saving import CheckpointKeeper
from megatron_long.cli import run_tool
from megatron_long.command_line import parse
from megatron_long.conversion import run_ends
from megatron_long.conversion.run_model import real_vocab_size, tokenizer_dir, write_sidecars
from megatron_long.engine.callback import Callback
from megatron_long.evaluation.live_callback import EvaluateLive
from megatron_long.evaluation.live_evaluation import LiveEvaluation, plan_live_evaluation
from megatron_long.flags.arguments import LongContextArguments
from megatron_long.flags.argv import Argv
from megatron_long.flags.backend import detect_backend, join_or_start_job
from megatron_long.flags.relations import check_export
from megatron_long.job import rendezvous
from megatron_long.job.hang_monitor import check_monitor_is_there
from megatron_long.job.leaving import leave_together
from megatron_long.job.side_output import keep_standard_streams
from megatron_long.job.start_log import StartLog
from megatron_long.job.watchdog import Watchdog
from megatron_long.planning.preflight import check_before_training
from megatron_long.training.callbacks.first_sidecars import WriteSidecars
from megatron_long.training.callbacks.heartbeat import Heartbeat
from megatron_long.training.callbacks.save_clock import SaveByTime, SaveClock
from megatron_long.training.callbacks.step_logs import EndStartLog, LossLog
from megatron_long.training.start import (
    Start,
    check_loss_log,
    check_optimizer,
    check_save_again,
    check_writable,
    find_start,
    hold_save,
    tell_start,
)


@dataclass(frozen=True)
class Run:
    """A run at its start."""

    arguments: LongContextArguments
    args: argparse.Namespace
    """All flags."""
    start: Start
    argv: list[str]
    """Arguments of the command line."""
    start_log: StartLog
    live: LiveEvaluation | None
    """The evaluations during training."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; the flags are those of the command line.

    Returns: Exit status.
    """
    signals.leave_before_training()
    signals.leave_on_second_interrupt()
    keep_standard_streams()
    user_argv = list(sys.argv[1:] if argv is None else argv)
    shows_all = Argv(user_argv).given("--verbose", "--help", "-h")
    with StartLog(verbose=shows_all) as start_log:
        return _run(user_argv, start_log)


def prepare(
    user_argv: Sequence[str],
) -> tuple[LongContextArguments, argparse.Namespace, Start]:
    """Check everything that can be checked before Megatron starts; each process of the job calls it.

    Returns: Our flags, all flags, and the checkpoint that the run starts from.
    """
    from megatron_long.engine import host_backend

    host_backend.install()
    from megatron_long.engine import megatron_adapter

    megatron_adapter.check_version()
    world_size = join_or_start_job()
    leave_together(signals.leave_with_others)
    arguments, args = parse(user_argv, detect_backend(), world_size)
    check_monitor_is_there(args)
    hold_save(args.save)
    return arguments, args, find_start(arguments, args)


def _run(user_argv: list[str], start_log: StartLog) -> int:
    arguments, args, start = prepare(user_argv)
    from megatron_long.engine import loading_hooks, megatron_adapter, surviving_logs

    start_log.take_logging()
    asked = _steps_asked(args)
    if asked and start.iteration >= asked[1]:  # as after a late requeue
        if args.rank == 0:
            start_log.say(f"--load {args.load} is at {asked[0]} already: nothing to train")
        start_log.end()
        if arguments.export_hf and not Path(arguments.export_hf).exists():
            _export(arguments, args)
        return 0
    rendezvous.from_first(functools.partial(check_export, arguments.export_hf))
    check_before_training(args)
    live = plan_live_evaluation(args, arguments.dataset, tokenizer_dir(arguments, args))
    megatron_adapter.install_patches(output_layer_is_called=arguments.megatron_loss)
    surviving_logs.install_surviving_logs()
    if start.choice is not None:
        loading_hooks.load_from(start.choice, args)
    if start.begins_stage:
        loading_hooks.keep_optimizer()
    megatron_adapter.validate_flags(args)
    check_optimizer(start, args)
    check_loss_log(arguments.loss_log, args.rank == args.world_size - 1)
    if args.save:
        check_writable(Path(args.save))
        hold_save(args.save)
        check_save_again(start, args)
    if start.choice is not None and start.weights is not None:
        loading_hooks.take_weights(start.choice.folder, start.weights, args)
    if args.rank == 0:
        tell_start(args, start, start_log)
    _train(Run(arguments, args, start, user_argv, start_log, live))
    start_log.end()
    _export(arguments, args)
    return 0


def _steps_asked(args: argparse.Namespace) -> tuple[str, int] | None:
    """The flag that says how long the run is, and its steps; None if the batch changes or is not known."""
    if args.train_iters:
        return f"--train-iters {args.train_iters}", args.train_iters
    if args.train_samples and args.global_batch_size and not args.step_batch_size_schedule:
        steps = args.train_samples // args.global_batch_size
        return f"--train-samples {args.train_samples}", steps
    return None


def _train(run: Run) -> None:
    from megatron_long.engine.run import run_training
    from megatron_long.job.torch_job import TorchJob
    from megatron_long.training.batch import forward_step, step_settings
    from megatron_long.training.callbacks.guarding import GuardSteps, LossRecorder, make_guard
    from megatron_long.training.datasets import dataset_provider

    arguments, args, start = run.arguments, run.args, run.start
    save = Path(args.save) if args.save else None
    write = functools.partial(write_sidecars, arguments=arguments, args=args, argv=run.argv)
    connect = functools.partial(rendezvous.connect, "watchdog")
    watchdog = Watchdog(arguments.hang_timeout, save, args.rank, connect)
    guard, losses = make_guard(arguments, args, start, args.rank), LossRecorder()
    facts: dict[str, Any] = {
        "data": start.data,
        "dataset_files": start.dataset_files,
        "argv": run.argv,
    }
    facts |= {"stages": start.stages} if start.stages else {}
    keeper = CheckpointKeeper(
        TorchJob(),
        save,
        lambda: facts | {"guard": guard.state()},
        keep_last=arguments.keep_last or None,
        keep_every=arguments.keep_every,
    )
    vocab_size = functools.partial(real_vocab_size, arguments, args)
    callbacks: list[Callback] = [
        EndStartLog(run.start_log),
        WriteSidecars(keeper.job, save, start, write),
        Heartbeat(watchdog),  # before the guard: a step that ends the run is also done
        GuardSteps(guard, losses, save, write),
    ]
    if arguments.loss_log:
        callbacks.append(LossLog(Path(arguments.loss_log), args.rank == args.world_size - 1))
    if arguments.save_minutes:
        callbacks.append(SaveByTime(SaveClock(arguments.save_minutes * 60), keeper, args))
    if run.live is not None:
        callbacks.append(EvaluateLive(run.live, args, vocab_size, watchdog.beat))
    settings = step_settings(arguments, args, vocab_size, watchdog.beat, losses.add)
    run_training(
        args,
        dataset_provider(arguments, args),
        functools.partial(forward_step, settings),
        callbacks=callbacks,
        keeper=keeper,
        program_start=PROGRAM_START,
        fill_model=run_ends.first_weights(
            arguments.hf_checkpoint, args.load, lambda: args.padded_vocab_size
        ),
        # Padded documents make micro-batches of different lengths, which pipeline stages must exchange.
        lengths_vary=settings.document_masking == "thd",
    )


def _export(arguments: LongContextArguments, args: argparse.Namespace) -> None:
    """Write the trained model as a Hugging Face folder, on one rank; the others do not wait."""
    if arguments.export_hf and args.rank == 0:
        report = run_ends.export(Path(args.save), Path(arguments.export_hf))
        print(f"wrote {report.output}: {report.num_tensors} tensors of {report.dtype}")


if __name__ == "__mp_main__":  # a helper process that Megatron spawns imports this file once more
    signals.end_with_parent()
elif __name__ == "__main__":
    sys.exit(run_tool(main, prints_result=False))
