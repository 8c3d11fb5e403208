"""Attention inside packed documents: one function, several backends behind it.

    attention(q_THC, k_SKC, v_SKC, cu_seqlens_q, cu_seqlens_k, max_seqlen) -> (T, H, C)

It is the seam for users and for context parallelism: each attention module calls `self.attention(...)`, and whatever
bears this signature may stand there. Dimensions: T packed queries, S packed keys, H query heads, K key/value heads
(H a multiple of K), C channels of a head, N documents. `reference` is the definition; the others are tested against it.
"""

import functools
import importlib.util
import inspect
import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from minitrain import fused_attention

log = logging.getLogger(__name__)


def attention(
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention inside each document: query i of n sees key j of m iff j <= i + m - n. Scores scale by C**-0.5.

    q (T, H, C), k and v (S, K, C), of one dtype and device; cu_seqlens_* (N + 1,) int32, the last entries T and S.
    max_seqlen: no document is longer, in tokens.
    window: keys before its own position that a query may look back on, in tokens (None: all).
    backend: a key of BACKENDS, or None / "auto" for the fastest that can run these inputs; it says once which.
    Raises ValueError naming the argument, or why a backend asked for by name cannot run.
    """
    fused_attention.check_tensors(q_THC, k_SKC, v_SKC, cu_seqlens_q, cu_seqlens_k)
    equal_lengths = _equal_lengths(q_THC, k_SKC, cu_seqlens_q, max_seqlen)
    name = choose(backend or "auto", q_THC.device.type, q_THC.dtype, q_THC.shape[-1], equal_lengths, window is not None)
    return BACKENDS[name](q_THC, k_SKC, v_SKC, cu_seqlens_q, cu_seqlens_k, max_seqlen, window)


def _equal_lengths(q, k, cu_q, max_seqlen) -> bool:
    """As many rows as N documents of the longest length: then every document has that length. Known without a sync."""
    return bool(len(q) == (len(cu_q) - 1) * max_seqlen == len(k))  # len(k) last: compiled code is for any, under cp


# ---- which backend


class Facts(NamedTuple):
    """What a backend's ability to run depends on, known without looking at the data."""

    device: str
    dtype: torch.dtype
    head_dim: int
    window: bool


def why_not(name: str, facts: Facts) -> str | None:
    """Why this backend cannot run here, or None if it can."""
    if name == "native":
        return fused_attention.why_not(facts.device, facts.dtype, facts.head_dim)
    if name == "xformers" and torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic"
    half = facts.dtype in (torch.bfloat16, torch.float16)
    if name in ("sdpa", "xformers") and facts.window:
        return "it has no sliding window for packed documents"
    if name in ("varlen", "flash_attn", "xformers"):
        if facts.device != "cuda":
            return f"it runs on CUDA devices only, not on {facts.device}"
        if not half:
            return f"it takes bfloat16 or float16, not {facts.dtype}"
        if facts.head_dim > 256 or facts.head_dim % 8:
            return f"head dim {facts.head_dim} is not a multiple of 8 up to 256"
    if name == "varlen" and facts.window and "window_size" not in _VARLEN_OPTIONS:
        return f"torch {torch.__version__} has no window_size in varlen_attn"
    if name in ("flash_attn", "xformers") and (reason := _import_fails(name)):
        return reason
    if name == "flex" and facts.device != "cuda":
        return f"it has no backward on {facts.device}"
    if name == "flex" and facts.dtype == torch.float64:
        return "it takes no float64"
    if name == "flex" and facts.head_dim & (facts.head_dim - 1):
        return f"head dim {facts.head_dim} is not a power of two"
    return None


@functools.cache
def _import_fails(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    try:
        importlib.import_module(package)
    except (ImportError, OSError) as error:  # one that was built for another torch is not found broken before this
        return f"the package {package} cannot be imported: {error}"
    return None


@torch.compiler.assume_constant_result  # a compiled caller sees the name, not how it was found
def choose(
    backend: str,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    equal_lengths: bool = False,
    window: bool = False,
) -> str:
    """The backend's name, "auto" resolved. ValueError if there is none of that name, or why it cannot run.

    auto takes the first that can run of a list, our own kernels and then by measured speed (benchmarks/); it says once
    which.
    """
    facts = Facts(device, dtype, head_dim, window)
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"attention backend {backend!r} is unknown; there are: auto, {', '.join(BACKENDS)}")
        if reason := why_not(backend, facts):
            raise ValueError(f"attention backend {backend!r} cannot run here: {reason}")
        return backend
    if device != "cuda":
        order = ["sdpa", "reference"]
    else:
        order = ["native", *(["sdpa"] if equal_lengths else []), "flash_attn", "varlen", "flex", "reference"]
    name = next(n for n in order if why_not(n, facts) is None)
    if (name, *facts[:3]) not in _said:
        _said.add((name, *facts[:3]))
        log.info("attention: %s (%s, %s, head dim %d)", name, device, dtype, head_dim)
    return name


_said: set[tuple] = set()  # choices that were announced


# ---- the backends, each (q, k, v, cu_q, cu_k, max_seqlen, window) -> (T, H, C)


def reference(q_THC, k_SKC, v_SKC, cu_q, cu_k, max_seqlen, window):
    """The definition, a document at a time, scores in fp32 (fp64 for fp64 inputs)."""
    groups = q_THC.shape[1] // k_SKC.shape[1]
    wide = torch.promote_types(q_THC.dtype, torch.float32)

    def one(q_nHC, k_mKC, v_mKC):
        n, m = len(q_nHC), len(k_mKC)
        k, v = (x.to(wide).repeat_interleave(groups, 1) for x in (k_mKC, v_mKC))
        scores = torch.einsum("nhc,mhc->hnm", q_nHC.to(wide), k) * q_nHC.shape[-1] ** -0.5
        back = torch.arange(n, device=q_nHC.device)[:, None] + m - n - torch.arange(m, device=q_nHC.device)
        seen = (back >= 0) if window is None else (back >= 0) & (back <= window)
        # A query without any key (m < n) gives zeros: softmax of an empty set is no number.
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0)
        return torch.einsum("hnm,mhc->nhc", weights, v).to(q_nHC.dtype)

    return _each_document(one, q_THC, k_SKC, v_SKC, cu_q, cu_k)


