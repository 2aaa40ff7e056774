"""The processes of a job in torch's default process group."""

from typing import Any

import torch


class TorchJob:
    """The other processes of this job, through its default process group."""

    @property
    def rank(self) -> int:
        """This process."""
        return torch.distributed.get_rank()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        up = torch.tensor([int(flag)], device=torch.cuda.current_device())
        torch.distributed.all_reduce(up, op=torch.distributed.ReduceOp.MAX)
        return bool(up.item())

    def gather(self, item: Any) -> list[Any]:
        """The value of each process."""
        items: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(items, item)
        return items
