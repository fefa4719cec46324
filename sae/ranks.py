"""`Ranks`: the processes that train one SAE together, each on its part of every batch.

Where there is only one, everything here is nothing. The processes form PyTorch's default process group, which whoever starts them
has set up: gloo between CPUs, nccl between GPUs.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from cache.errors import HearsaeError

Result = TypeVar("Result")


class Ranks:
    """The ranks of a run, seen from one of them. All must call the same methods in the same order.

    After each, all ranks hold the same bits: a sum over ranks is made once and handed round.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @classmethod
    def of_process_group(cls) -> "Ranks":
        """Those of the default process group; one where there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.rank == 0

    def part(self, n: int) -> range:
        """The part of range(n) that is this rank's: consecutive, as even as can be; what all have, in the order of ranks, is range(n)."""
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def sum(self, *tensors: Tensor) -> None:
        """Sums each tensor over the ranks, in place."""
        if self.world == 1:
            return
        dense = [_dense(tensor) for tensor in tensors]
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in dense]:
            work.wait()

    def table(self, row: Tensor) -> Tensor:
        """row [n] -> [world, n]: the rows of all ranks."""
        table = row.new_zeros((self.world, *row.shape))
        table[self.rank] = row
        self.sum(table)
        return table

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites each tensor with that of the first rank."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(_dense(tensor), 0)

    def once(self, function: Callable[[], Result]) -> Result:
        """Calls it on the first rank alone; all get what it returns, or raise the HearsaeError that it raises."""
        if self.world == 1:
            return function()
        outcome: list[Any] = [None]
        if self.first:
            try:
                outcome = [function()]
            except HearsaeError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, 0)
        if isinstance(outcome[0], HearsaeError):
            raise outcome[0]
        return outcome[0]


ALONE = Ranks()
"""One process."""


def _dense(tensor: Tensor) -> Tensor:
    """The same memory, as a tensor whose order is that of memory, which is what a process group takes."""
    if tensor.is_contiguous():
        return tensor.detach()
    if tensor.t().is_contiguous():
        return tensor.t().detach()
    raise ValueError(f"a tensor of strides {tensor.stride()} is neither a matrix nor its transpose in memory")
