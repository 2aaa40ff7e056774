"""Calls of `megatron.training`, and the changes that it needs first.

No API of `megatron.training` is declared stable: the version is checked first, only files of `engine` import
it, each of them lists the symbols that it changes (`CHANGED_SYMBOLS`), and
`tests/engine/test_megatron_adapter.py` holds a contract for each. Import this module after
`host_backend.install()`.
"""

import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import io
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from packaging.version import Version

from megatron_long.engine import host_backend
from megatron_long.engine.fixes.adamw_resume import fix_torch_adamw_resume
from megatron_long.engine.fixes.compiled_helpers import use_compiled_helpers
from megatron_long.engine.fixes.flags_parsed_once import flags_parsed_once
from megatron_long.engine.fixes.llama3_rope import Llama3RopeArguments, take_llama3_rope
from megatron_long.engine.fixes.old_format import old_format_errors_raised
from megatron_long.engine.fixes.rate_change import let_rates_change, schedule_error
from megatron_long.engine.fixes.uncalled_output_layer import let_output_layer_be_built
from megatron_long.engine.optimizer_shards import save_own_shards
from megatron_long.errors import ConfigError, DataError
from megatron_long.flags import flag_help
from megatron_long.flags.argv import Argv
from megatron_long.job import signals
from megatron_long.model.flash_attention import fix_windows
from megatron_long.model.rope import rope_from_arguments
from megatron_long.pickles import UnpicklingError, guard_checkpoints

SUPPORTED_VERSIONS = ("0.19.",)
OLDEST_RESILIENCY = "0.6"
PATCHED_SYMBOLS = {
    "megatron.training.training": ("initialize_megatron", "set_jit_fusion_options"),
}
"""Symbols replaced on the host backend, by module."""


def check_version() -> None:
    """Refuse a megatron-core version that the patches do not support, or that cannot be imported.

    Raises: ConfigError: names the version found and those supported.
    """
    version = importlib.metadata.version("megatron-core")
    if not version.startswith(SUPPORTED_VERSIONS):
        supported = ", ".join(f"{prefix}*" for prefix in SUPPORTED_VERSIONS)
        raise ConfigError(
            f"megatron-core {version} is installed; this release works with {supported}: "
            "pip install -c constraints.txt megatron-core"
        )
    try:
        resiliency = importlib.metadata.version("nvidia-resiliency-ext")
    except importlib.metadata.PackageNotFoundError:
        return
    if Version(resiliency) < Version(OLDEST_RESILIENCY):
        raise ConfigError(
            f"nvidia-resiliency-ext {resiliency} is installed, but megatron-core {version} needs "
            f"{OLDEST_RESILIENCY} or later and fails to import; upgrade it, or pip uninstall "
            "nvidia-resiliency-ext"
        )


def parse_flags(
    argv: Sequence[str],
    add_arguments: Callable[[ArgumentParser], ArgumentParser] | None = None,
    *,
    tool_flags: Sequence[str] = (),
) -> Namespace:
    """Parse Megatron's flags with Megatron's own parser; later flags win.

    Args:
        argv: Command-line arguments.
        add_arguments: Adds our flags to Megatron's.
        tool_flags: Flags that the calling tool has removed, to suggest for an unknown flag.
    Raises: ConfigError: an unknown flag, a value of the wrong type or choice, or `--yaml-cfg`.
    """
    from megatron.training.arguments import parse_args

    if Argv(argv).given("--yaml-cfg"):
        raise ConfigError(
            "--yaml-cfg would replace all other flags, including ours and the recipe's; write its "
            "values as flags"
        )

    def add_and_fix(parser: ArgumentParser) -> ArgumentParser:
        parser = _add_and_fix(parser, add_arguments)
        parser.error = functools.partial(_refuse_flags, parser, tool_flags)  # type: ignore[method-assign]
        return parser

    program = sys.argv[0]
    kept, sys.argv = sys.argv, [program, *argv]
    try:
        return parse_args(add_and_fix)
    finally:
        sys.argv = kept


def build_parser(add_arguments: Callable[[ArgumentParser], ArgumentParser]) -> ArgumentParser:
    """Return the parser of `parse_flags`, for what lists its flags."""
    from megatron.training.arguments import add_megatron_arguments

    return _add_and_fix(add_megatron_arguments(ArgumentParser(allow_abbrev=False)), add_arguments)


def _add_and_fix(
    parser: ArgumentParser, add_arguments: Callable[[ArgumentParser], ArgumentParser] | None
) -> ArgumentParser:
    parser = add_arguments(parser) if add_arguments else parser
    parser = add_dataclass_flags(parser, Llama3RopeArguments, "megatron_long RoPE")
    flag_help.take_lengths(parser)
    flag_help.describe_own(parser)
    flag_help.put_own_first(parser)
    for action in parser._actions:  # a bare "%" in a help text breaks `--help`
        if action.help and "%" in action.help.replace("%%", "").replace("%(", ""):
            action.help = action.help.replace("%", "%%")
    return parser


def _refuse_flags(parser: ArgumentParser, tool_flags: Sequence[str], message: str) -> NoReturn:
    """Replacement for `parser.error`, which would first print the usage of about 700 flags."""
    unknown = [word for word in message.split() if word.startswith("--")]
    known = [*tool_flags, *parser._option_string_actions]
    near = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1)]
    hint = f"did you mean {', '.join(near)}? " if "unrecognized" in message and near else ""
    raise ConfigError(f"{message}; {hint}`--help` lists the flags, ours and Megatron's")