def native(q_THC, k_SKC, v_SKC, cu_q, cu_k, max_seqlen, window):
    """Our CUDA kernels (fused_attention.py), no host sync; deterministic where torch's algorithms are to be."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    out_THC, _ = fused_attention.fused_attention(
        q_THC, k_SKC, v_SKC, cu_q, cu_k, max_seqlen, window=window, deterministic=deterministic
    )
    return out_THC


def sdpa(q_THC, k_SKC, v_SKC, cu_q, cu_k, max_seqlen, window):
    """torch's scaled_dot_product_attention: one call for documents of equal length, else one for each (a host sync)."""

    def one(q_BnHC, k_BmKC, v_BmKC):
        q, k, v = (x.transpose(1, 2) for x in (q_BnHC, k_BmKC, v_BmKC))
        n, m = q.shape[2], k.shape[2]
        mask = None if n == m else torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        # cuDNN is 1.8x FlashAttention-2 on Hopper and is not torch's first choice.
        with sdpa_kernel(_SDPA_ORDER, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=n == m, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    if _equal_lengths(q_THC, k_SKC, cu_q, max_seqlen):
        q, k, v = (x.unflatten(0, (len(cu_q) - 1, max_seqlen)) for x in (q_THC, k_SKC, v_SKC))
        return one(q, k, v).flatten(0, 1)
    return _each_document(lambda q, k, v: one(q[None], k[None], v[None])[0], q_THC, k_SKC, v_SKC, cu_q, cu_k)


_SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@torch.compiler.disable  # lengths are read on the host: one clean break of a compiled caller's graph
def _each_document(one, q_THC, k_SKC, v_SKC, cu_q, cu_k):
    """one(q, k, v) of each document, put together again; copies cu_seqlens to the host."""
    q_ends, k_ends = cu_q.tolist(), cu_k.tolist()
    out = [
        one(q_THC[a:b], k_SKC[c:d], v_SKC[c:d])
        for a, b, c, d in zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:], strict=True)
        if b > a
    ]
    return torch.cat(out)


_VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)  # torch 2.10 to 2.13 spell it differently


def varlen(q_THC, k_SKC, v_SKC, cu_q, cu_k, max_seqlen, window):
    """torch.nn.attention.varlen: FlashAttention-2 inside torch, no host sync."""
    if "window_size" in _VARLEN_OPTIONS:
        options = {"window_size": (-1 if window is None else window, 0)}
    else:
        options = {"is_causal": True}
    if "enable_gqa" in _VARLEN_OPTIONS:
        options["enable_gqa"] = q_THC.shape[1] != k_SKC.shape[1]
    return varlen_attn(q_THC, k_SKC, v_SKC, cu_q, cu_k, max_seqlen, max_seqlen, **options)


def flex(q_THC, k_SKC, v_SKC, cu_q, cu_k, max_seqlen, window):
    """FlexAttention, its document mask made for each call; no host sync. Compiled on the GPU, plain torch elsewhere.

    NOTE: a NaN in one document can reach its neighbours: what the mask hides is multiplied by 0, not left out.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    doc_T, place_T = _document_and_place(len(q_THC), cu_q)
    doc_S, place_S = _document_and_place(len(k_SKC), cu_k)

    def seen(b, h, i, j):
        back = place_T[i] - place_S[j]
        same = (doc_T[i] == doc_S[j]) & (back >= 0)
        return same if window is None else same & (back <= window)

    if q_THC.is_cuda and not torch.compiler.is_compiling():
        create_block_mask, flex_attention = torch.compile(create_block_mask), torch.compile(flex_attention)
    mask = create_block_mask(seen, None, None, len(q_THC), len(k_SKC), device=q_THC.device)
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q_THC, k_SKC, v_SKC))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)


def _document_and_place(rows, cu):
    """Of each row: its document, and its position, counted so that the last row of every document has -1."""
    row = torch.arange(rows, device=cu.device, dtype=cu.dtype)
    # NOTE: not in cu[1:]: compiled for CUDA, torch 2.11 forgets where a slice begins and searches all of cu.
    doc = torch.searchsorted(cu, row, right=True) - 1
    return doc, row - cu[doc + 1]


def flash_attn(q_THC, k_SKC, v_SKC, cu_q, cu_k, max_seqlen, window):
    """The flash-attn package (FlashAttention-2), no host sync."""
    from flash_attn import flash_attn_varlen_func

    look_back = (-1 if window is None else window, 0)
    options = {"window_size": look_back, "deterministic": torch.are_deterministic_algorithms_enabled()}
    return flash_attn_varlen_func(q_THC, k_SKC, v_SKC, cu_q, cu_k, max_seqlen, max_seqlen, causal=True, **options)


def xformers(q_THC, k_SKC, v_SKC, cu_q, cu_k, max_seqlen, window):
    """xFormers' memory-efficient attention; its masks are built from lengths on the host (a host sync)."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

    def grouped(x, groups):  # (rows, H, C) -> (1, rows, K, H / K, C), xFormers' layout
        return x[None].unflatten(2, (k_SKC.shape[1], -1)).expand(-1, -1, -1, groups, -1)

    groups = q_THC.shape[1] // k_SKC.shape[1]
    mask = BlockDiagonalCausalFromBottomRightMask.from_seqlens(cu_q.diff().tolist(), cu_k.diff().tolist())
    q, k, v = (grouped(x, groups) for x in (q_THC, k_SKC, v_SKC))
    return memory_efficient_attention(q, k, v, mask)[0].flatten(1, 2)


BACKENDS = {f.__name__: f for f in (native, sdpa, flash_attn, varlen, flex, xformers, reference)}
