"""Weights that come from all ranks while the model already runs.

ZeRO 1 and 2 (ArrivingWeights): after a step, each block's new weights come while the blocks before it run.

ZeRO 3 (GatheredWeights): weights are whole only while their block runs.

    forward      block i runs | i + 1 is on its way            then i's are gone again
    backward     block i runs | i - 1 is on its way            then i's are gone again
    elsewhere    the embedding, the norm and the head stay from the first forward to the step

A parameter is a view of its unit's flat tensor. What comes and goes is the memory under it: the storage is resized, so
views that autograd and compiled code keep stay valid, and nothing is compiled again. Who looks at a parameter while its
memory is gone finds its shape, and NaN.
"""

import contextlib
import functools
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from minitrain.config import UserError
from minitrain.parallel.comm import Lane
from minitrain.parallel.ddp import (
    Unit,
    around_blocks,
    blocks_of,
    first_of,
    keys_of,
    on_gradient,
    parts_of,
    shared_by_blocks,
)
from minitrain.parallel.window import Window


class _Weights:
    """flats[unit]: what the model computes with. windows[unit]: in which other ranks find this rank's shard of it."""

    def __init__(self, model: nn.Module, units: dict[str, Unit], windows: dict[str, Window], flats: dict[str, Tensor]):
        self.lane = Lane(next(iter(flats.values())).device)
        self.units, self.windows, self.flats = units, windows, flats
        self.marks = {}  # units that are on their way, or there
        self.ahead, self.behind = around_blocks(model, units)
        for key, unit in units.items():
            for p in unit.params.values():
                p.unit = (self, key)

    def wait_for_readers(self) -> None:
        """From here on the computation may write this rank's shards: no other reads them before renew()."""
        self.lane.join()
        for window in self.windows.values():
            window.meet()

    def settle(self) -> None:
        """From here on the computation finds the last step's weights, as far as they are there."""

    def close(self) -> None:
        """Let go of the model, as far as it can do without."""


class ArrivingWeights(_Weights):
    """A window has the whole flat."""

    def __init__(self, model: nn.Module, units: dict[str, Unit], *tensors: dict):
        super().__init__(model, units, *tensors)
        blocks = {key: block for key, block in blocks_of(model).items() if keys_of(key, units)}
        self.hooks = [model.register_forward_pre_hook(lambda *_: self.use(*self.ahead))]
        for key, block in blocks.items():
            use_this = functools.partial(self.use, *keys_of(key, units))
            self.hooks.append(block.register_forward_pre_hook(lambda *_, use=use_this: use()))
        for block in list(blocks.values())[-1:]:
            self.hooks.append(block.register_forward_hook(lambda *_: self.use(*self.behind)))

    def renew(self, keys: Collection[str]) -> None:
        """Their shards have new values, which go to all ranks."""
        for key in (key for key in keys if key in self.units):
            with self.lane.beside():
                self.windows[key].meet()
                self.windows[key].all_gather(self.flats[key])
            self.marks[key] = self.lane.mark()

    def use(self, *keys: str) -> None:
        """From here on the computation finds these weights."""
        for key in keys:
            self.lane.wait(self.marks.pop(key, None))

    show = use

    def free(self, *keys: str) -> None:
        """Nothing: they stay."""

    def settle(self) -> None:
        self.use(*self.units)

    def close(self) -> None:
        self.settle()
        for hook in self.hooks:
            hook.remove()
        for unit in self.units.values():
            for p in unit.params.values():
                del p.unit


