"""Attention from a block's input on, for Hopper: what models/layers.py does in steps, with fewer passes over memory.

    x (T, D) --one product--> qkv (T, H + 2 K, C) --norm_rotate--> q, k --attention--> out (T, H, C)
    d_out -----attention's backward, whose last step goes on through rotation and norm-----> d_qkv --one product--> dx

Three projections in one product read x once. In backward the gradient of queries goes from its sum in fp32 through
rotation and norm to its place in d_qkv in one pass for three. Dimensions as in fused_attention.py.
"""

import torch
from torch import Tensor

from minitrain import norm_rotate as heads
from minitrain.attention import choose
from minitrain.extension import kernels, packed, stream_of
from minitrain.fused_attention import HEAD_DIMS, attention_fwd, is_hopper, run_backward, shape_of
from minitrain.joined import joined_linear, joined_linear_dx


def can_run(x_TD: Tensor, head_dim: int, *weights: Tensor) -> bool:
    """Whether qkv_attention takes these: bf16 on a GPU with the kernels for Hopper, head_dim 64 or 128."""
    if any(w.dtype != torch.bfloat16 for w in (x_TD, *weights)) or head_dim not in HEAD_DIMS["hopper"]:
        return False
    device = x_TD.device
    is_native = choose("auto", device.type, x_TD.dtype, head_dim) == "native"
    return is_native and is_hopper("auto", device.type, device.index, x_TD.dtype, head_dim)


def qkv_attention(
    x_TD: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    norms: tuple[Tensor, Tensor],
    eps: float,
    cos_TC2: Tensor,
    sin_TC2: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
) -> Tensor:
    """Causal attention inside each document, of queries, keys and values made of x -> (T, H, C). Differentiable.

    weights: of the three projections, (H * C, D) and twice (K * C, D); norms: of the RMSNorm of each query and key
    before it is turned, (C,) twice; all bf16. cos, sin (T, C/2) fp32; cu_seqlens_* (N + 1,) int32, as for attention.
    Keeps x, qkv, q and the result. Not differentiable twice.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    rest = cos_TC2, sin_TC2, cu_seqlens_q, cu_seqlens_k, eps, deterministic
    return _QKVAttention.apply(x_TD, *weights, *norms, *rest)


class _QKVAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, q_weight, k_weight, v_weight, q_norm, k_norm, cos, sin, cu_q, cu_k, eps, deterministic):
        C, weights = len(q_norm), (q_weight, k_weight, v_weight)
        ctx.rows, ctx.options = [len(weight) for weight in weights], (eps, deterministic)
        qkv_TNC = joined_linear(x_TD, weights).unflatten(1, (-1, C))
        q_THC, k_TKC, v_TKC = qkv_TNC.split([rows // C for rows in ctx.rows], 1)
        q_THC = heads.norm_rotate(q_THC, q_norm, cos, sin, eps)
        k_TKC = heads.norm_rotate(k_TKC, k_norm, cos, sin, eps)
        mask = kernels.UNBOUNDED, 0, C**-0.5
        out_THC, lse_HT = attention_fwd(q_THC, k_TKC, v_TKC, cu_q, cu_k, *mask, deterministic, True)
        made = qkv_TNC, q_THC, out_THC, lse_HT  # k is made again
        ctx.save_for_backward(x_TD, *weights, *made, q_norm, k_norm, cos, sin, cu_q, cu_k)
        return out_THC

    @staticmethod
    def backward(ctx, d_out_THC):
        x_TD, *saved = ctx.saved_tensors  # read once: a checkpoint makes them again for that
        weights, saved = saved[:3], saved[3:]
        d_qkv_TNC, *d_norms = qkv_attention_bwd(d_out_THC, *saved, *ctx.options)
        d_qkv = d_qkv_TNC.flatten(1)
        needs_x, *needs_weights = ctx.needs_input_grad[:4]
        dx_TD = joined_linear_dx(d_qkv, weights) if needs_x else None
        d_weights = (d_qkv.T @ x_TD).split(ctx.rows) if any(needs_weights) else (None, None, None)
        return dx_TD, *d_weights, *d_norms, *(None,) * 6


@torch.library.custom_op("minitrain::qkv_attention_bwd", mutates_args=(), device_types="cuda")
def qkv_attention_bwd(
    d_out_THC: Tensor,
    qkv_TNC: Tensor,
    q_THC: Tensor,
    out_THC: Tensor,
    lse_HT: Tensor,
    q_norm_C: Tensor,
    k_norm_C: Tensor,
    cos_TC2: Tensor,
    sin_TC2: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    eps: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of qkv and of the norms' weights. q is what norm_rotate made of qkv's; k it makes again."""
    (T, H, C), K = q_THC.shape, (qkv_TNC.shape[1] - q_THC.shape[1]) // 2
    qkv_TNC = qkv_TNC.contiguous()
    d_qkv, d_q_norm, d_k_norm = (torch.empty_like(x) for x in (qkv_TNC, q_norm_C, k_norm_C))
    if not T:
        return d_qkv, d_q_norm.zero_(), d_k_norm.zero_()
    (q_before, k_before, v), (dq, dk, dv) = (x.split([H, K, K], 1) for x in (qkv_TNC, d_qkv))
    k_TKC = heads.norm_rotate(k_before, k_norm_C, cos_TC2, sin_TC2, eps)
    dk_turned, shape = torch.empty_like(k_TKC), shape_of(q_THC, k_TKC, cu_q, kernels.UNBOUNDED, 0, C**-0.5)
    saved = q_THC, k_TKC, v, out_THC, lse_HT, cu_q, cu_k
    left = run_backward(d_out_THC, None, saved, shape, (None, dk_turned, dv), deterministic, hopper=True)
    parts_PC = lse_HT.new_empty(kernels.attention_finish_num_parts(q_THC.device.index), C)
    kernels.attention_finish_through_norm(
        heads.arguments(q_before, q_norm_C, cos_TC2, sin_TC2, eps),
        shape=shape,
        **{name: x.data_ptr() for name, x in left.items()},
        dx=packed(dq),
        weight_grad=d_q_norm.data_ptr(),
        parts=parts_PC.data_ptr(),
        num_parts=len(parts_PC),
        device=q_THC.device.index,
        stream=stream_of(q_THC.device),
    )
    heads.run_backward(dk_turned, k_before, k_norm_C, cos_TC2, sin_TC2, eps, dk, d_k_norm)
    return d_qkv, d_q_norm, d_k_norm


@qkv_attention_bwd.register_fake
def _(_d_out, qkv_TNC, _q, _out, _lse, q_norm_C, k_norm_C, *_):
    return qkv_TNC.new_empty(qkv_TNC.shape), torch.empty_like(q_norm_C), torch.empty_like(k_norm_C)
