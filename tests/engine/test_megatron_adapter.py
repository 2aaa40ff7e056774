"""A contract for each Megatron symbol that the adapter changes or calls with positions of its own."""

import importlib
import importlib.metadata
import inspect
import pkgutil
from argparse import Namespace

import pytest

from megatron_long.engine import host_backend
from megatron_long.errors import ConfigError

host_backend.install()

# ruff: noqa: E402
from megatron_long import engine
from megatron_long.engine import megatron_adapter
from megatron_long.engine.fixes.flags_parsed_once import flags_parsed_once


def resolve(module: str, symbol: str):
    found = importlib.import_module(module)
    for part in symbol.split("."):
        found = getattr(found, part)
    return found


def changed_symbols() -> set[tuple[str, str]]:
    """What the files of `engine` list."""
    files = pkgutil.walk_packages(engine.__path__, f"{engine.__name__}.")
    tables = [
        getattr(importlib.import_module(file.name), "CHANGED_SYMBOLS", {})
        for file in files
        if not file.ispkg
    ]
    tables.append(megatron_adapter.PATCHED_SYMBOLS)
    return {
        (module, symbol)
        for table in tables
        for module, symbols in table.items()
        for symbol in symbols
    }


@pytest.mark.parametrize(("module", "symbol"), sorted(changed_symbols()))
def test_patched_symbols_are_there(module, symbol):
    found = resolve(module, symbol)
    assert isinstance(found, bool) if symbol.startswith("_grad_accum") else callable(found)


def test_output_layer_refuses_fusion_by_that_symbol_alone():
    from megatron.core.tensor_parallel import ColumnParallelLinear

    source = inspect.getsource(ColumnParallelLinear.__init__)
    assert "gradient_accumulation_fusion and not _grad_accum_fusion_available" in source


def test_installed_version_is_supported():
    megatron_adapter.check_version()


def test_flags_are_parsed_once(monkeypatch):
    """Megatron's fault tolerance parses `sys.argv` by itself, where 64K is no length and a recipe unknown."""
    from megatron.training import ft_integration

    monkeypatch.setattr("sys.argv", ["pretrain", "--seq-length", "64K"])
    with pytest.raises(SystemExit):
        ft_integration.setup()
    with flags_parsed_once(Namespace(enable_ft_package=False)):
        ft_integration.setup()
    with pytest.raises(SystemExit):
        ft_integration.setup()


def test_other_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.20.0")
    with pytest.raises(ConfigError, match=r"megatron-core 0\.20\.0 .*0\.19\.\*"):
        megatron_adapter.check_version()


def parameters(module: str, symbol: str) -> list[str]:
    return list(inspect.signature(resolve(module, symbol)).parameters)


def test_compile_helpers_takes_nothing():
    assert parameters("megatron.core.datasets.utils", "compile_helpers") == []


def test_initialize_megatron_can_do_without_cuda():
    assert "allow_no_cuda" in parameters("megatron.training.initialize", "initialize_megatron")


def test_the_queue_of_results_is_told_how_to_start():
    module = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    assert parameters(module, "get_write_results_queue") == ["mp_mode"]


def test_pretrain_is_called_as_it_is_declared():
    names = parameters("megatron.training.training", "pretrain")
    assert names[:4] == [
        "cfg_container",
        "train_valid_test_dataset_provider",
        "model_type",
        "forward_step_func",
    ]


def test_the_loop_calls_its_functions_as_events_expect():
    """What `engine.loop` takes from the arguments of Megatron's functions, and the order of those given."""
    named = {
        "train": ("model", "optimizer"),
        "train_step": ("model", "optimizer"),
        "training_log": ("iteration", "loss_dict", "grad_norm", "is_first_iteration"),
        "post_training_step_callbacks": ("iteration", "model", "optimizer"),
    }
    module = "megatron.training.training"
    for symbol, names in named.items():
        assert set(names) <= set(parameters(module, symbol))
    saved = ["iteration", "model", "optimizer", "opt_param_scheduler"]
    saved += ["num_floating_point_operations_so_far", "checkpointing_context"]
    assert parameters(module, "save_checkpoint")[:3] == saved[:3]
    assert parameters(module, "save_checkpoint_and_time")[:6] == saved
    assert parameters(module, "checkpoint_and_decide_exit") == [
        *(*saved[1:4], saved[0], *saved[4:]),
        "train_data_iterator",
    ]
    source = inspect.getsource(resolve(module, "train"))
    assert source.index("if should_checkpoint:") < source.index("if should_exit:")
    unpacked = source[source.index("loss_dict,\n") : source.index(") = train_step(")].split()
    assert unpacked[:5] == [
        *("loss_dict,", "skipped_iter,", "should_checkpoint,", "should_exit,", "exit_code,")
    ]


