"""Gradients of several ranks: added up in flat fp32 buffers, summed over the ranks while backward still runs.

    unit    the parameters of one block, or of one module outside of the blocks, end to end in a flat tensor
            [ q_proj.weight | k_proj.weight | ... | padding ], which is cut into equal shards; those whose gradients are
            summed over other ranks (p.grad_sum_on, such as experts) are a unit of their own
    row     forward and backward of one micro-batch; the gradients of a unit are summed over ranks when its block's
            backward is over: in the last row only, or (ZeRO 2 and 3, which keep a shard of the sum) in every row
    local   a unit of which no other rank has a part or a copy: its gradients stay as they come, as in one process

Which unit is summed when depends on the model alone, never on which parameters got a gradient: every rank issues the
same collectives in the same order. Read next: zero.py.
"""

import contextlib
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from minitrain.multi_tensor import add_
from minitrain.parallel.comm import Group, Lane, all_reduce, reduce_scatter, shard_of
from minitrain.parallel.mesh import Mesh
from minitrain.parallel.window import Window

DENSE = ("dp", "cp")  # the axes that a gradient is summed over if its parameter says nothing
_ALIGN = 64  # elements: 128 bytes of bf16, so that kernels see a parameter as they would see one of its own


class Unit:
    """Where parameters lie in a flat tensor of `numel` elements, and in the shards that ranks cut it into.

    Their gradients are summed over shard and replica, the ranks that cut it and those that repeat this one's shard; and
    at the end of a step over ends, those that have the same shard on another stage of a pipeline.
    """

    def __init__(self, params: dict[str, nn.Parameter], shard: Group, replica: Group, ends: Group):
        self.params, self.shard, self.replica, self.ends = params, shard, replica, ends
        self.starts, self.gaps, end = {}, [], 0  # gaps: first .. last + 1 of elements that belong to no parameter
        for name, p in params.items():
            start = round_up(end, _ALIGN)
            self.gaps.append((end, start))
            self.starts[name], end = start, start + p.numel()
        self.numel = round_up(end, shard.size * _ALIGN)
        self.gaps.append((end, self.numel))
        self.shard_numel = self.numel // shard.size

    def view(self, flat: Tensor, name: str) -> Tensor:
        """A parameter in a flat tensor, in its shape."""
        p = self.params[name]
        return flat[self.starts[name] :][: p.numel()].view(p.shape)

    def span(self, name: str, rank: int) -> tuple[int, int]:
        """Of a parameter's elements, those in a rank's shard: first .. last + 1; equal where there are none."""
        start, numel = rank * self.shard_numel - self.starts[name], self.params[name].numel()
        return min(max(start, 0), numel), min(max(start + self.shard_numel, 0), numel)

    def numel_of(self, name: str, rank: int) -> int:
        """How many these are."""
        first, end = self.span(name, rank)
        return end - first

    def piece(self, shard: Tensor, name: str, rank: int) -> Tensor:
        """These elements in that rank's shard, 1-D."""
        first, end = self.span(name, rank)
        offset = self.starts[name] + first - rank * self.shard_numel
        return shard[offset : offset + end - first] if end > first else shard[:0]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.params.values())).dtype


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """By the name of their unit."""
    return {f"layers.{i}": block for i, block in getattr(model, "layers", {}).items()}


def shared_by_blocks(model: nn.Module) -> str | None:
    """The name of a parameter that another block has, too."""
    owners = {}
    for key, block in blocks_of(model).items():
        for name, p in block.named_parameters(key):
            if owners.setdefault(p, key) != key:
                return name
    return None


def parts_of(model: nn.Module) -> list[nn.Module]:
    """Of a pipeline's stage (pp.py); most, and a model without one, are one part: the model itself."""
    return getattr(model, "parts", [model])


def on_gradient(x_TD: Tensor, do: Callable[[], None]) -> None:
    """When backward has made the gradient of x: all that was computed from it is through, its source is not."""
    if torch.is_grad_enabled() and x_TD.requires_grad:
        x_TD.register_hook(lambda _: do())


