"""The ranks of a run: one process a GPU, started by torchrun or srun, each with its place on named axes.

    ranks     0 1 2 3 4 5 6 7              their grid: (pp, dp, cp, tp, ep); today all of it is dp, data parallel
    shard     {0 1 2 3} {4 5 6 7}          ranks that together hold one copy (parallel.shard_within = 4)
    replica   {0 4} {1 5} {2 6} {3 7}      ranks that hold the same piece of it; dp = shard x replica

A group carries host tensors by gloo and device tensors by NCCL. Read next: comm.py.
"""

import os
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from minitrain.config import ParallelConfig, UserError
from minitrain.parallel.comm import Group

AXES = ("pp", "dp", "cp", "tp", "ep")


@dataclass(frozen=True)
class Mesh:
    """groups: by axis, and "shard" and "replica"; a name that is not there is a group of one."""

    device: torch.device
    rank: int = 0
    size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    groups: dict[str, Group] = field(default_factory=dict)
    timeout_s: int = ParallelConfig.timeout_s

    def group(self, name: str) -> Group:
        return self.groups.get(name, Group())

    def sum(self, number: int) -> int:
        """Over all ranks, on the hosts: no device waits. TimeoutError names the ranks that did not come to it."""
        return int(self.sum_host(torch.tensor(number))) if self.size > 1 else number

    def sum_host(self, counts: Tensor) -> Tensor:
        """A host tensor of integers, summed over all ranks in place."""
        if self.size == 1:
            return counts
        store = dist.distributed_c10d._get_default_store()
        turn = store.add(f"turns of rank {self.rank}", 1)  # each rank calls this equally often
        try:
            dist.all_reduce(counts, async_op=True).wait(timedelta(seconds=self.timeout_s))
        except RuntimeError:
            time.sleep(1)  # for those that are on their way
            missing = [r for r in range(self.size) if store.add(f"turns of rank {r}", 0) < turn]
            if not missing:
                raise
            text = f"{_listed(missing)} of {self.size} ended or did not arrive (parallel.timeout_s={self.timeout_s})"
            raise TimeoutError(text) from None
        return counts


ALONE = Mesh(torch.device("cpu"))


def init_mesh(device: str, cfg: ParallelConfig | None = None) -> Mesh:
    """Join the other ranks that torchrun or srun started, if there are any. device: auto, cuda or cpu.

    UserError if CUDA is asked for and absent, or if the number of ranks does not fit the config; TimeoutError names
    the ranks that did not arrive. A process group that exists already is taken as it is.
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
    if size == 1:
        return Mesh(torch.device(device))
    shards = 1 if cfg.zero == 0 else cfg.shard_within or size
    if size % shards:
        raise UserError(f"parallel.shard_within={shards} does not divide WORLD_SIZE={size}; use a divisor of it")
    if not dist.is_initialized():
        _join(rank, size, "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", cfg.timeout_s)
    groups = _make_groups(rank, {"dp": size}, shards, timedelta(seconds=2 * cfg.timeout_s))
    return Mesh(torch.device(device), rank, size, groups["dp"].rank, groups["dp"].size, groups, cfg.timeout_s)


def _make_groups(rank: int, sizes: dict[str, int], shards: int, timeout: timedelta) -> dict[str, Group]:
    """sizes: of the axes that are not 1. The last axis of AXES is the innermost: its ranks are neighbours."""
    pp, dp, cp, tp, ep = (sizes.get(axis, 1) for axis in AXES)
    grid = torch.arange(pp * dp * cp * tp * ep).view(pp, dp // shards, shards, cp, tp, ep)
    dims = {"pp": [0], "dp": [1, 2], "replica": [1], "shard": [2], "cp": [3], "tp": [4], "ep": [5]}
    groups = {}
    for name, along in dims.items():
        across = [dim for dim in range(grid.ndim) if dim not in along]
        rows = grid.permute(across + along).flatten(0, len(across) - 1).flatten(1).tolist()
        for row in rows if len(rows[0]) > 1 else []:  # every rank takes part in making every group
            handle = dist.group.WORLD if len(row) == grid.numel() else dist.new_group(row, timeout)
            if rank in row:
                groups[name] = Group(row.index(rank), len(row), handle)
    return groups


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
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(address, port, None, is_host, timeout=timeout, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise TimeoutError(
            f"rank {rank} cannot reach rank 0 at {address}:{port}: {str(error).splitlines()[0]}"
        ) from None
    # After a restart by torchrun, keys of the attempt before are still there.
    return dist.PrefixStore(f"minitrain {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


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
