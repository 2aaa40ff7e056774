"""Starts from weights alone take a checkpoint's weights, not what FP8 made of them.

With real FP8 parameters: tests/gpu/test_main_weights.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_long.engine import host_backend

host_backend.install()

# ruff: noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from megatron_long.checkpoint import stored
from megatron_long.checkpoint.direct_io import read_bytes
from megatron_long.checkpoint.megatron_folder import MAIN_PREFIXES
from megatron_long.checkpoint.torch_dist import COMMON_STATE, TorchDistReader
from megatron_long.checkpoint.torch_dist_writer import LazyPiece, write_torch_dist
from megatron_long.engine.main_weights import rename_on_load, take_main_weights
from megatron_long.errors import DataError

PREFIX = MAIN_PREFIXES[0]
PROJECTION, GATED = (
    "decoder.layers.self_attention.linear_proj.weight",
    "decoder.layers.mlp.fc1.weight",
)


def stored_tensors(prefix: str) -> dict[str, torch.Tensor]:
    """Two layers of two weights; those of different prefixes differ."""
    generator = torch.Generator().manual_seed(len(prefix))
    shapes = {PROJECTION: (2, 6, 5), GATED: (2, 8, 5)}
    return {prefix + key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "iter_0000004"
    tensors = {**stored_tensors(""), **stored_tensors(PREFIX)}
    pieces = [
        LazyPiece(
            key=key,
            global_shape=tuple(tensor.shape),
            offset=(layer, 0, 0),
            shape=(1, *tensor.shape[1:]),
            dtype=tensor.dtype,
            make=lambda tensor=tensor, layer=layer: tensor[layer : layer + 1],
        )
        for key, tensor in tensors.items()
        for layer in range(2)
    ]
    write_torch_dist(folder, pieces, {COMMON_STATE: {"iteration": 4}})
    return folder


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    """A process group of this process, which Megatron's loading asks for its rank."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


class Chunk(torch.nn.Module):
    """The second of two layers on the second of two tensor-parallel ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.nn.Parameter(torch.zeros(6, 5)[:3].clone())
        self.gated = torch.nn.Parameter(torch.zeros(4, 5))  # gate and up, each cut in two

    def sharded_state_dict(self) -> dict:
        layer, rows = (0, 1, 2), (1, 1, 2)
        cut = {"prepend_axis_num": 1}
        projection = ShardedTensor.from_rank_offsets(
            PROJECTION, self.projection, layer, rows, **cut
        )
        gated = ShardedTensor.from_rank_offsets(GATED, self.gated, layer, rows, **cut)
        factory = apply_swiglu_sharded_factory(gated, ((0, 1, 2),))
        return {"projection": projection, "gated": factory}

    def expected(self, prefix: str) -> dict[str, torch.Tensor]:
        stored = stored_tensors(prefix)
        gate_and_up = stored[prefix + GATED][1]
        return {
            "projection": stored[prefix + PROJECTION][1, 3:],
            "gated": torch.cat([gate_and_up[2:4], gate_and_up[6:8]]),
        }


@dataclass
class Optimizer:
    """What `DistributedOptimizer` keeps of each parameter on one of two data-parallel ranks."""

    chunk: Chunk
    start: int = 7
    mains: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, parameter in self.chunk.named_parameters():
            self.mains[name] = torch.full((parameter.numel() - self.start - 1,), 9.0)
        self.model_float16_groups = [list(self.chunk.parameters()), []]
        self.shard_fp32_from_float16_groups = [list(self.mains.values()), []]

    def _get_model_param_range_map(self, parameter: torch.Tensor) -> dict:
        stop = parameter.numel() - 1
        return {"param": SimpleNamespace(start=self.start, end=stop, size=stop - self.start)}


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["model", "main-copy"])
def test_a_rank_takes_its_range_of_the_main_copy(prefix, checkpoint):
    chunk = Chunk()
    optimizer = Optimizer(chunk)
    stub = SimpleNamespace()  # of a stage without parameters
    chained = SimpleNamespace(chained_optimizers=[stub, optimizer])
    number = take_main_weights(chained, [chunk], checkpoint, prefix)
    assert number == sum(main.numel() for main in optimizer.mains.values())
    for name, expected in chunk.expected(prefix).items():
        assert torch.equal(optimizer.mains[name], expected.reshape(-1)[7:-1]), name
    assert not any(parameter.any() for parameter in chunk.parameters())


def test_a_further_padded_vocabulary_keeps_its_padding(checkpoint):
    target = torch.full((1, 3, 5), 9.0)
    filled = TorchDistReader(checkpoint).fill_box(PROJECTION, (1, 4, 0), target)
    assert filled == 2 * 5
    assert torch.equal(target[0, :2], stored_tensors("")[PROJECTION][1, 4:])
    assert (target[0, 2] == 9).all()


def test_no_more_is_read_than_the_range(checkpoint, monkeypatch):
    read = []
    monkeypatch.setattr(
        stored,
        "read_bytes",
        lambda path, at, size, **kw: read.append(size) or read_bytes(path, at, size, **kw),
    )
    optimizer = Optimizer(Chunk())
    number = take_main_weights(optimizer, [optimizer.chunk], checkpoint, "")
    assert sum(read) == 4 * number


def test_a_tensor_that_is_not_there_is_named(checkpoint):
    with pytest.raises(DataError, match=r"there is no tensor decoder\.other of 3"):
        TorchDistReader(checkpoint).fill_box("decoder.other", (0, 0, 0), torch.empty(1, 2, 2))


def test_what_holds_no_main_copy_is_left_alone(checkpoint):
    """As in FP32, or where Transformer Engine's optimizer holds it."""
    chunk = Chunk()
    held = Optimizer(chunk)
    held.shard_fp32_from_float16_groups = [[None, None], []]
    assert take_main_weights(held, [chunk], checkpoint, "") == 0
    assert take_main_weights(SimpleNamespace(), [chunk], checkpoint, "") == 0


