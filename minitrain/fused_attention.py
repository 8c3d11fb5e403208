"""Our CUDA kernels for attention as functions of torch tensors: fused_attention, and merge for keys in several places.

    fused_attention --> attention_fwd  (out, lse) ...  attention_bwd  (dq, dk, dv)      two torch.library ops
                              \\                            /
                               make_plan: the list of work of a batch of documents, made once for all layers

This file checks what the kernels are given and allocates what they write; kernels/attention.h says what they promise.
Dimensions as in attention.py: T queries, S keys, H query heads, K key/value heads, C channels, N documents.
"""

import functools
import itertools

import torch
from torch import Tensor

from minitrain import extension
from minitrain.extension import address, addressable, kernels, packed, runs_on_hopper, stream_of

HEAD_DIMS = {"hopper": (64, 128), "portable": (64, 96, 128, 192, 256)}


def fused_attention(
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    deterministic: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention inside each document -> out (T, H, C) bf16 and lse (H, T) fp32, both differentiable.

    q (T, H, C), k and v (S, K, C): bf16 on one CUDA device, K divides H, C of HEAD_DIMS; slices of one packed qkv are
    read in place, what the kernels cannot address is copied. cu_seqlens_* (N + 1,) int32, the same N: document i is
    rows cu[i] : cu[i + 1], from 0 on; rows past the last entry belong to no document, their out is 0. The host does not
    look at them: check_documents does, and waits. T and S are at most 8,192 tiles of rows: 1,048,576 by "hopper", else
    524,288, and 262,144 where C is 256. max_seqlen: not needed, here for attention()'s signature.
    causal: query i of n sees key j of m iff j <= i + m - n (else every key of its document); window: and iff
    j >= i + m - n - window. scale: of the scores, positive, C**-0.5 if None.
    lse: log of the sum of exp(score), natural, -inf where a query sees nothing (its out is 0). For merge.
    deterministic: dq too is summed in a fixed order, at some cost; all else always is. The same bits in every run.
    kernel: "hopper" (capability 9.0), "portable" (8.0 and later), or "auto", the faster one that can run.
    Raises ValueError naming the argument. Sums and softmax in fp32. Algorithm: Dao 2023, arXiv:2307.08691.
    """
    check_tensors(q_THC, k_SKC, v_SKC, cu_seqlens_q, cu_seqlens_k)
    C = q_THC.shape[-1]
    if window is not None and (not causal or window < 0):
        raise ValueError(f"fused_attention: window={window} needs causal=True, and must be at least 0")
    if scale is not None and not scale > 0:
        raise ValueError(f"fused_attention: scale={scale} is not positive")
    hopper = is_hopper(kernel, q_THC.device.type, q_THC.device.index, q_THC.dtype, C)
    look_back = kernels.UNBOUNDED if window is None else min(window, kernels.UNBOUNDED)
    look_ahead = 0 if causal else kernels.UNBOUNDED
    scale = C**-0.5 if scale is None else scale
    return torch.ops.minitrain.attention_fwd(
        q_THC, k_SKC, v_SKC, cu_seqlens_q, cu_seqlens_k, look_back, look_ahead, scale, deterministic, hopper
    )


def merge(out_a_THC: Tensor, lse_a_HT: Tensor, out_b_THC: Tensor, lse_b_HT: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two disjoint sets of keys, from (out, lse) of each -> (out, lse) of all of them. Differentiable.

    out (T, H, C), lse (H, T); a query may see no key of one set or of both. Computed in lse's dtype.
    """
    blind_HT = (lse_a_HT == -torch.inf) & (lse_b_HT == -torch.inf)  # there, (-inf) - (-inf) would be no number
    lse_HT = torch.logaddexp(lse_a_HT.masked_fill(blind_HT, 0), lse_b_HT.masked_fill(blind_HT, 0))

    def share(out_THC, part_HT):
        return out_THC * (part_HT - lse_HT).exp().T[..., None]

    out_THC = (share(out_a_THC, lse_a_HT) + share(out_b_THC, lse_b_HT)).to(out_a_THC.dtype)
    return out_THC, lse_HT.masked_fill(blind_HT, -torch.inf)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    """ValueError naming the argument whose shape, dtype or device does not fit the others'; the values are not read."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(
                f"attention: {name} has shape {tuple(x.shape)}; packed tokens are (tokens, heads, channels)"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"attention: {name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}")
    if k.shape != v.shape or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"attention: shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if not q.shape[1] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key/value heads")
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if cu.ndim != 1 or cu.dtype != torch.int32 or cu.device != q.device or not 0 < len(cu) == len(cu_q):
            raise ValueError(f"attention: {name} must be (documents + 1,) int32 on {q.device}, as long as its twin")


def check_documents(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_queries: int, num_keys: int) -> None:
    """ValueError if they do not begin at 0, decrease, or go beyond the rows that there are. Waits for the device.

    The kernels find no document at all in such: out is 0.
    """
    for name, cu, rows in (("cu_seqlens_q", cu_seqlens_q, num_queries), ("cu_seqlens_k", cu_seqlens_k, num_keys)):
        ends = cu.tolist()
        if ends[0] != 0:
            raise ValueError(f"{name}[0] = {ends[0]} is not 0, where the first document begins")
        for i, (before, end) in enumerate(itertools.pairwise(ends), 1):
            if not before <= end <= rows:
                raise ValueError(f"{name}[{i}] = {end} is not in {before} .. {rows}, the entry before and the rows")


def why_not(device_type: str, dtype: torch.dtype, head_dim: int, device: int | None = None) -> str | None:
    """Why the kernels cannot take such tensors on this GPU (None: the current one), or None if they can."""
    if device_type == "cuda" and device is None and torch.cuda.is_available():
        device = torch.cuda.current_device()
    if reason := extension.why_not(device_type, device):
        return reason
    if dtype != torch.bfloat16:
        return f"it takes bfloat16, not {dtype}"
    if head_dim not in HEAD_DIMS["portable"]:
        return f"head dim {head_dim} is none of {', '.join(map(str, HEAD_DIMS['portable']))}"
    return None


torch.compiler.assume_constant_result(extension.runs_on)  # marks it; here, since importing this takes the compiler
torch.compiler.assume_constant_result(runs_on_hopper)


@torch.compiler.assume_constant_result  # a compiled caller sees the answer, not how it was found
def is_hopper(kernel: str, device_type: str, device: int | None, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether Hopper's kernels are to be used, not the portable ones. ValueError if what is asked for cannot run."""
    if reason := why_not(device_type, dtype, head_dim, device):
        raise ValueError(f"fused_attention: {reason}")
    if kernel not in ("auto", *HEAD_DIMS):
        raise ValueError(f"fused_attention: kernel={kernel!r} is unknown; there are: auto, {', '.join(HEAD_DIMS)}")
    can = runs_on_hopper(device_type, device) and head_dim in HEAD_DIMS["hopper"]
    if kernel == "hopper" and not can:
        raise ValueError(
            "fused_attention: kernel='hopper' needs capability 9.0, a build for 90a, and head dim 64 or 128"
        )
    return can and kernel != "portable"


# ---- the ops


@torch.library.custom_op("minitrain::attention_fwd", mutates_args=(), device_types="cuda")
def attention_fwd(
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    look_back: int,
    look_ahead: int,
    scale: float,
    deterministic: bool,  # for the backward
    hopper: bool,
) -> tuple[Tensor, Tensor]:
    """-> out (T, H, C), lse (H, T). See fused_attention."""
    T, H, C = q_THC.shape
    out, lse = q_THC.new_empty(T, H, C), q_THC.new_empty(H, T, dtype=torch.float32)
    if not T or not len(k_SKC):
        return out.zero_(), lse.fill_(-torch.inf)
    q, k, v = map(addressable, (q_THC, k_SKC, v_SKC))
    shape = shape_of(q, k, cu_q, look_back, look_ahead, scale)
    plan = make_plan(cu_q, cu_k, shape, _tiles(C, hopper))
    kernels.attention_forward(
        shape=shape,
        plan=plan.data_ptr(),
        q=packed(q),
        k=packed(k),
        v=packed(v),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        hopper=hopper,
        device=q.device.index,
        stream=stream_of(q.device),
    )
    return out, lse


@attention_fwd.register_fake
def _(q_THC, k_SKC, v_SKC, *_):
    T, H, C = q_THC.shape
    return q_THC.new_empty(T, H, C), q_THC.new_empty(H, T, dtype=torch.float32)


@torch.library.custom_op("minitrain::attention_bwd", mutates_args=(), device_types="cuda")
def attention_bwd(
    d_out_THC: Tensor,
    d_lse_HT: Tensor | None,
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    out_THC: Tensor,
    lse_HT: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    look_back: int,
    look_ahead: int,
    scale: float,
    deterministic: bool,
    hopper: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq (T, H, C), dk and dv (S, K, C)."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_THC, k_SKC, v_SKC))
    if not len(q_THC) or not len(k_SKC):
        return dq.zero_(), dk.zero_(), dv.zero_()
    shape = shape_of(q_THC, k_SKC, cu_q, look_back, look_ahead, scale)
    saved = q_THC, k_SKC, v_SKC, out_THC, lse_HT, cu_q, cu_k
    run_backward(d_out_THC, d_lse_HT, saved, shape, (dq, dk, dv), deterministic, hopper)
    return dq, dk, dv


def run_backward(d_out_THC, d_lse_HT, saved, shape, grads, deterministic, hopper) -> dict[str, Tensor]:
    """Fills grads: dq, dk, dv; of these dk and dv may be slices, and on Hopper dq may be None.

    -> what is then left for a last step (kernels/attention.h): plan, dq_sum, turns. There must be a query and a key.
    """
    (q_THC, k_SKC, v_SKC, out_THC, lse_HT, cu_q, cu_k), (dq_THC, dk_SKC, dv_SKC) = saved, grads
    H, C, R = shape.heads, q_THC.shape[2], kernels.attention_padded_rows(shape)
    q, k, v, out, d_out = map(addressable, (q_THC, k_SKC, v_SKC, out_THC, d_out_THC))
    d_lse, lse = d_lse_HT if d_lse_HT is None else d_lse_HT.contiguous(), lse_HT.contiguous()
    rows, dq_sum = lse.new_empty(2, H, R), lse.new_empty(H, R, C)
    turns, tiles = cu_q.new_empty(H, R // 64), _tiles(C, hopper)
    plan = make_plan(cu_q, cu_k, shape, tiles)
    is_split = kernels.attention_parts(shape, tiles) > 1  # then dk and dv are sums of several parts
    dkv_sum = lse.new_empty(2, k.shape[1], kernels.attention_padded_keys(shape), C) if is_split else None
    dkv_turns = cu_q.new_zeros(k.shape[1], len(k)) if is_split else None
    kernels.attention_backward(
        shape=shape,
        plan=plan.data_ptr(),
        q=packed(q),
        k=packed(k),
        v=packed(v),
        out=packed(out),
        d_out=packed(d_out),
        lse=lse.data_ptr(),
        d_lse=address(d_lse),
        dq=address(dq_THC),
        dk=packed(dk_SKC),
        dv=packed(dv_SKC),
        rows=rows.data_ptr(),
        dq_sum=dq_sum.data_ptr(),
        turns=turns.data_ptr(),
        dkv_sum=address(dkv_sum),
        dkv_turns=address(dkv_turns),
        deterministic=deterministic,
        hopper=hopper,
        device=q.device.index,
        stream=stream_of(q.device),
    )
    return {"plan": plan, "dq_sum": dq_sum, "turns": turns}


@attention_bwd.register_fake
def _(d_out_THC, d_lse_HT, q_THC, k_SKC, v_SKC, *_):
    return tuple(x.new_empty(x.shape) for x in (q_THC, k_SKC, v_SKC))


def _save(ctx, inputs, output):
    q, k, v, cu_q, cu_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)
    ctx.set_materialize_grads(False)  # lse is seldom used


def _differentiate(ctx, d_out, d_lse):
    q, *_ = saved = ctx.saved_tensors
    d_out = torch.zeros_like(q) if d_out is None else d_out
    grads = torch.ops.minitrain.attention_bwd(d_out, d_lse, *saved, *ctx.options)
    return *grads, None, None, *(None for _ in ctx.options)


attention_fwd.register_autograd(_differentiate, setup_context=_save)


# ---- what the kernels are given


def shape_of(q, k, cu_q, look_back, look_ahead, scale):
    (T, H, C), (S, K, _) = q.shape, k.shape
    return kernels.AttentionShape(
        num_queries=T, num_keys=S, num_documents=len(cu_q) - 1, heads=H, kv_heads=K, head_dim=C,
        look_back=look_back, look_ahead=look_ahead, scale=scale,
    )  # fmt: skip


@functools.cache
def _tiles(head_dim: int, hopper: bool) -> tuple[int, int, int]:
    return kernels.attention_tiles(head_dim, hopper)


# ---- the plan


def make_plan(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, shape, tiles: tuple[int, int, int]) -> Tensor:
    """The list of work of these documents in such tiles (AttentionTiles), int32; see kernels/attention.cuh.

    Made on the device, without a wait. A tensor with an attribute `plans`, a dict, keeps it there, so that all layers
    and both passes of a batch share one; Batch gives its cu_seqlens that attribute. It is made anew after they were
    written to, and in every capture of a CUDA graph, whose replays may see other documents.
    NOTE: a write that torch does not count, as by `.data` or the replay of a graph, is not noticed: clear `plans` then.
    """
    device, stream = cu_seqlens_q.device, stream_of(cu_seqlens_q.device)
    if cu_seqlens_q.is_inference() or cu_seqlens_k.is_inference():  # these count no writes
        plans, versions = {}, None
    else:
        plans, versions = getattr(cu_seqlens_q, "plans", {}), (cu_seqlens_q._version, cu_seqlens_k._version)
    key = (shape.num_queries, shape.num_keys, shape.heads, shape.kv_heads, tiles, stream)
    state = (versions, cu_seqlens_k.data_ptr(), kernels.capture_id(stream))
    if key not in plans or plans[key][0] != state:
        cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        plan = cu_q.new_empty(kernels.attention_plan_ints(shape, tiles))
        places = (x.data_ptr() for x in (cu_q, cu_k, plan))
        kernels.attention_plan(shape, tiles, *places, device.index, stream)
        other = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k  # kept, so that its place in memory stays taken
        plans[key] = state, plan, other
    return plans[key][1]
