"""Every valid layout that fits, fastest first; of those about as fast, the simplest."""

import itertools
import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_long.errors import ConfigError
from megatron_long.flags.recipe import ParallelLayout, build_recipe
from megatron_long.mixture.shares import parse_token_count
from megatron_long.model.geometry import LlamaGeometry, geometry_from_hf
from megatron_long.planning.hardware import ATTENTION_KERNELS, GPUS_PER_NODE, Gpu, find_gpu
from megatron_long.planning.memory import MemoryParts, checkpoint_bytes, predict_memory
from megatron_long.planning.run_shape import RECOMPUTE_FLAGS, RunShape
from megatron_long.planning.step_time import TimeParts, predict_time

RESERVE_GIB = 4.0
"""GPU memory reserved for CUDA's context, NCCL's buffers and fragmentation."""

PRECISIONS = {"bf16": ("bf16",), "fp8": ("fp8",), "both": ("bf16", "fp8")}
"""Values of --precision: those of the plans to compare."""

NEAR_TIE = 0.02
"""Plans whose hours differ by this fraction count as equally fast: predictions are no more accurate."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to train, and on which hardware."""

    model: LlamaGeometry
    seq_length: int
    num_gpus: int
    gpu: Gpu
    batch_tokens: int = 4 * 1024 * 1024
    train_tokens: int = 5_000_000_000
    precisions: Sequence[str] = ("bf16",)
    """`bf16`, `fp8`."""
    attention: str = "cudnn"

    def __post_init__(self) -> None:
        for flag, value in (
            ("--seq-length", self.seq_length),
            ("--gpus", self.num_gpus),
            ("--batch-tokens", self.batch_tokens),
            ("--train-tokens", self.train_tokens),
        ):
            if value < 1:
                raise ConfigError(f"{flag} {value} must be 1 or more")
        if self.batch_tokens < self.seq_length:
            raise ConfigError(
                f"--batch-tokens {self.batch_tokens} holds no window of --seq-length "
                f"{self.seq_length}; give at least that many"
            )
        if self.attention not in ATTENTION_KERNELS:
            raise ConfigError(
                f"--attention {self.attention} is unknown; choose one of {', '.join(ATTENTION_KERNELS)}"
            )
        if "fp8" in self.precisions and not self.gpu.fp8_flops:
            asked = "both" if len(self.precisions) > 1 else "fp8"
            raise ConfigError(
                f"--precision {asked}: this GPU has no FP8 arithmetic; give --precision bf16"
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to do a task, with its time and memory."""

    run: RunShape
    memory: MemoryParts
    time: TimeParts
    train_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        tokens = self.run.global_batch_size * self.run.seq_length
        return tokens / self.time.total_s / self.run.num_gpus

    @property
    def tflops(self) -> float:
        """Of one GPU, by Megatron's count."""
        return self.tokens_per_second * self.run.megatron_flops() / self.run.seq_length / 1e12

    @property
    def hours(self) -> float:
        """For the token budget, without checkpoints and restarts."""
        return self.train_tokens / (self.tokens_per_second * self.run.num_gpus) / 3600

    @property
    def train_iters(self) -> int:
        """Whole steps within the token budget, at least one."""
        return max(1, self.train_tokens // (self.run.global_batch_size * self.run.seq_length))

    def to_argv(self) -> list[str]:
        """Flags of megatron_long.pretrain, to append to `--recipe`."""
        return [*self.run.to_argv(), "--train-iters", str(self.train_iters)]

    def record(self) -> dict[str, Any]:
        """Give all that is predicted, with the parts of its sums, as JSON takes it."""
        return {
            "flags": self.to_argv(),
            "hours": self.hours,
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "tflops_per_gpu": self.tflops,
            "checkpoint_bytes": checkpoint_bytes(self.run.parameters),
            "step_seconds": {"total": self.time.total_s, **vars(self.time)},
            "peak_gib": {
                "total": self.memory.total_gib,
                **{name: size / 2**30 for name, size in vars(self.memory).items()},
            },
        }


def read_task(flags: Namespace) -> Task:
    """Give what the flags of `plan_run.py` ask for; a recipe gives what no flag does.

    Raises: ConfigError: no model is given, or two; see `Task`.
    """
    if bool(flags.hf_config) == bool(flags.recipe):
        raise ConfigError("give the model by one of --hf-config and --recipe")
    given: dict[str, Any] = {"seq_length": flags.seq_length}
    for name in ("batch_tokens", "train_tokens"):
        text = getattr(flags, name)
        given[name] = parse_token_count(text, f"--{name.replace('_', '-')}") if text else None
    if flags.recipe:
        recipe = build_recipe(flags.recipe)
        model = recipe.model
        values = {
            "seq_length": recipe.seq_length,
            "batch_tokens": recipe.tokens_per_batch,
            "train_tokens": recipe.train_tokens,
        }
    else:
        model, values = geometry_from_hf(flags.hf_config), {"seq_length": 131_072}
    values |= {name: value for name, value in given.items() if value is not None}
    return Task(
        model=model,
        num_gpus=flags.gpus,
        gpu=find_gpu(flags.gpu),
        precisions=PRECISIONS[flags.precision],
        attention=flags.attention,
        **values,
    )


def find_plans(task: Task) -> list[Plan]:
    """The plans that fit, fastest first; those within `NEAR_TIE` of the next one by simplicity.

    Raises: ConfigError: none fits, or none is valid.
    """
    plans = [
        Plan(
            run=run,
            memory=predict_memory(run),
            time=predict_time(run, task.gpu),
            train_tokens=task.train_tokens,
        )
        for run in possible_runs(task)
    ]
    if not plans:
        raise ConfigError(
            f"no layout of {task.num_gpus} GPUs divides the model and --seq-length {task.seq_length}; give "
            "a number of GPUs and a length that are multiples of powers of two"
        )
    limit = usable_gib(task.gpu)
    fitting = [plan for plan in plans if plan.memory.total_gib <= limit]
    if not fitting:
        least = min(plan.memory.total_gib for plan in plans)
        raise ConfigError(
            f"no layout fits: the smallest takes {least:.0f} GiB per GPU and {limit:.0f} are available; give "
            "more --gpus, a --gpu with more memory, or a shorter --seq-length"
        )
    return _simple_before_close(sorted(fitting, key=lambda plan: plan.hours))


def usable_gib(gpu: Gpu) -> float:
    """Memory of a GPU that a plan may take."""
    return gpu.memory_gib - RESERVE_GIB


def _simple_before_close(plans: list[Plan]) -> list[Plan]:
    """Reorder plans sorted by speed: of each group of near ties the simplest is taken next.

    Criteria, in this order: few pipeline stages, few GPUs per replica, few context-parallel ranks with a
    single way of communication, little recomputation, little memory.
    """
    ordered = []
    while plans:
        near = [plan for plan in plans if plan.hours <= plans[0].hours * (1 + NEAR_TIE)]
        simplest = min(near, key=_complexity)
        plans.remove(simplest)
        ordered.append(simplest)
    return ordered


def _complexity(plan: Plan) -> tuple[float, ...]:
    layout = plan.run.layout
    return (
        layout.pipeline,
        layout.num_devices,
        layout.context,
        layout.hierarchy is not None,
        list(RECOMPUTE_FLAGS).index(plan.run.recompute),
        plan.memory.total_gib,
    )


def possible_runs(task: Task) -> Iterator[RunShape]:
    """Layouts of powers of two that divide the model and the window, with each recompute mode."""
    windows = task.batch_tokens // task.seq_length
    for tp, cp, pp in itertools.product(_powers(GPUS_PER_NODE), *2 * [_powers(task.num_gpus)]):
        if not _can_be_cut(task, tp, cp, pp):
            continue
        replicas = task.num_gpus // (tp * cp * pp)
        if windows < replicas:
            continue
        layouts = _layouts(task.model, tp, cp, pp)
        for layout, recompute, precision in itertools.product(
            layouts, RECOMPUTE_FLAGS, task.precisions
        ):
            yield RunShape(
                model=task.model,
                seq_length=task.seq_length,
                num_gpus=task.num_gpus,
                global_batch_size=windows - windows % replicas,
                layout=layout,
                recompute=recompute,
                fp8=precision == "fp8",
                attention=task.attention,
            )


def _layouts(model: LlamaGeometry, tp: int, cp: int, pp: int) -> list[ParallelLayout]:
    """Ways to exchange keys and values: `a2a` distributes heads, and is slow between nodes."""
    ring = ParallelLayout(tensor=tp, context=cp, pipeline=pp)
    heads = math.gcd(model.num_query_groups // tp, model.num_attention_heads // tp)
    dealing = math.gcd(heads, min(cp, max(1, GPUS_PER_NODE // tp)))
    if cp > 1 and dealing == cp:
        return [replace(ring, context_communication="a2a")]
    if dealing == 1:
        return [ring]
    hierarchy = (dealing, cp // dealing)
    return [ring, replace(ring, context_communication="a2a+p2p", hierarchy=hierarchy)]


def _can_be_cut(task: Task, tp: int, cp: int, pp: int) -> bool:
    model = task.model
    groups = model.num_query_groups
    rest = (
        task.num_gpus % (tp * cp * pp),
        model.num_attention_heads % tp,
        model.padded_vocab_size % tp,
        model.num_layers % pp,
        task.seq_length % ((2 * cp if cp > 1 else 1) * tp),
        groups % tp and tp % groups,  # fewer groups than ranks are repeated
    )
    return not any(rest)


def _powers(limit: int) -> list[int]:
    """Powers of two up to a limit.

    >>> _powers(6)
    [1, 2, 4]
    """
    return [1 << exponent for exponent in range(limit.bit_length())]
