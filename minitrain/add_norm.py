"""The residual stream and its RMSNorm, what comes before each half of a block, as one CUDA kernel each way.

models/layers.py has the plain function and chooses. Dimensions: T tokens, D hidden.
"""

import torch
from torch import Tensor

from minitrain.extension import address, aligned, kernels, runs_on, stream_of

_MOST_CHANNELS = 16_384  # a row lies in the registers of 16 warps


def can_run(x_TD: Tensor, weight_D: Tensor, delta_TD: Tensor | None = None) -> bool:
    """Whether add_norm takes these: bf16, D a multiple of 8 up to 16,384, on a GPU that the extension is built for."""
    rows = (x_TD,) if delta_TD is None else (x_TD, delta_TD)
    is_bf16 = all(x.dtype == torch.bfloat16 for x in (*rows, weight_D))
    fit = _has_rows(x_TD) and weight_D.shape == x_TD.shape[1:] and all(x.shape == x_TD.shape for x in rows)
    return is_bf16 and fit and runs_on(x_TD.device.type, x_TD.device.index)


def add_norm(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> sum = x + delta, and weight * sum / rms(sum) over D; (T, D) each. delta None: sum is x. Differentiable, once.

    x and delta (T, D), weight (D,), and what comes out: bf16; computed in fp32, sum and the norm rounded once each, the
    norm that of the rounded sum. eps is added to the mean square. Backward adds the gradient that reaches sum from
    elsewhere, and is deterministic. Zhang & Sennrich 2019, arXiv:1910.07467. Raises ValueError naming the argument.
    """
    return _AddNorm.apply(x_TD, delta_TD, weight_D, eps)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, delta_TD, weight_D, eps):
        sum_TD, out_TD = add_norm_fwd(x_TD, delta_TD, weight_D, eps)
        if delta_TD is None:
            sum_TD = x_TD.view_as(x_TD)  # not x_TD itself: both gradients of x are to come through here
        ctx.save_for_backward(x_TD if delta_TD is None else sum_TD, weight_D)
        ctx.eps, ctx.adds = eps, delta_TD is not None
        return sum_TD, out_TD

    @staticmethod
    def backward(ctx, d_sum_TD, d_out_TD):
        sum_TD, weight_D = ctx.saved_tensors
        dx_TD, d_weight_D = add_norm_bwd(d_out_TD, d_sum_TD, sum_TD, weight_D, ctx.eps)
        return dx_TD, dx_TD if ctx.adds else None, d_weight_D, None


@torch.library.custom_op("minitrain::add_norm", mutates_args=(), device_types="cuda")
def add_norm_fwd(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> sum (T, D), without delta (0,), and out (T, D)."""
    _check(weight_D, x=x_TD, delta=delta_TD)
    x_TD, weight_D, delta_TD = aligned(x_TD), aligned(weight_D), None if delta_TD is None else aligned(delta_TD)
    sum_TD, out_TD = x_TD.new_empty(0 if delta_TD is None else x_TD.shape), torch.empty_like(x_TD)
    if len(x_TD):
        kernels.add_norm(
            _arguments(x_TD, weight_D, eps),
            x=x_TD.data_ptr(),
            delta=address(delta_TD),
            sum=sum_TD.data_ptr(),
            out=out_TD.data_ptr(),
            device=x_TD.device.index,
            stream=stream_of(x_TD.device),
        )
    return sum_TD, out_TD


@torch.library.custom_op("minitrain::add_norm_bwd", mutates_args=(), device_types="cuda")
def add_norm_bwd(
    d_out_TD: Tensor, d_sum_TD: Tensor, sum_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """-> dx (T, D), of both gradients, and d_weight (D,)."""
    _check(weight_D, sum=sum_TD, d_out=d_out_TD, d_sum=d_sum_TD)
    d_out_TD, d_sum_TD, sum_TD, weight_D = map(aligned, (d_out_TD, d_sum_TD, sum_TD, weight_D))
    dx_TD, d_weight_D = torch.empty_like(sum_TD), torch.empty_like(weight_D)
    if not len(sum_TD):
        return dx_TD, d_weight_D.zero_()
    num_parts = kernels.add_norm_num_parts(sum_TD.device.index)
    parts_PD = sum_TD.new_empty(num_parts, len(weight_D), dtype=torch.float32)
    kernels.add_norm_backward(
        _arguments(sum_TD, weight_D, eps),
        d_out=d_out_TD.data_ptr(),
        d_sum=d_sum_TD.data_ptr(),
        sum=sum_TD.data_ptr(),
        dx=dx_TD.data_ptr(),
        weight_grad=d_weight_D.data_ptr(),
        parts=parts_PD.data_ptr(),
        num_parts=num_parts,
        device=sum_TD.device.index,
        stream=stream_of(sum_TD.device),
    )
    return dx_TD, d_weight_D


def _has_rows(x):
    return x.ndim == 2 and x.shape[1] % 8 == 0 and 0 < x.shape[1] <= _MOST_CHANNELS


def _check(weight_D, **rows):
    x_TD = next(iter(rows.values()))
    if not _has_rows(x_TD):
        raise ValueError(f"add_norm: {tuple(x_TD.shape)} are not rows of a multiple of 8 channels up to 16,384")
    for name, tensor in {"weight": weight_D, **rows}.items():
        shape = x_TD.shape[1:] if name == "weight" else x_TD.shape
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.bfloat16):
            found = f"{tuple(tensor.shape)}, {tensor.dtype}"
            raise ValueError(f"add_norm: {name} is {found}, not {tuple(shape)}, torch.bfloat16")


def _arguments(x_TD, weight_D, eps):
    T, D = x_TD.shape
    return kernels.AddNorm(tokens=T, channels=D, weight=weight_D.data_ptr(), eps=eps)


@add_norm_fwd.register_fake
def _(x_TD, delta_TD, _weight_D, _eps):
    return x_TD.new_empty(0 if delta_TD is None else x_TD.shape), x_TD.new_empty(x_TD.shape)


@add_norm_bwd.register_fake
def _(_d_out_TD, _d_sum_TD, sum_TD, weight_D, _eps):
    return sum_TD.new_empty(sum_TD.shape), weight_D.new_empty(weight_D.shape)
