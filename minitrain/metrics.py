"""What a run says of itself: metrics.jsonl, validation.jsonl, a progress bar, and a meter that counts honestly.

FLOPs per trained step, for tokens/s to be turned into model FLOPs utilisation (MFU) of the device's dense bf16 peak:
    C    6 * N * tokens + 6 * L * H * C * pairs     causal half of attention; pairs = sum of squared document lengths
    F    6 * N * tokens + 12 * L * H * C * pairs    attention as if it were full, as many trainers print it
    HFU  C plus the forward of the blocks that recomputation runs again
N: parameters in matrices that a token goes through: the head, not the embedding's look-up; of experts, the active ones.
Those that are frozen count 4 times, not 6: their own gradient is not computed. Padding is neither tokens nor pairs.
Device values are kept on the device until a line on the console is due; they are then fetched while the next step is
queued, so that the device never waits for the host.
"""

import contextlib
import errno
import json
import logging
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minitrain.batch import Batch
from minitrain.boxes import part_of
from minitrain.config import TrainConfig, UserError
from minitrain.parallel.mesh import Mesh
from minitrain.parallel.window import bytes_of_windows

log = logging.getLogger(__name__)

PEAK_TFLOPS = {  # dense bf16, by the vendors' data sheets; the first whose words are in the device's name counts
    "H200 NVL": 835,
    "H200": 989,
    "GH200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H20": 148,
    "H800": 989,
    "GB200": 2500,
    "B200": 2250,
    "B300": 2250,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A10": 125,
    "A6000": 155,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 6000 Ada": 364,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "V100": 125,
}


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device, None if it is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


@dataclass(frozen=True)
class Flops:
    """Training FLOPs of a model: matrices per token (on a stage those that it has), attention per (query, key) pair."""

    blocks: int  # parameters in the blocks' matrices that a token goes through
    head: int  # parameters of the head
    attention: int  # L * H * C
    frozen: int = 0  # of the parameters in blocks and head

    @classmethod
    def of(cls, model: nn.Module) -> "Flops":
        cfg = model.config

        def active(matrices: list[nn.Parameter]) -> int:
            stacked = sum(_numel(p) for p in matrices if p.ndim == 3)
            experts = stacked * cfg.num_experts_per_tok // cfg.num_experts if stacked else 0
            return sum(_numel(p) for p in matrices if p.ndim == 2) + experts

        blocks = [p for p in model.layers.parameters() if p.ndim > 1]
        head = [model.lm_head.weight] if model.lm_head is not None else []
        attention = cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim
        return cls(active(blocks), active(head), attention, active([p for p in blocks + head if not p.requires_grad]))

    def causal(self, tokens: int, pairs: int) -> float:
        """C."""
        return (6 * (self.blocks + self.head) - 2 * self.frozen) * tokens + 6 * self.attention * pairs

    def full(self, tokens: int, pairs: int) -> float:
        """F."""
        return self.causal(tokens, pairs) + 6 * self.attention * pairs

    def hardware(self, tokens: int, pairs: int, recompute: str) -> float:
        """C and what recomputation adds."""
        again = 2 * self.blocks * tokens if recompute in ("block", "full") else 0
        again += 2 * self.attention * pairs if recompute == "full" else 0
        return self.causal(tokens, pairs) + again


def _numel(p: nn.Parameter) -> int:
    """Of the whole one, where ranks have parts."""
    return part_of(p).shape.numel()