def add_dataclass_flags(parser: ArgumentParser, kind: type, title: str) -> ArgumentParser:
    """Add a flag for each field of a dataclass, with its docstring as help."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    ArgumentGroupFactory(kind).build_group(parser, title=title)
    flag_help.take_lengths(parser)
    return parser


def validate_flags(args: Namespace, *, quiet: bool = False) -> None:
    """Run Megatron's own validation and make the flags global for its code.

    Args:
        args: The parsed flags.
        quiet: Suppress Megatron's list of all 800 values.
    Raises: ConfigError: Megatron refuses them; its message is kept.
    """
    from megatron.training import global_vars
    from megatron.training.arguments import validate_args

    try:
        with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
            validate_args(args)
    except (AssertionError, ValueError) as error:
        reason = str(error) or _source_line(error)
        raise ConfigError(f"Megatron refuses these flags: {reason}") from error
    if args.tokenizer_type is None:
        raise ConfigError(
            "these data have no tokenizer: give --tokenizer-type and --tokenizer-model, or --tokenizer-type "
            "NullTokenizer --vocab-size N where tokens are numbers already"
        )
    if host_backend.is_installed():
        args.use_persistent_ckpt_worker = False  # it would look for a GPU; a forked process writes
    build = global_vars.build_tokenizer
    global_vars.build_tokenizer = functools.partial(_build_tokenizer, build)
    try:
        global_vars.set_global_variables(args)
    finally:
        global_vars.build_tokenizer = build
    if args.exit_signal_handler:
        handler = global_vars.get_signal_handler()
        signals.watch(lambda: setattr(handler, "_signal_received", True))


def _source_line(error: BaseException) -> str:
    """The condition of an assertion without a message."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"`{frames[-1].line}` does not hold"


def _build_tokenizer(build: Callable, args: Namespace) -> Any:
    try:
        return build(args)
    except Exception as error:  # any exception of a tokenizer's package
        raise ConfigError(
            f"Megatron cannot create a tokenizer from --tokenizer-type {args.tokenizer_type} "
            f"--tokenizer-model {args.tokenizer_model} --vocab-size {args.vocab_size} "
            f"({type(error).__name__}: {error})"
        ) from error


def build_model_config(args: Namespace) -> Any:
    """Megatron's configuration of the model, with portable attention where Transformer Engine is absent."""
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_long.model.layer_spec import portable_block_spec

    config = gpt_config_from_args(args)
    if args.use_rope_scaling:
        take_llama3_rope(rope_from_arguments(args))
    if args.transformer_impl == "local" and args.spec is None:
        config.transformer_layer_spec = portable_block_spec
    return config


def install_patches(*, output_layer_is_called: bool = True) -> None:
    """Install the patches that training and scoring share, here and in `engine.fixes`.

    Args:
        output_layer_is_called: False if an output processor replaces the layer in training.
    """
    check_version()
    guard_checkpoints()
    fix_windows()
    use_compiled_helpers()
    save_own_shards()
    fix_torch_adamw_resume()
    if not output_layer_is_called:
        let_output_layer_be_built()
    training: Any = importlib.import_module("megatron.training.training")
    if host_backend.is_installed():
        training.initialize_megatron = functools.partial(
            training.initialize_megatron, allow_no_cuda=True
        )
        # Its warm-up of fused kernels would draw a layout-dependent amount of random numbers.
        training.set_jit_fusion_options = lambda *args, **kwargs: None


def run_pretrain(
    args: Namespace,
    dataset_provider: Callable,
    forward_step: Callable,
    program_start: float,
    fill_model: Callable[[list], None] | None = None,
    *,
    lengths_vary: bool = False,
) -> None:
    """Run Megatron's training, and destroy the process group; see `engine.run` for the arguments.

    Raises: ConfigError: the run that is continued had another schedule, or its optimizer was not saved.
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
    let_rates_change(keep_saved=args.use_checkpoint_opt_param_scheduler)
    try:
        with refused_pickles_named(args.load), flags_parsed_once(args):
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
            "resume at its step with a new optimizer, or --finetune to start at step 0 from its weights"
        ) from error
    leave_process_group()


@contextlib.contextmanager
def refused_pickles_named(load: str | None) -> Iterator[None]:
    """Report in one paragraph an object that `guard_checkpoints` rejected."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with old_format_errors_raised():
            yield
    except (CheckpointException, UnpicklingError) as error:
        failures = getattr(error, "failures", {0: (error, None)}).values()
        causes = [str(cause) for cause, _ in failures if isinstance(cause, UnpicklingError)]
        if not causes:
            raise
        reason = next((line for line in causes[0].splitlines() if "GLOBAL" in line), causes[0])
        raise DataError(
            f"the checkpoint in --load {load} cannot be read as tensors and plain values only ({reason}): "
            "it is damaged, or crafted to run code when it is loaded; use one from a source that you trust"
        ) from error


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
        args: Flags after `validate_flags`; without `load` the weights keep their initial values.
    Returns: The model chunk of this rank, in evaluation mode.
    Raises: ConfigError: virtual pipeline stages were requested.
    """
    from megatron.training.checkpointing import load_checkpoint

    if args.virtual_pipeline_model_parallel_size is not None:
        raise ConfigError("evaluation runs without virtual pipeline stages; drop that flag")
    chunks = build_model_chunks(args)
    if args.load is not None:
        with refused_pickles_named(args.load):
            load_checkpoint(chunks, None, None)
    return chunks[0].eval()


def leave_process_group() -> None:
    """Wait for all ranks and end the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def stock_blend(args: Namespace) -> tuple:
    """Megatron's interpretation of `--data-path` and `--train-data-path`: (blend, blend_per_split)."""
    from megatron.training.utils import get_blend_and_blend_per_split

    return get_blend_and_blend_per_split(args)