def make_units(model: nn.Module, mesh: Mesh) -> dict[str, Unit]:
    """One for each block and for each other child of the model, by name; frozen parameters are in none.

    What is summed over other axes than most parameters has a key such as "layers.0/expert_dp".
    """
    params: dict[str, dict[str, nn.Parameter]] = {}
    axes = {}
    for name, p in model.named_parameters():
        depth = 2 if name.startswith("layers.") else 1
        if p.requires_grad:
            kind = getattr(p, "grad_sum_on", DENSE)
            key = "/".join([".".join(name.split(".")[:depth]), *(kind if kind != DENSE else ())])
            params.setdefault(key, {})[name] = p
            axes[key] = kind
    ends = {key: mesh.group("ends") if "ends" in kind else Group() for key, kind in axes.items()}
    return {key: Unit(of, *mesh.sharding(axes[key]), ends[key]) for key, of in params.items()}


def keys_of(child: str, units: dict[str, Unit]) -> list[str]:
    """The units of a block or other child; none for frozen ones, and for a tied head."""
    return [key for key in units if key.split("/")[0] == child]


def around_blocks(model: nn.Module, units: dict[str, Unit]) -> tuple[list[str], list[str]]:
    """Units that are in no block: those that the model needs before its blocks, and those behind the last that is."""
    outside = [key for key in units if key.split("/")[0] not in blocks_of(model)]
    if len(outside) == len(units):
        return outside, []
    children = [name for name, _ in model.named_children()]
    behind = [key for child in children[children.index("layers") + 1 :] for key in keys_of(child, units)]
    return [key for key in outside if key not in behind], behind


def first_of(model: nn.Module, units: dict[str, Unit]) -> list[str]:
    """Units that forward begins with: those before the blocks, and the first block's."""
    first = [keys_of(key, units) for key in blocks_of(model)][:1]
    return [*around_blocks(model, units)[0], *itertools.chain(*first)]


def is_local(unit: Unit) -> bool:
    """Whether no other rank has a part or a copy of it."""
    return unit.shard.size == unit.replica.size == unit.ends.size == 1


def row_buffers(model: nn.Module, units: dict[str, Unit], is_deferred: bool) -> dict[tuple[int, Group], int]:
    """{(elements of a unit, who cut it): windows for a row's gradients}: one is read while the next block fills one.

    What is outside of the blocks comes at the two ends of backward, and shares them. is_deferred: each block has one,
    with gradients of its norms while it waits for those of weights. No rank needs more, whatever it has gradients of:
    ranks make a window together, and one that makes another would wait for the rest.
    """
    ahead, behind = around_blocks(model, units)
    places = ahead, behind, [key for key in units if key not in {*ahead, *behind}]
    ahead, behind, blocks = (Counter((units[key].numel, units[key].shard) for key in keys) for keys in places)
    if not is_deferred:
        blocks = Counter(dict.fromkeys(blocks, 2))
    return ahead | behind | blocks  # of each kind the most


def added(total: Tensor | None, grad: Tensor) -> Tensor:
    """A sum of gradients and one more: the first is taken as it is, which loses nothing; sums are in fp32."""
    if total is None:
        return grad
    wide = torch.promote_types(total.dtype, torch.float32)
    if total.dtype != wide:
        first, total = total, torch.empty_like(total, dtype=wide, memory_format=torch.contiguous_format)
        add_(total, first[None], is_first=True)
    add_(total, grad[None], is_first=False)
    return total


