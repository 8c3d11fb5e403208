"""Master weights: what an optimizer steps, in fp32, for a model that computes in bf16.

A master is an fp32 Parameter, rounded to `rounded`, what the model computes with. Or it is split: `rounded` is the
upper half of the bits of its fp32 value, and the master has the lower half only, in 2 bytes for 4. Its dtype then says
bf16, for a Parameter has to be of a floating one, but its elements are bits and no numbers.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minitrain.storage import Later


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of masters and gradients: float32 for what is narrower."""
    return torch.promote_types(dtype, torch.float32)


def master_of(p: nn.Parameter) -> nn.Parameter:
    """p itself where it is frozen, or as wide as a master."""
    if p.dtype == wide(p.dtype) or not p.requires_grad:
        return p
    master = nn.Parameter(p.detach().to(wide(p.dtype)))
    master.rounded, master.grad_dtype = p, None  # None: any
    return master


def is_split(master: Tensor) -> bool:
    """Whether it has the lower half only."""
    return master.dtype == torch.bfloat16 and hasattr(master, "rounded")


def split(masters: Iterable[nn.Parameter]) -> None:
    """Those of fp32 that have a `rounded`, of bf16: it gets the nearest value, of two as near the one away from 0."""
    for master in masters:
        if hasattr(master, "rounded"):
            value, master.data = master.data, torch.empty_like(master, dtype=torch.bfloat16)
            set_value(master, value)


def value_of(master: Tensor) -> Tensor:
    """In fp32; of one that is split in new memory."""
    if not is_split(master):
        return master.detach()
    upper, lower = _bits(master.rounded), _bits(master)
    return upper.int().bitwise_left_shift_(16).add_(lower).view(torch.float32)  # lower has a sign, for upper is rounded


@torch.no_grad()
def set_value(master: Tensor, value: Tensor) -> None:
    """In fp32, from any device; of one that is split `rounded` gets its half."""
    if not is_split(master):
        master.copy_(value)
        return
    bits = value.to(master.device).contiguous().view(torch.int32)
    _bits(master).copy_(bits)  # without the upper half
    _bits(master.rounded).copy_((bits + 0x8000).bitwise_right_shift_(16))


def round_weights(masters: Iterable[Tensor]) -> None:
    """`rounded` of those that have one and are not split gets their values."""
    pairs = [(master.rounded, master) for master in masters if hasattr(master, "rounded") and not is_split(master)]
    if pairs:
        torch._foreach_copy_(*zip(*pairs, strict=True))


def to_save(master: Tensor) -> Tensor | Later:
    """Its value, as a checkpoint takes it: one that is split is put together when its turn comes."""
    if not is_split(master):
        return master.detach()
    return Later(torch.float32, master.shape, functools.partial(value_of, master))


def _bits(x: Tensor) -> Tensor:
    """Of bf16."""
    return x.detach().view(torch.int16)
