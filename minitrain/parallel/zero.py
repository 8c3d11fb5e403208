"""The optimizer's side of data parallelism: fp32 master weights, fp32 gradients, one global norm, shared by ranks.

    model parameter (bf16)  --gradients of the rows, added in fp32-->  master.grad
    master (fp32, what the optimizer sees)  --after its step, rounded-->  model parameter

Our AdamW's kernel rounds too, and masters are split for it: they keep the bits that model parameters lack.

One process has all of it (MasterOptimizer); where its model is fp32, parameters are their own masters. Several ranks
have flat tensors, one for each block (ddp.py), cut into a shard for each rank (ShardedOptimizer):

    parallel.zero     0        1        2        3
    masters, state    whole    shard    shard    shard
    gradients         whole    whole    shard    shard
    weights           whole    whole    whole    shard, gathered block by block (gather.py)

Rajbhandari et al. 2019, arXiv:1910.02054. An optimizer is handed the pieces of parameters that lie in this rank's
shards or, if it says shard = "param", whole parameters of which this rank is the owner (owners.py).
"""

import contextlib
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from minitrain.boxes import part_of
from minitrain.config import ParallelConfig, UserError
from minitrain.masters import master_of, round_weights, set_value, split, to_save, wide
from minitrain.multi_tensor import global_norm
from minitrain.parallel.comm import Group, shard_of, sum_equal
from minitrain.parallel.ddp import DENSE, Gradients, Unit, added, first_of, make_units
from minitrain.parallel.gather import ArrivingWeights, GatheredWeights
from minitrain.parallel.mesh import Mesh
from minitrain.parallel.offload import HostMemory, HostState, on_host, scalars_on
from minitrain.parallel.owners import Owners
from minitrain.parallel.window import Window
from minitrain.pieces import Piece


def shard_optimizer(
    model: nn.Module,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    mesh: Mesh,
    cfg: ParallelConfig,
    fill: Callable[[Collection[str]], None] | None = None,
) -> "MasterOptimizer":
    """One process that offloads nothing has the plain form, and all others the sharded one.

    fill: gives parameters of these names their values, where they have no memory before they are cut.
    """
    model.zero_grad()  # what is there would be added to the first step's
    if mesh.size == 1 and not cfg.offload:
        return MasterOptimizer(model, make)
    return ShardedOptimizer(model, make, mesh, cfg, fill)


