"""Each rank saves and loads its own part of the distributed optimizer, in model-tensor coordinates.

Megatron-Core 0.19.2 has two formats whose checkpoints another layout can load. Both first gather the whole
state of a tensor- and pipeline-parallel part: in the host memory of every rank (12 bytes a parameter each,
385 GB a node for an 8B model at TP2 on eight GPUs), or on one rank, which then writes alone. Here nothing is
gathered. A rank of the distributed optimizer holds a flat range of each tensor's values. In row-major order
that is a few boxes (the end of a row, whole rows, the beginning of a row), and a `torch_dist` checkpoint
takes boxes of any size. Keys, global shapes and the recorded format are those of
`--dist-ckpt-optim-fully-reshardable`: stock Megatron reads these checkpoints, and this module reads those of
stock Megatron.

It also avoids a bug of the stock format: if Megatron pads gradient buckets (a hidden size that
128 does not divide, data-parallel sizes with a factor of 3), 0.19.2 saves weights and moments shifted
(Megatron-LM pull request 5077 fixes it later).
"""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

CHANGED_SYMBOLS = {
    "megatron.core.optimizer.distrib_optimizer": (
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        "DistributedOptimizer.load_parameter_state_from_fully_reshardable",
    ),
}
"""Symbols replaced, by module."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""First index and size of a block, by axis."""


def cut_into_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut a range of a row-major array's values into boxes, in the order of the values.

    Args:
        shape: Of the array.
        start: First value of the range.
        stop: One past its last value.
    Returns: At most `2 * len(shape) - 1` boxes; none for an empty range.

    >>> cut_into_boxes((4, 10), 5, 32)
    [((0, 5), (1, 5)), ((1, 0), (2, 10)), ((3, 0), (1, 2))]
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [((start,), (stop - start,))] if shape else [((), ())]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        return _within_row(shape, last, start, stop)
    boxes = _within_row(shape, first - 1, start, min(stop, first * row))
    if first < last:
        boxes.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return boxes + _within_row(shape, last, max(start, last * row), stop)


def _within_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    begin = row * prod(shape[1:])
    inner = cut_into_boxes(shape[1:], start - begin, stop - begin)
    return [((row, *offset), (1, *sizes)) for offset, sizes in inner]


def shard(tensor: Any, values: Tensor, start: int, key: str, replica_id: tuple) -> list[Any]:
    """Describe a flat range of a tensor's values to Megatron's checkpointing.

    Args:
        tensor: Megatron's `ShardedTensor` or `ShardedTensorFactory` of the model parameter on this rank.
        values: Values of the range [n]; views of them become the data, to be saved or filled.
        start: Where the range begins in the parameter on this rank, in values.
        key: Name in the checkpoint.
        replica_id: Which copy this is; the one with all zeros is saved.
    Returns: A `ShardedTensor` for each box, in the order of the values.
    """
    stop = start + values.numel()
    found = []
    for part, begin in _parts(tensor, key):
        size = prod(part.local_shape)
        low, high = max(start, begin), min(stop, begin + size)
        at = low - start
        for offset, sizes in cut_into_boxes(tuple(part.local_shape), low - begin, high - begin):
            count = prod(sizes)
            found.append(_box(part, offset, values[at : at + count].view(sizes), replica_id))
            at += count
    assert sum(prod(piece.local_shape) for piece in found) == values.numel(), key
    return found


def parameters_of(chunk: Any) -> Iterator[Any]:
    """Content of a model chunk: a `ShardedTensor` or `ShardedTensorFactory` for each parameter."""
    mapping: Any = importlib.import_module("megatron.core.dist_checkpointing.mapping")
    utils: Any = importlib.import_module("megatron.core.dist_checkpointing.dict_utils")
    kinds = (mapping.ShardedTensor, mapping.ShardedTensorFactory)
    for entry in utils.nested_values(chunk.sharded_state_dict()):
        if isinstance(entry, kinds):
            yield entry


def _parts(tensor: Any, key: str) -> Iterator[tuple[Any, int]]:
    """The tensors that a parameter is stored as, and where each begins among its values."""
    mapping: Any = importlib.import_module("megatron.core.dist_checkpointing.mapping")
    if not isinstance(tensor, mapping.ShardedTensorFactory):
        yield replace(tensor, key=key, data=None), 0
        return
    # SwiGLU: gate and up are one parameter, and two blocks of the checkpoint's tensor.
    shape = torch.empty(tensor.data.shape, device="meta")
    plan = replace(tensor, key=key, data=shape).build()
    for part in importlib.import_module(
        "megatron.core.dist_checkpointing.dict_utils"
    ).nested_values(plan):
        assert part.data.is_contiguous(), key
        yield replace(part, data=None), part.data.storage_offset()


def _box(part: Any, offset: tuple[int, ...], data: Tensor, replica_id: tuple) -> Any:
    lead = part.prepend_axis_num
    axes = zip(part.global_offset[lead:], offset, strict=True)
    # Prepended axes (layers) become axes of the tensor: torch's checkpointing then takes any box.
    data = data.view((1,) * lead + data.shape)
    return replace(
        part,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_offset=(*part.global_offset[:lead], *(whole + here for whole, here in axes)),
        axis_fragmentations=None,
        prepend_axis_num=0,
        replica_id=replica_id,
    )


def save_own_shards() -> None:
    """Replace the saving and loading of `DistributedOptimizer`'s fully reshardable format."""
    module: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer: Any = module.DistributedOptimizer
    optimizer.sharded_param_state_fully_reshardable = _describe
    optimizer.load_parameter_state_from_fully_reshardable = _take


def _describe(
    self: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, dict[int, Any]]]:
    """This rank's boxes, by parameter and kind of state. Loading fills the optimizer itself."""
    checkpointing: Any = importlib.import_module("megatron.core.dist_checkpointing.utils")
    utils: Any = importlib.import_module("megatron.core.dist_checkpointing.dict_utils")
    plans, _ = checkpointing.extract_sharded_tensors_and_factories(model_sharded_state_dict)
    plan_of = {plan.data: plan for plan in utils.nested_values(plans)}
    state: dict[int, dict[str, dict[int, Any]]] = {}
    for index, (parameter, values) in enumerate(_ranges(self)):
        plan = plan_of[parameter]
        replica_id = (*plan.replica_id[:2], self.distributed_optimizer_instance_id)
        state[index] = {
            name: dict(
                enumerate(
                    shard(
                        plan,
                        tensor.detach().view(-1),
                        values.start,
                        f"optimizer.state.{name}.{plan.key}",
                        replica_id,
                    )
                )
            )
            for name, tensor in self._get_main_param_and_optimizer_states(parameter).items()
            if name != "step"  # of torch's AdamW; Megatron keeps it with the parameter groups
        }
    return state


@torch.no_grad()
def _take(self: Any, state_dict: Any) -> None:
    """Pass the loaded state to the optimizer."""
    for index, (parameter, _) in enumerate(_ranges(self)):
        flat = {
            name: torch.cat([box.reshape(-1) for _, box in sorted(boxes.items())])
            for name, boxes in state_dict[index].items()
        }
        self._set_main_param_and_optimizer_states(parameter, flat)
    offload: Any = importlib.import_module("megatron.core.optimizer.cpu_offloading")
    if isinstance(self.optimizer, offload.HybridDeviceOptimizer):
        self.optimizer._sync_hdo_state_to_sub_optimizers()


def _ranges(optimizer: Any) -> Iterator[tuple[Tensor, Any]]:
    """Each parameter of which this rank holds values, and their range."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"]
