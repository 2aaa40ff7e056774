"""Settings of the walk: the model's size, the layout, and the paths."""

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_long.errors import ConfigError
from megatron_long.flags.recipe import LLAMA3_8B
from megatron_long.model.geometry import LlamaGeometry, pad_vocab_size

REPOSITORY = Path(__file__).resolve().parents[2]
K = 1024
STEPS_COMPARED = 2
"""Steps after the interruption whose losses are compared: the second shows the optimizer's state."""
LAST_STEP = 4
"""The last step that is compared, of an uninterrupted run."""
BYTES_PER_PARAMETER = 14
"""Of a checkpoint: BF16 weights, and the FP32 main copy and two moments of Adam."""
FP8_FLAGS = ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--fp8-param-gather")
RECOMPUTE_FLAGS = tuple(
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
)
"""Flags with which the 8B model fits four GPUs of 80 GB."""
DETERMINISTIC_FLAGS = ("--deterministic-mode", "--no-masked-softmax-fusion")
DETERMINISTIC_ATTENTION = ("--attention-backend", "flash")
"""On GPUs: cuDNN's deterministic backward would request 513 GiB for 16 heads and 131,072 tokens."""
CALM_FLAGS = ("--lr", "1e-6", "--min-lr", "1e-6")
"""At full size: at the recipe's 2e-5 the loss of random weights is 12.56, 11.69, 11.76, 14.8, and runs that
differ by FP8's rounding drift apart by 4e-3 nats in step 2 and 7e-2 in step 4."""
DETERMINISTIC_ENVIRONMENT = {
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""Variables that Megatron's --deterministic-mode sets if they are unset."""

LAUNCH_ENVIRONMENT = {
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
"""For the processes of a job; the last two are what the launch script sets."""

TINY = LlamaGeometry(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=192,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=8448,
    padded_vocab_size=pad_vocab_size(8448),
    norm_epsilon=1e-5,
    rotary_base=10_000,
    max_position_embeddings=256,
    tie_embeddings=False,
)
"""A model for the host; its vocabulary holds that of `data`, as the full one's does."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One walk. Kept in WORK/settings.json; later commands must not change it."""

    size: str = "full"
    layers: int | None = None
    """Fewer layers than the model has."""
    processes: int = 4
    tensor: int = 2
    context: int = 2
    reshard_tensor: int = 1
    reshard_context: int = 4
    seq_length: int = 128 * K
    windows: int = 1
    """Windows of a step."""
    fp8: bool = True
    deterministic: bool = False
    recompute_all: bool = False

    def __post_init__(self) -> None:
        for tensor, context in (self.layout, self.reshard_layout):
            if tensor * context != self.processes:
                raise ConfigError(
                    f"a layout of tensor {tensor} * context {context} takes {tensor * context} "
                    f"processes, and --processes is {self.processes}; give --layout and --reshard-layout "
                    "whose product is that"
                )

    @property
    def layout(self) -> tuple[int, int]:
        """Tensor and context parallel size that the walk trains in."""
        return self.tensor, self.context

    @property
    def reshard_layout(self) -> tuple[int, int]:
        """The layout that the checkpoint is resharded to."""
        return self.reshard_tensor, self.reshard_context

    @property
    def is_full(self) -> bool:
        """Whether the model is the 8B one."""
        return self.size == "full"

    @property
    def recipe(self) -> str:
        """Recipe of the launch script."""
        return "llama3_8b_128k" if self.is_full else "tiny_debug"

    @property
    def geometry(self) -> LlamaGeometry:
        """The model."""
        whole = LLAMA3_8B if self.is_full else TINY
        return replace(whole, num_layers=self.layers or whole.num_layers)

    @property
    def num_parameters(self) -> int:
        """Weights of the model."""
        g = self.geometry
        heads, groups = g.num_attention_heads * g.kv_channels, g.num_query_groups * g.kv_channels
        layer = g.hidden_size * (2 * heads + 2 * groups + 3 * g.ffn_hidden_size + 2)
        return g.num_layers * layer + g.hidden_size * (2 * g.vocab_size + 1)

    @property
    def model_gb(self) -> float:
        """A Hugging Face folder, or a checkpoint of weights alone, BF16, GB."""
        return 2 * self.num_parameters / 1e9

    @property
    def checkpoint_gb(self) -> float:
        """A checkpoint with optimizer, GB."""
        return BYTES_PER_PARAMETER * self.num_parameters / 1e9


def layout_argv(layout: tuple[int, int]) -> list[str]:
    """Megatron's flags of a layout."""
    tensor, context = layout
    return [
        *("--tensor-model-parallel-size", str(tensor), "--context-parallel-size", str(context)),
        *("--cp-comm-type", "a2a"),
    ]


@dataclass(frozen=True, kw_only=True)
class Work:
    """The paths of a walk."""

    folder: Path
    settings: Settings
    data: Path | None = None
    """Folder of the phase `data`: mix/ and haystack.txt."""
    fast: Path | None = None
    """Folder of model folders whose disk is not measured; default: WORK itself."""
    corpus: Path | None = None
    deadline: float | None = None
    """`time.monotonic()` at which all children must have ended."""
    python: str = sys.executable

    @property
    def data_folder(self) -> Path:
        return self.data or self.folder / "data"

    @property
    def dataset(self) -> Path:
        return self.data_folder / "mix"

    @property
    def haystack(self) -> Path:
        return self.data_folder / "haystack.txt"

    @property
    def hf(self) -> Path:
        return (self.fast or self.folder) / "hf"

    @property
    def base(self) -> Path:
        return (self.fast or self.folder) / "base"

    @property
    def export(self) -> Path:
        return (self.fast or self.folder) / "export"

    @property
    def run(self) -> Path:
        """OUTPUT of the launch script."""
        return self.folder / "run"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def environment(self) -> dict[str, str]:
        """Environment of every child."""
        path = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
        own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHON": self.python}
        exact = DETERMINISTIC_ENVIRONMENT if self.settings.deterministic else {}
        return {**os.environ, **own, **exact}


def keep_settings(settings: Settings, path: Path) -> None:
    """Write the settings, or refuse settings that differ from those of earlier commands.

    Raises: ConfigError: names what differs.
    """
    own = asdict(settings)
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [f"{k} {before.get(k)} -> {v}" for k, v in own.items() if before.get(k) != v]
        if changed:
            raise ConfigError(
                f"{path} holds another walk ({', '.join(changed)}); give its flags, or another --work"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(own, indent=1) + "\n")
