"""What a block keeps of its forward for its backward, and what it computes again: train.recompute.

            computes again                              keeps
    none    what the compiler finds cheap               the rest
    cheap   pointwise operations, norms, RoPE, copies   results of matrix products, sorts, attention, and of the
                                                        exchange of rows with other ranks' experts
    block   all but attention and the choice of experts the block's input, attention's results, who goes where
    full    all                                         the block's input

"none" and "cheap" cost no matrix product, "block" and "full" a forward of the block. Under "cheap" and "block" a block
that cannot be compiled as one graph runs uncompiled. Chen et al. 2016, arXiv:1604.06174.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_ROUTING = {"aten::topk", "aten::sort", "minitrain::exchange_counts"}  # few bytes; the host waits for the last
_COSTLY = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "_grouped_mm")} | _ROUTING
_COSTLY |= {f"minitrain::{name}" for name in ("joined_linear", "swiglu_products", "rows_to_ranks", "rows_from_ranks")}


def _is_attention(op) -> bool:
    """Of any backend."""
    return "attention" in _name(op) or "attn" in _name(op)


def _is_attention_or_routing(op) -> bool:
    return _name(op) in _ROUTING or _is_attention(op)


def _is_costly(op) -> bool:
    return _name(op) in _COSTLY or _is_attention(op)


def _name(op) -> str:
    return op.name().split(".")[0] if isinstance(op, torch._ops.OpOverload) else str(op)


# It warns of operations in place, of which a block has one, its count of rows, which need not be right to the bit.
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
KEEPS = {"cheap": _is_costly, "block": _is_attention_or_routing}  # operations whose results are kept


def recomputed(forward: Callable, keeps: Callable | None = None) -> Callable:
    """forward, of which its inputs are kept and the results of operations for which keeps(op) holds."""
    options = {"use_reentrant": False}
    if keeps:
        policy = functools.partial(_policy, keeps)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    return functools.partial(checkpoint, forward, **options)


def _policy(keeps, _context, op, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(op) else CheckpointPolicy.PREFER_RECOMPUTE
