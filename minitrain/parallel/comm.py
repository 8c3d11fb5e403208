"""The collectives that everything here uses, over a group of ranks, and the stream beside the computation.

A group of one communicates nothing, so callers need not ask. Flat tensors are cut into `group.size` equal shards; this
rank's is shard number `group.rank`.
"""

import contextlib
import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed them; both names do the same.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class Group:
    """Some ranks, and the place of this one among them. handle: None for a group of one."""

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None
    is_on_one_host: bool = True


def everyone() -> Group:
    """All ranks."""
    return Group(dist.get_rank(), dist.get_world_size())


def named(name: str) -> Group:
    """The group whose handle has this name, which is what an operation of the compiler's graphs can be told."""
    handle = dist.distributed_c10d._resolve_process_group(name)
    return Group(handle.rank(), handle.size(), handle)


def shard_of(flat: Tensor, group: Group) -> Tensor:
    """This rank's shard, a view."""
    return flat.chunk(group.size)[group.rank]


def all_reduce(flat: Tensor, group: Group) -> None:
    """Sum over the ranks, in place."""
    if group.size > 1:
        dist.all_reduce(flat, group=group.handle)


def reduce_scatter(flat: Tensor, group: Group) -> Tensor:
    """This rank's shard of the sum over the ranks, in place: a view of flat, whose other shards hold nothing of use."""
    shard = shard_of(flat, group)
    if group.size > 1:
        _reduce_scatter(shard, flat, group=group.handle)
    return shard


def exchange_shards(flat: Tensor, group: Group) -> Tensor:
    """Of each rank's flat this rank's shard, (ranks, numel of a shard)."""
    shards = flat.view(group.size, -1)
    if group.size == 1:
        return shards
    out = torch.empty_like(shards)
    dist.all_to_all_single(out, shards, group=group.handle)
    return out


def all_gather(flat: Tensor, shard: Tensor, group: Group) -> None:
    """Fill flat with the shards of all ranks; shard may be this rank's part of it."""
    if group.size > 1:
        _all_gather(flat, shard, group=group.handle)
    elif flat.data_ptr() != shard.data_ptr():
        flat.copy_(shard)


def all_to_all(pieces: list[Tensor], sizes: list[int], group: Group) -> list[Tensor]:
    """pieces[i] goes to rank i, all 1-D. -> what each rank sent here; sizes: their numbers of elements."""
    if group.size == 1:
        return pieces
    out = pieces[0].new_empty(sum(sizes))
    dist.all_to_all_single(out, torch.cat(pieces), sizes, [len(p) for p in pieces], group=group.handle)
    return list(out.split(sizes))


def all_to_all_rows(x: Tensor, send: list[int], got: list[int], group: Group) -> Tensor:
    """send[i] of x's rows go to rank i -> got[i] rows of each rank i, in the ranks' order."""
    out = x.new_empty(sum(got), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), got, send, group=group.handle)
    return out


def gather_equal(values: Tensor, group: Group) -> Tensor:
    """Tensors of one shape -> (ranks, ...)."""
    rows = values.new_empty(group.size, *values.shape)
    all_gather(rows.view(-1), values.reshape(-1), group)
    return rows


def broadcast(values: Tensor, source: int, group: Group) -> None:
    """In place, from a rank of the group."""
    if group.size > 1:
        dist.broadcast(values, group=group.handle, group_src=source)


def gather_objects(value, group: Group) -> list:
    """What each rank has, on the hosts: no device waits."""
    values = [value] * group.size
    if group.size > 1:
        dist.all_gather_object(values, value, group=group.handle)
    return values


def send(x: Tensor, to: int, group: Group) -> dist.Work:
    """x stays as it is until the work is waited for."""
    return dist.isend(x, group=group.handle, group_dst=to)


def receive(x: Tensor, source: int, group: Group) -> None:
    """Into x. Messages between two ranks of a group arrive in the order in which they were sent."""
    dist.recv(x, group=group.handle, group_src=source)


