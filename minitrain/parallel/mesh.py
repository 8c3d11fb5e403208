"""The ranks of a run: one process a GPU, started by torchrun or srun, each with its place on named axes.

    ranks     0 1 2 3 4 5 6 7              their grid: (pp, dp, cp, tp), the last ones neighbours
    pp        {0 4} {1 5} {2 6} {3 7}      with pp = 2: stages that pass rows on; "stage" {0 1 2 3} {4 5 6 7}
    ends      of each pp the first and the last stage, which both have a tied embedding
    dp        all, with pp = tp = cp = 1   ranks that have other rows of the data
    ep        {0 1} {2 3} {4 5} {6 7}      with ep = 2: neighbours within dp x cp, each with its part of the experts
    shard     {0 1 2 3} {4 5 6 7}          ranks that together hold one copy (parallel.shard_within = 4)
    replica   {0 4} {1 5} {2 6} {3 7}      ranks that hold the same piece of it; dp x cp = shard x replica

Parameters differ in the axes over which their gradients are summed; each kind has its shard and replica (GRAD_SUMS).

A group carries host tensors by gloo and device tensors by NCCL. Read next: comm.py.
"""

import math
import os
import re
import socket
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitrain.config import ParallelConfig, UserError
from minitrain.parallel.comm import Group, everyone, gather_objects
from minitrain.parallel.layout import objections

# A parameter's grad_sum_on -> dimensions of _make_groups' grid.
# dp x cp is "copies" x "part" x "ep"; tp is "kv" x "kv_copies", ranks with the same key and value heads.
GRAD_SUMS = {
    ("dp", "cp"): ("copies", "part", "ep"),
    ("dp", "cp", "tp"): ("copies", "part", "ep", "kv", "kv_copies"),
    ("dp", "cp", "kv_copies"): ("copies", "part", "ep", "kv_copies"),
    ("expert_dp",): ("copies", "part"),
    ("dp", "cp", "ends"): ("copies", "part", "ep"),  # and then over "ends"
}


