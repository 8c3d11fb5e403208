"""Gradients of weights that are made later than those of inputs, where a pipeline's stage would else wait (pp.py).

    backward    of a row: a Linear of a block gives dx, which the stage before waits for, and puts (x, dy) aside
    weights     of the oldest such row: dW = dy.T @ x, block after block, to where autograd would have brought it

x and dy come out of a block's backward as the gradients of two inputs of the block, of which nothing is read (_Aside):
a compiled block stays one graph, without effects, and nothing is copied. All other gradients, of norms, biases and
experts, come with the inputs'. Qi et al. 2023, arXiv:2401.10241.
"""

import collections
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitrain.parallel.ddp import blocks_of


class Deferred:
    """then[block's key]: called when the block's gradients of a row are complete."""

    def __init__(self, model: nn.Module):
        self.then = {}
        self.rows = collections.deque()  # {block's key: [(weight, x, dy), ..]} of each row
        self.row = {key: [] for key in blocks_of(model)}  # the one whose forward runs
        self.source = torch.empty((), device="cpu", requires_grad=True)  # not the weight: its hooks would be called
        model.register_forward_pre_hook(self._begin_row)
        for key, block in blocks_of(model).items():
            linears = [module for module in block.modules() if type(module) is nn.Linear]
            for linear in linears:
                linear.__class__ = _Linear
            block.register_forward_pre_hook(functools.partial(self._before_block, key, linears))

    def _begin_row(self, _model: nn.Module, _args: tuple) -> None:
        self.row = {key: [] for key in self.row}
        if torch.is_grad_enabled():
            self.rows.append(self.row)

    def _before_block(self, key: str, linears: list["_Linear"], _block: nn.Module, args: tuple) -> None:
        for linear in linears:
            linear.aside = None
            if torch.is_grad_enabled() and linear.weight.requires_grad:
                linear.aside = _Aside.apply(self.source, linear, len(args[-1].tokens), self.row[key])

    def run(self) -> None:
        """The oldest row's."""
        row = self.rows.popleft()
        for key in reversed(row):
            while row[key]:  # what is used goes
                _Product.apply(*row[key].pop()).backward()
            if key in self.then:
                self.then[key]()


class _Linear(nn.Linear):
    """NOTE: a block calls it once; of two calls autograd would add up each x and dy before they are multiplied."""

    aside: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.aside is None or x.shape != self.aside[0].shape:  # of other things than the row's tokens
            return super().forward(x)
        return _PutAside.apply(x, self.weight.detach(), self.bias, *self.aside)


class _PutAside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight, bias, _x, _dy):
        ctx.save_for_backward(x_TD, weight)
        ctx.has_bias = bias is not None
        return F.linear(x_TD, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x_TD, weight = ctx.saved_tensors
        return dy @ weight, None, dy.sum(0) if ctx.has_bias else None, x_TD, dy


class _Aside(torch.autograd.Function):
    """-> what has the shapes of x and dy, and no memory; their "gradients" x and dy are put into row."""

    @staticmethod
    def forward(ctx, _source, linear, T, row):
        ctx.weight, ctx.row = linear.weight, row
        x, dy = linear.weight.new_empty(2)
        return x.expand(T, ctx.weight.shape[1]), dy.expand(T, ctx.weight.shape[0])

    @staticmethod
    def backward(ctx, x_TD, dy):
        ctx.row.append((ctx.weight, x_TD.detach(), dy))  # x bears its history
        return None, None, None, None


class _Product(torch.autograd.Function):
    """A scalar whose gradient is dW: autograd hands it to the weight and its hooks, and copies nothing."""

    @staticmethod
    def forward(ctx, weight, x_TD, dy):
        ctx.save_for_backward(x_TD, dy)
        return weight.new_empty(())

    @staticmethod
    def backward(ctx, _):
        x_TD, dy = ctx.saved_tensors
        return dy.T @ x_TD, None, None
