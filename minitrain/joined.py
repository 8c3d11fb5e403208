"""Several Linears of one input as one product, which reads the input once and has fewer, fuller rounds of tiles.

Their weights are one matrix where they lie end to end in memory, as models.materialize and parallel/ddp.py lay them
out; else they are copied together each time. Operations of their own, so that a compiler does not keep such copies from
a forward to its backward. Dimensions: T tokens, D inputs, N outputs of all together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("minitrain::joined_linear", mutates_args=())
def joined_linear(x_TD: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x times each of the weights (.., D), transposed, side by side -> (T, N). For its gradients see below."""
    return x_TD @ joined(weights).T


@torch.library.custom_op("minitrain::joined_linear_dx", mutates_args=())
def joined_linear_dx(d_out_TN: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gradient of x (T, D). That of the weights is d_out.T @ x, its rows in the same order."""
    return d_out_TN @ joined(weights)


def joined(weights: Sequence[Tensor]) -> Tensor:
    """The rows of all (.., D) -> (N, D): a view if they lie end to end in one storage, else a copy."""
    first, end = weights[0], weights[0].data_ptr()
    for weight in weights:
        is_next = weight.data_ptr() == end and weight.is_contiguous()
        if not is_next or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(weights))
        end += weight.nbytes
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


@joined_linear.register_fake
def _(x_TD, weights):
    return x_TD.new_empty(len(x_TD), sum(len(weight) for weight in weights))


@joined_linear_dx.register_fake
def _(d_out_TN, weights):
    return d_out_TN.new_empty(len(d_out_TN), weights[0].shape[1])
