"""Makes optimizer checkpoints right where Megatron pads the ends of its gradient buckets.

The fully reshardable format of 0.19.2 puts a buffer's buckets together without their padding, and then takes
each parameter out at its place in the buffer with padding. So what is saved for the parameters of all buckets
but the first is shifted, and the end is zeros: the run goes on from other weights.

Buckets are padded to a multiple of 128 and of the data-parallel size (context parallelism included): so it is
with a hidden size that 128 does not divide, with a data-parallel size that has a factor of 3, and with
`--ddp-pad-buckets-for-high-nccl-busbw`. (Mended upstream by Megatron-LM pull request 5077, after 0.19.2.)
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any


def mend_bucket_padding() -> None:
    """Replace `DistributedOptimizer.sharded_param_state_fully_reshardable`, once."""
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer: Any = module.DistributedOptimizer
    stock = optimizer.sharded_param_state_fully_reshardable
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def sharded_param_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for buffer in self.buffers:
                stack.enter_context(_places_without_padding(buffer))
            return stock(self, *args, **kwargs)

    optimizer.sharded_param_state_fully_reshardable = sharded_param_state


@contextlib.contextmanager
def _places_without_padding(buffer: Any) -> Iterator[None]:
    """Let `param_index_map` say where each parameter is when no bucket has padding at its end."""
    padding_before, total = [], 0
    for (start, end), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True):
        padding_before.append(total)
        total += end - start - bucket.numel_unpadded
    padded = buffer.param_index_map
    buffer.param_index_map = {
        parameter: (start - padding_before[bucket], end - padding_before[bucket], bucket)
        for parameter, (start, end, bucket) in padded.items()
    }
    try:
        yield
    finally:
        buffer.param_index_map = padded
