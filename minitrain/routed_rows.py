"""Tokens' rows copied to the order of their experts, and summed back, as CUDA kernels.

models/qwen3_moe.py has the plain functions and chooses. Dimensions: T tokens, A copies of each, R = T * A rows,
D channels. Copy a of token t is row place_TA[t, a].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minitrain.extension import address, kernels, runs_on, stream_of


@torch.compiler.disable
def uncompiled(function: Callable, *args):
    """function(*args), whose shapes are others in each call: one clean break of a compiled caller's graph."""
    return function(*args)


def can_run(x: Tensor) -> bool:
    """Whether the kernels take such rows: bf16, D a multiple of 8, on a GPU that the extension is built for."""
    return x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0 and runs_on(x.device.type, x.device.index)


@torch.library.custom_op("minitrain::spread_rows", mutates_args=(), device_types="cuda")
def spread_rows(x_TD: Tensor, place_TA: Tensor) -> Tensor:
    """-> (R, D), every row a copy of its token's. Differentiable. x bf16, place (T, A) int64, each row once."""
    out_RD = x_TD.new_empty(place_TA.numel(), x_TD.shape[1])
    x_TD, place_TA = x_TD.contiguous(), place_TA.contiguous()
    kernels.spread_rows(_rows(x_TD, place_TA, None), x_TD.data_ptr(), out_RD.data_ptr(), 0, 0, *_where(x_TD))
    return out_RD


@torch.library.custom_op("minitrain::sum_rows", mutates_args=(), device_types="cuda")
def sum_rows(x_RD: Tensor, place_TA: Tensor, weights_TA: Tensor | None) -> Tensor:
    """-> (T, D), of each token the sum of its rows, in fp32; differentiable with factors, weights (T, A) fp32."""
    x_RD, place_TA = x_RD.contiguous(), place_TA.contiguous()
    weights_TA = None if weights_TA is None else weights_TA.contiguous()
    out_TD = x_RD.new_empty(len(place_TA), x_RD.shape[1])
    kernels.sum_rows(_rows(x_RD, place_TA, weights_TA), x_RD.data_ptr(), out_TD.data_ptr(), *_where(x_RD))
    return out_TD


@torch.library.custom_op("minitrain::sum_rows_bwd", mutates_args=(), device_types="cuda")
def sum_rows_bwd(d_TD: Tensor, x_RD: Tensor, place_TA: Tensor, weights_TA: Tensor) -> tuple[Tensor, Tensor]:
    """-> dx (R, D), d_weights (T, A)."""
    d_TD, x_RD, place_TA, weights_TA = (x.contiguous() for x in (d_TD, x_RD, place_TA, weights_TA))
    dx_RD, d_weights_TA = torch.empty_like(x_RD), torch.empty_like(weights_TA)
    places = d_TD.data_ptr(), dx_RD.data_ptr(), x_RD.data_ptr(), d_weights_TA.data_ptr()
    kernels.spread_rows(_rows(d_TD, place_TA, weights_TA), *places, *_where(d_TD))
    return dx_RD, d_weights_TA


def _rows(x, place_TA, weights_TA):
    T, A = place_TA.shape
    return kernels.RoutedRows(
        tokens=T, copies=A, channels=x.shape[1], place=place_TA.data_ptr(), weights=address(weights_TA)
    )


def _where(x):
    return x.device.index, stream_of(x.device)


@spread_rows.register_fake
def _(x_TD, place_TA):
    return x_TD.new_empty(place_TA.numel(), x_TD.shape[1])


@sum_rows.register_fake
def _(x_RD, place_TA, _weights_TA):
    return x_RD.new_empty(len(place_TA), x_RD.shape[1])


@sum_rows_bwd.register_fake
def _(_d_TD, x_RD, _place_TA, weights_TA):
    return torch.empty_like(x_RD), torch.empty_like(weights_TA)


def _save_place(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _save_all(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_spread(ctx, d_RD):
    return sum_rows(d_RD, *ctx.saved_tensors, None), None


def _differentiate_sum(ctx, d_TD):
    x_RD, place_TA, weights_TA = ctx.saved_tensors
    dx_RD, d_weights_TA = sum_rows_bwd(d_TD, x_RD, place_TA, weights_TA)
    return dx_RD, None, d_weights_TA


spread_rows.register_autograd(_differentiate_spread, setup_context=_save_place)
sum_rows.register_autograd(_differentiate_sum, setup_context=_save_all)
