"""The input of the planner: a model, a window, a layout, and activation recomputation."""

import math
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_long.flags.recipe import ParallelLayout, Recipe
from megatron_long.model.geometry import LlamaGeometry, geometry_from_args

Recompute = Literal["layernorm", "mlp", "full"]
RECOMPUTE_FLAGS: dict[Recompute, list[str]] = {
    # A recipe's flags cannot be unset, so no entry is empty. Transformer Engine fuses the norms with the
    # products after them: recomputing `layernorm` recomputes nothing there.
    "layernorm": "--recompute-granularity selective --recompute-modules layernorm".split(),
    "mlp": "--recompute-granularity selective --recompute-modules layernorm mlp".split(),
    "full": (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    ),
}


@dataclass(frozen=True, kw_only=True)
class RunShape:
    """One step of a run. Sizes of the whole model and window; properties give those of one GPU."""

    model: LlamaGeometry
    seq_length: int
    num_gpus: int
    global_batch_size: int
    """Windows of a step."""
    layout: ParallelLayout
    recompute: Recompute = "mlp"
    fp8: bool = False
    attention: str = "cudnn"
    """Key of `ATTENTION_KERNELS`."""
    full_logits: bool = False
    """Megatron's own loss (`--megatron-loss`, or stock Megatron)."""
    shards_optimizer: bool = True
    """Whether data- and context-parallel ranks share the optimizer's state (the distributed optimizer)."""

    @property
    def data_parallel(self) -> int:
        """Replicas of the model."""
        return self.num_gpus // self.layout.num_devices

    @property
    def num_micro_batches(self) -> int:
        """Windows that each replica takes in a step, one at a time."""
        return self.global_batch_size // self.data_parallel

    @property
    def tokens_per_gpu(self) -> int:
        """Tokens of a window on a context-parallel rank (tensor-parallel ones share these)."""
        return self.seq_length // self.layout.context

    @property
    def layers_per_gpu(self) -> int:
        return self.model.num_layers // self.layout.pipeline

    @cached_property
    def layer_parameters(self) -> int:
        """Weights of the matrices of one layer."""
        model = self.model
        heads = model.num_attention_heads + 2 * model.num_query_groups
        attention = model.hidden_size * model.kv_channels * (heads + model.num_attention_heads)
        return attention + 3 * model.hidden_size * model.ffn_hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding; the output layer has as many."""
        return self.model.padded_vocab_size * self.model.hidden_size

    @property
    def parameters(self) -> float:
        """Of the whole model, norms left out."""
        tables = 1 if self.model.tie_embeddings else 2
        return self.model.num_layers * self.layer_parameters + tables * self.embedding_parameters

    @property
    def parameters_per_gpu(self) -> float:
        """Of the fullest pipeline stage (norms are left out: they are 0.003%)."""
        tables = 1 if self.model.tie_embeddings or self.layout.pipeline > 1 else 2
        layers = self.layers_per_gpu * self.layer_parameters
        return (layers + tables * self.embedding_parameters) / self.layout.tensor

    def attention_flops(self) -> float:
        """Forward pass of causal attention, one window, the whole model."""
        width = self.model.num_attention_heads * self.model.kv_channels
        return 2.0 * self.seq_length**2 * width * self.model.num_layers

    def product_flops(self) -> float:
        """Forward pass of the layers' matrix products, one window, the whole model."""
        return 2.0 * self.layer_parameters * self.model.num_layers * self.seq_length

    def output_flops(self) -> float:
        """Forward pass of the output layer, one window."""
        return 2.0 * self.embedding_parameters * self.seq_length

    def megatron_flops(self) -> float:
        """A window's training step as Megatron's `--log-throughput` counts it: nothing recomputed."""
        return 3 * (self.attention_flops() + self.product_flops() + self.output_flops())

    def to_argv(self) -> list[str]:
        """Flags of megatron_long.pretrain, to append to a recipe's."""
        precision = "--fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather".split()
        return [
            *self.layout_argv(),
            *("--seq-length", str(self.seq_length)),
            *("--global-batch-size", str(self.global_batch_size)),
            *(precision if self.fp8 else []),
        ]

    def layout_argv(self) -> list[str]:
        """Those of them that define the layout and recomputation."""
        return [*self.layout.to_argv(), *RECOMPUTE_FLAGS[self.recompute]]


def run_of_recipe(recipe: Recipe, num_gpus: int | None = None) -> RunShape:
    """A recipe on the number of GPUs that it names, or on this number."""
    return RunShape(
        model=recipe.model,
        seq_length=recipe.seq_length,
        num_gpus=num_gpus or recipe.num_gpus,
        global_batch_size=recipe.global_batch_size,
        layout=recipe.layout,
        recompute="mlp" if "mlp" in recipe.recompute_modules else "layernorm",
        fp8=recipe.precision == "fp8",
    )


def run_of_arguments(args: Namespace, world_size: int) -> RunShape:
    """The run that Megatron's parsed flags describe."""
    levels = args.hierarchical_context_parallel_sizes
    layout = ParallelLayout(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        context=args.context_parallel_size,
        context_communication="a2a+p2p" if levels else args.cp_comm_type[0],
        hierarchy=(levels[0], math.prod(levels[1:])) if levels else None,
    )
    replicas = world_size // layout.num_devices
    recompute: Recompute = "full" if args.recompute_granularity == "full" else "layernorm"
    if args.recompute_granularity == "selective" and "mlp" in (args.recompute_modules or ()):
        recompute = "mlp"
    return RunShape(
        model=geometry_from_args(args),
        seq_length=args.seq_length * args.micro_batch_size,
        num_gpus=world_size,
        global_batch_size=args.global_batch_size or replicas,
        layout=layout,
        recompute=recompute,
        fp8=bool(args.fp8),
        full_logits=args.megatron_loss,
        shards_optimizer=args.use_distributed_optimizer,
    )