class MasterOptimizer:
    """Any torch.optim.Optimizer over the master weights of a model: make(list of fp32 Parameters) -> the optimizer.
    Its use_loaded(), if it has one, is called when its state was loaded.

    masters: {parameter's name: its master}, of which masters.value_of is the value. Nothing here waits for the device,
    if the optimizer knows torch's grad_scale and found_inf (the fused ones do): a loss or norm that is no number then
    skips this step and all that follow, so that the weights stay as they were until the host reads it and stops. For
    other optimizers the host looks before each step.
    """

    host: HostState | None = None  # of offloaded masters and states
    grad_scale = broken = None  # 0-d fp32: divides the gradients; 1 once something was no number

    def __init__(self, model: nn.Module, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
        self.params = dict(model.named_parameters())
        self.masters = {name: master_of(p) for name, p in self.params.items()}  # a frozen parameter is its own
        self.optimizer = make([master for master in self.masters.values() if master.requires_grad])
        self.settings = [_numbers(group) for group in self.optimizer.param_groups]
        self.hooks = [
            p.register_post_accumulate_grad_hook(_grad_mover(self.masters[name]))
            for name, p in self.params.items()
            if self.masters[name] is not p
        ]
        if getattr(self.optimizer, "rounds", False):
            split(self.masters.values())

    def backward(self, part: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
        """A context for the backward of one row, through the model or a part of it; is_last: of the step."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Let go of the model: its gradients stay its own again."""
        for hook in self.hooks:
            hook.remove()

    def settle(self) -> None:
        """From here on all weights of the last step may be read, by other code than the model's forward."""

    def clip_grad_norm(self, max_norm: float, loss: Tensor | float = 0.0) -> Tensor:
        """Norm of the whole gradient, fp32 scalar on the device. The step will scale it down to max_norm (0: never).

        loss: what else must be a number for the step to be taken.
        """
        norm = self._grad_norm()
        self.grad_scale = (norm / max_norm).clamp(min=1) if max_norm else torch.ones_like(norm)
        broken = (~(norm + loss).isfinite()).float()
        self.broken = broken if self.broken is None else torch.maximum(self.broken, broken)
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """After clip_grad_norm: one step at this learning rate, new weights to the model, gradients gone."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._step_masters(list(self.masters))

    def _step_masters(self, names: list[str]) -> None:
        """Of these, those that have a gradient, which goes; then all of these to the model."""
        rounds = getattr(self.optimizer, "rounds", False)  # it takes any gradient, and rounds new weights itself
        for master in () if rounds else self.masters.values():
            if master.grad is not None:
                master.grad = master.grad.to(master.dtype)
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.grad_scale, self.optimizer.found_inf = self.grad_scale, self.broken
            self.optimizer.step()
        elif not self.broken.item():
            if grads := self._grads():
                torch._foreach_div_(grads, self.grad_scale)
            self.optimizer.step()
        for master in self.masters.values():
            master.grad = None
        if not rounds:
            round_weights(self.masters[name] for name in names)

    def _grad_norm(self) -> Tensor:
        return global_norm(self._grads())

    def _grads(self) -> list[Tensor]:
        return [m.grad for m in self.masters.values() if m.grad is not None]

    # ---- checkpoints: what this rank has of each tensor, under the names of pieces.py

    def tensors(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Of the masters and the frozen parameters, in whole."""
        return {
            f"model.{name}": (wide(p.dtype) if p.requires_grad else p.dtype, part_of(p).shape)
            for name, p in self.params.items()
            if part_of(p).shape.numel()
        }

    def pieces(self) -> dict[str, Piece]:
        """What this rank has to save, so that all ranks together save everything once; no copies.

        UserError if the optimizer keeps what cannot be put together again.
        """
        self._check_groups()
        pieces = {}
        for name in self._to_save():
            (first, _), part = self._span(name), part_of(self.params[name])
            master = self.masters.get(name, self.params[name])
            pieces[f"model.{name}"] = Piece(to_save(master), *part, first)
            for key, value in self.optimizer.state.get(master, {}).items():
                full_name = f"optimizer.{name}.{key}"
                self._check_state(name, key, value, master)
                if value.ndim and self._is_part(name):
                    pieces[full_name] = Piece(value, *part, first)
                elif first == 0 and not any(side.start for side in part.box):
                    # A scalar, such as a count of steps, is the same for all pieces.
                    pieces[full_name] = Piece(value, *part_of(value))
        return pieces

    @torch.no_grad()
    def load(self, tensors: dict[str, tuple[torch.dtype, torch.Size]], read: Callable[..., Tensor]) -> None:
        """Weights and state, of any layout. tensors: all that were saved.

        read: (name, box, first, end) -> these elements, 1-D; no others than this rank holds are asked for.
        """
        for full_name, (_, shape) in tensors.items():
            kind, _, rest = full_name.partition(".")
            name, _, key = rest.rpartition(".")
            if kind == "optimizer" and name in self.masters and self.masters[name].requires_grad:
                master, part = self.masters[name], part_of(self.params[name])
                is_piece = self._is_part(name) and len(shape) > 0
                if is_piece and shape != part.shape:
                    raise UserError(
                        f"{full_name} has shape {tuple(shape)}: it cannot be cut as {name} is on these ranks"
                    )
                value = read(full_name, part.box, *self._span(name)) if is_piece else read(full_name)
                on = master.device if shape else scalars_on(self.optimizer, master, self.params[name].device)
                self.optimizer.state[master][key] = value.view(master.shape if is_piece else shape).to(on, copy=True)
        for full_name in self.tensors():
            name = full_name.removeprefix("model.")
            first, end = self._span(name)
            if end > first:
                held = self.masters.get(name, self.params[name])
                set_value(held, read(full_name, part_of(self.params[name]).box, first, end).view_as(held))
        if hasattr(self.optimizer, "use_loaded"):
            self.optimizer.use_loaded()
        self._use_loaded()

    def _use_loaded(self) -> None:
        round_weights(self.masters.values())

    def _is_part(self, name: str) -> bool:
        """Whether a master can be less than the whole parameter of all ranks."""
        return False

    def _span(self, name: str) -> tuple[int, int]:
        """First .. last + 1 of the elements, of this rank's part of a parameter, that it has a master of."""
        return 0, self.params[name].numel()

    def _to_save(self) -> list[str]:
        """Parameters."""
        return [name for name, p in self.params.items() if p.numel()]

    def _check_groups(self) -> None:
        keeps, params = f"{type(self.optimizer).__name__} keeps", set()
        for group, before in zip(self.optimizer.param_groups, self.settings, strict=True):
            params |= set(group["params"])
            for key, value in _numbers(group).items():
                if value != before.get(key):
                    raise UserError(f"{keeps} {key}={value} in a group; make it a tensor in state[p], to be saved")
        if others := self.optimizer.state.keys() - params:
            raise UserError(f"{keeps} state[{others.pop()!r}]; make it tensors in state[p], to be saved")

    def _check_state(self, name: str, key: str, value, master: nn.Parameter) -> None:
        keeps = f"{type(self.optimizer).__name__} keeps {name}.{key}"
        if not torch.is_tensor(value):
            raise UserError(f"{keeps}={value!r}; make it a tensor, to be saved")
        if value.ndim and self._is_part(name) and value.numel() != master.numel():
            raise UserError(
                f"{keeps} of shape {tuple(value.shape)} for a piece of shape {tuple(master.shape)}; "
                'a class that needs whole matrices says shard = "param"'
            )


class ShardedOptimizer(MasterOptimizer):
    """The same over several ranks, as parallel.zero says; every method is called by all of them together.

    masters: of the pieces in this rank's shard, or of the parameters that it owns. A piece keeps its parameter's number
    of dimensions, (1, .., 1, n), so that a rule such as "matrices decay" still holds. Frozen parameters have none.
    One process can be asked for it too, for parallel.offload.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, make: Callable, mesh: Mesh, cfg: ParallelConfig, fill: Callable | None):
        if any(hasattr(p, "unit") for p in model.parameters()):
            raise UserError("the weights of this model are shared out by an earlier run with parallel.zero=3")
        self.mesh = mesh
        self.params = dict(model.named_parameters())
        self.units = make_units(model, mesh)
        self.unit_of = {name: key for key, unit in self.units.items() for name in unit.params}
        self.is_sharded = any(unit.shard.size > 1 for unit in self.units.values())
        wants_whole = getattr(make, "shard", "piece") == "param"
        if wants_whole and mesh.group("tp").size > 1:
            raise UserError("this optimizer needs whole matrices, of which each rank has a part: parallel.tp must be 1")
        self.owners = Owners(self.units) if wants_whole and self.is_sharded else None
        shared = [key for key, unit in self.units.items() if cfg.zero > 0 and unit.shard.size > 1]
        self.flats, self.shards = {}, {}  # what the model computes with, and this rank's part of it
        self.masters, windows, memory, offloaded = {}, {}, HostMemory(mesh.device), on_host(self.units, cfg)
        for key, unit in self.units.items():
            is_cut, group = cfg.zero == 3 and key in shared, unit.shard if key in shared else Group()
            window = Window(unit.shard_numel if is_cut else unit.numel, unit.dtype, mesh.device, group)
            flat = torch.empty(unit.numel, dtype=unit.dtype, device=mesh.device) if is_cut else window.flat
            _fill_flat(flat, unit, fill)
            self.masters |= self._make_masters(unit)
            if key in offloaded:
                memory.take([self.masters[name] for name in self._names(key)])
            windows[key], self.flats[key], self.shards[key] = window, flat, shard_of(flat, unit.shard)
            if is_cut:  # one unit is whole at a time
                self.shards[key] = window.flat.copy_(self.shards[key])
                flat.untyped_storage().resize_(0)
            for name in self._names(key) if self.owners is None else ():
                piece = unit.piece(self.shards[key], name, unit.shard.rank)
                self.masters[name].rounded = piece.view_as(self.masters[name])
        if fill:
            _fill_frozen({name: p for name, p in self.params.items() if name not in self.unit_of}, fill)
        # An empty one where a rank has none at all, since torch's optimizers refuse an empty list.
        self.optimizer = make(list(self.masters.values()) or [nn.Parameter(torch.zeros(0, device=mesh.device))])
        if self.is_sharded or mesh.group("tp").size > 1:
            _check_shard(self.optimizer, make)
        self.settings = [_numbers(group) for group in self.optimizer.param_groups]
        portions = [[self.masters[n] for n in self._names(key)] if key in offloaded else [] for key in self.units]
        self.host = HostState(self.optimizer, memory, portions) if cfg.offload else None
        parts = [{key: of[key] for key in shared} for of in (self.units, windows, self.flats)]
        self.weights = (GatheredWeights if cfg.zero == 3 else ArrivingWeights)(model, *parts) if shared else None
        # Units are stepped in portions; our AdamW begins with those whose weights are shared beside the rest of it.
        first = first_of(model, self.units) if getattr(self.optimizer, "rounds", False) else []
        self.portions = [keys for keys in (first, [key for key in self.units if key not in first]) if keys]
        if self.host:
            self.portions = [[key] for key in self.units]
        elif getattr(self.optimizer, "rounds", False):
            split(self.masters.values())
        self.gradients = Gradients(model, self.units, mesh, cfg.zero, getattr(torch, cfg.reduce_dtype))

    def _make_masters(self, unit: Unit) -> dict[str, nn.Parameter]:
        masters = {}
        for name, p in unit.params.items():
            first, end = self._span(name)
            if end > first:
                shape = [1] * (p.ndim - 1) + [end - first] if end - first < p.numel() else p.shape
                piece = p.detach().flatten()[first:end].to(wide(p.dtype), copy=True).view(shape)
                masters[name] = nn.Parameter(piece)
                masters[name].grad_dtype = None  # any
        return masters

    def _span(self, name: str) -> tuple[int, int]:
        if name not in self.unit_of:  # frozen
            return super()._span(name)
        unit = self.units[self.unit_of[name]]
        if self.owners is None:
            return unit.span(name, unit.shard.rank)
        return super()._span(name) if self.owners.of[name] == unit.shard.rank else (0, 0)

    def backward(self, part: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
        return self.gradients.backward(part, is_last)

    def close(self) -> None:
        """Gradients are the model's own again. Under ZeRO 3 its weights stay shared out: all ranks run it together."""
        self.gradients.close()
        if self.weights:
            self.weights.close()

    # ---- one step

    def _grad_norm(self) -> Tensor:
        self.with_gradient = self.gradients.finish()
        keys = [key for key, unit in self.units.items() if unit.replica.rank == unit.ends.rank == 0]  # each counts once
        counted = self.gradients.tensors(keys) or [torch.zeros(1, dtype=self.gradients.dtype, device=self.mesh.device)]
        norm = global_norm(counted).to(self.gradients.dtype)  # the same on all ranks, whatever they count
        return sum_equal(norm.square(), self.mesh.group("world")).sqrt()

    def settle(self) -> None:
        if self.weights:
            self.weights.settle()

    def _step_masters(self, names: list[str]) -> None:
        if self.weights:
            self.weights.wait_for_readers()
        if self.host is None:
            for keys in self.portions:
                self._step_units(keys)
        else:
            self.host.step(lambda i: self._step_units(self.portions[i]))
        self.gradients.clear()

    def _step_units(self, keys: list[str]) -> None:
        """Masters of these units, from them this rank's shards of the weights, and from these the weights."""
        for key in keys:
            grads = self.gradients.of(key)
            if self.owners and self.units[key].shard.size > 1:
                grads = self.owners.collect(key, self.gradients.sums[key])
            for name in self._names(key):
                if name in self.with_gradient:  # of some rank; what none has stays as it is
                    self.masters[name].grad = grads[name].view_as(self.masters[name])
        super()._step_masters([name for key in keys for name in self._names(key)])
        self._share(keys)

    def _share(self, keys: Collection[str]) -> None:
        """What owners have of whole parameters, into the shards of all ranks, and shards into the weights of all."""
        for key in keys if self.owners else ():
            self.owners.hand_out(key, {name: self.masters[name] for name in self._names(key)}, self.shards[key])
        if self.weights:
            self.weights.renew(keys)

    def _names(self, key: str) -> list[str]:
        return [name for name in self.units[key].params if name in self.masters]

    # ---- checkpoints

    def pieces(self) -> dict[str, Piece]:
        if self.host:
            self.host.wait()
        return super().pieces()

    def load(self, tensors: dict[str, tuple[torch.dtype, torch.Size]], read: Callable[..., Tensor]) -> None:
        if self.weights:
            self.weights.wait_for_readers()
        super().load(tensors, read)

    def _use_loaded(self) -> None:
        if self.host:
            self.host.place()
        super()._use_loaded()
        self._share(self.units)

    def _to_save(self) -> list[str]:
        """Ranks that hold the same piece share the work parameter by parameter: of those that have the same part of it,
        and sum its gradient, the ones with the same shard; if it is frozen, and so in no shard, all.
        """
        mine = []
        names = [name for name in super()._to_save() if not self.mesh.is_second_copy(self.params[name])]
        for i, name in enumerate(names):
            shard, same = self.mesh.sharding(getattr(self.params[name], "grad_sum_on", DENSE))
            if name not in self.unit_of:
                same = Group(same.rank * shard.size + shard.rank, same.size * shard.size)
            if i % same.size == same.rank and (name in self.masters or name not in self.unit_of):
                mine.append(name)
        return mine

    def _is_part(self, name):
        return (self.owners is None and self.is_sharded) or hasattr(self.params[name], "part")


def _fill_flat(flat: Tensor, unit: Unit, fill: Callable | None) -> None:
    """With a unit's parameters, which are views of it from here on."""
    flat.zero_()
    for name, p in unit.params.items():
        view = unit.view(flat, name)
        p.data = view if fill else view.copy_(p)
    if fill:
        fill(unit.params.keys())


def _fill_frozen(params: dict[str, nn.Parameter], fill: Callable) -> None:
    """What is in no unit stays whole on every rank."""
    for p in params.values():
        p.untyped_storage().resize_(p.numel() * p.element_size())
    fill(params.keys())


def _check_shard(optimizer: torch.optim.Optimizer, make: Callable) -> None:
    """UserError if the optimizer needs whole matrices and did not get them: its steps would be nonsense."""
    of_torch = isinstance(optimizer, torch.optim.Muon | torch.optim.Adafactor)
    if (of_torch or getattr(optimizer, "shard", "") == "param") and getattr(make, "shard", "") != "param":
        raise UserError(
            f'{type(optimizer).__name__} needs whole matrices: say so on what makes it, as make.shard = "param"'
        )


def _numbers(group: dict) -> dict[str, float]:
    """Of a group of parameters, but for the learning rate, which each step sets."""
    return {key: value for key, value in group.items() if isinstance(value, int | float) and key != "lr"}


def _grad_mover(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Called with a parameter whose gradient is complete for this row: adds it to the master's."""

    def move(p):
        master.grad = added(master.grad, p.grad)
        p.grad = None

    return move
