"""The one place that imports `megatron.training`, and every change made to it.

Nothing of `megatron.training` is declared stable, so the version is checked first, each changed symbol
is listed in `PATCHED_SYMBOLS`, and `tests/training/test_megatron_adapter.py` holds a contract for each.
Import this module after `host_backend.install()`.
"""

import difflib
import functools
import importlib
import importlib.metadata
import inspect
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_long.errors import ConfigError
from megatron_long.model.flash_attention import mend_windows
from megatron_long.model.rope import BaseRope, Llama3Rope, rope_from_arguments
from megatron_long.training import host_backend, signals
from megatron_long.training.adamw_resume import mend_torch_adamw_resume
from megatron_long.training.checkpoint_choice import Choice
from megatron_long.training.checkpoint_saving import CheckpointKeeper, ErrorKeepingStream
from megatron_long.training.step_guard import FAULT_STATUS, StepGuard
from megatron_long.training.watchdog import LONG_PHASE, Watchdog

SUPPORTED_VERSIONS = ("0.19.",)
PATCHED_SYMBOLS = {
    "megatron.core.datasets.utils": ("compile_helpers",),
    "megatron.training.training": (
        "initialize_megatron",
        "set_jit_fusion_options",
        "training_log",
        "train_step",
        "save_checkpoint",
        "save_checkpoint_and_time",
        "checkpoint_and_decide_exit",
        "post_training_step_callbacks",
    ),
    "megatron.training.checkpointing": (
        "ensure_directory_exists",
        "read_metadata",
        "checkpoint_exists",
    ),
    "megatron.core.dist_checkpointing": ("save",),
    "megatron.core.dist_checkpointing.serialization": ("save_config",),
    "megatron.core.dist_checkpointing.strategies.filesystem_async": (
        "FileSystemWriterAsync.finish",
        "_write_item",
    ),
    "megatron.core.models.common.embeddings.rotary_pos_embedding": (
        "RotaryEmbedding._apply_scaling",
    ),
    "megatron.core.tensor_parallel.layers": ("_grad_accum_fusion_available",),
    "megatron.core.optimizer.distrib_optimizer": (
        "DistributedOptimizer.sharded_state_dict",
        "DistributedOptimizer.load_state_dict",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
    ),
}
"""What is replaced, by module: `compile_helpers` always, `training_log` where step losses are asked for,
`_apply_scaling` where RoPE is Llama-3.1's, `_grad_accum_fusion_available` where the output layer is not
called, `post_training_step_callbacks` where something is evaluated during training, `train_step` and what
belongs to checkpoints in training, the others on the host backend only."""


@dataclass(kw_only=True)
class Llama3RopeArguments:
    """What Megatron has no flags for beside `--use-rope-scaling` and `--rope-scaling-factor`."""

    rope_scaling_low_freq_factor: float = 1.0
    """low_freq_factor of --use-rope-scaling."""

    rope_scaling_high_freq_factor: float = 4.0
    """high_freq_factor of --use-rope-scaling."""

    rope_scaling_original_length: int = 8192
    """original_max_position_embeddings of --use-rope-scaling."""


StepListener = Callable[[int, dict[str, torch.Tensor], float | None], None]
"""Called after each step with the iteration, the reduced losses and the gradient norm."""

AfterStep = Callable[[torch.nn.Module, int, Any, Any], None]
"""Called between two steps with the model chunk in evaluation mode, the iteration, and the writers of
TensorBoard and W&B (None on ranks that do not log)."""


def check_version() -> None:
    """Refuse a megatron-core that the patches were not written for.

    Raises: ConfigError: names the version found and those supported.
    """
    version = importlib.metadata.version("megatron-core")
    if not version.startswith(SUPPORTED_VERSIONS):
        supported = ", ".join(f"{prefix}*" for prefix in SUPPORTED_VERSIONS)
        raise ConfigError(
            f"megatron-core {version} is installed; this release works with {supported}: "
            "pip install -c constraints.txt megatron-core"
        )


def parse_flags(
    argv: Sequence[str], add_arguments: Callable[[ArgumentParser], ArgumentParser] | None = None
) -> Namespace:
    """Parse Megatron's flags with Megatron's own parser; later flags win.

    Raises: ConfigError: an unknown flag, or a value of the wrong type or choice.
    """
    from megatron.training.arguments import parse_args

    def add_and_mend(parser: ArgumentParser) -> ArgumentParser:
        parser = add_arguments(parser) if add_arguments else parser
        parser = add_dataclass_flags(parser, Llama3RopeArguments, "megatron_long RoPE")
        parser.error = functools.partial(_refuse_flags, parser)  # type: ignore[method-assign]
        for action in parser._actions:  # a bare "%" in a help text breaks `--help`
            if action.help and "%" in action.help.replace("%%", "").replace("%(", ""):
                action.help = action.help.replace("%", "%%")
        return parser

    program = sys.argv[0]
    kept, sys.argv = sys.argv, [program, *argv]
    try:
        return parse_args(add_and_mend)
    finally:
        sys.argv = kept