class GatheredWeights(_Weights):
    """A window has the shard. A flat has memory while the weights are there, at first not."""

    def __init__(self, model: nn.Module, units: dict[str, Unit], *tensors: dict):
        if name := shared_by_blocks(model):
            raise UserError(f"parallel.zero=3: {name} is a parameter of another block, too, and whole in one at a time")
        super().__init__(model, units, *tensors)
        self.shown: str | None = None
        self.views, self.blanks = {}, {}  # of each unit's parameters: their data while it is there, and while not
        for key, unit in units.items():
            blank = torch.full((), torch.nan, dtype=unit.dtype, device=self.flats[key].device)
            self.views[key] = [(p, p.data) for p in unit.params.values()]
            self.blanks[key] = [(p, blank.expand(p.shape)) for p in unit.params.values()]
            _set_data(self.blanks[key])
        blocks = {key: block for key, block in blocks_of(model).items() if keys_of(key, units)}
        self.blocks = [keys_of(key, units) for key in blocks]
        self.first, self.last = {}, set()  # block of each part of the model
        for part in parts_of(model):
            if own := [i for i, key in enumerate(blocks) if key.removeprefix("layers.") in part.layers]:
                self.first[part] = own[0]
                self.last.add(own[-1])
        self.begin = first_of(model, units)
        model.register_forward_pre_hook(self._before_model)
        for i, block in enumerate(blocks.values()):
            block.register_forward_pre_hook(functools.partial(self._before_block, i))
            block.register_forward_hook(functools.partial(self._after_block, i))
        self._meet(units)

    def _meet(self, keys: Collection[str]) -> None:
        """What is gathered from here on is what all ranks have written."""
        with self.lane.beside():
            for key in keys:
                self.windows[key].meet()

    def gather(self, *keys: str) -> None:
        """Send for what is not there yet."""
        for key in keys:
            if key not in self.marks:
                flat = self.flats[key]
                with self.lane.beside():  # the memory is of this stream: it is not written before readers are done
                    flat.untyped_storage().resize_(flat.numel() * flat.element_size())
                    self.windows[key].all_gather(flat)
                _set_data(self.views[key])
                self.marks[key] = self.lane.mark()

    def use(self, *keys: str) -> None:
        """From here on the computation finds these weights."""
        self.gather(*keys)
        for key in keys:
            self.lane.wait(self.marks[key])

    def free(self, *keys: str) -> None:
        for key in keys:
            if key in self.marks:
                del self.marks[key]
                _set_data(self.blanks[key])
                self.flats[key].untyped_storage().resize_(0)

    def renew(self, keys: Collection[str]) -> None:
        """Their shards have new values. What forward begins with is sent for."""
        keys = [key for key in keys if key in self.units]
        self.free(*keys)
        self._meet(keys)
        self.gather(*(key for key in self.begin if key in keys))

    def show(self, key: str) -> None:
        """Like use; what was shown before goes."""
        if self.shown not in (None, key):
            self.free(self.shown)
        self.use(key)
        self.shown = key

    def _before_model(self, part: nn.Module, _args) -> None:
        self.gather(*self.ahead)
        if part in self.first:
            self.gather(*self.blocks[self.first[part]])
        self.gather(*self.behind)
        self.use(*self.ahead)

    def _before_block(self, i: int, _module, args) -> None:
        self.use(*self.blocks[i])
        if i not in self.last:
            self.gather(*self.blocks[i + 1])
        on_gradient(args[0], functools.partial(self._backward_leaves, i))

    def _after_block(self, i: int, _module, _args, y_TD: Tensor) -> None:
        if i in self.last:
            self.use(*self.behind)
        if i in self.last and y_TD.requires_grad:  # backward begins here
            on_gradient(y_TD, functools.partial(self._backward_enters, i))
        else:
            self.free(*self.blocks[i])

    def _backward_enters(self, i: int) -> None:
        self.use(*self.blocks[i])
        if i not in self.first.values():
            self.gather(*self.blocks[i - 1])

    def _backward_leaves(self, i: int) -> None:
        self.free(*self.blocks[i])
        if i not in self.first.values():
            self._backward_enters(i - 1)


def _set_data(pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    for p, data in pairs:
        p.data = data


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, the module's parameters hold their values under every ZeRO; for all ranks together, between steps.

    with whole(model.norm):
        print(model.norm.weight)
    """
    units = dict.fromkeys(p.unit for p in module.parameters() if hasattr(p, "unit"))  # in the same order on all ranks
    for weights, key in units:
        weights.use(key)
    try:
        yield
    finally:
        for weights, key in units:
            weights.free(key)


def read_whole(p: nn.Parameter) -> nn.Parameter:
    """The parameter, with its values under every ZeRO; for all ranks together, between steps.

    They are there until a parameter of another unit is read, or the model runs.
    """
    if hasattr(p, "unit"):
        weights, key = p.unit
        weights.show(key)
    return p
