"""Expert parallel: each rank of "ep" has some of the experts of a layer, and sends for the others' its tokens' copies.

    x_RD in the order of experts --all-to-all--> rows for the experts here, of all ranks --sort--> experts
                                 <--all-to-all--                        y, back in its place

The ranks have different tokens: ep lies inside dp x cp, and only the ranks that have the same experts sum their
gradients. Who sends how much is exchanged first, and read by the host: one sync a layer. A rank that sends or gets
nothing takes part all the same. Lepikhin et al. 2020, arXiv:2006.16668.
"""

import fnmatch
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minitrain.parallel.comm import Group, all_to_all_rows
from minitrain.parallel.cut import cut
from minitrain.parallel.mesh import Mesh


def apply_ep(model: nn.Module, mesh: Mesh) -> None:
    """Cut dimension 0 of what the model's TP_PLAN calls "experts", whose forward is (x_RD, counts_E) -> (R, D)."""
    patterns = [pattern for pattern, style in getattr(type(model), "TP_PLAN", {}).items() if style == "experts"]
    exchanged = torch.compiler.disable(_exchanged)  # it reads counts: one clean break of a compiled caller's graph
    for name, module in model.named_modules():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            for p in module.parameters():
                cut(p, "ep", 0, mesh.group("ep"))
                p.grad_sum_on = ("expert_dp",)
            module.forward = functools.partial(exchanged, module.forward, mesh.group("ep"))


def _exchanged(experts: Callable, group: Group, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    """experts(x, counts) where rows and counts are those of all experts, and here are some of these."""
    send_ranks_E = counts_E.view(group.size, -1)
    got_ranks_E = all_to_all_rows(send_ranks_E, [1] * group.size, [1] * group.size, group)
    send, got = torch.stack([send_ranks_E.sum(1), got_ranks_E.sum(1)]).tolist()

    x_RD = _Exchange.apply(x_RD, send, got, group)  # by rank, then by expert
    order_R = _by_expert(got_ranks_E, len(x_RD))
    inverse_R = order_R.argsort()
    y_RD = experts(_Permute.apply(x_RD, order_R, inverse_R), got_ranks_E.sum(0))
    return _Exchange.apply(_Permute.apply(y_RD, inverse_R, order_R), got, send, group)


def _by_expert(counts_ranks_E: Tensor, num_rows: int) -> Tensor:
    """Where, in rows ordered by rank and then by expert, those ordered by expert and then by rank are, (R,)."""
    experts = torch.arange(counts_ranks_E.shape[1], device=counts_ranks_E.device).repeat(len(counts_ranks_E))
    return experts.repeat_interleave(counts_ranks_E.flatten(), output_size=num_rows).argsort(stable=True)


class _Exchange(torch.autograd.Function):
    """send[i] rows go to rank i, got[i] come from it."""

    @staticmethod
    def forward(ctx, x_RD, send, got, group):
        ctx.back = got, send, group
        return all_to_all_rows(x_RD, send, got, group)

    @staticmethod
    def backward(ctx, d_RD):
        return all_to_all_rows(d_RD, *ctx.back), None, None, None


class _Permute(torch.autograd.Function):
    """x[order]; in backward a gather too."""

    @staticmethod
    def forward(ctx, x_RD, order_R, inverse_R):
        ctx.save_for_backward(inverse_R)
        return x_RD[order_R]

    @staticmethod
    def backward(ctx, d_RD):
        return d_RD[ctx.saved_tensors[0]], None, None