class Log:
    """`with Log(...) as log`: one line a step in metrics.jsonl, and every log_every steps one on the console.

    Lines are written when one on the console is due, with the next step queued behind it (after the last step at once);
    speeds in them, and its loss, are means since the one before. On several ranks, rank 0 writes and prints; but for
    tokens_per_s, of all, speeds and expert loads are its own.
    Raises FloatingPointError if a loss or gradient norm is no number; the weights are then those before that step.
    """

    def __init__(self, run_dir: Path, cfg: TrainConfig, model: nn.Module, mesh: Mesh, first: int):
        self.run_dir, self.first = run_dir, first
        self.unwritten = {"metrics.jsonl": b"", "validation.jsonl": b""}  # what a full disk refused
        self.cfg, self.model, self.device = cfg, model, mesh.device
        self.writes, self.ranks = mesh.rank == 0, mesh.dp_size
        self.ranks_of_a_row = mesh.ranks_of_a_row
        flops = Flops.of(model)
        matrices = {name: mesh.sum_stages(getattr(flops, name)) for name in ("blocks", "head", "frozen")}
        self.flops = replace(flops, **matrices)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.peak = peak_tflops(name)
        self.fetched: _Window | None = None  # which the device may not have ended
        total = mesh.sum_stages(sum(_numel(p) for p in model.parameters() if not mesh.is_second_copy(p)))
        active = self.flops.blocks + self.flops.head
        log.info("%s: %.4g M parameters, %.4g M in matrices for each token; %s", type(model).__name__, total / 1e6,
                 active / 1e6, name)  # fmt: skip

    def __enter__(self) -> "Log":
        if self.writes:
            for path in (self.run_dir / name for name in self.unwritten):
                if self.first == 0 and path.exists() and path.stat().st_size:
                    log.info("%s: of a run that left no checkpoint; it is %s.old now", path, path.name)
                    path.rename(f"{path}.old")
                _cut_lines(path, self.first)
            (self.run_dir / "metrics.jsonl").touch()
        quiet = None if self.writes else True  # None: where there is no terminal
        self.bar = tqdm(total=self.cfg.steps, initial=self.first, unit="step", disable=quiet, dynamic_ncols=True)
        self._start_window()
        return self

    def __exit__(self, failed, *_):
        if failed in (KeyboardInterrupt, SystemExit):
            self.flush()
        elif failed and self.fetched and self.fetched.end.is_over():  # what failed may have stopped the device
            self._write()
        for name in [name for name, rest in self.unwritten.items() if rest]:
            self._append(name, [])
        self.bar.close()

    def wait_for(self, data: Iterator[list[Batch]]) -> list[Batch]:
        """next(data), and how long that took."""
        begin = time.perf_counter()
        batches = next(data, None)
        if batches is None:
            self.flush()
            raise UserError(f"the data ended before step {self.cfg.steps}")
        self.data_wait += time.perf_counter() - begin
        return batches

    @contextlib.contextmanager
    def pause(self):
        """Write what waits; then what happens inside is no part of the step."""
        self.flush()
        yield
        self._start_window()

    def _start_window(self):
        self.waiting, self.data_wait, self.begin = [], 0.0, _Moment(self.device)

    def step(
        self, step: int, batches: list[Batch], trained: int, loss: Tensor, norm: Tensor, lr: float,
        extras: dict[str, Tensor],
    ):  # fmt: skip
        """After `step` steps: loss and extras are means over trained tokens, of all ranks as `trained` is."""
        self._write()
        row = {"step": step, "lr": lr, "trained_tokens": trained}
        padding, pairs = sum(b.num_padding for b in batches), sum(b.num_pairs for b in batches)
        tokens = sum(len(b.tokens) for b in batches) - padding
        row["padding"] = padding / (tokens + padding)
        self.waiting.append((row, tokens, pairs, {"loss": loss, "grad_norm": norm, **extras}))
        self.bar.update()
        if step == self.cfg.steps:
            self.flush()
        elif step % self.cfg.log_every == 0:
            self._fetch()

    def validation(self, step: int, results: list[dict]) -> None:
        """A line for each source in validation.jsonl and on the console."""
        if not self.writes:
            return
        self._append("validation.jsonl", [{"step": step, **r} for r in results])
        for r in results:
            self.bar.write(
                f"step {step:>6}  validation loss {r['loss']:.4f}  perplexity {r['perplexity']:.4g}  of {r['source']}"
                f", {r['trained_tokens']:,} tokens"
            )

    def flush(self) -> None:
        """Read the waiting values off the device, write their lines, print the last."""
        self._write()
        self._fetch()
        self._write()

    def _fetch(self) -> None:
        """Ask the device for what waits."""
        if not self.waiting:
            return
        scalars = torch.stack([v.detach().float() for *_, scalars in self.waiting for v in scalars.values()])
        values = [t.to("cpu", non_blocking=True) for t in (scalars, self._expert_load())]
        end = _Moment(self.device)
        self.fetched = _Window(self.waiting, self.data_wait, *values, self.begin, end)
        self.waiting, self.data_wait, self.begin = [], 0.0, end

    def _write(self) -> None:
        """What was fetched, once the device has it."""
        if self.fetched is None:
            return
        window, self.fetched = self.fetched, None
        seconds = window.end.seconds_since(window.begin)
        speed, values = self._speed(window, seconds), iter(window.scalars.tolist())
        rows = [row | {name: next(values) for name in scalars} | speed for row, _, _, scalars in window.steps]
        if len(window.load):
            rows[-1]["expert_load"] = window.load.double().mul(100).round().div(100).tolist()
        self._append("metrics.jsonl", rows)
        for row in rows:
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                raise FloatingPointError(
                    f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}; "
                    "the weights are those before this step"
                )
        if self.writes:
            loss = sum(row["loss"] for row in rows) / len(rows)  # of one step alone it jumps too much to be watched
            self.bar.write(_console_line(rows[-1] | {"loss": loss}))

    def _append(self, name: str, rows: list[dict]) -> None:
        """Lines to a file; those that a full disk refuses are kept until there is room."""
        if not self.writes:
            return
        self.unwritten[name] += "".join(json.dumps(_without_nan(row)) + "\n" for row in rows).encode()
        try:
            with open(self.run_dir / name, "ab", buffering=0) as file:
                while rest := self.unwritten[name]:
                    self.unwritten[name] = rest[file.write(rest) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            log.warning("%s: %s; its lines wait for room", self.run_dir / name, error.strerror)

    def _speed(self, window: "_Window", seconds: float) -> dict:
        steps = len(window.steps)
        tokens, pairs = sum(n for _, n, _, _ in window.steps), sum(n for _, _, n, _ in window.steps)
        mine = tokens / self.ranks_of_a_row, pairs / self.ranks_of_a_row
        flops = {
            "mfu_c": self.flops.causal(*mine),
            "mfu_f": self.flops.full(*mine),
            "hfu": self.flops.hardware(*mine, self.cfg.recompute),
        }
        speed = {"tokens_per_s": self.ranks * tokens / seconds, "step_ms": 1000 * seconds / steps}
        speed |= {"data_wait_ms": 1000 * window.data_wait / steps, "tflops_c": flops["mfu_c"] / seconds / 1e12}
        if self.peak:
            speed |= {name: value / seconds / 1e12 / self.peak for name, value in flops.items()}
        if self.device.type == "cuda":
            speed["peak_gib"] = (torch.cuda.max_memory_allocated(self.device) + bytes_of_windows()) / 2**30
        return speed

    def _expert_load(self) -> Tensor:
        """(L, E): for each layer with experts, rows that each got since the last line, relative to balance (1.0)."""
        loads = [m.load for m in self.model.modules() if isinstance(getattr(m, "load", None), Tensor)]
        if not loads:
            return torch.empty(0)
        loads_LE = torch.stack(loads).float()
        for load in loads:
            load.zero_()
        return loads_LE / loads_LE.mean(1, keepdim=True).clamp(min=1e-9)


class _Moment:
    """When the device has done what was queued so far, by its own clock: the host may be ahead of it, or come late."""

    def __init__(self, device: torch.device):
        self.host = time.perf_counter()
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record()

    def is_over(self) -> bool:
        return self.event is None or self.event.query()

    def seconds_since(self, earlier: "_Moment") -> float:
        """Waits for this moment."""
        if self.event is None:
            return self.host - earlier.host
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


@dataclass
class _Window:
    """Steps between two lines on the console; scalars (n,) of all and load (L, E) are on the host once it has ended."""

    steps: list[tuple[dict, int, int, dict[str, Tensor]]]  # row, tokens, pairs, scalars on the device
    data_wait: float
    scalars: Tensor
    load: Tensor
    begin: _Moment
    end: _Moment


def _cut_lines(path: Path, step: int) -> None:
    """Of a file of JSON lines, leave those of the first `step` steps: no later ones, none that was being written, and
    none from a damaged one on."""
    if path.exists():
        end = 0
        with open(path, "rb+") as file:
            while _step_of(file.readline()) <= step:
                end = file.tell()
            file.truncate(end)


def _step_of(line: bytes) -> float:
    """Infinity if the line is not whole, as after a crash of the machine."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _without_nan(row) -> dict:
    """JSON has no NaN and no infinity: null stands for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _console_line(row) -> str:
    text = f"step {row['step']:>6}  loss {row['loss']:.4f}  norm {row['grad_norm']:.2f}  lr {row['lr']:.2e}"
    text += f"  {row['tokens_per_s']:,.0f} tokens/s  {row['tflops_c']:.3g} TFLOP/s"
    if "mfu_c" in row:
        text += f"  MFU {row['mfu_c']:.1%} (full attention {row['mfu_f']:.1%}, hardware {row['hfu']:.1%})"
    text += f"  data {row['data_wait_ms']:.1f} ms"
    if "peak_gib" in row:
        text += f"  {row['peak_gib']:.1f} GiB"
    if "expert_load" in row:
        text += f"  busiest expert {max(map(max, row['expert_load'])):.1f}x"
    return text
