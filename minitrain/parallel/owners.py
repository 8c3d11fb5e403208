"""For optimizers that need whole matrices (shard = "param"): each parameter has one rank that owns it.

Gradients and weights stay in flat shards (ddp.py). In a step the pieces of a gradient go to the owner, and those of its
new weights come back: one all-to-all of a rank's shard each way, whatever the optimizer.
"""

import torch
from torch import Tensor

from minitrain.parallel.comm import all_to_all
from minitrain.parallel.ddp import Unit


class Owners:
    """of: parameter's name -> rank in its unit's shard. The largest go first, to the rank that has least by then."""

    def __init__(self, units: dict[str, Unit]):
        self.units, self.of = units, {}
        group_of = {name: unit.shard for unit in units.values() for name in unit.params}
        sizes = {name: p.numel() for unit in units.values() for name, p in unit.params.items()}
        loads = {group: [0] * group.size for group in group_of.values()}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            load = loads[group_of[name]]
            self.of[name] = load.index(min(load))
            load[self.of[name]] += sizes[name]

    def collect(self, key: str, shard: Tensor) -> dict[str, Tensor]:
        """shard: this rank's, of a unit. -> what this rank owns of the unit, whole and 1-D."""
        unit, me, ranks = self.units[key], self.units[key].shard.rank, range(self.units[key].shard.size)
        send = [self._cat([unit.piece(shard, n, me) for n in self._names(key, r)], shard) for r in ranks]
        sizes = [[unit.numel_of(n, r) for n in self._names(key, me)] for r in ranks]
        got = all_to_all(send, [sum(of_rank) for of_rank in sizes], unit.shard)
        pieces = [g.split(of_rank) for g, of_rank in zip(got, sizes, strict=True)]
        return {n: torch.cat([of_rank[i] for of_rank in pieces]) for i, n in enumerate(self._names(key, me))}

    def hand_out(self, key: str, owned: dict[str, Tensor], shard: Tensor) -> None:
        """The inverse: fills this rank's shard, in its dtype and where it is, from what the ranks own."""
        unit, me, ranks = self.units[key], self.units[key].shard.rank, range(self.units[key].shard.size)
        flat = {n: owned[n].to(shard).flatten() for n in self._names(key, me)}
        send = [self._cat([f[slice(*unit.span(n, r))] for n, f in flat.items()], shard) for r in ranks]
        sizes = [[unit.numel_of(n, me) for n in self._names(key, r)] for r in ranks]
        got = all_to_all(send, [sum(of_rank) for of_rank in sizes], unit.shard)
        for r, pieces, of_rank in zip(ranks, got, sizes, strict=True):
            for n, piece in zip(self._names(key, r), pieces.split(of_rank), strict=True):
                unit.piece(shard, n, me).copy_(piece)

    def _names(self, key, rank):
        return [n for n in self.units[key].params if self.of[n] == rank]

    @staticmethod
    def _cat(pieces, like):
        return torch.cat([*pieces, like[:0]])
