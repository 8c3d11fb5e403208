"""Context parallel: the tokens of a row shared out, so that no rank computes more of its attention than another.

    row      [ a a a a a a a a | b b b | c c c c c ]      cut into equal pieces, without regard to the documents
    pieces    0 0 0 0 1 1 1 1   2 2 2   2 3 3 3 3         work of a piece: the (query, key) pairs of its tokens
    rank 0    0 0 0 0           2 2 2   2                 each rank has as many pieces, and about as much work
    rank 1            1 1 1 1             3 3 3 3

Each layer gathers the keys and values of all ranks, and gives to each run of neighbouring tokens of a document the keys
from the document's begin on. For the attention function such a run is a document of its own with more keys than
queries, which its signature knows: any function works unchanged, with positions, targets and window as they are.
"""

import functools
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
    """Attention, and a router's loss, see all tokens of a row; what an earlier call put there gives way."""
    for module in model.modules():
        for name, wrap in (("attention", _with_all_keys), ("load_balancing_loss", _with_all_counts)):
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


def _with_all_counts(loss: Callable, group: Group, probs_TE: Tensor, counts_E: Tensor) -> Tensor:
    """A product of two means over the row, of which probs is the only one with a gradient: the ranks' losses add up."""
    return loss(probs_TE, sum_equal(counts_E, group)) / group.size


def share_tokens(batch: Batch, group: Group) -> Batch:
    """This rank's tokens of a row that all ranks of the group have. The host reads where documents end: one sync."""
    if group.size == 1:
        return batch
    T, ends = len(batch.tokens), batch.cu_seqlens_q.cpu().long()
    begin_T = ends[torch.searchsorted(ends, torch.arange(T), right=True) - 1]  # of each token's document
    ranks = assign(torch.arange(T) - begin_T + 1, group.size)
    place_T = torch.cat(ranks).argsort()  # in the keys of all ranks, one after the other

    mine = ranks[group.rank]
    is_first = torch.cat([torch.ones(1, dtype=torch.bool), (mine.diff() != 1) | (begin_T[mine].diff() != 0)])
    first = is_first.nonzero()[:, 0]
    last = torch.cat([first[1:], torch.tensor([len(mine)])]) - 1
    runs = [(int(begin_T[end]), int(end) + 1) for end in mine[last]]
    num_runs = len(ends) - 1 + _PIECES[-1]  # never more: shapes stay
    device = batch.tokens.device
    cu_q, cu_k = (
        torch.tensor([0, *lengths, *[0] * (num_runs - len(runs))]).cumsum(0).to(device, torch.int32)
        for lengths in ((last - first + 1).tolist(), [end - begin for begin, end in runs])
    )
    cu_q.key_rows = torch.cat([place_T[begin:end] for begin, end in runs]).to(device)
    mine = mine.to(device)
    return replace(
        batch,
        tokens=batch.tokens[mine],
        targets=batch.targets[mine],
        positions=batch.positions[mine],
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        num_targets=None,
        num_pairs=batch.num_pairs // group.size,
    )


def assign(work_T: Tensor, ranks: int) -> list[Tensor]:
    """Work of each token -> the tokens of each rank, ascending, equally many."""
    T = len(work_T)
    if T % ranks:
        raise UserError(f"a row of {T} tokens is not divisible by parallel.cp={ranks}")
    best = None
    for each in (each for each in _PIECES if T % (ranks * each) == 0):
        work = work_T.view(ranks * each, -1).sum(1).tolist()
        pieces, loads = [[] for _ in range(ranks)], [0] * ranks
        for i in sorted(range(len(work)), key=lambda i: -work[i]):  # the largest first, to the rank that has least
            rank = min((r for r in range(ranks) if len(pieces[r]) < each), key=lambda r: loads[r])
            pieces[rank].append(i)
            loads[rank] += work[i]
        if best is None or max(loads) < best[0]:
            best = max(loads), pieces
        if max(loads) * ranks <= _BALANCED * sum(loads):
            break
    tokens = torch.arange(T).view(-1, T // (ranks * len(best[1][0])))
    return [tokens[sorted(of_rank)].flatten() for of_rank in best[1]]
