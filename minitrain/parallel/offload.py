"""Master weights and optimizer state in host memory: they pass through the device unit by unit in each step.

    to the device   | unit 1 | unit 2 |        | unit 4 |
    the step                 | unit 1 | unit 2 | unit 3 | unit 4 |        unit 3 stays on the device
    back to the host                  | unit 1 | unit 2 |        | unit 4 |

Rajbhandari et al. 2021, arXiv:2104.07857; here the device does the arithmetic, so any optimizer can be
streamed that steps each parameter for itself: its step() is called once for each unit.
"""

import itertools
import mmap
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from minitrain.config import ParallelConfig
from minitrain.parallel.comm import Lane
from minitrain.parallel.ddp import Unit, round_up
from minitrain.storage import THREADS

_ALIGN = 64  # bytes, of a tensor in a block
_PAGES = 1 << 14  # that a thread makes at a time


def on_host(units: dict[str, Unit], cfg: ParallelConfig) -> list[str]:
    """Units whose masters and state are in host memory: spread evenly, never more than the share of all elements, and
    less by no more than a unit.
    """
    chosen, held, total = [], 0, 0
    for key, unit in units.items() if cfg.offload else ():
        total += unit.numel
        if held + unit.numel <= cfg.offload_share * total:
            chosen.append(key)
            held += unit.numel
    return chosen


def scalars_on(optimizer: torch.optim.Optimizer, param: Tensor, device: torch.device) -> torch.device:
    """Where a parameter on `device` has its scalar state, a count of steps: torch's own optimizers keep it on the host
    unless a group is fused or capturable, and would wait for a device that has it."""
    group = next((group for group in optimizer.param_groups if any(p is param for p in group["params"])), {})
    is_on_host = not group.get("fused") and group.get("capturable") is False
    return torch.device("cpu") if is_on_host else device


class HostMemory:
    """Host memory that a GPU copies from and to beside its work, until this object is gone.

    Ordinary memory, registered with CUDA: torch's own pinned tensors take up to twice their size, a power of two.
    """

    def __init__(self, device: torch.device):
        self.device, self.blocks = device, []
        if device.type == "cuda":
            end = weakref.finalize(self, _unregister, self.blocks)  # which keeps the blocks until then
            end.atexit = False

    def like(self, tensors: list[Tensor]) -> list[Tensor]:
        """Of the same shapes and dtypes, with any values, in one block."""
        ends = list(itertools.accumulate(round_up(t.nbytes, _ALIGN) for t in tensors))
        block = self._block(ends[-1]) if ends else None
        starts = [0, *ends][:-1]
        return [block[i:][: t.nbytes].view(t.dtype).view(t.shape) for i, t in zip(starts, tensors, strict=True)]

    def copy(self, tensors: list[Tensor]) -> list[Tensor]:
        """The same with their values."""
        copies = self.like(tensors)
        for copy, t in zip(copies, tensors, strict=True):
            copy.copy_(t)
        return copies

    def take(self, masters: list[nn.Parameter]) -> None:
        """They are here from now on."""
        for master, copy in zip(masters, self.copy([m.data for m in masters]), strict=True):
            master.data = copy

    def _block(self, nbytes: int) -> Tensor:
        if self.device.type != "cuda":
            return torch.empty(nbytes, dtype=torch.uint8)
        # Pages of its own, since none may be registered twice.
        pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block = torch.frombuffer(pages, dtype=torch.uint8)
        with ThreadPoolExecutor(THREADS) as pool:  # they are made when they are first written; CUDA does it in one
            list(pool.map(Tensor.zero_, block[:: mmap.PAGESIZE].split(_PAGES)))
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), nbytes, 0))
        self.blocks.append(block)
        return block


def _unregister(blocks: list[Tensor]) -> None:
    for block in blocks:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(block.data_ptr()))


class HostState:
    """Streams the masters of an optimizer and its state. On a CPU all stays where it is, on the same way.

    portions: what is stepped one after the other; one that stays on the device is empty.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, memory: HostMemory, portions: list[list[nn.Parameter]]):
        self.optimizer, self.memory, self.portions = optimizer, memory, portions
        self.device = memory.device
        self.there, self.back = Lane(self.device), Lane(self.device)
        self.homes: dict[tuple[nn.Parameter, str], Tensor] = {}  # host tensors of what is on the device, by state's key

    def step(self, step: Callable[[int], None]) -> None:
        """step(i): steps portion i, whose masters and state are then on the device."""
        portions = self.portions
        come, gone = [self._bring(portion) for portion in portions[:1]], []
        for i, portion in enumerate(portions):
            if i >= 2 and gone[i - 2]:  # three portions are on the device; else the host would send for all of them
                gone[i - 2].synchronize()
            come += [self._bring(following) for following in portions[i + 1 : i + 2]]
            self.there.wait(come[i])
            step(i)
            gone.append(self._take_back(portion))
        self.back.join()

    def wait(self) -> None:
        """Until all is back, for the host to read it."""
        torch.get_device_module(self.device).synchronize()

    def place(self) -> None:
        """State that was loaded, where step() expects it: in our memory."""
        for portion in self.portions:
            loaded = {place: t for place, t in self._tensors(portion).items() if place[1]}
            for place, copy in zip(loaded, self.memory.copy([*loaded.values()]), strict=True):
                self._put(*place, copy)

    def _bring(self, masters: list[nn.Parameter]):
        with self.there.beside():
            for place, home in self._tensors(masters).items():
                self.homes[place] = home
                self._put(*place, self._lent(self._fetch(home)))
        return self.there.mark()

    def _fetch(self, home: Tensor) -> Tensor:
        return home.to(self.device, non_blocking=True)

    def _take_back(self, masters: list[nn.Parameter]):
        tensors = self._tensors(masters)
        new = [place for place in tensors if place not in self.homes]  # the first step made them
        self.homes.update(zip(new, self.memory.like([tensors[place] for place in new]), strict=True))
        with self.back.beside():
            for place, value in tensors.items():
                home = self.homes.pop(place)
                home.copy_(value, non_blocking=True)
                self._lent(value)
                self._put(*place, home)
        return self.back.mark()

    def _tensors(self, masters: list[nn.Parameter]) -> dict[tuple[nn.Parameter, str], Tensor]:
        """The masters themselves by the key "", and their state but for scalars, which stay on the device."""
        tensors = {}
        for master in masters:
            tensors[master, ""] = master.data
            for key, value in self.optimizer.state.get(master, {}).items():
                if torch.is_tensor(value) and value.ndim:
                    tensors[master, key] = value
        return tensors

    def _put(self, master, key, value):
        if key:
            self.optimizer.state[master][key] = value
        else:
            master.data = value

    def _lent(self, t: Tensor) -> Tensor:
        """Its memory is not reused before the computation and the way back are done with it."""
        if t.is_cuda:
            t.record_stream(torch.cuda.default_stream(self.device))
            t.record_stream(self.back.stream)
        return t
