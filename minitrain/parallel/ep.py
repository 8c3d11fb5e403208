"""Expert parallel: each rank of "ep" has some of the experts of a layer, and sends for the others' its tokens' copies.

    x_RD in the order of experts --all-to-all--> rows for the experts here, of all ranks --sort--> x_SD
                                                                                                    | experts
    y_RD, back in their places   <--all-to-all-- in the order of ranks                    <--sort-- y_SD

The ranks have different tokens: ep lies inside dp x cp, and only the ranks that have the same experts sum their
gradients. Who sends how much is exchanged first, and read by the host: one sync a layer. A rank that sends or gets
nothing takes part all the same. Lepikhin et al. 2020, arXiv:2006.16668.

What communicates are operations of torch, so that a block is one graph, whatever S is: the compiler knows only how
large it can be. Dimensions: R rows of this rank, S rows that its experts get, N ranks, L experts here, N * L = E.
"""

import fnmatch
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minitrain.parallel.comm import Group, all_to_all_rows, named
from minitrain.parallel.cut import cut
from minitrain.parallel.mesh import Mesh


def apply_ep(model: nn.Module, mesh: Mesh) -> None:
    """Cut dimension 0 of what the model's TP_PLAN calls "experts", whose forward is (x_RD, counts_E) -> (R, D)."""
    patterns = [pattern for pattern, style in getattr(type(model), "TP_PLAN", {}).items() if style == "experts"]
    for name, module in model.named_modules():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            for p in module.parameters():
                cut(p, "ep", 0, mesh.group("ep"))
                p.grad_sum_on = ("expert_dp",)
            module.forward = _exchanged(module.forward, mesh.group("ep"))


def _exchanged(experts: Callable, group: Group) -> Callable:
    """experts(x, counts) where rows and counts are those of all experts, and here are some of these.

    NOTE: a function of its own: with a partial in the place of a module's forward each block is compiled anew.
    """

    def forward(x_RD: Tensor, counts_E: Tensor) -> Tensor:
        name, R = group.handle.group_name, len(x_RD)
        counts_L, *route = exchange_counts(counts_E, name, R)
        y_SD = experts(rows_to_ranks(x_RD, *route, name), counts_L)
        return rows_from_ranks(y_SD, *route, name, R)

    return forward


@torch.library.custom_op("minitrain::exchange_counts", mutates_args=())
def exchange_counts(counts_E: Tensor, group: str, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> counts (L,) of what the experts here get, and the route of rows: order and inverse (S,) of the sort, and, on
    the host, how many go to each rank and come from it, (2, N). num_rows: R, the same on all ranks."""
    ranks = named(group)
    send_NL = counts_E.view(ranks.size, -1)
    got_NL = all_to_all_rows(send_NL, [1] * ranks.size, [1] * ranks.size, ranks)
    by_rank, by_expert = got_NL.flatten(), got_NL.T.flatten()
    first_NL = (by_rank.cumsum(0) - by_rank).view_as(got_NL)  # of the rows that a rank sends to an expert
    sorted_LN = (by_expert.cumsum(0) - by_expert).view_as(got_NL.T)
    shift_NL, counts_L = first_NL - sorted_LN.T, got_NL.sum(0)

    sizes_2N = torch.stack([send_NL.sum(1), got_NL.sum(1)]).cpu()  # the host waits
    rows_S = torch.arange(int(sizes_2N[1].sum()), device=counts_E.device)
    order_S = rows_S + shift_NL.T.flatten().repeat_interleave(by_expert, output_size=len(rows_S))
    inverse_S = rows_S - shift_NL.flatten().repeat_interleave(by_rank, output_size=len(rows_S))
    return counts_L, order_S, inverse_S, sizes_2N


@torch.library.custom_op("minitrain::rows_to_ranks", mutates_args=())
def rows_to_ranks(x_RD: Tensor, order_S: Tensor, inverse_S: Tensor, sizes_2N: Tensor, group: str) -> Tensor:
    """Rows in the order of all experts -> those of all ranks for the experts here, in their order (S, D)."""
    return all_to_all_rows(x_RD, *sizes_2N.tolist(), named(group))[order_S]


@torch.library.custom_op("minitrain::rows_from_ranks", mutates_args=())
def rows_from_ranks(
    y_SD: Tensor, order_S: Tensor, inverse_S: Tensor, sizes_2N: Tensor, group: str, num_rows: int
) -> Tensor:
    """The way back -> (R, D). num_rows: R."""
    return all_to_all_rows(y_SD[inverse_S], *sizes_2N.flip(0).tolist(), named(group))


@exchange_counts.register_fake
def _(counts_E, group, num_rows):
    size = named(group).size
    order_S = counts_E.new_empty(torch.library.get_ctx().new_dynamic_size(max=size * num_rows))  # 32 bits will do
    sizes_2N = torch.empty(2, size, dtype=torch.int64, device="cpu")
    return counts_E.new_empty(len(counts_E) // size), order_S, torch.empty_like(order_S), sizes_2N


@rows_to_ranks.register_fake
def _(x_RD, order_S, *_):
    return x_RD.new_empty(order_S.shape[0], x_RD.shape[1])  # len() would want to know it


@rows_from_ranks.register_fake
def _(y_SD, _order_S, _inverse_S, _sizes_2N, _group, num_rows):
    return y_SD.new_empty(num_rows, y_SD.shape[1])


def _save_route(ctx, inputs, output):
    x, *route, ctx.group = inputs[:5]
    ctx.save_for_backward(*route)
    ctx.num_rows = x.shape[0]


def _differentiate_to(ctx, d_SD):
    return rows_from_ranks(d_SD, *ctx.saved_tensors, ctx.group, ctx.num_rows), None, None, None, None


def _differentiate_from(ctx, d_RD):
    return rows_to_ranks(d_RD, *ctx.saved_tensors, ctx.group), None, None, None, None, None


rows_to_ranks.register_autograd(_differentiate_to, setup_context=_save_route)
rows_from_ranks.register_autograd(_differentiate_from, setup_context=_save_route)
