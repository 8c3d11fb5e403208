"""Master weights and optimizer state in host memory: they pass through the device unit by unit in each step.

    to the device   | unit 1 | unit 2 | unit 3 |
    the step                 | unit 1 | unit 2 | unit 3 |
    back to the host                  | unit 1 | unit 2 | unit 3 |

Rajbhandari et al. 2021, arXiv:2104.07857; here the device does the arithmetic, so any optimizer can be
streamed that steps each parameter for itself: its step() is called once for each unit.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minitrain.parallel.comm import Lane


class HostState:
    """Streams the masters of an optimizer and its state. On a CPU all stays where it is, on the same way."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.optimizer, self.device = optimizer, device
        self.pins = device.type == "cuda"
        self.there, self.back = Lane(device), Lane(device)
        self.homes: dict[tuple[nn.Parameter, str], Tensor] = {}  # host tensors of what is on the device, by state's key

    def step(self, portions: list[list[nn.Parameter]], step: Callable[[int], None]) -> None:
        """step(i): steps portion i, whose masters and state are then on the device."""
        come, gone = [self._bring(portion) for portion in portions[:1]], []
        for i, portion in enumerate(portions):
            if i >= 2 and self.pins:  # three portions are on the device; else the host would send for all of them
                gone[i - 2].synchronize()
            come += [self._bring(following) for following in portions[i + 1 : i + 2]]
            self.there.wait(come[i])
            step(i)
            gone.append(self._take_back(portion))
        self.back.join()

    def wait(self) -> None:
        """Until all is back, for the host to read it."""
        if self.pins:
            torch.cuda.synchronize(self.device)

    def place(self) -> None:
        """State that was loaded, where step() expects it: pinned, and scalars on the device."""
        for state in self.optimizer.state.values() if self.pins else ():
            for key, value in state.items():
                state[key] = value.pin_memory() if value.ndim else value.to(self.device)

    def _bring(self, masters: list[nn.Parameter]):
        with self.there.beside():
            for master in masters:
                for key, home in self._tensors(master).items():
                    self.homes[master, key] = home
                    self._put(master, key, self._lent(self._fetch(home)))
        return self.there.mark()

    def _fetch(self, home: Tensor) -> Tensor:
        return home.to(self.device, non_blocking=True)

    def _take_back(self, masters: list[nn.Parameter]):
        with self.back.beside():
            for master in masters:
                for key, value in self._tensors(master).items():
                    home = self.homes.pop((master, key), None)
                    home = torch.empty(value.shape, dtype=value.dtype, pin_memory=self.pins) if home is None else home
                    home.copy_(value, non_blocking=True)
                    self._lent(value)
                    self._put(master, key, home)
        return self.back.mark()

    def _tensors(self, master) -> dict[str, Tensor]:
        """The master itself by the key "", and its state but for scalars, which stay on the device."""
        state = {k: v for k, v in self.optimizer.state.get(master, {}).items() if torch.is_tensor(v) and v.ndim}
        return {"": master.data, **state}

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
