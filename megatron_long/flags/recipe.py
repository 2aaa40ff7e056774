"""Recipes: what the paper does to a model, as data whose only output is Megatron flags.

The recipe of Fu et al. 2024 (arXiv 2402.10171, section 4 and appendix): continual pretraining of the
whole model, full attention, constant learning rate 2e-5, 4M tokens a batch, 1-5B tokens, RoPE base
raised, no mask between the documents of a window.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_long.errors import ConfigError
from megatron_long.flags.backend import GPU_TRAINING_ARGV, PRECISION_ARGV, Backend
from megatron_long.flags.own_recipe import is_own, load_function
from megatron_long.model.geometry import LlamaGeometry, pad_vocab_size
from megatron_long.model.rope import BaseRope
from megatron_long.model.rope_stretch import ntk_rotary_base

Precision = Literal["fp32", "bf16", "fp8"]
K = 1024


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How a model and its sequences are cut over devices."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    context_communication: Literal["p2p", "a2a", "all_gather", "a2a+p2p"] = "p2p"
    """How keys and values travel between context-parallel ranks (Transformer Engine only)."""
    hierarchy: tuple[int, int] | None = None
    """With `a2a+p2p`: neighbours that deal out heads, and groups of them that form a ring."""

    def __post_init__(self) -> None:
        if (self.context_communication == "a2a+p2p") is not (self.hierarchy is not None):
            raise ConfigError(
                "a hierarchy of context-parallel ranks belongs to a2a+p2p, and only there"
            )
        if self.hierarchy and self.hierarchy[0] * self.hierarchy[1] != self.context:
            raise ConfigError(
                f"the hierarchy {self.hierarchy} does not multiply to {self.context} context-parallel ranks"
            )

    @property
    def dealing_ranks(self) -> int:
        """Context-parallel ranks that deal out heads among each other."""
        if self.hierarchy:
            return self.hierarchy[0]
        return self.context if self.context_communication == "a2a" else 1

    @property
    def ring_ranks(self) -> int:
        """Context-parallel ranks that pass keys and values on in a ring."""
        return self.context // self.dealing_ranks

    @property
    def num_devices(self) -> int:
        """Devices that one model replica takes."""
        return self.tensor * self.pipeline * self.context

    def to_argv(self) -> list[str]:
        """Megatron's flags. Sequence parallelism always: Megatron turns it off itself when tensor is 1."""
        levels = ("--hierarchical-context-parallel-sizes", *map(str, self.hierarchy or ()))
        return [
            *("--tensor-model-parallel-size", str(self.tensor)),
            *("--pipeline-model-parallel-size", str(self.pipeline)),
            *("--context-parallel-size", str(self.context)),
            *("--cp-comm-type", self.context_communication),
            *(levels if self.hierarchy else ()),
            "--sequence-parallel",
        ]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One continual pretraining run."""

    name: str
    model: LlamaGeometry
    seq_length: int
    """Tokens of a training window."""
    rotary_base: int
    """RoPE base trained with; replaces the model's own, unless its RoPE is scaled in another way."""
    tokens_per_batch: int = 4 * K * K
    """Tokens of one optimizer step, rounded down to whole windows."""
    train_tokens: int = 5_000_000_000
    learning_rate: float = 2e-5
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    clip_grad: float = 1.0
    layout: ParallelLayout = ParallelLayout()
    precision: Precision = "bf16"
    """Precision on GPUs; the host backend computes in float32."""
    recompute_modules: tuple[str, ...] = ()
    """Modules whose activations are computed again in the backward pass; never attention."""
    gpu: str | None = "h100"
    """Kind of GPU that this layout fits (a name in `planning.hardware`); None for any machine."""
    num_gpus: int = 8
    """GPUs of that kind that one replica of the model takes."""
    save_interval: int = 100
    """Steps between checkpoints under stock Megatron; `megatron_long.pretrain` saves by time, see
    `--save-minutes`."""

    def __post_init__(self) -> None:
        divisor = 2 * self.layout.context
        if self.layout.context > 1 and self.seq_length % divisor:
            raise ConfigError(
                f"recipe {self.name}: sequence length {self.seq_length} is not a multiple of "
                f"2 * context parallel size {self.layout.context} ({divisor})"
            )
        if self.tokens_per_batch < self.seq_length:
            raise ConfigError(
                f"recipe {self.name}: {self.tokens_per_batch} tokens a batch hold no window of "
                f"{self.seq_length} tokens; raise tokens_per_batch"
            )

    @property
    def global_batch_size(self) -> int:
        """Windows of one optimizer step."""
        return windows_of(self.tokens_per_batch, self.seq_length)

    @property
    def train_iters(self) -> int:
        """Optimizer steps that read `train_tokens` once."""
        return max(1, self.train_tokens // (self.global_batch_size * self.seq_length))

    def to_argv(self, backend: Backend, *, own_loss: bool = False) -> list[str]:
        """Megatron's flags for this recipe; later flags on a command line override them.

        Args:
            own_loss: See `Backend.to_argv`; without it the flags suit stock Megatron.
        """
        model = replace(self.model, max_position_embeddings=self.seq_length)
        if type(model.rope) is BaseRope:
            model = replace(model, rotary_base=self.rotary_base)
        argv = [*backend.to_argv(own_loss=own_loss), *model.to_argv(), *self.layout.to_argv()]
        argv += self._schedule_argv()
        if backend.cuda:
            argv += (*GPU_TRAINING_ARGV, *PRECISION_ARGV[self.precision])
            if self.recompute_modules:
                argv += ["--recompute-granularity", "selective", "--recompute-modules"]
                argv += self.recompute_modules
        return argv

    def _schedule_argv(self) -> list[str]:
        values: dict[str, object] = {
            "--seq-length": self.seq_length,
            "--micro-batch-size": 1,
            "--global-batch-size": self.global_batch_size,
            "--train-iters": self.train_iters,
            "--lr": self.learning_rate,
            "--min-lr": self.learning_rate,
            "--lr-decay-style": "constant",
            "--weight-decay": self.weight_decay,
            "--adam-beta1": 0.9,
            "--adam-beta2": self.adam_beta2,
            "--clip-grad": self.clip_grad,
            "--ckpt-format": "torch_dist",
            "--save-interval": self.save_interval,
            "--log-interval": 1,
            "--eval-interval": 100,
            "--eval-iters": 0,
        }
        words = [word for flag, value in values.items() for word in (flag, str(value))]
        # Token-weighted loss: under context parallelism ranks hold different numbers of masked tokens.
        flags = ["--calculate-per-token-loss", "--dist-ckpt-optim-fully-reshardable"]
        return [*words, *flags, "--exit-signal-handler", "--log-throughput"]


def windows_of(tokens_per_batch: int, seq_length: int) -> int:
    """Windows of one optimizer step, a multiple of 8 where there are 8 or more, at least 1.

    >>> windows_of(4 * K * K, 80 * K), windows_of(4 * K * K, 1024 * K), windows_of(16 * K, 32 * K)
    (48, 4, 1)
    """
    windows = tokens_per_batch // seq_length
    return windows - windows % 8 if windows >= 8 else max(1, windows)


def llama2(**sizes: Any) -> LlamaGeometry:
    """Llama-2's constants around the sizes of one model (arXiv 2307.09288, HF config.json)."""
    return LlamaGeometry(
        vocab_size=32_000,
        padded_vocab_size=pad_vocab_size(32_000),
        norm_epsilon=1e-5,
        rotary_base=10_000,
        max_position_embeddings=4096,
        tie_embeddings=False,
        kv_channels=128,
        **sizes,
    )


def llama3(**sizes: Any) -> LlamaGeometry:
    """Llama-3's constants around the sizes of one model (arXiv 2407.21783, HF config.json)."""
    return LlamaGeometry(
        vocab_size=128_256,
        padded_vocab_size=pad_vocab_size(128_256),
        norm_epsilon=1e-5,
        rotary_base=500_000,
        max_position_embeddings=8192,
        tie_embeddings=False,
        kv_channels=128,
        num_query_groups=8,
        **sizes,
    )


LLAMA2_7B = llama2(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11_008,
    num_attention_heads=32,
    num_query_groups=32,
)
LLAMA2_13B = llama2(
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=13_824,
    num_attention_heads=40,
    num_query_groups=40,
)
LLAMA3_8B = llama3(num_layers=32, hidden_size=4096, ffn_hidden_size=14_336, num_attention_heads=32)
LLAMA3_70B = llama3(num_layers=80, hidden_size=8192, ffn_hidden_size=28_672, num_attention_heads=64)


def llama2_7b_80k() -> Recipe:
    """The paper's 7B run on 8 x H100 (80 GB): 80K windows.

    The RoPE base is dynamic NTK's with factor 10, as the authors evaluate.
    """
    return Recipe(
        name="llama2_7b_80k",
        model=LLAMA2_7B,
        seq_length=80 * K,
        rotary_base=ntk_rotary_base(10_000, 4096, 80 * K, factor=10),
        layout=ParallelLayout(tensor=4, context=2),
    )


def llama2_7b_128k() -> Recipe:
    """Llama-2-7B at the length that the paper tests, on 8 x H100 (80 GB)."""
    return Recipe(
        name="llama2_7b_128k",
        model=LLAMA2_7B,
        seq_length=128 * K,
        rotary_base=5_000_000,
        layout=ParallelLayout(tensor=2, context=4, context_communication="a2a"),
        recompute_modules=("layernorm", "mlp"),
    )


def llama2_13b_64k() -> Recipe:
    """The paper's 13B run on 8 x H100 (80 GB): 64K windows."""
    return Recipe(
        name="llama2_13b_64k",
        model=LLAMA2_13B,
        seq_length=64 * K,
        rotary_base=ntk_rotary_base(10_000, 4096, 64 * K, factor=10),
        layout=ParallelLayout(tensor=4, context=2, context_communication="a2a"),
        recompute_modules=("layernorm", "mlp"),
    )


def llama3_8b_128k() -> Recipe:
    """Llama-3-8B from 8K to 128K on 8 x H100 (80 GB)."""
    return Recipe(
        name="llama3_8b_128k",
        model=LLAMA3_8B,
        seq_length=128 * K,
        rotary_base=16_000_000,
        layout=ParallelLayout(tensor=2, context=4, context_communication="a2a"),
        recompute_modules=("layernorm", "mlp"),
    )


def llama3_70b_128k() -> Recipe:
    """Llama-3-70B from 8K to 128K on 64 x H100 (80 GB)."""
    return Recipe(
        name="llama3_70b_128k",
        model=LLAMA3_70B,
        seq_length=128 * K,
        rotary_base=16_000_000,
        layout=ParallelLayout(tensor=8, pipeline=2, context=4),
        recompute_modules=("layernorm", "mlp"),
        num_gpus=64,
    )


def tiny_debug() -> Recipe:
    """A model of a few million parameters that trains on a laptop: demo, tests, first steps."""
    return Recipe(
        name="tiny_debug",
        model=LlamaGeometry(
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=384,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=32,
            vocab_size=4096,
            padded_vocab_size=4096,
            norm_epsilon=1e-5,
            rotary_base=10_000,
            max_position_embeddings=256,
            tie_embeddings=True,
        ),
        seq_length=2048,
        rotary_base=ntk_rotary_base(10_000, 256, 2048, factor=1, head_size=32),
        tokens_per_batch=16 * K,
        train_tokens=K * K,
        learning_rate=1e-3,
        precision="bf16",
        gpu=None,
        num_gpus=1,
        save_interval=1000,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        llama2_7b_80k,
        llama2_7b_128k,
        llama2_13b_64k,
        llama3_8b_128k,
        llama3_70b_128k,
        tiny_debug,
    )
}


def build_recipe(name: str, model: LlamaGeometry | None = None) -> Recipe:
    """The recipe of a name, around another model's geometry if one is given.

    Args:
        name: One of `RECIPES`, or FILE.py:FUNCTION of the user.
    Raises: ConfigError: no such recipe; lists those there are.
    """
    recipe = _own_recipe(name) if is_own(name) else None
    if recipe is None:
        if name not in RECIPES:
            raise ConfigError(
                f"--recipe {name} is unknown; choose one of {', '.join(RECIPES)}, or write FILE.py:FUNCTION "
                "for one of your own"
            )
        recipe = RECIPES[name]()
    return replace(recipe, model=model) if model is not None else recipe


def _own_recipe(name: str) -> Recipe:
    make = load_function(name)
    try:
        recipe = make()
    except ConfigError:
        raise
    except Exception as error:  # of any kind: it is a program
        raise ConfigError(
            f"--recipe {name} fails ({type(error).__name__}: {error}); it takes no arguments and returns a "
            "megatron_long.flags.recipe.Recipe"
        ) from error
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"--recipe {name} returns {type(recipe).__name__}, not a megatron_long.flags.recipe.Recipe"
        )
    return recipe