@dataclass(frozen=True)
class Mesh:
    """groups: by axis, "world", "stage", "data" (dp x cp) and others; a name that is not there is a group of one.

    shardings: of each kind of parameter, by its grad_sum_on, the groups shard and replica: it is summed over both.
    schedule, parts: of a pipeline's stages.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    groups: dict[str, Group] = field(default_factory=dict)
    shardings: dict[tuple[str, ...], tuple[Group, Group]] = field(default_factory=dict)
    timeout_s: int = ParallelConfig.timeout_s
    schedule: str = ParallelConfig.pp_schedule
    parts: int = ParallelConfig.pp_parts

    def group(self, name: str) -> Group:
        return self.groups.get(name, Group())

    def sharding(self, grad_sum_on: tuple[str, ...]) -> tuple[Group, Group]:
        """-> shard, replica."""
        return self.shardings.get(grad_sum_on, (Group(), Group()))

    def is_second_copy(self, p: nn.Parameter) -> bool:
        """Whether p is a tied head on the last stage of a pipeline, whose first stage has it, too."""
        return "ends" in getattr(p, "grad_sum_on", ()) and self.group("ends").rank > 0

    @property
    def ranks_of_a_row(self) -> int:
        """Those that have the same rows of data, and share the work."""
        return self.size // self.dp_size

    def sum_rows(self, number: int) -> int:
        """As sum(), of what all ranks with the same rows know alike: counted once."""
        return self.sum(number) // self.ranks_of_a_row

    def sum_stages(self, number: int) -> int:
        """As sum(), of what all ranks of a stage know alike: counted once."""
        return self.sum(number) * self.group("pp").size // self.size

    def sum(self, number: int) -> int:
        """Over all ranks, on the hosts: no device waits. TimeoutError names the ranks that did not come to it."""
        return int(self.sum_host(torch.tensor(number))) if self.size > 1 else number

    def sum_host(self, counts: Tensor, among: str | None = None) -> Tensor:
        """A host tensor of integers, summed in place over all ranks, or over a group that is as large on every rank."""
        group = self.group(among) if among else Group(self.rank, self.size)
        if group.size == 1:
            return counts
        store = dist.distributed_c10d._get_default_store()
        turn = store.add(f"turns of rank {self.rank}", 1)  # each rank calls this equally often
        try:
            dist.all_reduce(counts, group=group.handle, async_op=True).wait(timedelta(seconds=self.timeout_s))
        except RuntimeError:
            time.sleep(1)  # for those that are on their way
            missing = [r for r in range(self.size) if store.add(f"turns of rank {r}", 0) < turn]
            if not missing:
                raise
            text = f"{_listed(missing)} of {self.size} ended or did not arrive (parallel.timeout_s={self.timeout_s})"
            raise TimeoutError(text) from None
        return counts


ALONE = Mesh(torch.device("cpu"))


def init_mesh(device: str, cfg: ParallelConfig | None = None, model=None) -> Mesh:
    """Join the other ranks that torchrun or srun started, if there are any. device: auto, cuda or cpu.

    model: the architecture's config; parallel.tp needs it. A process group that exists already is taken as it is.
    UserError if CUDA is asked for and absent, or with all that does not fit in the layout; TimeoutError names the
    ranks that did not arrive.
    """
    cfg = cfg or ParallelConfig()
    rank, size, local_rank = (dist.get_rank(), dist.get_world_size(), 0) if dist.is_initialized() else _place()
    if size == 1 and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but there is no RANK or LOCAL_RANK; use torchrun")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                'train.device="cuda": torch sees no CUDA device; use "cpu", or a torch built for your driver'
            )
        if not dist.is_initialized():
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"rank {rank}: is process {local_rank} of its node, which has {torch.cuda.device_count()} GPUs; "
                    "start one process a GPU"
                )
            torch.cuda.set_device(local_rank)
        device = f"cuda:{torch.cuda.current_device()}"
    if reasons := objections(cfg, size, model):
        raise UserError("; ".join(reasons))
    if size == 1:
        return Mesh(torch.device(device))
    if not dist.is_initialized():
        _join(rank, size, "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", cfg.timeout_s)
    groups, shardings = _make_groups(rank, size, cfg, model, timedelta(seconds=2 * cfg.timeout_s))
    dp = groups["dp"]
    pipeline = cfg.pp_schedule, cfg.pp_parts
    return Mesh(torch.device(device), rank, size, dp.rank, dp.size, groups, shardings, cfg.timeout_s, *pipeline)


def grids(size: int, cfg: ParallelConfig, model) -> tuple[dict[str, int], dict[str, int]]:
    """Ranks along the named axes, and along the dimensions of GRAD_SUMS; both grids have all ranks."""
    data = size // (cfg.pp * cfg.tp)
    within = cfg.shard_within or data
    part = within // cfg.ep if cfg.zero else 1
    kv = min(cfg.tp, model.num_key_value_heads) if model else cfg.tp
    axes = {"pp": cfg.pp, "dp": data // cfg.cp, "cp": cfg.cp, "tp": cfg.tp}
    fine = {"copies": data // (part * cfg.ep), "part": part, "ep": cfg.ep, "kv": kv, "kv_copies": cfg.tp // kv}
    return axes, {"pp": cfg.pp, **fine}


def sharded_over(dims: Collection[str], zero: int) -> list[str]:
    """Of a kind's dimensions, along which ranks have shards; along the others they hold the same."""
    return [dim for dim in dims if dim != "copies" and zero]