def test_distributed_optimizer_methods():
    module = "megatron.core.optimizer.distrib_optimizer"
    sharded = parameters(module, "DistributedOptimizer.sharded_state_dict")
    assert sharded[:3] == ["self", "model_sharded_state_dict", "is_loading"]
    assert parameters(module, "DistributedOptimizer.load_state_dict") == ["self", "state_dict"]
    states = parameters(module, "DistributedOptimizer._set_main_param_and_optimizer_states")
    assert states == ["self", "model_param", "tensors"]
    assert callable(
        resolve(module, "DistributedOptimizer._init_optimizer_states_with_dummy_values")
    )


def test_model_forward_takes_an_output_processor():
    from megatron.core.models.gpt.gpt_model import GPTModel

    assert "output_processor" in inspect.signature(GPTModel.forward).parameters


def test_help_prints_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        megatron_adapter.parse_flags(["--help"])
    assert stopped.value.code == 0
    assert "--context-parallel-size" in capsys.readouterr().out


def test_mistyped_flag_of_the_calling_tool_is_told():
    with pytest.raises(ConfigError, match="--bukets 8; did you mean --buckets"):
        megatron_adapter.parse_flags(["--bukets", "8"], tool_flags=["--buckets", "--dataset"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--seqlength", "4096"],
            "unrecognized arguments: --seqlength 4096; did you mean --seq-length",
        ),
        (["--seq-length", "4Q"], "argument --seq-length: '4Q' is not a length of 1 token or more"),
        (["--global-batch-size", "4K"], "argument --global-batch-size: invalid int value: '4K'"),
        (["--lr-decay-style", "flat"], "argument --lr-decay-style: invalid choice: 'flat'"),
    ],
)
def test_wrong_flags_are_one_paragraph(argv, words):
    with pytest.raises(ConfigError) as refused:
        megatron_adapter.parse_flags(argv)
    assert words in str(refused.value)
    assert len(str(refused.value)) < 400


def test_saves_in_the_background_are_finished_through_that_symbol_alone():
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.training import training

    assert parameters("megatron.training.training", "maybe_finalize_async_save") == [
        "blocking",
        "terminate",
    ]
    assert inspect.getsource(training).count("    maybe_finalize_async_save(blocking=") == 3
    lines = inspect.getsource(AsyncCallsQueue.maybe_finalize_async_calls).splitlines()
    forgets = next(number for number, line in enumerate(lines) if "popleft()" in line)
    assert "finalize_fn" in lines[forgets + 1]  # a save that fails here is not met again


def test_torch_adamw_resumes_on_gpus_too(monkeypatch):
    """Without Transformer Engine and Apex it is the optimizer there as well."""
    fixed = []
    for name in ("guard_checkpoints", "fix_windows", "save_own_shards"):
        monkeypatch.setattr(megatron_adapter, name, lambda: None)
    monkeypatch.setattr(megatron_adapter, "fix_torch_adamw_resume", lambda: fixed.append(1))
    monkeypatch.setattr(megatron_adapter.host_backend, "is_installed", lambda: False)
    monkeypatch.setattr(megatron_adapter, "use_compiled_helpers", lambda: None)
    megatron_adapter.install_patches()
    assert fixed == [1]


def test_loading_takes_the_model_and_the_optimizer_first():
    loads = parameters("megatron.training.training", "load_checkpoint")
    assert loads[:2] == ["ddp_model", "optimizer"]
    assert loads[2] == "opt_param_scheduler"
    set_up = parameters("megatron.training.checkpointing", "_maybe_setup_gpt_to_hybrid_load")
    assert set_up == ["args", "ckpt_args", "model"]
    source = inspect.getsource(resolve("megatron.training.checkpointing", "load_checkpoint"))
    assert source.count("(not args.finetune or gpt_compat_load_optim)") >= 2
    assert "opt_param_scheduler is not None and not args.finetune" in source
    read = parameters("megatron.core.dist_checkpointing", "load")
    assert read[:2] == ["sharded_state_dict", "checkpoint_dir"]
    assert "validate_access_integrity" in read
