"""Speed and memory of the training step itself: random weights, made-up tokens, everything of a step inside the time.

    python tools/bench_step.py --config configs/qwen3_0.6b.toml [--documents 4096 | 64:8192] [--section.key value ...]
    torchrun --nproc-per-node 4 tools/bench_step.py --config configs/qwen3_8b.toml --parallel.zero 3

--documents: every document of this length (default: data.max_seqlen), or lengths drawn log-uniformly from a range.
It runs minitrain's own train() and reads its metrics; the first third of the steps is warm-up. It takes 30 steps of
one row a rank unless told otherwise. Prints one row of a table, with the figures that minitrain/metrics.py defines and
the peak that minitrain/plan.py predicts.
On several GPUs it profiles two more steps, and prints a row for each kind of collective: bytes that a rank's links
carry (as nccl-tests counts them), the bandwidth that this makes, and in how much of the time other kernels ran, too.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import minitrain as mt
from minitrain.config import Config, UserError, exit_with, load_config, take_config
from minitrain.hf import default_config
from minitrain.parallel.mesh import Mesh, init_mesh, leave
from minitrain.plan import predict_memory

_PROFILED = 2  # steps


def made_up_rows(cfg: Config, documents: str, mesh: Mesh) -> Iterator[list[mt.Batch]]:
    """This rank's rows of random tokens in documents of made-up lengths, new ones every step."""
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    low, _, high = documents.partition(":")
    low, high = int(low), int(high or low)
    T = cfg.data.tokens_per_row

    def lengths():
        drawn = []
        while sum(drawn) < T:
            length = round(low * (high / low) ** torch.rand(1, generator=generator).item())
            drawn.append(min(length, T - sum(drawn)))
        return drawn

    per_step = cfg.data.rows_per_step // mesh.dp_size
    rows = [lengths() for _ in range(cfg.train.steps * per_step)]
    fullest = max(map(len, rows))  # cu_seqlens of one size, as the data loader makes them

    def batch(lengths):
        tokens = torch.randint(0, cfg.model.vocab_size, (T,), generator=generator)
        row = mt.Batch.pack(list(tokens.split(lengths)), max_seqlen=high)
        row.cu_seqlens_q = row.cu_seqlens_k = F.pad(row.cu_seqlens_q, (0, fullest - len(lengths)), value=T)
        return (row.pin_memory() if mesh.device.type == "cuda" else row).to(mesh.device)

    for step in range(cfg.train.steps):
        yield [batch(row) for row in rows[step * per_step :][:per_step]]