def _make_groups(rank: int, size: int, cfg: ParallelConfig, model, timeout: timedelta):
    """-> Mesh.groups, Mesh.shardings. Every rank makes every group, in the same order; ranks that meet twice, once."""
    axes, fine = grids(size, cfg, model)
    made, hosts = {}, gather_objects(socket.gethostname(), everyone())

    def group(grid: dict[str, int], names: Collection[str], stages: slice = slice(None), wires: str = "") -> Group:
        """Ranks of these stages that differ in these dimensions only; wires: connections of their own have a name."""
        across = [i for i, name in enumerate(grid) if name not in names]
        along = [i for i, name in enumerate(grid) if name in names]
        ranks = torch.arange(size).view(*grid.values())[stages].permute(across + along)
        rows = list(map(tuple, ranks.reshape(-1, math.prod(ranks.shape[len(across) :])).tolist()))
        for row in rows:
            if len(row) > 1 and (row, wires) not in made:
                is_world = len(row) == size and not wires
                made[row, wires] = dist.group.WORLD if is_world else dist.new_group(row, timeout)
        mine = next((row for row in rows if rank in row), (rank,))  # of other stages: alone
        is_on_one_host = len({hosts[r] for r in mine}) == 1
        return Group(mine.index(rank), len(mine), made.get((mine, wires)), is_on_one_host)

    groups = {"world": group(axes, axes), "stage": group(axes, ("dp", "cp", "tp")), "data": group(axes, ("dp", "cp"))}
    groups |= {name: group(axes, (name,)) for name in axes}
    groups |= {"ends": group(axes, ("pp",), slice(None, None, max(1, cfg.pp - 1)))}
    wires = ("pp_back", "pp_around", "pp_back_around") if cfg.pp_parts > 1 else ("pp_back",)
    groups |= {name: group(axes, ("pp",), wires=name) for name in wires}
    groups |= {name: group(fine, (name,)) for name in ("ep", "kv", "kv_copies")}
    shardings = {}
    for axes_of_kind, dims in GRAD_SUMS.items():
        shard = sharded_over(dims, cfg.zero)
        shardings[axes_of_kind] = group(fine, shard), group(fine, [dim for dim in dims if dim not in shard])
    return groups, shardings


# ---- finding the other ranks


def _place() -> tuple[int, int, int]:
    """-> rank, number of ranks, rank within the node: of torchrun, else of srun, else alone."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if all(name in os.environ for name in names):
            return tuple(int(os.environ[name]) for name in names)
    return 0, 1, 0


def _address() -> tuple[str, int]:
    """Where rank 0 is met: as torchrun says; under srun the first node of the step, on a port made of the job's id."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return first_node(os.environ["SLURM_STEP_NODELIST"]), 20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000


def first_node(nodes: str) -> str:
    """Of SLURM's short form: node[07-12,15],other3 -> node07."""
    name, number = re.match(r"([^,\[]+)(?:\[([^],-]+))?", nodes).groups()
    return name + (number or "")


def _store(rank: int, timeout_s: float) -> dist.Store:
    """The table that all ranks see: torchrun's, or rank 0's own."""
    address, port = _address()
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(address, port, None, rank == 0 and not of_torchrun, timeout, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise TimeoutError(
            f"rank {rank} cannot reach rank 0 at {address}:{port}: {str(error).splitlines()[0]}"
        ) from None
    # torchrun's outlives a restart, with the keys of the attempt before. Each node counts restarts of its own.
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] if of_torchrun else ""
    return dist.PrefixStore(f"minitrain {attempt}", store)


def _join(rank: int, size: int, backend: str, timeout_s: int) -> None:
    store = _store(rank, timeout_s)
    store.set(f"rank {rank}", "")
    everyone, last = [f"rank {r}" for r in range(size)], time.monotonic() + timeout_s
    while not store.check(everyone):
        if time.monotonic() > last:
            missing = [r for r in range(size) if not store.check([f"rank {r}"])]
            raise TimeoutError(f"{_listed(missing)} of {size} did not arrive (parallel.timeout_s={timeout_s})")
        time.sleep(0.1)
    # Twice as long in the groups themselves: the sum in each step, which knows who is missing, speaks first.
    timeout = timedelta(seconds=2 * timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


# ---- the end


def is_first() -> bool:
    """Whether this process is rank 0, the one that prints and writes."""
    return (dist.get_rank() if dist.is_initialized() else _place()[0]) == 0


def leave() -> None:
    """After a run that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abandon(code: int) -> None:
    """After one that failed: among other ranks at once, since what waits for them can hold up a usual exit."""
    if _place()[1] == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost(error: Exception) -> str | None:
    """A line for what a rank sees when another one ended without a word, and None for any other error."""
    broken = re.search(
        "Connection (closed|reset) by peer|Connection was likely closed|remote process exited", str(error)
    )
    return f"another rank ended ({broken[0]}); what started it says how" if broken else None


def is_first_to_fail() -> bool:
    """Whether no other rank has said yet why the run ends."""
    rank, size, _ = _place()
    if size == 1:
        return True
    try:
        store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else _store(rank, 10)
        return store.add("failed", 1) == 1
    except (RuntimeError, OSError):
        return False  # rank 0, which keeps the table, is gone: it has spoken