class Gradients:
    """Sums over rows and ranks: of() has those of this rank after finish(), until clear().

    parameters' own .grad is emptied as soon as it is there, so a bf16 gradient lives for a moment only.
    """

    def __init__(self, model: nn.Module, units: dict[str, Unit], mesh: Mesh, zero: int, reduce_dtype: torch.dtype):
        self.units, self.mesh, self.lane = units, mesh, Lane(mesh.device)
        self.local = {key for key, unit in units.items() if is_local(unit)}
        self.own: dict[str, Tensor] = {}  # of the parameters of local units
        self.keeps_shard = {key for key, unit in units.items() if zero >= 2 and unit.shard.size > 1}
        self.is_last, self.done, self.got = False, set(), set()  # units summed in this row; names with a gradient
        self.held = set()  # names whose gradient is in `rows` or `flat`; units of which `flat` has the sum of a row
        self.dtype = torch.promote_types(next(iter(units.values())).dtype, torch.float32)  # of sums
        self.reduce_dtype = reduce_dtype if reduce_dtype == torch.bfloat16 else self.dtype
        zeros = functools.partial(torch.zeros, dtype=self.dtype, device=mesh.device)
        self.flat = {key: zeros(u.numel) for key, u in units.items() if key not in self.local | self.keeps_shard}
        shards = {key: u.shard_numel for key, u in units.items() if key in self.keeps_shard}
        with self.lane.beside():  # where they are written, and freed when a step has more rows
            self.flat |= {key: zeros(numel, dtype=self.reduce_dtype) for key, numel in shards.items()}
        self.sums = {
            key: f if key in self.keeps_shard else shard_of(f, units[key].shard) for key, f in self.flat.items()
        }  # complete after finish(); under ZeRO 0 the whole
        self.rows: dict[str, Window] = {}  # with this row's gradients of a unit
        self.pools = {}
        self.deferred = getattr(model, "deferred", None)
        shared = {key: units[key] for key in units if key in self.keeps_shard}
        for (numel, group), count in row_buffers(model, shared, self.deferred is not None).items():
            make = functools.partial(Window, numel, next(iter(units.values())).dtype, mesh.device, group)
            self.pools[numel, group] = _Pool(make, count, self.lane)
        self.of_part = {}  # the units of each part of the model
        for part in parts_of(model):
            names = {name for name, _ in part.named_parameters()}
            self.of_part[part] = [key for key, unit in units.items() if unit.params.keys() & names]
        if self.deferred:
            self.of_part[self.deferred] = [key for key in units if key.startswith("layers.")]
            self.of_part[model] = [key for key in units if not key.startswith("layers.")]
        self.hooks = [
            p.register_post_accumulate_grad_hook(functools.partial(self._add, key, name))
            for key, unit in units.items()
            for name, p in unit.params.items()
        ]
        self._hook_blocks(model)

    def _hook_blocks(self, model):
        """A block's unit is done when backward reaches its input, or gradients of weights that were deferred are there;
        what stands behind the blocks, before their last."""
        blocks, (_, behind) = blocks_of(model), around_blocks(model, self.units)
        for key, block in blocks.items():
            sum_this = functools.partial(self._sum_over_ranks, keys_of(key, self.units))
            if self.deferred:
                self.deferred.then[key] = sum_this
            else:
                self.hooks.append(block.register_forward_pre_hook(lambda _, args, f=sum_this: on_gradient(args[0], f)))
        for block in list(blocks.values())[-1:]:
            sum_these = functools.partial(self._sum_over_ranks, behind)
            self.hooks.append(block.register_forward_hook(lambda _, _args, y, f=sum_these: on_gradient(y, f)))

    @contextlib.contextmanager
    def backward(self, part: nn.Module, is_last: bool):
        """Around the backward of one row, through the model, a part of it or what it deferred; is_last: of the step."""
        self.is_last = is_last
        yield
        self._sum_over_ranks([key for key in self.of_part[part] if key not in self.done])
        self.done.difference_update(self.of_part[part])

    def _add(self, key: str, name: str, p: nn.Parameter) -> None:
        """A parameter's gradient is there."""
        if key in self.done:
            raise RuntimeError(
                f"{name} got a gradient after those of {key} were summed over the ranks: it is used by another module, "
                "or its block runs twice; that works in one process only"
            )
        if key in self.local:
            self.own[name] = added(self.own.get(name), p.grad)
        else:
            self._add_to_flat(self.units[key], key, name, p.grad)
        self.got.add(name)
        p.grad = None

    def _add_to_flat(self, unit, key, name, grad):
        place = unit.view(self._row_of(key).flat if key in self.keeps_shard else self.flat[key], name)
        add_(place, grad[None], is_first=name not in self.held)
        self.held.add(name)

    def _row_of(self, key: str) -> Window:
        if key not in self.rows:
            unit = self.units[key]
            self.rows[key] = self.pools[unit.numel, unit.shard].take()
        return self.rows[key]

    @torch.no_grad()
    def _sum_over_ranks(self, keys: list[str]) -> None:
        for key in keys:
            self.done.add(key)
            unit = self.units[key]
            if key in self.keeps_shard:
                row = self._row_of(key)  # other ranks may have gradients here if this one has none
                self._clear_others(unit, row.flat)
                with self.lane.beside():
                    is_first, sums = key not in self.held, self.flat[key].to(self.dtype)
                    add_(sums, row.terms(self.reduce_dtype), is_first)
                    if is_first and self.is_last:
                        self.flat[key].copy_(sums)
                    else:  # of more rows: kept in fp32 from here on
                        self.sums[key] = self.flat[key] = sums
                    if self.is_last:
                        self._all_reduce(self.flat[key], unit.replica)
                self.pools[unit.numel, unit.shard].give_back(self.rows.pop(key))
                self.held -= unit.params.keys()
                self.held.add(key)
            elif self.is_last and key not in self.local:
                self._clear_others(unit, self.flat[key])
                with self.lane.beside():
                    narrow = self.flat[key].to(self.reduce_dtype)
                    shard = reduce_scatter(narrow, unit.shard)
                    if narrow is not self.flat[key]:  # else it is there
                        self.sums[key].copy_(shard)
                    self._all_reduce(self.sums[key], unit.replica)

    def _clear_others(self, unit: Unit, flat: Tensor) -> None:
        """Parameters of which this rank has no gradient, and what lies between: another unit may have written there."""
        for name in unit.params.keys() - self.held:
            unit.view(flat, name).zero_()
        for start, end in unit.gaps:
            if end > start:
                flat[start:end].zero_()

    def _all_reduce(self, shard: Tensor, replica: Group) -> None:
        if replica.size > 1:
            narrow = shard.to(self.reduce_dtype)
            all_reduce(narrow, replica)
            shard.copy_(narrow)

    def finish(self) -> set[str]:
        """After the step's rows: the sums are complete. -> parameters of which some rank had a gradient."""
        self.lane.join()
        for key, unit in self.units.items():
            if unit.ends.size > 1:  # not before: until here the first stage waits for gradients of the last
                self._all_reduce(self.sums[key], unit.ends)
                self.got |= unit.params.keys()
        names = [name for unit in self.units.values() for name in unit.params]
        counts = self.mesh.sum_host(torch.tensor([name in self.got for name in names], dtype=torch.int32), "stage")
        self.got.clear()
        return {name for name, count in zip(names, counts.tolist(), strict=True) if count}

    def of(self, key: str) -> dict[str, Tensor]:
        """{name: this rank's piece of its gradient, 1-D}, of a unit; zeros where it has none."""
        unit = self.units[key]
        if key not in self.local:
            return {name: unit.piece(self.sums[key], name, unit.shard.rank) for name in unit.params}
        return {n: self.own[n].flatten() if n in self.own else p.new_zeros(p.numel()) for n, p in unit.params.items()}

    def tensors(self, keys: Collection[str]) -> list[Tensor]:
        """All of these units' that this rank has, in any shape."""
        local = [self.own[n] for key in keys if key in self.local for n in self.units[key].params if n in self.own]
        return local + [self.sums[key] for key in keys if key not in self.local]

    def clear(self) -> None:
        self.held.clear()
        self.own.clear()

    def close(self) -> None:
        """Let go of the model."""
        for hook in self.hooks:
            hook.remove()
        if self.deferred:
            self.deferred.close()


class _Pool:
    """Windows of one size, used in turn, of one unit or another; a model that fills more at a time gets more."""

    def __init__(self, make: Callable[[], Window], count: int, lane: Lane):
        self.make, self.lane = make, lane
        self.free = [(make(), None) for _ in range(count)]

    def take(self) -> Window:
        """One that holds anything, as soon as its last use is over."""
        window, mark = self.free.pop(0) if self.free else (self.make(), None)
        self.lane.wait(mark)
        return window

    def give_back(self, window: Window) -> None:
        """Its last use is queued on the lane."""
        self.free.append((window, self.lane.mark()))


def round_up(n: int, unit: int) -> int:
    return math.ceil(n / unit) * unit
