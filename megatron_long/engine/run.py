"""A training run on Megatron's loop, from its first line to the end of the process group."""

from argparse import Namespace
from collections.abc import Callable, Sequence

from megatron_long.checkpoint.saving import CheckpointKeeper
from megatron_long.engine import megatron_adapter
from megatron_long.engine.callback import Callback, Callbacks
from megatron_long.engine.fixes.first_log import log_each_step_once
from megatron_long.engine.fixes.flags_parsed_once import flags_parsed_once
from megatron_long.engine.fixes.rate_change import let_rates_change, schedule_error
from megatron_long.engine.loop import Loop
from megatron_long.engine.saving_hooks import KeptSaves
from megatron_long.errors import ConfigError


def run_training(
    args: Namespace,
    dataset_provider: Callable,
    forward_step: Callable,
    *,
    callbacks: Sequence[Callback],
    keeper: CheckpointKeeper,
    program_start: float,
    fill_model: Callable[[list], None] | None = None,
    lengths_vary: bool = False,
) -> None:
    """Train.

    Args:
        args: Flags after `megatron_adapter.validate_flags`.
        callbacks: Told of each event, in this order.
        keeper: Writes the checkpoints.
        program_start: Time of the day, seconds, for Megatron's figures of its start.
        fill_model: Called with the model chunks of this rank when they are built and before anything,
            the optimizer among it, is made from them.
        lengths_vary: Whether micro-batches may differ in length.
    Raises: ConfigError: the run that is continued had another schedule, or its optimizer was not saved.
    """
    events = Callbacks(callbacks)
    try:
        log_each_step_once()
        saves = KeptSaves(keeper, events, args)
        saves.install()
        Loop(events, saves, args).install()
        _pretrain(args, dataset_provider, forward_step, program_start, fill_model, lengths_vary)
    finally:
        events.on_end()


def _pretrain(
    args: Namespace,
    dataset_provider: Callable,
    forward_step: Callable,
    program_start: float,
    fill_model: Callable[[list], None] | None,
    lengths_vary: bool,
) -> None:
    """Run Megatron's training, its errors in the words of the flags."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.training import set_startup_timestamps

    set_startup_timestamps(program_start=program_start, main_entry=program_start)
    config = megatron_adapter.build_model_config(args)
    config.variable_seq_lengths = lengths_vary
    if fill_model is not None:
        config.pre_wrap_hooks.append(lambda chunks: fill_model(chunks) or chunks)
    container = pretrain_cfg_container_from_args(args, config)
    let_rates_change(keep_saved=args.use_checkpoint_opt_param_scheduler)
    try:
        with megatron_adapter.refused_pickles_named(args.load), flags_parsed_once(args):
            pretrain(container, dataset_provider, ModelType.encoder_or_decoder, forward_step)
    except AssertionError as error:
        refusal = schedule_error(args.load, str(error))
        if refusal is None:
            raise
        raise refusal from error
    except KeyError as error:
        if error.args != ("optimizer",):
            raise
        raise ConfigError(
            f"--load {args.load} holds no optimizer state, as after --no-save-optim; give --no-load-optim to "
            "go on at its step with a new optimizer, or --finetune to start at step 0 from its weights"
        ) from error
    megatron_adapter.leave_process_group()