def test_the_model_is_filled_with_the_main_copy(checkpoint, tmp_path):
    def keys(iteration: Path, folder: Path, name: str) -> list[str]:
        asked = []
        load = rename_on_load(lambda state, *_: asked.append(state[name]), iteration, PREFIX)
        load({name: Chunk().sharded_state_dict()}, str(folder))
        parts = asked[0]["gated"].build()  # gate and up go by the name of their whole
        return [asked[0]["projection"].key, *(part.key for part in parts)]

    own = [PROJECTION, GATED, GATED]
    assert keys(checkpoint, checkpoint, "model") == [PREFIX + key for key in own]
    assert keys(checkpoint, checkpoint, "model1") == [PREFIX + key for key in own]
    assert keys(checkpoint, checkpoint, "optimizer") == own
    assert keys(checkpoint, tmp_path, "model") == own


@pytest.mark.slow
def test_a_start_from_an_fp8_run_takes_its_main_copy(jobs, tmp_path):
    """Without CUDA, BF16 stands for FP8: the model's weights are the rounded main copy there too."""
    common = ("--bf16", "--use-distributed-optimizer", "--train-iters", 1)
    jobs.run(2, *common, "--save", tmp_path / "run")
    still = ("--lr", 0, "--min-lr", 0, "--weight-decay", 0)  # what is saved is what was loaded
    start = ("--pretrained-checkpoint", tmp_path / "run", "--save", tmp_path / "next")
    job = jobs.run(
        2, *common, *still, *start, faults=[{"kind": "rounded-weights", "ranks": [0, 1]}]
    )
    assert "they are its optimizer's float32 main copy" in job.text
    run, started = (tmp_path / name / "iter_0000001" for name in ("run", "next"))
    main, model = TorchDistReader(run, prefix=PREFIX), TorchDistReader(started)
    copy, differing = TorchDistReader(started, prefix=PREFIX), 0
    for key in main.shapes():
        exact = main.read(key, None)
        assert torch.equal(copy.read(key, None), exact), key
        assert torch.equal(model.read(key, None), exact.bfloat16()), key
        differing += not torch.equal(exact.bfloat16().float(), exact)
    assert differing
