"""The optimizer's side of data parallelism: fp32 master weights, fp32 gradients, one global norm, shared by ranks.

    model parameter (bf16)  --gradient of each row, added in fp32-->  master.grad
    master (fp32, what the optimizer sees)  --after its step, rounded-->  model parameter

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
import torch.distributed as dist
from torch import Tensor, nn

from minitrain.config import ParallelConfig, UserError
from minitrain.parallel.comm import all_gather, shard_of, sum_equal
from minitrain.parallel.ddp import Gradients, Unit, make_units
from minitrain.parallel.gather import GatheredWeights
from minitrain.parallel.mesh import Mesh
from minitrain.parallel.offload import HostState
from minitrain.parallel.owners import Owners
from minitrain.storage import Later


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
    if mesh.size == 1 and not cfg.offload:
        return MasterOptimizer(model, make)
    return ShardedOptimizer(model, make, mesh, cfg, fill)


class MasterOptimizer:
    """Any torch.optim.Optimizer over the master weights of a model: make(list of fp32 Parameters) -> the optimizer.

    masters: {parameter's name: its master}. Nothing here waits for the device, if the optimizer knows torch's
    grad_scale and found_inf (the fused ones do): a loss or norm that is no number then skips this step and all that
    follow, so that the weights stay as they were until the host reads it and stops. For other optimizers the host
    looks before each step.
    """

    def __init__(self, model: nn.Module, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
        self.params = dict(model.named_parameters())
        self.masters = {name: _master(p) for name, p in self.params.items()}  # a frozen parameter is its own
        self.optimizer = make([master for master in self.masters.values() if master.requires_grad])
        self.grad_scale = self.broken = None  # 0-d fp32: divides the gradients; 1 once something was no number
        self.hooks = [
            p.register_post_accumulate_grad_hook(_grad_mover(self.masters[name]))
            for name, p in self.params.items()
            if self.masters[name] is not p
        ]

    backward = staticmethod(contextlib.nullcontext)  # a context for the backward of each row, which needs none here

    def close(self) -> None:
        """Let go of the model: its gradients stay its own again."""
        for hook in self.hooks:
            hook.remove()

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
        self._step_masters()
        self.write_weights()

    def _step_masters(self) -> None:
        """Of those that have a gradient; these go."""
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.grad_scale, self.optimizer.found_inf = self.grad_scale, self.broken
            self.optimizer.step()
        elif not self.broken.item():
            if grads := self._grads():
                torch._foreach_div_(grads, self.grad_scale)
            self.optimizer.step()
        for master in self.masters.values():
            master.grad = None

    def _grad_norm(self) -> Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._grads())))

    def _grads(self) -> list[Tensor]:
        return [m.grad for m in self.masters.values() if m.grad is not None]

    @torch.no_grad()
    def write_weights(self) -> None:
        """Round the masters into the model's parameters."""
        pairs = [(p, self.masters[name]) for name, p in self.params.items() if self.masters[name] is not p]
        if pairs:
            torch._foreach_copy_(*zip(*pairs, strict=True))

    def weights(self) -> dict[str, Tensor | Later]:
        """The masters, in whole, by parameter name."""
        return self.masters

    @torch.no_grad()
    def load_weights(self, read: Callable[[str], Tensor]) -> None:
        """read: name -> the whole master."""
        for name, master in self.masters.items():
            master.copy_(read(name))
        self.write_weights()

    def state(self) -> dict[str, Tensor | Later]:
        """The optimizer's tensors by "name.key", such as "norm.weight.exp_avg". ValueError if it keeps others."""
        names = {master: name for name, master in self.masters.items()}
        tensors = {}
        for master, state in self.optimizer.state.items():
            for key, value in state.items():
                if not torch.is_tensor(value):
                    raise ValueError(
                        f"{type(self.optimizer).__name__} keeps {key}={value!r}; make it a tensor, to be saved"
                    )
                tensors[f"{names[master]}.{key}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of state(). ValueError for a tensor whose parameter does not exist."""
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition(".")
            if name not in self.masters:
                raise ValueError(f"optimizer state for {name}, which the model has not")
            master = self.masters[name]
            on = value.device if value.ndim == 0 and not master.is_cuda else master.device
            self.optimizer.state[master][key] = value.to(on, copy=True)


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
        gathers = [key for key, unit in self.units.items() if cfg.zero == 3 and unit.shard.size > 1]
        self.flats, self.shards = {}, {}  # what the model computes with, and this rank's part of it
        self.masters = {}
        for key, unit in self.units.items():
            flat = _flatten(unit, fill)
            self.masters |= self._make_masters(unit, on_host=cfg.offload == "optimizer" and flat.is_cuda)
            self.flats[key], self.shards[key] = flat, shard_of(flat, unit.shard)
            if key in gathers:  # one unit is whole at a time
                self.shards[key] = self.shards[key].clone()
                flat.untyped_storage().resize_(0)
        if fill:
            _fill_frozen({name: p for name, p in self.params.items() if name not in self.unit_of}, fill)
        # An empty one where a rank has none at all, since torch's optimizers refuse an empty list.
        self.optimizer = make(list(self.masters.values()) or [nn.Parameter(torch.zeros(0, device=mesh.device))])
        if self.is_sharded or mesh.group("tp").size > 1:
            _check_shard(self.optimizer, make)
        self.host = HostState(self.optimizer, mesh.device) if cfg.offload == "optimizer" else None
        parts = [{key: of[key] for key in gathers} for of in (self.units, self.flats, self.shards)]
        self.gathered = GatheredWeights(model, *parts) if gathers else None
        self.gradients = Gradients(model, self.units, mesh, cfg.zero, getattr(torch, cfg.reduce_dtype))
        self.grad_scale = self.broken = None

    def _make_masters(self, unit: Unit, on_host: bool) -> dict[str, nn.Parameter]:
        masters = {}
        for name, p in unit.params.items():
            first, end = self._span(name, unit.shard.rank)
            if end > first:
                shape = [1] * (p.ndim - 1) + [end - first] if end - first < p.numel() else p.shape
                piece = p.detach().flatten()[first:end].to(_wide(p.dtype), copy=True).view(shape)
                masters[name] = nn.Parameter(piece.cpu().pin_memory() if on_host else piece)
        return masters

    def _span(self, name: str, rank: int) -> tuple[int, int]:
        """First .. last + 1 of a parameter's elements whose master is with a rank of its unit's shard group."""
        if self.owners is None:
            return self.units[self.unit_of[name]].span(name, rank)
        return (0, self.params[name].numel()) if self.owners.of[name] == rank else (0, 0)

    def backward(self, is_last: bool):
        """A context for the backward of one row; is_last: of the step."""
        return self.gradients.backward(is_last)

    def close(self) -> None:
        """Gradients are the model's own again. Under ZeRO 3 its weights stay shared out: all ranks run it together."""
        self.gradients.close()

    # ---- one step

    def _grad_norm(self) -> Tensor:
        self.with_gradient = self.gradients.finish()
        sums = self.gradients.sums
        counted = [sums[key] for key, unit in self.units.items() if unit.replica.rank == 0]  # each once in all ranks
        counted = counted or [next(iter(sums.values())).new_zeros(1)]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(counted)))
        return sum_equal(norm.square(), self.mesh.group("world")).sqrt()

    def _step_masters(self) -> None:
        keys = list(self.units)
        if self.host is None:
            self._step_units(keys)
        else:
            portions = [[self.masters[name] for name in self._names(key)] for key in keys]
            self.host.step(portions, lambda i: self._step_units(keys[i : i + 1]))
        self.gradients.clear()

    def _step_units(self, keys: list[str]) -> None:
        """Masters of these units, and from them this rank's shards of the weights."""
        for key in keys:
            sums = self.gradients.sums[key]
            grads = self._pieces(key, sums) if self.owners is None else self.owners.collect(key, sums)
            for name in grads.keys() & self.with_gradient:  # of some rank; what none has stays as it is
                self.masters[name].grad = grads[name].view_as(self.masters[name])
        super()._step_masters()
        self._round(keys)

    def _round(self, keys: list[str]) -> None:
        """Masters into this rank's shards of the weights."""
        if self.owners is not None:
            for key in keys:
                self.owners.hand_out(key, {name: self.masters[name] for name in self._names(key)}, self.shards[key])
            return
        pieces = {name: piece for key in keys for name, piece in self._pieces(key, self.shards[key]).items()}
        if pieces:
            torch._foreach_copy_(list(pieces.values()), [self.masters[name].flatten() for name in pieces])

    @torch.no_grad()
    def write_weights(self) -> None:
        """This rank's shards into the weights of all."""
        if self.gathered:
            self.gathered.free_all()
        for key, flat in self.flats.items():
            if self.gathered is None or key not in self.gathered.flats:
                all_gather(flat, self.shards[key], self.units[key].shard)

    def _names(self, key: str) -> list[str]:
        return [name for name in self.units[key].params if name in self.masters]

    def _pieces(self, key: str, shard: Tensor) -> dict[str, Tensor]:
        """What lies of each master in a flat shard of its unit, 1-D."""
        return {name: self.units[key].piece(shard, name, self.units[key].shard.rank) for name in self._names(key)}

    # ---- checkpoints: whole tensors, of which every rank sends its piece to rank 0

    def weights(self) -> dict[str, Tensor | Later]:
        """Masters, read by all ranks together: rank 0 then has the whole one."""
        if self.host:
            self.host.wait()
        later = {}
        for name, p in self.params.items():
            later[name] = self._later(name, _wide(p.dtype), p.shape, lambda m: m) if name in self.unit_of else p
        return later

    @torch.no_grad()
    def load_weights(self, read: Callable[[str], Tensor]) -> None:
        for name, p in self.params.items():
            if name not in self.unit_of:
                p.copy_(read(name))
            elif name in self.masters:
                self.masters[name].copy_(self._cut(name, read(name)))
        self._round(list(self.units))
        self.write_weights()

    def state(self) -> dict[str, Tensor | Later]:
        """As weights(). A scalar, such as a count of steps, is the same on all ranks that have one."""
        if self.host:
            self.host.wait()
        mine = {}
        for full_name, value in super().state().items():
            name, _, _ = full_name.rpartition(".")
            if value.ndim and self._is_cut and value.numel() != self.masters[name].numel():
                raise ValueError(
                    f"{type(self.optimizer).__name__} keeps {full_name} of shape {tuple(value.shape)} for a piece of "
                    f'shape {tuple(self.masters[name].shape)}; a class that needs whole matrices says shard = "param"'
                )
            shape = self.params[name].shape if value.ndim and self._is_cut else value.shape
            mine[full_name] = (value.dtype, shape, None if value.ndim else value.item())
        of_ranks = [mine]
        if self.mesh.size > 1:
            of_ranks = [None] * self.mesh.size
            dist.all_gather_object(of_ranks, mine)
        tensors = {}
        for full_name, (dtype, shape, scalar) in sorted({k: v for of in of_ranks for k, v in of.items()}.items()):
            name, _, key = full_name.rpartition(".")
            later = self._later(name, dtype, shape, lambda m, key=key: self.optimizer.state[m][key])
            tensors[full_name] = later if scalar is None else torch.tensor(scalar, dtype=dtype)
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of state(). ValueError for a tensor whose parameter does not exist."""
        for full_name in tensors:
            if full_name.rpartition(".")[0] not in self.params:
                raise ValueError(f"optimizer state for {full_name}, which the model has not")
        mine = {k: v for k, v in tensors.items() if k.rpartition(".")[0] in self.masters}
        super().load_state({k: self._cut(k.rpartition(".")[0], v) if v.ndim else v for k, v in mine.items()})
        if self.host:
            self.host.place()

    @property
    def _is_cut(self):
        return self.owners is None and self.is_sharded

    def _cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's piece of a whole tensor, in the shape of the master."""
        first, end = self._span(name, self.units[self.unit_of[name]].shard.rank)
        return whole.flatten()[first:end].view_as(self.masters[name]) if self._is_cut else whole

    def _later(self, name: str, dtype: torch.dtype, shape: torch.Size, of: Callable) -> Later:
        """of(master) of all pieces, put together on rank 0; on the others nothing. Other replicas are not asked."""

        def read():
            mine = of(self.masters[name]).detach().flatten() if name in self.masters else torch.empty(0)
            unit = self.units[self.unit_of[name]]
            if unit.shard.size == 1 or unit.replica.rank > 0:
                return mine.view(shape) if unit.shard.size == 1 else torch.empty(0)
            handle = unit.shard.handle
            like = torch.empty(0, dtype=dtype, device="cpu" if self.host else self.mesh.device)
            if unit.shard.rank > 0:
                if name in self.masters:
                    dist.send(mine, dist.get_global_rank(handle, 0), handle)
                return torch.empty(0)
            pieces = [mine] if name in self.masters else []
            for rank in range(1, unit.shard.size):
                first, end = self._span(name, rank)
                if end > first:
                    pieces.append(like.new_empty(end - first if self._is_cut else shape.numel()))
                    dist.recv(pieces[-1], dist.get_global_rank(handle, rank), handle)
            return torch.cat(pieces).view(shape)

        return Later(dtype, shape, read)


def _flatten(unit: Unit, fill: Callable | None) -> Tensor:
    """One flat tensor with a unit's parameters, which are views of it from here on."""
    p = next(iter(unit.params.values()))
    flat = torch.zeros(unit.numel, dtype=p.dtype, device=p.device)
    for name, p in unit.params.items():
        view = unit.view(flat, name)
        p.data = view if fill else view.copy_(p)
    if fill:
        fill(unit.params.keys())
    return flat


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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of masters and gradients: float32 for what is narrower."""
    return torch.promote_types(dtype, torch.float32)


def _master(p: nn.Parameter) -> nn.Parameter:
    return p if p.dtype == _wide(p.dtype) or not p.requires_grad else nn.Parameter(p.detach().to(_wide(p.dtype)))


def _grad_mover(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Called with a parameter whose gradient is complete for this row: adds it to the master's, in fp32."""

    def move(p):
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad.add_(p.grad)
        p.grad = None

    return move
