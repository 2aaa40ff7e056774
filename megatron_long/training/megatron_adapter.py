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
from typing import Any, NoReturn

import torch

from megatron_long.errors import ConfigError
from megatron_long.training import host_backend

SUPPORTED_VERSIONS = ("0.19.",)
PATCHED_SYMBOLS = {
    "megatron.core.datasets.utils": ("compile_helpers",),
    "megatron.training.training": (
        "initialize_megatron",
        "set_jit_fusion_options",
        "training_log",
        "post_training_step_callbacks",
    ),
    "megatron.core.tensor_parallel.layers": ("_grad_accum_fusion_available",),
    "megatron.core.optimizer.distrib_optimizer": (
        "DistributedOptimizer.sharded_state_dict",
        "DistributedOptimizer.load_state_dict",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
    ),
}
"""What is replaced, by module: `compile_helpers` always, `training_log` where step losses are asked for,
`post_training_step_callbacks` where something is evaluated during training,
`_grad_accum_fusion_available` where the output layer is not called, the others on the host backend only."""

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


def build_model_config(args: Namespace) -> Any:
    """Megatron's configuration of the model, with portable attention where Transformer Engine is absent."""
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_long.model.layer_spec import portable_block_spec

    config = gpt_config_from_args(args)
    if args.transformer_impl == "local" and args.spec is None:
        config.transformer_layer_spec = portable_block_spec
    return config


def install_patches(
    step_listener: StepListener | None = None,
    *,
    output_layer_is_called: bool = True,
    after_step: tuple[Callable[[int], bool], AfterStep] | None = None,
) -> None:
    """Put the changes of `PATCHED_SYMBOLS` in place.

    Args:
        step_listener: Told the figures of each step.
        output_layer_is_called: False where an output processor takes the layer's place in training.
        after_step: Which iterations are followed by an evaluation, and the evaluation.
    """
    check_version()
    # The wheel ships the compiled helpers but no Makefile: compile_helpers() would end the process.
    helpers: Any = importlib.import_module("megatron.core.datasets.utils")
    helpers.compile_helpers = lambda: None
    training: Any = importlib.import_module("megatron.training.training")
    if step_listener is not None:
        training.training_log = _listening(training.training_log, step_listener)
    if after_step is not None:
        training.post_training_step_callbacks = _evaluating(
            training.post_training_step_callbacks, *after_step
        )
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
        _mend_torch_adamw_resume()


def run_pretrain(
    args: Namespace, dataset_provider: Callable, forward_step: Callable, program_start: float
) -> None:
    """Run Megatron's training loop to its end, and leave the process group."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.training import set_startup_timestamps

    set_startup_timestamps(program_start=program_start, main_entry=program_start)
    container = pretrain_cfg_container_from_args(args, build_model_config(args))
    pretrain(container, dataset_provider, ModelType.encoder_or_decoder, forward_step)
    leave_process_group()


def load_model_for_scoring(args: Namespace) -> torch.nn.Module:
    """Join the process group, build this rank's part of the model and load its weights.

    Args:
        args: Flags after `validate_flags`; without `load` the weights stay as they were initialised.
    Returns: The model chunk of this rank, in evaluation mode.
    Raises: ConfigError: virtual pipeline stages were asked for.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    if args.virtual_pipeline_model_parallel_size is not None:
        raise ConfigError("evaluation runs without virtual pipeline stages; drop that flag")
    initialize_megatron(allow_no_cuda=host_backend.is_installed())
    container = pretrain_cfg_container_from_args(args, build_model_config(args))
    builder = container.model.get_builder_cls()(container.model)
    chunks = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=container.ddp,
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
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


def _mend_torch_adamw_resume() -> None:
    """Let the distributed optimizer resume over torch's AdamW (no Transformer Engine, no Apex).

    In 0.19.2 loading asserts on optimizer state that does not exist yet, copies in place into views of
    leaf parameters, restores a stale `step`, and misses `step` in fully reshardable checkpoints.
    """
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if module.HAVE_APEX_OR_TE:
        return
    optimizer = module.DistributedOptimizer
    stock_sharded = optimizer.sharded_state_dict
    stock_load = optimizer.load_state_dict
    stock_set = optimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def sharded_state_dict(self, model_sharded_state_dict, is_loading=False, *args, **kwargs):
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return stock_sharded(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        stock_load(self, state_dict)
        step = float(state_dict["optimizer"]["param_groups"][0]["step"])
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(step)

    def set_states(self, model_param, tensors):
        stock_set(self, model_param, {**tensors, "step": None})

    optimizer.sharded_state_dict = sharded_state_dict
    optimizer.load_state_dict = load_state_dict
    optimizer._set_main_param_and_optimizer_states = set_states
