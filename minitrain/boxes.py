"""Which elements of a whole tensor somebody has.

    box    (range(0, 4), range(2, 8))    a range of each dimension: what tp and ep leave a rank of a parameter (cut.py)
    run    elements first .. end - 1 of a box, laid flat row by row: what lies of it in a rank's shard (zero.py)

Checkpoints (pieces.py) and exports (hf.py) are written and read in these terms, and know of no axes.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Box = tuple[range, ...]


class Part(NamedTuple):
    """Of a tensor of this shape, what is in the box."""

    shape: torch.Size
    box: Box


def part_of(x: Tensor) -> Part:
    """What x is a part of, and which: p.part where ranks share a parameter, else x is whole."""
    return getattr(x, "part", None) or Part(x.shape, whole_box(x.shape))


def whole_box(shape: torch.Size) -> Box:
    return tuple(map(range, shape))


def numel(box: Box) -> int:
    return math.prod(map(len, box))


def common(a: Box, b: Box) -> Box | None:
    """What is in both, None if nothing is."""
    box = tuple(range(max(s.start, t.start), min(s.stop, t.stop)) for s, t in zip(a, b, strict=True))
    return box if all(box) else None


def take(x: Tensor, box: Box, held: Box | None = None) -> Tensor:
    """A view of what is in the box. held: the box of which x has the elements; None: x is whole."""
    held = held or whole_box(x.shape)
    return x[tuple(slice(b.start - h.start, b.stop - h.start) for b, h in zip(box, held, strict=True))]


def rows_of_run(box: Box, first: int, end: int) -> Box:
    """The box of these elements and the others in their rows."""
    size = max(1, numel(box[1:]))
    return (box[0][first // size : -(-end // size)], *box[1:]) if box else box


def run_as_boxes(box: Box, first: int, end: int) -> Iterator[Box]:
    """The elements first .. end - 1 as boxes, one laid flat after the other; of a matrix at most three."""
    while first < end:
        if not box:  # of a scalar
            yield box
            return
        rows, inner, size = box[0], box[1:], numel(box[1:])
        row, offset = divmod(first, size)
        if offset or end - first < size:  # part of a row
            stop = min(end, (row + 1) * size)
            for part in run_as_boxes(inner, offset, stop - row * size):
                yield rows[row : row + 1], *part
        else:
            stop = end - end % size
            yield rows[row : stop // size], *inner
        first = stop