def bench(cfg: Config, documents: str, mesh: Mesh) -> tuple[dict, list[dict]]:
    """-> medians over the later two thirds of a run's steps, and what communication() makes of two steps after it."""
    is_profiled = mesh.size > 1 and mesh.device.type == "cuda"
    cfg.train.steps += _PROFILED + 1 if is_profiled else 0  # the first of them lets the profiler start
    profiler = torch.profiler.profile() if is_profiled else None
    trace = Path(cfg.run_dir) / "trace.json"

    def on_step(step, model, extras):
        left = cfg.train.steps - step
        if left == _PROFILED:
            torch.cuda.synchronize()
            profiler.start()
        elif left == 0:
            torch.cuda.synchronize()
            profiler.stop()
            profiler.export_chrome_trace(str(trace))

    mt.train(cfg, data=made_up_rows(cfg, documents, mesh), on_step=on_step if is_profiled else None)
    if mesh.rank > 0:
        return {}, []
    rows = [json.loads(line) for line in (Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()]
    rows = rows[len(rows) // 3 : -_PROFILED - 1 if is_profiled else None]
    numbers = [key for key in rows[-1] if isinstance(rows[-1][key], int | float)]
    events = json.loads(trace.read_text())["traceEvents"] if is_profiled else []
    return {key: statistics.median(row[key] for row in rows) for key in numbers}, communication(events, _PROFILED)


def communication(events: list[dict], steps: int) -> list[dict]:
    """Events of a Chrome trace by torch.profiler -> for each kind of NCCL kernel, what it did in one step."""
    kernels = [e for e in events if e.get("cat") == "kernel"]
    others = _union([(e["ts"], e["ts"] + e["dur"]) for e in kernels if not e["name"].startswith("nccl")])
    kinds: dict[str, list[dict]] = {}
    for e in kernels:
        if e["name"].startswith("nccl") and "Collective name" in e["args"]:
            kinds.setdefault(re.sub(r".*Kernel_([A-Za-z]+).*", r"\1", e["name"]), []).append(e)
    rows = []
    for kind, of_kind in sorted(kinds.items()):
        time_us = sum(e["dur"] for e in of_kind)
        hidden_us = sum(_overlap((e["ts"], e["ts"] + e["dur"]), others) for e in of_kind)
        sent = sum(_bus_bytes(kind, e["args"]) for e in of_kind)
        rows.append({
            "collective": kind,
            "a step": f"{len(of_kind) / steps:.0f}",
            "MB": f"{sent / steps / 1e6:,.0f}",
            "ms": f"{time_us / steps / 1e3:.1f}",
            "GB/s": f"{sent / time_us / 1e3:.0f}",
            "hidden": f"{hidden_us / time_us:.0%}",
        })  # fmt: skip
    return rows


def _bus_bytes(kind, args) -> float:
    """github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md: what links can be measured by, whatever the algorithm."""
    width = {"Float": 4, "BFloat16": 2, "Half": 2, "Double": 8, "Long": 8, "Int": 4}.get(args["dtype"], 1)
    n = args["Group size"]
    return max(args["In msg nelems"], args["Out msg nelems"]) * width * (n - 1) / n * (2 if kind == "AllReduce" else 1)


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _overlap(span: tuple[float, float], union: list[tuple[float, float]]) -> float:
    return sum(max(0, min(span[1], end) - max(span[0], start)) for start, end in union)


def main() -> None:
    path, flags = take_config(sys.argv[1:])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--documents", help="length, or shortest:longest")
    options, flags = parser.parse_known_args(flags)
    with tempfile.TemporaryDirectory() as folder:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        defaults = ["--train.steps=30", "--train.log_every=5", f"--data.rows_per_step={ranks}"]
        fixed = ["--checkpoint.every=0", "--checkpoint.export=false", f"--run_dir={folder}"]
        cfg = load_config(path, [*defaults, *flags, *fixed], default_config)
        documents = options.documents or str(cfg.data.max_seqlen)
        if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", documents):
            raise UserError(f"--documents {documents}: give a length, or two as 64:8192")
        mesh = init_mesh(cfg.train.device, cfg.parallel, cfg.model)
        result, collectives = bench(cfg, documents, mesh)
    if mesh.rank > 0:
        return
    where = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "CPU"
    where += f" x {mesh.size}, zero {cfg.parallel.zero}" if mesh.size > 1 else ""
    predicted = predict_memory(cfg, mesh.size)
    print(f"\n{where}, torch {torch.__version__}, {cfg.model.type}, documents {documents}")
    columns = {
        "tokens a step": f"{cfg.data.rows_per_step} x {cfg.data.tokens_per_row:,}",
        "tokens/s a GPU": f"{result['tokens_per_s'] / mesh.size:,.0f}",
        "ms a step": f"{result['step_ms']:,.1f}",
        "TFLOP/s (C)": f"{result['tflops_c']:.1f}",
        "MFU C": f"{result['mfu_c']:.1%}" if "mfu_c" in result else "-",
        "MFU F": f"{result['mfu_f']:.1%}" if "mfu_f" in result else "-",
        "HFU": f"{result['hfu']:.1%}" if "hfu" in result else "-",
        "peak GiB": f"{result['peak_gib']:.1f}" if "peak_gib" in result else "-",
        "predicted": f"{predicted.peak / 2**30:.1f}",
        "data wait ms": f"{result['data_wait_ms']:.2f}",
    }
    _print_table([columns])
    print(f"\npredicted GiB: {predicted.table()}")
    if collectives:
        _print_table(collectives)


def _print_table(rows: list[dict[str, str]]) -> None:
    print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    try:
        main()
        leave()
    except UserError as error:
        exit_with(error)
