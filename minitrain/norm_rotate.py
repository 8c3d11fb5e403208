"""RMSNorm of each head and its rotary positions, what Qwen3 does to queries and keys, as one CUDA kernel each way.

models/layers.py has the plain functions and chooses. Dimensions: T tokens, H heads, C channels of a head.
"""

import torch
from torch import Tensor

from minitrain.extension import addressable, kernels, packed, runs_on, stream_of

HEAD_DIMS = (64, 128, 256)


def can_run(x_THC: Tensor, weight_C: Tensor) -> bool:
    """Whether norm_rotate takes these: bf16, C of HEAD_DIMS, on a GPU that the extension is built for."""
    is_bf16 = x_THC.dtype == weight_C.dtype == torch.bfloat16
    return is_bf16 and x_THC.shape[-1] in HEAD_DIMS and runs_on(x_THC.device.type, x_THC.device.index)


@torch.library.custom_op("minitrain::norm_rotate", mutates_args=(), device_types="cuda")
def norm_rotate(x_THC: Tensor, weight_C: Tensor, cos_TC2: Tensor, sin_TC2: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) over C, then channels i and i + C/2 turned by the token's angle -> (T, H, C). Differentiable.

    x (T, H, C) and weight (C,) bf16, cos and sin (T, C/2) fp32; computed in fp32, rounded once. eps is added to the
    mean square. No gradient for cos and sin. Norm: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    out_THC, x_THC = x_THC.new_empty(x_THC.shape), addressable(x_THC)
    if out_THC.numel():
        args = arguments(x_THC, weight_C, cos_TC2, sin_TC2, eps)
        kernels.norm_rotate(args, out=out_THC.data_ptr(), device=x_THC.device.index, stream=stream_of(x_THC.device))
    return out_THC


@torch.library.custom_op("minitrain::norm_rotate_bwd", mutates_args=(), device_types="cuda")
def norm_rotate_bwd(
    d_out_THC: Tensor, x_THC: Tensor, weight_C: Tensor, cos_TC2: Tensor, sin_TC2: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """-> dx (T, H, C), d_weight (C,)."""
    dx_THC, d_weight_C = x_THC.new_empty(x_THC.shape), torch.empty_like(weight_C)
    if not dx_THC.numel():
        return dx_THC, d_weight_C.zero_()
    run_backward(addressable(d_out_THC), addressable(x_THC), weight_C, cos_TC2, sin_TC2, eps, dx_THC, d_weight_C)
    return dx_THC, d_weight_C


def run_backward(d_out_THC, x_THC, weight_C, cos_TC2, sin_TC2, eps, dx_THC, d_weight_C) -> None:
    """Fills dx, which may be a slice, and d_weight. There must be a head, and all be addressable (extension.py)."""
    parts_PC = cos_TC2.new_empty(kernels.norm_rotate_num_parts(x_THC.device.index), len(weight_C))
    kernels.norm_rotate_backward(
        arguments(x_THC, weight_C, cos_TC2, sin_TC2, eps),
        d_out=packed(d_out_THC),
        dx=packed(dx_THC),
        weight_grad=d_weight_C.data_ptr(),
        parts=parts_PC.data_ptr(),
        num_parts=len(parts_PC),
        device=x_THC.device.index,
        stream=stream_of(x_THC.device),
    )


def arguments(x_THC, weight_C, cos_TC2, sin_TC2, eps):
    """kernels.NormRotate of them. ValueError naming one that does not fit the others."""
    T, H, C = x_THC.shape
    for name, tensor, shape in (
        ("weight", weight_C, (C,)),
        ("cos", cos_TC2, (T, C // 2)),
        ("sin", sin_TC2, (T, C // 2)),
    ):
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"norm_rotate: {name} is {tuple(tensor.shape)}, not {shape}, or not contiguous")
    addresses = {"weight": weight_C.data_ptr(), "cos": cos_TC2.data_ptr(), "sin": sin_TC2.data_ptr()}
    return kernels.NormRotate(tokens=T, heads=H, head_dim=C, x=packed(x_THC), **addresses, eps=eps)


@norm_rotate.register_fake
def _(x_THC, *_):
    return x_THC.new_empty(x_THC.shape)


@norm_rotate_bwd.register_fake
def _(d_out_THC, x_THC, weight_C, *_):
    return x_THC.new_empty(x_THC.shape), torch.empty_like(weight_C)


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, d_out_THC):
    return *norm_rotate_bwd(d_out_THC, *ctx.saved_tensors, ctx.eps), None, None, None


norm_rotate.register_autograd(_differentiate, setup_context=_save)