def _refuse_flags(parser: ArgumentParser, message: str) -> NoReturn:
    """Stand in for `parser.error`, which would print the usage of some 700 flags first."""
    unknown = [word for word in message.split() if word.startswith("--")]
    known = list(parser._option_string_actions)
    near = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1)]
    hint = f"did you mean {', '.join(near)}? " if "unrecognized" in message and near else ""
    raise ConfigError(f"{message}; {hint}`--help` lists the flags, ours and Megatron's")


def add_dataclass_flags(parser: ArgumentParser, kind: type, title: str) -> ArgumentParser:
    """Add a flag for each field of a dataclass, with its docstring as help."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    ArgumentGroupFactory(kind).build_group(parser, title=title)
    return parser


def validate_flags(args: Namespace) -> None:
    """Run Megatron's own validation and make the flags global for its code.

    Raises: ConfigError: Megatron refuses them; its words are kept.
    """
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    try:
        validate_args(args)
    except (AssertionError, ValueError) as error:
        reason = str(error) or "an unnamed assertion, see the line below"
        raise ConfigError(f"Megatron refuses these flags: {reason}") from error
    set_global_variables(args)
    if args.exit_signal_handler:
        from megatron.training.global_vars import get_signal_handler

        handler = get_signal_handler()
        signals.watch(lambda: setattr(handler, "_signal_received", True))


def build_model_config(args: Namespace) -> Any:
    """Megatron's configuration of the model, with portable attention where Transformer Engine is absent."""
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_long.model.layer_spec import portable_block_spec

    config = gpt_config_from_args(args)
    if args.use_rope_scaling:
        _take_llama3_rope(rope_from_arguments(args))
    if args.transformer_impl == "local" and args.spec is None:
        config.transformer_layer_spec = portable_block_spec
    return config


def _take_llama3_rope(rope: BaseRope) -> None:
    """Let Megatron-Core scale RoPE as the flags say: 0.19.2 takes 8, 1, 4 and 8192 whatever they are."""
    assert isinstance(rope, Llama3Rope)
    name = "megatron.core.models.common.embeddings.rotary_pos_embedding"
    embedding = importlib.import_module(name).RotaryEmbedding
    embedding._apply_scaling = lambda self, freqs, factor=None: rope.scale(freqs)


def install_patches(
    step_listener: StepListener | None = None,
    *,
    output_layer_is_called: bool = True,
) -> None:
    """Put the changes of `PATCHED_SYMBOLS` in place.

    Args:
        step_listener: Told the figures of each step.
        output_layer_is_called: False where an output processor takes the layer's place in training.
    """
    check_version()
    mend_windows()
    # The wheel ships the compiled helpers but no Makefile: compile_helpers() would end the process.
    helpers: Any = importlib.import_module("megatron.core.datasets.utils")
    helpers.compile_helpers = lambda: None
    training: Any = importlib.import_module("megatron.training.training")
    if step_listener is not None:
        training.training_log = _listening(training.training_log, step_listener)
    if not output_layer_is_called:
        # Its constructor refuses in-place weight gradients without Apex's kernel, which it will not run.
        layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
        layers._grad_accum_fusion_available = True
    if host_backend.is_installed():
        training.initialize_megatron = functools.partial(
            training.initialize_megatron, allow_no_cuda=True
        )
        # Its warm-up of fused kernels would draw a layout-dependent amount of random numbers.
        training.set_jit_fusion_options = lambda *args, **kwargs: None
        mend_torch_adamw_resume()


def load_from(choice: Choice, args: Namespace) -> None:
    """Let Megatron load this checkpoint, whatever the tracker file says."""
    checkpointing: Any = importlib.import_module("megatron.training.checkpointing")
    folder = choice.folder.parent
    read, exists = checkpointing.read_metadata, checkpointing.checkpoint_exists
    pinned = (choice.iteration or 0, choice.iteration is None)

    def read_metadata(tracker):
        return pinned if Path(tracker).parent == folder else read(tracker)

    def checkpoint_exists(path):
        return (path is not None and Path(path) == folder) or exists(path)

    checkpointing.read_metadata = read_metadata
    checkpointing.checkpoint_exists = checkpoint_exists
    args.ckpt_step = choice.iteration


