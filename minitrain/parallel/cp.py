"""Context parallel: the tokens of a row shared out, so that no rank computes more of its attention than another.

    row      [ a a a a a a a a | b b b | c c c c c ]      cut into equal pieces, without regard to the documents
    pieces    0 0 0 0 1 1 1 1   2 2 2   2 3 3 3 3         work of a piece: the (query, key) pairs of its tokens
    rank 0    0 0 0 0           2 2 2   2                 each rank has as many pieces, and about as much work
    rank 1            1 1 1 1             3 3 3 3

Each layer gathers the keys and values of all ranks, and gives to each run of neighbouring tokens of a document the keys
from the document's begin on. For the attention function such a run is a document of its own with more keys than
queries, which its signature knows: any function works unchanged, with positions, targets and window as they are. In a
compiled block the product of the queries runs while keys are gathered, and those of weights' gradients while theirs are
summed (parallelize).
"""

import functools
import itertools
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from minitrain.batch import Batch
from minitrain.config import UserError
from minitrain.parallel.comm import GatherTokens, Group, sum_equal
from minitrain.parallel.mesh import Mesh

_PIECES = (1, 2, 4, 8)  # of a rank; more are better balanced, and copy more keys
_BALANCED = 1.05  # the busiest rank's work over the mean


def apply_cp(model: nn.Module, mesh: Mesh) -> None:
    """Attention, and a router's losses, know of all tokens of a row; what an earlier call put there gives way."""
    for module in model.modules():
        for name, wrap in (("attention", _with_all_keys), ("counts_of_row", _of_all_ranks)):
            function = getattr(module, name, None)
            if callable(function) and not isinstance(function, nn.Module):
                used = plain = getattr(function, "plain", function)
                if mesh.group("cp").size > 1:
                    used = functools.partial(wrap, plain, mesh.group("cp"))
                    used.plain = plain
                if used is not function:
                    setattr(module, name, used)


def _with_all_keys(attention, group, q_THC, k_TKC, v_TKC, cu_seqlens_q, *args, **options) -> Tensor:
    rows_S = getattr(cu_seqlens_q, "key_rows", None)
    if rows_S is not None:  # the batch is cut; in generate it is not
        kv = GatherTokens.apply(torch.stack([k_TKC, v_TKC], 1), group.size * len(k_TKC), group)
        k_TKC, v_TKC = kv.index_select(0, rows_S).unbind(1)
    return attention(q_THC, k_TKC, v_TKC, cu_seqlens_q, *args, **options)


def _of_all_ranks(counts: Callable, group: Group, counts_E: Tensor) -> Tensor:
    return sum_equal(counts(counts_E), group)


def share_tokens(batch: Batch, group: Group) -> Batch:
    """This rank's tokens of a row that all ranks of the group have. The host reads where documents end: one sync.

    num_targets and num_pairs stay those of the row; share grows by the ranks, which each have a term of a mean over it.
    """
    if group.size == 1:
        return batch
    ends, device = batch.cu_seqlens_q.tolist(), batch.tokens.device
    pieces = assign(ends, group.size)
    mine, runs = pieces[group.rank], runs_of(pieces[group.rank], ends)

    order = [piece.start for of_rank in pieces for piece in of_rank]  # in the keys of all ranks, one after the other
    places = torch.arange(ends[-1], device=device).chunk(len(order))
    place_T = torch.cat([places[i] for i in sorted(range(len(order)), key=order.__getitem__)])

    def ends_of(lengths: list[int]) -> Tensor:
        filled = lengths + [0] * (len(ends) - 1 + _PIECES[-1] - len(runs))  # never more runs: shapes stay
        return torch.tensor([*itertools.accumulate(filled, initial=0)], dtype=torch.int32).to(device, non_blocking=True)

    cu_q = ends_of([end - first for _, first, end in runs])
    cu_k = ends_of([end - begin for begin, _, end in runs])
    cu_q.key_rows = torch.cat([place_T[begin:end] for begin, _, end in runs])
    torch._dynamo.maybe_mark_dynamic(cu_q.key_rows, 0)  # as many as the row wants, for which nothing is compiled anew
    of_tokens = {name: getattr(batch, name) for name in ("tokens", "targets", "positions", "is_real")}
    of_mine = {
        name: torch.cat([x_T[piece.start : piece.stop] for piece in mine])
        for name, x_T in of_tokens.items()
        if x_T is not None
    }
    return replace(batch, **of_mine, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, share=batch.share * group.size)


def runs_of(pieces: list[range], ends: list[int]) -> list[tuple[int, int, int]]:
    """Neighbouring tokens of a document in these pieces: where it begins, the first of them, the last + 1."""
    runs = []
    for piece in pieces:
        first = piece.start
        while first < piece.stop:
            i = bisect_right(ends, first)
            begin, end = ends[i - 1], min(ends[i], piece.stop)
            if runs and (runs[-1][0], runs[-1][2]) == (begin, first):  # the piece before is its neighbour
                first = runs.pop()[1]
            runs.append((begin, first, end))
            first = end
    return runs


def assign(ends: list[int], ranks: int) -> list[list[range]]:
    """Where documents end, from 0 on -> the tokens of each rank, equally many: pieces of one size, ascending."""
    T = ends[-1]
    if T % ranks:
        raise UserError(f"a row of {T} tokens is not divisible by parallel.cp={ranks}")
    pairs = [0, *itertools.accumulate((b - a) * (b - a + 1) // 2 for a, b in itertools.pairwise(ends))]

    def work_before(token: int) -> int:
        """Keys that all tokens before it see."""
        i = bisect_right(ends, token) - 1
        return pairs[i] + (token - ends[i]) * (token - ends[i] + 1) // 2

    best = None
    for each in (each for each in _PIECES if T % (ranks * each) == 0):
        size = T // (ranks * each)
        starts = range(0, T, size)
        work = [work_before(start + size) - work_before(start) for start in starts]
        pieces, loads = [[] for _ in range(ranks)], [0] * ranks
        for i in sorted(range(len(work)), key=lambda i: -work[i]):  # the largest first, to the rank that has least
            rank = min((r for r in range(ranks) if len(pieces[r]) < each), key=lambda r: loads[r])
            pieces[rank].append(range(starts[i], starts[i] + size))
            loads[rank] += work[i]
        if best is None or max(loads) < best[0]:
            best = max(loads), pieces
        if max(loads) * ranks <= _BALANCED * sum(loads):
            break
    return [sorted(of_rank, key=lambda piece: piece.start) for of_rank in best[1]]