def sum_equal(values: Tensor, group: Group) -> Tensor:
    """Sum over the ranks, added in their order: the same bits on every rank, whatever the algorithm of a reduction."""
    return values if group.size == 1 else gather_equal(values, group).sum(0)


def sum_named(values: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Scalars, of which a rank may lack some, summed by their names; there is at least one, of the wanted dtype."""
    if group.size == 1:
        return values
    names = list(dict.fromkeys(itertools.chain(*gather_objects(list(values), group))))
    first = next(iter(values.values()))
    mine = [values.get(name, torch.zeros_like(first)).to(first.dtype) for name in names]
    return dict(zip(names, sum_equal(torch.stack(mine), group), strict=True))


class Lane:
    """A stream on which collectives run beside the computation. On a CPU, which has none, they run where they stand."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def beside(self):
        """What is queued inside runs on this stream, after all that the computation has queued so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """A point that wait() waits for: what is queued on this stream so far."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """The computation goes on after the mark; the host does not wait."""
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)

    def join(self) -> None:
        """The computation goes on after all that this stream has."""
        self.wait(self.mark())


# ---- with gradients. Ranks that share the tokens of a row each have ceil(T / ranks) of them, the last ones fewer, and
#      rows of zeros. "Whole" tensors are alike on all ranks, "partial" ones are terms of a sum over the ranks.


def _all_rows(x: Tensor, num_tokens: int, group: Group) -> Tensor:
    """Each rank's rows -> all."""
    whole = x.new_empty(group.size * len(x), *x.shape[1:])
    all_gather(whole, x.contiguous(), group)
    return whole[:num_tokens]


def _filled(x: Tensor, group: Group) -> Tensor:
    """With rows of zeros, up to a multiple of the ranks."""
    missing = -len(x) % group.size
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def _sum_rows(x: Tensor, group: Group) -> Tensor:
    """All rows, partial -> this rank's, summed.

    NOTE: a slice, as above, also where it is all: the compiler of torch 2.11 makes no gradient of what a Function
    returns if that was written in place.
    """
    whole = _filled(x, group).contiguous()
    mine = whole.new_empty(len(whole) // group.size, *x.shape[1:])
    _reduce_scatter(mine, whole, group=group.handle)
    return mine[:]


class GatherTokens(torch.autograd.Function):
    """Each rank's tokens -> those of all (num_tokens, ...); their gradients are partial."""

    @staticmethod
    def forward(ctx, x, num_tokens, group):
        ctx.group = group
        return _all_rows(x, num_tokens, group)

    @staticmethod
    def backward(ctx, d):
        return _sum_rows(d, ctx.group), None, None


class ScatterTokens(torch.autograd.Function):
    """Partial values of all tokens -> sums, of each rank's tokens."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.num_tokens = group, len(x)
        return _sum_rows(x, group)

    @staticmethod
    def backward(ctx, d):
        return _all_rows(d, ctx.num_tokens, ctx.group), None


class JoinTokens(GatherTokens):
    """The same where the gradients are whole."""

    @staticmethod
    def backward(ctx, d):
        return shard_of(_filled(d, ctx.group), ctx.group), None, None


class Enter(torch.autograd.Function):
    """x, which is whole; its gradients are partial."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        d = d.clone()
        all_reduce(d, ctx.group)
        return d, None


class JoinColumns(torch.autograd.Function):
    """Each rank's columns, widths of them, of the last dimension -> all; their gradients are whole."""

    @staticmethod
    def forward(ctx, x, widths, group):
        ctx.group, ctx.widths = group, widths
        most = torch.nn.functional.pad(x, (0, max(widths) - x.shape[-1]))
        pieces = gather_equal(most, group)
        return torch.cat([piece[..., :width] for piece, width in zip(pieces, widths, strict=True)], -1)

    @staticmethod
    def backward(ctx, d):
        return d.split(ctx.widths, -1)[ctx.group.rank], None, None