def install_keeper(keeper: CheckpointKeeper, args: Namespace, watchdog: Watchdog) -> None:
    """Let the keeper write checkpoints and survive failing ones; none with a NaN in it is written."""
    from megatron.training import ft_integration
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_long.training.guarded_step import all_finite, state_tensors

    training: Any = importlib.import_module("megatron.training.training")
    _patch_writers(keeper)
    save, save_and_time = training.save_checkpoint, training.save_checkpoint_and_time
    decide = training.checkpoint_and_decide_exit

    def save_checkpoint(iteration, model, optimizer, *rest, **options):
        watchdog.beat(LONG_PHASE)
        if keeper.job.any(not all_finite(state_tensors(model, optimizer))):
            if keeper.job.rank == 0:
                sys.stderr.write(
                    f"error: NaN or Inf in the weights or the optimizer after step {iteration}: they are not "
                    "saved, the checkpoint before is the newest\n"
                )
            raise SystemExit(FAULT_STATUS)
        whole = functools.partial(save, iteration, model, optimizer, *rest, **options)
        keeper.attempt(iteration, whole, (CheckpointException,))
        if keeper.pending is not None:
            ft_integration.on_checkpointing_end(is_async_finalization=False)
        watchdog.beat(LONG_PHASE)

    def save_checkpoint_and_time(iteration, *rest, **options):
        save_and_time(iteration, *rest, **options)
        if iteration >= args.train_iters:
            keeper.insist(lambda: save_and_time(iteration, *rest, **options))

    def checkpoint_and_decide_exit(model, optimizer, scheduler, iteration, flops, context, data):
        leaves = decide(model, optimizer, scheduler, iteration, flops, context, data)

        def again() -> None:
            state = (iteration, model, optimizer, scheduler, flops, context)
            save_and_time(*state, train_data_iterator=data)

        if leaves:
            keeper.insist(again)
        elif keeper.is_due(iteration):
            again()
        return leaves

    training.save_checkpoint = save_checkpoint
    training.save_checkpoint_and_time = save_checkpoint_and_time
    training.checkpoint_and_decide_exit = checkpoint_and_decide_exit


