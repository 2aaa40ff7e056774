"""A start from weights alone uses those of the checkpoint, not their FP8 rounding.

The optimizer works on a float32 main copy of the weights. If the model's parameters are FP8,
Megatron-Core 0.19.2 makes that copy from the rounded parameters in each start that loads no optimizer state
(`--pretrained-checkpoint`, `--finetune`, `--no-load-optim`): 2.65% RMS error, as large as the total change
by training. Here each rank reads only its own range of the main copy from the checkpoint instead.
Nothing is held twice: values go from the file into the main copy.

A run with FP8 parameters also saves the rounded values. From its checkpoint the main copy is used, also for
the model (`checkpoint.megatron_folder.find_weights`).
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_long.checkpoint.torch_dist import TorchDistReader, stored_keys
from megatron_long.engine.optimizer_shards import parameters_of, shard

MODEL = "model"
"""Prefix of model chunks in Megatron's state: `model`, or `model0` and so on."""


def rename_on_load(load: Callable, iteration: Path, prefix: str) -> Callable:
    """Return a `dist_checkpointing.load` that fills the model with the main copy.

    Args:
        load: The stock function.
        iteration: Folder of the checkpoint for which names are changed.
        prefix: Prefix of the main copy's names.
    """
    mapping: Any = importlib.import_module("megatron.core.dist_checkpointing.mapping")
    utils: Any = importlib.import_module("megatron.core.dist_checkpointing.dict_utils")
    kinds = (mapping.ShardedTensor, mapping.ShardedTensorFactory)

    def load_main_copy(
        sharded_state_dict: dict, checkpoint_dir: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if Path(checkpoint_dir) == iteration:
            stored = stored_keys(iteration)
            chunks = [part for name, part in sharded_state_dict.items() if name.startswith(MODEL)]
            for entry in utils.nested_values(chunks):
                if isinstance(entry, kinds) and prefix + entry.key in stored:
                    entry.key = prefix + entry.key
        return load(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return load_main_copy


@torch.no_grad()
def take_main_weights(
    optimizer: Any, chunks: Iterable[torch.nn.Module], iteration: Path, prefix: str
) -> int:
    """Fill the float32 main copy of the distributed optimizer from a checkpoint; each rank reads its ranges.

    Args:
        optimizer: Megatron's, whose main copy was made from the model.
        chunks: The pipeline stages that this rank holds, without wrappers.
        iteration: Folder of the checkpoint, `torch_dist`.
        prefix: Prefix of the names to read, before those of the model: "" for the checkpoint's model.
            If the model's vocabulary is padded further than the checkpoint's, the padding stays.
    Returns: Number of values filled on this rank; 0 if the optimizer has no main copy of its own.
    """
    plans = {entry.data: entry for chunk in chunks for entry in parameters_of(chunk)}
    reader, filled = TorchDistReader(iteration), 0
    for parameter, start, main in _main_shards(optimizer):
        plan = plans[parameter]
        values = main.detach().view(-1)
        for box in shard(plan, values, start, prefix + plan.key, (0, 0, 0)):
            filled += reader.fill_box(box.key, box.global_offset, box.data)
    return filled


def _main_shards(optimizer: Any) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Each 16-bit or FP8 parameter with a main copy on this rank, the copy's offset, and the copy."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        groups = getattr(part, "shard_fp32_from_float16_groups", ())
        for parameters, mains in zip(
            getattr(part, "model_float16_groups", ()), groups, strict=True
        ):
            for parameter, main in zip(parameters, mains, strict=True):
                if main is not None and main.numel():
                    yield parameter, part._get_model_param_range_map(parameter)["param"].start, main
