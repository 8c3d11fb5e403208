"""How fast a run's state is saved and loaded, beside what dd does on the same disk, and how long a save holds the step.

    python tools/bench_checkpoint.py --config configs/qwen3_0.6b.toml [--folder FOLDER] [--section.key value ...]
    torchrun --nproc-per-node 4 tools/bench_checkpoint.py --config configs/qwen3_8b.toml --parallel.zero 3

--folder: on the disk that is measured (default: where temporary files are). Three times a checkpoint has to fit.

It takes minitrain's own steps on made-up tokens, one row a rank unless told otherwise, and saves as train() does.

    memory         for the copies: made once a run, beside its first steps; here none run meanwhile
    save 1, 2      held: what save() and the step after it take, less the median of 5 steps before; of the whole save
    verify, load   with nothing of it in the page cache; every byte is read and checked, then loaded into the same state
    dd             as many bytes with O_DIRECT, 16 MiB at a time, a process a rank, synced
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_step import made_up_rows

from minitrain.checkpoint import Checkpointer
from minitrain.config import Config, UserError, exit_with, load_config, take_config
from minitrain.hf import default_config
from minitrain.models import build_model, load_object
from minitrain.optim import adamw
from minitrain.parallel import parallelize
from minitrain.parallel.comm import gather_objects
from minitrain.parallel.mesh import Mesh, init_mesh, leave
from minitrain.parallel.zero import MasterOptimizer, shard_optimizer
from minitrain.pieces import Saved
from minitrain.train import forward_backward, set_weights

_TIMED = 5  # steps
_DD = ["bs=16M", "status=none"]


class Bench:
    """A run's state, and the clock: seconds of the slowest rank."""

    def __init__(self, cfg: Config, mesh: Mesh):
        self.cfg, self.mesh = cfg, mesh
        self.model = parallelize(build_model(cfg.model), mesh, cfg.train)
        fill = set_weights(self.model, cfg, mesh)
        self.opt: MasterOptimizer = shard_optimizer(self.model, adamw(cfg.optim), mesh, cfg.parallel, fill)
        self.data = made_up_rows(cfg, str(cfg.data.max_seqlen), mesh)
        self.loss_fn = load_object(cfg.train.loss)

    def seconds(self, do: Callable) -> float:
        synchronize = torch.get_device_module(self.mesh.device).synchronize
        self.mesh.sum(0)
        synchronize()
        start = time.perf_counter()
        do()
        synchronize()
        return max(gather_objects(time.perf_counter() - start, self.mesh.group("world")))

    def step(self, ckpt: Checkpointer) -> None:
        """As train() takes it."""
        forward_backward(self.model, next(self.data), self.loss_fn, 1e-6, self.mesh, self.opt.backward)
        self.opt.clip_grad_norm(1.0)
        ckpt.before_step()
        self.opt.step(1e-6)

    def save(self, ckpt: Checkpointer, number: int) -> tuple[float, float]:
        """-> seconds that a save takes, and those of it and the step after it."""

        def save_and_step():
            ckpt.save(number)
            ended.append(ckpt.thread.submit(time.perf_counter))  # its turn comes when the save has ended
            self.step(ckpt)

        ended, start = [], time.perf_counter()
        step_s = self.seconds(save_and_step)
        return ended[0].result() - start, step_s

    def run(self) -> dict[str, tuple[float, float | None]]:
        """-> of each row of the table: seconds, and how many of them the step was held."""
        path = Path(self.cfg.run_dir) / f"dd-{self.mesh.rank}"
        with Checkpointer(self.cfg, self.opt, itertools.repeat(None), self.mesh) as ckpt:
            for _ in range(2):  # the first makes the optimizer's state, before the second memory is asked for
                self.step(ckpt)
            rows = {"memory": (self.seconds(ckpt.wait), None)}
            calm_s = statistics.median(self.seconds(lambda: self.step(ckpt)) for _ in range(_TIMED))
            self.bytes = sum(p.values.shape.numel() * p.values.dtype.itemsize for p in self.opt.pieces().values())
            rows["dd write"] = self.seconds(lambda: dd_write(path, self.bytes)), None
            for number in (1, 2):
                save_s, step_s = self.save(ckpt, number)
                rows[f"save {number}"] = save_s, step_s - calm_s
            rows["dd read"] = self.seconds(lambda: dd_read(path)), None
            saved, file = Saved(ckpt.folder / "latest"), f"rank-{self.mesh.rank:05}.safetensors"
            forget(saved.folder / file)
            rows["verify"] = self.seconds(lambda: saved.verify(self.mesh.rank, self.mesh.size)), None
            forget(saved.folder / file)
            rows["verify, load"] = self.seconds(ckpt.resume), None
        return rows


def dd_write(path: Path, size: int) -> None:
    amount = [f"count={size}", "iflag=count_bytes"]
    subprocess.run(["dd", "if=/dev/zero", f"of={path}", *amount, *_DD, "oflag=direct", "conv=fsync"], check=True)


def dd_read(path: Path) -> None:
    subprocess.run(["dd", f"if={path}", "of=/dev/null", *_DD, "iflag=direct"], check=True)


def forget(path: Path) -> None:
    """What the page cache has of a file."""
    with open(path) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(rows: dict[str, tuple[float, float | None]], size: int) -> str:
    """size: bytes of all ranks together."""
    lines = ["| | s | GB/s | of dd | held s | held |", "|---|---|---|---|---|---|"]
    for name, (took, held) in rows.items():
        beside = {"s": "dd write", "v": "dd read"}.get(name[0])
        of_dd = f"{rows[beside][0] / took:.0%}" if beside else "-"
        holding = "- | -" if held is None else f"{held:.3f} | {held / took:.1%}"
        lines.append(f"| {name} | {took:.2f} | {size / took / 1e9:.2f} | {of_dd} | {holding} |")
    return "\n".join(lines)


def main() -> None:
    path, flags = take_config(sys.argv[1:])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir())
    options, flags = parser.parse_known_args(flags)
    rows_per_step = f"--data.rows_per_step={os.environ.get('WORLD_SIZE', 1)}"
    fixed = ["--checkpoint.keep=2", f"--train.steps={2 + _TIMED + 2}"]
    cfg = load_config(path, [rows_per_step, *flags, *fixed], default_config)
    mesh = init_mesh(cfg.train.device, cfg.parallel, cfg.model)
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        cfg.run_dir = gather_objects(own, mesh.group("world"))[0]
        bench = Bench(cfg, mesh)
        rows = bench.run()
        size = sum(gather_objects(bench.bytes, mesh.group("world")))
    if mesh.rank == 0:
        where = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "CPU"
        about = f"torch {torch.__version__}, {cfg.model.type}, zero {cfg.parallel.zero}, {size / 1e9:.2f} GB"
        print(f"\n{where} x {mesh.size}, {about}, in {options.folder}")
        print("\n" + table(rows, size))


if __name__ == "__main__":
    try:
        main()
        leave()
    except (UserError, OSError, subprocess.CalledProcessError) as error:
        exit_with(error)
