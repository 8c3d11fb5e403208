"""Memory that the ranks of a host copy from each other, beside the computation and without its processors.

NCCL moves data by kernels, which take multiprocessors from what runs beside them; between GPUs of a host, copies need
none. What is in a window changes in turns:

    all write, each in its own    meet()    all read others'    meet()    all write ...

Between hosts, on a CPU, and where GPUs do not reach each other, reading is a collective to which all ranks come.
"""

import functools
import os
import weakref

import torch
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from minitrain.parallel.comm import Group, all_gather, exchange_shards, gather_objects, reduce_scatter, shard_of

_all: weakref.WeakSet["Window"] = weakref.WeakSet()


class Window:
    """flat: (numel,) of this rank, with any content; made by all ranks of the group together."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, group: Group):
        self.group, self.peers = group, []
        if device.type == "cuda" and group.size > 1 and _can_copy(group):
            self.flat = symmetric.empty(numel, dtype=dtype, device=device)
            self.handle = symmetric.rendezvous(self.flat, group.handle)
            self.peers = [self.handle.get_buffer(rank, (numel,), dtype) for rank in range(group.size)]
        else:
            self.flat = torch.empty(numel, dtype=dtype, device=device)
        _all.add(self)

    def meet(self) -> None:
        """On the stream that runs: what any rank has queued before is done before what any rank queues after."""
        if self.peers:
            self.handle.barrier()

    def all_gather(self, flat: Tensor) -> None:
        """Fill flat with the windows of all ranks; or with each rank's shard of its window, if flat is this rank's."""
        is_window = flat.data_ptr() == self.flat.data_ptr()
        if not self.peers:
            return all_gather(flat, shard_of(flat, self.group) if is_window else self.flat, self.group)
        shards = flat.chunk(self.group.size)
        for rank in self._ranks():
            if not is_window:
                shards[rank].copy_(self.peers[rank])
            elif rank != self.group.rank:
                shards[rank].copy_(self.peers[rank].chunk(self.group.size)[rank])

    def terms(self, reduce_dtype: torch.dtype) -> Tensor:
        """Tensors whose sum is this rank's shard of the sum of all windows, (terms, numel of a shard); with both meets.

        On one host what each rank has, to be added up in as wide a dtype as one likes: for bf16 half the bytes of a
        reduction in fp32, and no pass to fp32. Between hosts a reduction on the way sends less.
        """
        if not self.group.is_on_one_host:
            return reduce_scatter(self.flat.to(reduce_dtype), self.group)[None]
        if not self.peers:
            return exchange_shards(self.flat, self.group)
        terms = torch.empty_like(self.flat).view(self.group.size, -1)
        self.meet()
        for rank in self._ranks():
            terms[rank].copy_(shard_of(self.peers[rank], self.group))
        self.meet()
        return terms

    def _ranks(self) -> list[int]:
        """From this one on, so that no two ranks read the same one's at a time."""
        return [(self.group.rank + i) % self.group.size for i in range(self.group.size)]


def bytes_of_windows() -> int:
    """Of device memory that torch's allocator does not count."""
    return sum(window.flat.nbytes for window in _all if window.peers)


@functools.cache
def _can_copy(group: Group) -> bool:
    """Whether every rank of the group reaches the memory of every other: they try."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # which nothing here uses
    can = group.is_on_one_host
    if can:
        try:
            symmetric.rendezvous(symmetric.empty(1, device="cuda"), group.handle)
        except RuntimeError:
            can = False
    return all(gather_objects(can, group))
