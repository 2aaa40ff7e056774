"""Continual pretraining on long windows: `torchrun -m megatron_long.pretrain` (or `python -m`).

The loop is Megatron's own `megatron.training.pretrain`. Its flags work, but for those that
`training.unsupported_flags` refuses; ours are those of `LongContextArguments` and `EvaluationArguments`
(`training.command_line` puts them together).
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

PROGRAM_START = time.time()

# ruff: noqa: E402
from megatron_long.training import signals

if __name__ == "__main__":
    signals.leave_before_training()  # the imports below take a while

from megatron_long.cli import run_tool
from megatron_long.conversion.sources import read_config, read_source_geometry
from megatron_long.data.manifest import read_manifest
from megatron_long.errors import ConfigError
from megatron_long.model.geometry import geometry_from_args
from megatron_long.planning.preflight import check_before_training
from megatron_long.training import hugging_face, rendezvous, signals
from megatron_long.training.arguments import (
    LongContextArguments,
    check_export,
    check_monitor_is_there,
)
from megatron_long.training.backend import detect_backend, join_or_start_job
from megatron_long.training.checkpoint_folder import (
    copy_generation_config,
    copy_tokenizer,
    write_hf_config,
    write_run,
)
from megatron_long.training.checkpoint_saving import CheckpointKeeper, Job
from megatron_long.training.command_line import (
    model_source,
    parse,
    real_vocab_size,
    tokenizer_dir,
)
from megatron_long.training.live_evaluation import LiveEvaluation, Logs, plan_live_evaluation
from megatron_long.training.reliability import (
    Start,
    check_optimizer,
    check_save_again,
    find_start,
    hold_save,
    make_guard,
    make_snapshot,
    record_sidecars,
)
from megatron_long.training.save_clock import SaveClock
from megatron_long.training.side_output import LossLog, keep_standard_streams
from megatron_long.training.start_log import StartLog, describe_start, start_log_path
from megatron_long.training.watchdog import Watchdog


def main(argv: Sequence[str] | None = None) -> int:
    """Train; the flags are those of the command line.

    Returns: Exit status.
    """
    signals.leave_before_training()
    signals.leave_on_second_interrupt()
    keep_standard_streams()
    user_argv = list(sys.argv[1:] if argv is None else argv)
    shows_all = not {"--verbose", "--help", "-h"}.isdisjoint(user_argv)
    with StartLog(verbose=shows_all) as start_log:
        return _run(user_argv, start_log)


def _run(user_argv: list[str], start_log: StartLog) -> int:
    arguments, args, start = prepare(user_argv)
    from megatron_long.training import loading_hooks, megatron_adapter, megatron_hooks, step_hooks

    start_log.take_logging()
    if args.train_iters and start.iteration >= args.train_iters:  # as after a late requeue
        if args.rank == 0:
            start_log.say(
                f"--load {args.load} is at --train-iters {args.train_iters} already: nothing to train"
            )
        start_log.end()
        if arguments.export_hf and not Path(arguments.export_hf).exists():
            _export(arguments, args)
        return 0
    check_export(arguments.export_hf)
    check_before_training(args)
    live = plan_live_evaluation(args, arguments.dataset, tokenizer_dir(arguments, args))
    megatron_adapter.install_patches(output_layer_is_called=arguments.megatron_loss)
    if arguments.loss_log:
        log = LossLog(Path(arguments.loss_log), writes=args.rank == args.world_size - 1)
        megatron_hooks.install_listener(log)
    step_hooks.install_first_log(start_log.end)
    megatron_hooks.install_surviving_logs()
    if start.choice is not None:
        loading_hooks.load_from(start.choice, args)
    megatron_adapter.validate_flags(args)
    check_optimizer(start, args)
    if args.save:
        _check_writable(Path(args.save))
        hold_save(args.save)
        check_save_again(start, args)
    if args.rank == 0:
        _tell_start(args, start, start_log)
    _train(arguments, args, start, user_argv, live)
    start_log.end()
    _export(arguments, args)
    return 0


def _tell_start(args: argparse.Namespace, start: Start, start_log: StartLog) -> None:
    path = start_log_path(args.save, args.loss_log)
    if path is not None:
        start_log.write_to(path)
    checkpoint = start.choice.folder if start.choice else None
    for line in describe_start(args, checkpoint, start.resumes, is_main_copy=bool(start.weights)):
        start_log.say(line)
    if not start_log.verbose:
        where = f"is in {path}" if path else "is left out"
        start_log.say(f"what Megatron says before the first step {where}; --verbose prints it")


def prepare(
    user_argv: Sequence[str],
) -> tuple[LongContextArguments, argparse.Namespace, Start]:
    """Check everything that can be checked before Megatron starts; each process of the job calls it.

    Returns: Our flags, all flags, and the checkpoint that the run starts from.
    """
    from megatron_long.training import host_backend

    host_backend.install()
    from megatron_long.training import megatron_adapter

    megatron_adapter.check_version()
    arguments, args = parse(user_argv, detect_backend(), join_or_start_job())
    check_monitor_is_there(args)
    hold_save(args.save)
    return arguments, args, find_start(arguments, args)


def write_sidecars(
    folder: Path, arguments: LongContextArguments, args: argparse.Namespace, argv: Sequence[str]
) -> None:
    """Put next to the checkpoints what evaluation and export need (see `checkpoint_folder`)."""
    folder.mkdir(parents=True, exist_ok=True)
    source = model_source(arguments, args)
    model_type = read_source_geometry(source).model_type if source else None
    trained = geometry_from_args(args, real_vocab_size(arguments, args), model_type)
    write_hf_config(folder, trained, read_config(source) if source else None)
    if arguments.hf_checkpoint:
        hugging_face.write_start_sidecars(folder, Path(arguments.hf_checkpoint))
    for start in (args.load, args.pretrained_checkpoint):
        if start:
            copy_generation_config(folder, Path(start))
    tokenizer = tokenizer_dir(arguments, args)
    if tokenizer is not None:
        copy_tokenizer(folder, tokenizer)
    fingerprint = read_manifest(Path(arguments.dataset)).fingerprint if arguments.dataset else None
    run = {"argv": list(argv), "world_size": args.world_size, "dataset_fingerprint": fingerprint}
    write_run(folder, run)


def _check_writable(save: Path) -> None:
    """Find out early; what lies there stays as it is until Megatron has loaded and accepted everything."""
    try:
        save.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save):
            pass
    except OSError as error:
        raise _unwritable(save, str(error)) from error


def _unwritable(save: Path, reason: str) -> ConfigError:
    return ConfigError(f"--save {save} cannot be written to ({reason}); nothing has been trained")


def _in_all(job: Job, write: Callable[[], None], save: str | None) -> Callable[[], None]:
    """`write` that fails in all processes of the job where it fails in one."""

    def write_together() -> None:
        reason = None
        try:
            write()
        except OSError as error:
            reason = str(error)
        reasons = [found for found in job.gather(reason) if found]
        if save and reasons:
            raise _unwritable(Path(save), reasons[0])

    return write_together


def _train(
    arguments: LongContextArguments,
    args: argparse.Namespace,
    start: Start,
    argv: list[str],
    live: LiveEvaluation | None,
) -> None:
    from megatron_long.training import megatron_adapter, megatron_hooks, step_hooks
    from megatron_long.training.batch import StepSettings, forward_step
    from megatron_long.training.datasets import dataset_provider
    from megatron_long.training.guarded_step import LossRecorder, TorchJob
    from megatron_long.training.loss import chunked_loss

    masking = attention_format(args) if arguments.document_masking else None
    save = Path(args.save) if args.save else None
    store = functools.partial(rendezvous.connect, "watchdog")
    watchdog, losses = Watchdog(arguments.hang_timeout, save, args.rank, store), LossRecorder()
    guard = make_guard(arguments, args, start, args.rank)
    facts = {"data": start.data, "dataset_files": start.dataset_files, "argv": argv}
    keeper = CheckpointKeeper(
        TorchJob(),
        save,
        lambda: facts | {"guard": guard.state()},
        keep_last=arguments.keep_last or None,
        keep_every=arguments.keep_every,
    )

    def write_beside(folder: Path) -> None:
        write_sidecars(folder, arguments, args, argv)

    def write_first() -> None:
        if save and args.rank == 0:
            write_beside(save)
            record_sidecars(save, start)

    snapshot = make_snapshot(guard, args.save, args.rank, write_beside)
    megatron_hooks.install_before_training(_in_all(keeper.job, write_first, args.save))
    megatron_hooks.install_keeper(keeper, args, watchdog)
    if start.choice is not None and start.weights is not None:
        _take_weights(start.choice.folder, start.weights, args)
    if arguments.save_minutes:
        step_hooks.install_save_clock(SaveClock(arguments.save_minutes * 60), keeper, args)
    megatron_hooks.install_guard(guard, losses, args, watchdog, snapshot)
    if live is not None:
        evaluate = _evaluator(live, arguments, args, watchdog.beat)
        megatron_hooks.install_evaluation(live.is_due, evaluate)
    settings = StepSettings(
        args.micro_batch_size,
        args.eval_micro_batch_size,
        args.seq_length,
        None
        if arguments.megatron_loss
        else functools.partial(chunked_loss, real_vocab_size(arguments, args)),
        masking,
        args.tensor_model_parallel_size if args.sequence_parallel else 1,
        watchdog.beat,
        losses.add,
    )
    provider = dataset_provider(arguments, args)
    fill = None
    if arguments.hf_checkpoint and hugging_face.starts_from_hf(arguments.hf_checkpoint, args.load):
        model = Path(arguments.hf_checkpoint)
        fill = hugging_face.filler(model, lambda: args.padded_vocab_size)
    step = functools.partial(forward_step, settings)
    # Padded documents make micro-batches of different lengths, and pipeline stages must tell each other.
    varies = masking == "thd"
    try:
        megatron_adapter.run_pretrain(
            args, provider, step, PROGRAM_START, fill, lengths_vary=varies
        )
    finally:
        watchdog.stop()


def _take_weights(iteration: Path, prefix: str, args: argparse.Namespace) -> None:
    """Let a start that loads no optimizer state have the weights as they were before FP8 rounded them."""
    from megatron_long.training import loading_hooks

    if prefix:
        loading_hooks.load_main_copy(iteration, prefix)
    if prefix or args.fp8_param_gather:
        loading_hooks.install_exact_start(iteration, prefix)


def _export(arguments: LongContextArguments, args: argparse.Namespace) -> None:
    """Leave the trained model behind as a Hugging Face folder; one rank writes, none waits."""
    if arguments.export_hf and args.rank == 0:
        report = hugging_face.export(Path(args.save), Path(arguments.export_hf))
        print(f"wrote {report.output}: {report.num_tensors} tensors of {report.dtype}")


def attention_format(args: argparse.Namespace) -> Literal["sbhd", "thd"]:
    """How masks between documents are given to the attention in use, see `training.documents`."""
    return "thd" if args.transformer_impl == "transformer_engine" else "sbhd"


def _evaluator(
    live: LiveEvaluation,
    arguments: LongContextArguments,
    args: argparse.Namespace,
    on_batch: Callable[[], None],
) -> Callable[..., None]:
    def evaluate(model: Any, iteration: int, tensorboard: Any, wandb: Any) -> None:
        from megatron_long.evaluation.scoring import Scorer

        scorer = Scorer(
            model,
            context_length=args.seq_length,
            vocab_size=real_vocab_size(arguments, args),
            sequence_parallel=args.sequence_parallel,
            on_batch=on_batch,
        )
        live.run(scorer, iteration, Logs(tensorboard, wandb))

    return evaluate


if __name__ == "__mp_main__":  # a helper process that Megatron spawns imports this file once more
    signals.end_with_parent()
elif __name__ == "__main__":
    sys.exit(run_tool(main, prints_result=False))
