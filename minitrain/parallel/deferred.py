"""Gradients of weights that are made later than those of inputs, where a pipeline's stage would else wait (pp.py).

    backward    of a row: a Linear of a block gives dx, which the stage before waits for, and puts (x, dy) aside
    weights     of the oldest such row: dW = dy.T @ x, block after block, to where autograd would have brought it

x and dy come out of a block's backward as the gradients of two inputs of the block, of which nothing is read (_Aside):
a compiled block stays one graph, without effects, and nothing is copied. All other gradients, of norms, biases and
experts, come with the inputs'. A third such gradient, 1 on the host, says that the block called the Linear once: of two
calls autograd would have added up each x and dy before they are multiplied. Qi et al. 2023, arXiv:2401.10241.
"""

import collections
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitrain.config import UserError
from minitrain.parallel.ddp import blocks_of


class Deferred:
    """then[block's key]: called when the block's gradients of a row are complete."""

    def __init__(self, model: nn.Module):
        self.then = {}
        self.rows = collections.deque()  # {block's key: [(weight, x, dy), ..]} of each row
        self.row = {key: [] for key in blocks_of(model)}  # the one whose forward runs
        self.one = torch.ones((), device="cpu", requires_grad=True)  # not the weight: its hooks would be called
        self.hooks = [model.register_forward_pre_hook(self._begin_row)]
        self.linears = []
        for key, block in blocks_of(model).items():
            linears = {f"{key}.{name}": m for name, m in block.named_modules() if type(m) is nn.Linear}
            for linear in linears.values():
                linear.__class__ = _Linear
            self.linears += linears.values()
            before = functools.partial(self._before_block, key, linears)
            self.hooks.append(block.register_forward_pre_hook(before))

    def _begin_row(self, _model: nn.Module, _args: tuple) -> None:
        self.row = {key: [] for key in self.row}
        if torch.is_grad_enabled():
            self.rows.append(self.row)

    def _before_block(self, key: str, linears: dict[str, "_Linear"], _block: nn.Module, args: tuple) -> None:
        for name, linear in linears.items():
            linear.aside = None
            if torch.is_grad_enabled() and linear.weight.requires_grad:
                aside = _Aside.apply(self.one, name, linear, len(args[-1].tokens), self.row[key])
                linear.aside = linear.weight.detach(), *aside  # in a compiled block its hooks would be called, too

    def run(self) -> None:
        """The oldest row's."""
        row = self.rows.popleft()
        for key in reversed(row):
            while row[key]:  # what is used goes
                _Product.apply(*row[key].pop()).backward()
            if key in self.then:
                self.then[key]()

    def close(self) -> None:
        """Let go of the model: its Linears make all their gradients again."""
        for hook in self.hooks:
            hook.remove()
        for linear in self.linears:
            linear.aside = None
        self.then.clear()


class _Linear(nn.Linear):
    aside: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # weight; for x, dy and 1 of the forward that runs

    def forward(self, x: Tensor) -> Tensor:
        if self.aside is None or x.shape != self.aside[1].shape:  # of other things than the row's tokens
            return super().forward(x)
        return _PutAside.apply(x, self.bias, *self.aside)


class _PutAside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, bias, weight, _x, _dy, one):
        ctx.save_for_backward(x_TD, weight, one)
        ctx.has_bias = bias is not None
        return F.linear(x_TD, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x_TD, weight, one = ctx.saved_tensors
        return dy @ weight, dy.sum(0) if ctx.has_bias else None, None, x_TD, dy, one


class _Aside(torch.autograd.Function):
    """-> what has the shapes of x and dy, and no memory, and 1; their "gradients" x and dy are put into row."""

    @staticmethod
    def forward(ctx, one, name, linear, T, row):
        ctx.name, ctx.weight, ctx.row = name, linear.weight, row
        x, dy = linear.weight.new_empty(2)
        return x.expand(T, ctx.weight.shape[1]), dy.expand(T, ctx.weight.shape[0]), one.view_as(one)

    @staticmethod
    def backward(ctx, x_TD, dy, calls):
        if calls != 1:
            raise UserError(f'pp_schedule="zb-h1": {ctx.name} is called {int(calls)} times by its block, not once')
        ctx.row.append((ctx.weight, x_TD.detach(), dy))  # x bears its history
        return None, None, None, None, None


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
