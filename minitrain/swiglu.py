"""SwiGLU as three matrix products, of which two do the pointwise work between them: CUDA kernels for Hopper.

models/layers.py has the plain function and chooses. Dimensions: T tokens, D hidden, F feed-forward.
"""

import torch
from torch import Tensor

from minitrain.extension import aligned, kernels, runs_on_hopper, stream_of
from minitrain.joined import joined_linear_dx

_GRAIN = 64  # the kernels' step: D and F are multiples of it


def can_run(x_TD: Tensor, *weights: Tensor) -> bool:
    """Whether swiglu takes these: bf16 matrices, D and F multiples of 64, on a GPU with the kernels for Hopper."""
    return runs_on_hopper(x_TD.device.type, x_TD.device.index) and all(
        x.dtype == torch.bfloat16 and x.ndim == 2 and x.shape[-1] % _GRAIN == 0 for x in (x_TD, *weights)
    )


def swiglu(x_TD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T) @ down.T -> (T, D). Differentiable; keeps what it was given and both products.

    bf16 in and out, sums in fp32; gate, up and their gradients are rounded, what is between is not. Not differentiable
    twice. Shazeer 2020, arXiv:2002.05202.
    """
    return _SwiGLU.apply(x_TD, gate_FD, up_FD, down_DF)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, gate_FD, up_FD, down_DF):
        gate_TF, up_TF, act_TF = swiglu_products(x_TD, gate_FD, up_FD)
        ctx.save_for_backward(x_TD, gate_FD, up_FD, down_DF, gate_TF, up_TF)
        return act_TF @ down_DF.T

    @staticmethod
    def backward(ctx, dy_TD):
        x_TD, gate_FD, up_FD, down_DF, gate_TF, up_TF = ctx.saved_tensors
        F = gate_TF.shape[1]
        both_T2F, act_TF = swiglu_products_bwd(dy_TD, down_DF, gate_TF, up_TF).split([2 * F, F], 1)
        needs_x, needs_gate, needs_up, needs_down = ctx.needs_input_grad
        dx_TD = joined_linear_dx(both_T2F, [gate_FD, up_FD]) if needs_x else None
        d_gate_FD, d_up_FD = (both_T2F.T @ x_TD).chunk(2) if needs_gate or needs_up else (None, None)
        return dx_TD, d_gate_FD, d_up_FD, dy_TD.T @ act_TF if needs_down else None


@torch.library.custom_op("minitrain::swiglu_products", mutates_args=(), device_types="cuda")
def swiglu_products(x_TD: Tensor, gate_FD: Tensor, up_FD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> x @ gate.T, x @ up.T, and silu of the one times the other; (T, F) each."""
    sizes = _sizes(x_TD, {"gate": gate_FD.T, "up": up_FD.T})
    x_TD, gate_FD, up_FD = map(aligned, (x_TD, gate_FD, up_FD))
    gate_TF, up_TF, act_TF = (x_TD.new_empty(len(x_TD), len(gate_FD)) for _ in range(3))
    if len(x_TD):
        kernels.swiglu_forward(
            sizes,
            x=x_TD.data_ptr(),
            gate_weight=gate_FD.data_ptr(),
            up_weight=up_FD.data_ptr(),
            gate=gate_TF.data_ptr(),
            up=up_TF.data_ptr(),
            act=act_TF.data_ptr(),
            device=x_TD.device.index,
            stream=stream_of(x_TD.device),
        )
    return gate_TF, up_TF, act_TF


@torch.library.custom_op("minitrain::swiglu_products_bwd", mutates_args=(), device_types="cuda")
def swiglu_products_bwd(d_out_TD: Tensor, down_DF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """-> of d_act = d_out @ down, which is not kept: gradients of gate and up, and act again, side by side (T, 3 F)."""
    sizes = _sizes(d_out_TD, {"down": down_DF})
    d_out_TD, down_DF, gate_TF, up_TF = map(aligned, (d_out_TD, down_DF, gate_TF, up_TF))
    T, F = gate_TF.shape
    out = gate_TF.new_empty(T, 3 * F)
    if T:
        kernels.swiglu_backward(
            sizes,
            d_out=d_out_TD.data_ptr(),
            down_weight=down_DF.data_ptr(),
            gate=gate_TF.data_ptr(),
            up=up_TF.data_ptr(),
            out=out.data_ptr(),
            device=d_out_TD.device.index,
            stream=stream_of(d_out_TD.device),
        )
    return out


def _sizes(x_TD, weights):
    (T, D), F = x_TD.shape, next(iter(weights.values())).shape[1]
    if any(x.dtype != torch.bfloat16 for x in (x_TD, *weights.values())):
        raise ValueError(f"swiglu: takes bfloat16, not {x_TD.dtype} with weights {next(iter(weights.values())).dtype}")
    for name, weight_DF in weights.items():
        if tuple(weight_DF.shape) != (D, F):
            raise ValueError(f"swiglu: {name} takes {len(weight_DF)} to {weight_DF.shape[1]}, not {D} to {F}")
    return kernels.SwiGLU(tokens=T, hidden=D, inner=F)


@swiglu_products.register_fake
def _(x_TD, gate_FD, up_FD):
    return tuple(x_TD.new_empty(len(x_TD), len(gate_FD)) for _ in range(3))


@swiglu_products_bwd.register_fake
def _(_d_out_TD, _down_DF, gate_TF, _up_TF):
    T, F = gate_TF.shape
    return gate_TF.new_empty(T, 3 * F)
