"""Memory that the ranks of a host copy from each other, beside the computation and without its processors.

NCCL moves data by kernels, which take multiprocessors from what runs beside them; between GPUs of a host, copies need
none. What is in a window changes in turns:

    all write, each in its own    meet()    all read others'    meet()    all write ...

Between hosts, on a CPU, and where GPUs do not reach each other, reading is a collective to which all ranks come.
"""

import functools
import os
import weakref
from collections.abc import Sequence

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
            with torch.profiler.record_function("minitrain::Window.meet"):
                self.handle.barrier()

    def all_gather(self, flat: Tensor) -> None:
        """Fill flat with the windows of all ranks; or with each rank's shard of its window, if flat is this rank's."""
        is_window, n = flat.data_ptr() == self.flat.data_ptr(), self.group.size
        mine = shard_of(flat, self.group) if is_window else self.flat
        if self.peers:
            shards = [peer.chunk(n)[rank] if is_window else peer for rank, peer in enumerate(self.peers)]
            self._copy(shards, mine, flat.chunk(n))
        else:
            all_gather(flat, mine, self.group)

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
        self._copy([shard_of(peer, self.group) for peer in self.peers], shard_of(self.flat, self.group), terms)
        self.meet()
        return terms

    def _copy(self, shards: Sequence[Tensor], mine: Tensor, to: Sequence[Tensor]) -> None:
        """One of each rank; mine is this rank's of them. No two ranks read the same one's memory at a time."""
        rank, size = self.group.rank, self.group.size
        with torch.profiler.record_function("minitrain::Window.copy"):
            for other in ((rank + i) % size for i in range(1, size)):
                to[other].copy_(shards[other])
        if to[rank].data_ptr() != mine.data_ptr():
            to[rank].copy_(mine)


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
