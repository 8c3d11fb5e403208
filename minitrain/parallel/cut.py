"""Parameters of which each rank keeps a part: a range of one dimension.

    p.cut_on        {"tp": 0}: axis of the mesh -> dimension that it cuts
    p.grad_sum_on   ("dp", "cp"): axes over which its gradient is summed (mesh.GRAD_SUMS)
    p.part          what this rank has of the whole tensor; part_of(p) knows it of any parameter (boxes.py)

Names and objects stay, so ties do too.
"""

import torch
from torch import nn

from minitrain.boxes import Part, part_of
from minitrain.parallel.comm import Group


def span(n: int, group: Group, unit: int = 1) -> tuple[int, int]:
    """This rank's first .. last + 1 of n things that only part at multiples of unit; earlier ranks may have more."""
    each, more = divmod(n // unit, group.size)
    start = group.rank * each + min(group.rank, more)
    return start * unit, (start + each + (group.rank < more)) * unit


@torch.no_grad()
def cut(p: nn.Parameter, axis: str, dim: int, group: Group, unit: int = 1) -> None:
    """Keep this rank's part of p, in p; one that is cut on this axis already, under another name, stays."""
    cut_on = getattr(p, "cut_on", {})
    if axis in cut_on:
        return
    shape, box = part_of(p)
    start, end = span(p.shape[dim], group, unit)
    p.data = p.data.narrow(dim, start, end - start).clone()
    p.part = Part(shape, (*box[:dim], box[dim][start:end], *box[dim + 1 :]))
    p.cut_on = {**cut_on, axis: dim}