def _patch_writers(keeper: CheckpointKeeper) -> None:
    """Write to the keeper's folder; what fails on one process is kept, not raised there alone."""
    checkpointing: Any = importlib.import_module("megatron.training.checkpointing")
    package: Any = importlib.import_module("megatron.core.dist_checkpointing")
    serialization: Any = importlib.import_module("megatron.core.dist_checkpointing.serialization")
    strategies = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    files: Any = importlib.import_module(strategies)
    save, write_item = package.save, files._write_item

    def noting(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except OSError as error:
                return keeper.note(error)

        return call

    def save_beside(state, folder, *args, **kwargs):
        return keeper.write(Path(folder), lambda path: save(state, str(path), *args, **kwargs))

    @functools.wraps(write_item)
    def write_whole_item(transforms, stream, *args, **kwargs):
        kept = ErrorKeepingStream(stream)
        result = write_item(transforms, kept, *args, **kwargs)
        if kept.error is not None:
            keeper.note(kept.error)  # Megatron passes on no more than its class
            raise kept.error
        return result

    package.save = save_beside
    files._write_item = write_whole_item
    checkpointing.ensure_directory_exists = noting(checkpointing.ensure_directory_exists)
    serialization.save_config = noting(serialization.save_config)
    files.FileSystemWriterAsync.finish = noting(files.FileSystemWriterAsync.finish)


def install_guard(
    guard: StepGuard, losses: Any, args: Namespace, watchdog: Watchdog, snapshot: Callable
) -> None:
    """Let the guard judge each step before the optimizer, and end the run when it says so.

    Args:
        losses: The `LossRecorder` that the forward step fills.
        snapshot: Told the step that ends the run; gives the folder for a checkpoint of before it, if any.
    """
    from megatron_long.training.guarded_step import guard_optimizer

    training: Any = importlib.import_module("megatron.training.training")
    stock, signature = training.train_step, inspect.signature(training.train_step)
    guarded: list[Any] = []

    @functools.wraps(stock)
    def train_step(*positional, **named):
        values = signature.bind(*positional, **named).arguments
        optimizer = values["optimizer"]
        if not guarded:
            guard_optimizer(optimizer, guard, losses, lambda: args.curr_iteration + 1)
            guarded.append(optimizer)
        losses.clear()
        result = stock(*positional, **named)
        watchdog.beat()
        if guard.stop_reason is None:
            return result
        folder = snapshot(args.curr_iteration + 1)
        args.save = str(folder) if folder else None
        loss_dict, _, _, _, _, *figures = result
        return (loss_dict, 1, folder is not None, True, FAULT_STATUS, *figures)

    training.train_step = train_step


def run_pretrain(
    args: Namespace,
    dataset_provider: Callable,
    forward_step: Callable,
    program_start: float,
    fill_model: Callable[[list], None] | None = None,
    *,
    lengths_vary: bool = False,
) -> None:
    """Run Megatron's training loop to its end, and leave the process group.

    Args:
        fill_model: Called with the model chunks of this rank when they are built and before anything,
            the optimizer among it, is made from them.
        lengths_vary: Whether micro-batches may differ in length.
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.training import set_startup_timestamps

    set_startup_timestamps(program_start=program_start, main_entry=program_start)
    config = build_model_config(args)
    config.variable_seq_lengths = lengths_vary
    if fill_model is not None:
        config.pre_wrap_hooks.append(lambda chunks: fill_model(chunks) or chunks)
    container = pretrain_cfg_container_from_args(args, config)
    pretrain(container, dataset_provider, ModelType.encoder_or_decoder, forward_step)
    leave_process_group()


def build_model_chunks(args: Namespace) -> list:
    """Join the process group and build this rank's part of the model, with random weights.

    Args:
        args: Flags after `validate_flags`.
    Returns: The model's pipeline stages on this rank.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.initialize import initialize_megatron

    initialize_megatron(allow_no_cuda=host_backend.is_installed())
    container = pretrain_cfg_container_from_args(args, build_model_config(args))
    builder = container.model.get_builder_cls()(container.model)
    chunks: list = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=container.ddp,
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    return chunks


def load_model_for_scoring(args: Namespace) -> torch.nn.Module:
    """Build this rank's part of the model and load its weights.

    Args:
        args: Flags after `validate_flags`; without `load` the weights stay as they were initialised.
    Returns: The model chunk of this rank, in evaluation mode.
    Raises: ConfigError: virtual pipeline stages were asked for.
    """
    from megatron.training.checkpointing import load_checkpoint

    if args.virtual_pipeline_model_parallel_size is not None:
        raise ConfigError("evaluation runs without virtual pipeline stages; drop that flag")
    chunks = build_model_chunks(args)
    if args.load is not None:
        load_checkpoint(chunks, None, None)
    return chunks[0].eval()


def leave_process_group() -> None:
    """Wait for all ranks and end the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def stock_blend(args: Namespace) -> tuple:
    """Megatron's reading of `--data-path` and `--train-data-path`: (blend, blend_per_split)."""
    from megatron.training.utils import get_blend_and_blend_per_split

    return get_blend_and_blend_per_split(args)


def _listening(training_log: Callable, listener: StepListener) -> Callable:
    """`training_log` that first tells the listener the unrounded figures of the step."""

    signature = inspect.signature(training_log)

    @functools.wraps(training_log)
    def log_and_tell(*args, **kwargs):
        values = signature.bind(*args, **kwargs).arguments
        listener(values["iteration"], values["loss_dict"], values["grad_norm"])
        return training_log(*args, **kwargs)

    return log_and_tell


def install_evaluation(is_due: Callable[[int], bool], evaluate: AfterStep) -> None:
    """Evaluate after some steps.

    Args:
        is_due: Which iterations are followed by an evaluation.
    """
    training: Any = importlib.import_module("megatron.training.training")
    training.post_training_step_callbacks = _evaluating(
        training.post_training_step_callbacks, is_due, evaluate
    )


def _evaluating(
    callbacks: Callable, is_due: Callable[[int], bool], evaluate: AfterStep
) -> Callable:
    """`post_training_step_callbacks` that evaluates first, as Megatron's loop brackets its own evaluation."""
    signature = inspect.signature(callbacks)

    @functools.wraps(callbacks)
    def evaluate_and_call(*args, **kwargs):
        values = signature.bind(*args, **kwargs).arguments
        if is_due(values["iteration"]):
            _evaluate_between_steps(
                values["model"], values["optimizer"], values["iteration"], evaluate
            )
        return callbacks(*args, **kwargs)

    return evaluate_and_call


def _evaluate_between_steps(
    chunks: list[torch.nn.Module], optimizer: Any, iteration: int, evaluate: AfterStep
) -> None:
    from megatron.core.utils import get_model_config
    from megatron.training import global_vars, training

    timers, config = global_vars.get_timers(), get_model_config(chunks[0])
    has_hook = training.should_disable_forward_pre_hook(global_vars.get_args())
    timers("interval-time").stop()
    if has_hook:  # gathers the parameters that the next forward pass would gather
        training.disable_forward_pre_hook(chunks, optimizer=optimizer)
    config_timers, config.timers = config.timers, None
    chunks[0].eval()
    try:
        writers = global_vars.get_tensorboard_writer(), global_vars.get_wandb_writer()
        evaluate(chunks[0], iteration, *writers)
    finally:
        chunks[0].train()
        config.timers = config_timers
    if has_hook:
        training.enable_forward_pre_hook(chunks)
    timers("interval-time", log_level=0).start(barrier=True)
