"""Speed and memory of the training step itself: random weights, made-up tokens, everything of a step inside the time.

    python tools/bench_step.py --config configs/qwen3_0.6b.toml [--documents 4096 | 64:8192] [--section.key value ...]
    python tools/bench_step.py --config configs/qwen3_30b_a3b.toml --model.num_hidden_layers 6 [--balanced]
    torchrun --nproc-per-node 4 tools/bench_step.py --config configs/qwen3_8b.toml --parallel.zero 3

--documents: every document of this length (default: data.max_seqlen), or lengths drawn log-uniformly from a range.
--balanced: all experts of a layer get as many rows, whatever the router chose (its own load is what the meter shows).
--profile FILE.json: keep the trace, for chrome://tracing or ui.perfetto.dev.

It runs minitrain's own train() and reads its metrics; the first third of the steps is warm-up. It takes 30 steps of
one row a rank unless told otherwise. Prints one row of a table, with the figures that minitrain/metrics.py defines and
the peak that minitrain/plan.py predicts.
On GPUs it profiles two more steps, and prints what they spend their time on; on one GPU beside the floor of each part
(step_parts.py), on several with a row for each kind of collective: bytes that a rank's links carry (as nccl-tests
counts them), the bandwidth that this makes, and in how much of the time other kernels ran, too; in a pipeline also the
bubble that its schedule has.
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
from step_parts import communicates, floors, measure_ceilings, part_rows, part_times, parts_of_launches

import minitrain as mt
from minitrain.config import Config, UserError, exit_with, load_config, take_config
from minitrain.hf import default_config
from minitrain.models import build_model
from minitrain.models.qwen3_moe import Experts
from minitrain.parallel import compute_dtype
from minitrain.parallel.mesh import Mesh, init_mesh, leave
from minitrain.parallel.pp import bubble
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


def bench(cfg: Config, documents: str, mesh: Mesh, balanced: bool, trace: Path) -> tuple[dict, list[dict], float]:
    """-> medians over the later two thirds of a run's steps; of two steps after it the events, which are also written
    to `trace`, and the (query, key) pairs of one of them. Rank 0 alone has them.
    """
    cfg.train.steps += _PROFILED + 1  # the first of them lets the profiler start
    profiler = torch.profiler.profile()
    synchronize = torch.get_device_module(mesh.device).synchronize
    pairs = []  # of each step

    def data():
        for step, batches in enumerate(made_up_rows(cfg, documents, mesh)):
            pairs.append(sum(batch.num_pairs for batch in batches))
            if step == cfg.train.steps - _PROFILED:
                synchronize()
                profiler.start()
            yield batches

    model = build_model(cfg.model)
    if balanced:
        balance(model)
    mt.train(cfg, model=model, data=data())
    synchronize()
    profiler.stop()
    if mesh.rank > 0:
        return {}, [], 0
    profiler.export_chrome_trace(str(trace))
    rows = [json.loads(line) for line in (Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()]
    rows = rows[len(rows) // 3 : -_PROFILED - 1]
    numbers = [key for key in rows[-1] if isinstance(rows[-1][key], int | float)]
    medians = {key: statistics.median(row[key] for row in rows) for key in numbers}
    return medians, json.loads(trace.read_text())["traceEvents"], sum(pairs[-_PROFILED:]) / _PROFILED


def balance(model: torch.nn.Module) -> None:
    """Give each expert as many rows as the others, those that lie in its place; the router does all its work still."""
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    if not experts:
        raise UserError(f"--balanced: {type(model).__name__} has no experts")
    for module in experts:
        module.register_forward_pre_hook(_with_even_counts)


def _with_even_counts(_module, args):
    x_RD, counts_E = args
    ends_E = torch.arange(len(counts_E) + 1, device=counts_E.device) * len(x_RD) // len(counts_E)
    return x_RD, ends_E.diff()


def communication(events: list[dict], steps: int) -> list[dict]:
    """Events of a Chrome trace by torch.profiler -> one step's copies between GPUs, and NCCL kernels of each kind."""
    part_of = parts_of_launches(events)
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy")]
    others = _union([(e["ts"], e["ts"] + e["dur"]) for e in kernels if not communicates(e, part_of)])
    kinds: dict[str, list[dict]] = {}
    for e in (e for e in kernels if communicates(e, part_of)):
        if e["cat"] == "gpu_memcpy":
            kinds.setdefault("copies", []).append(e)
        elif "Collective name" in e["args"]:
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
    if kind == "copies":
        return args["bytes"]
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
    parser.add_argument("--balanced", action="store_true")
    parser.add_argument("--profile", metavar="FILE.json")
    options, flags = parser.parse_known_args(flags)
    with tempfile.TemporaryDirectory() as folder:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        defaults = ["--train.steps=30", "--train.log_every=5", f"--data.rows_per_step={ranks}"]
        fixed = ["--checkpoint.every=0", "--checkpoint.export=false", f"--run_dir={folder}"]
        cfg = load_config(path, [*defaults, *flags, *fixed], default_config)
        documents = options.documents or str(cfg.data.max_seqlen)
        if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", documents):
            raise UserError(f"--documents {documents}: give a length, or two as 64:8192")
        trace = Path(options.profile or f"{folder}/trace.json")
        if trace.suffix != ".json" or not trace.parent.is_dir():
            raise UserError(f"--profile {trace}: give a file whose name ends in .json, in a folder that is there")
        mesh = init_mesh(cfg.train.device, cfg.parallel, cfg.model)
        result, events, pairs = bench(cfg, documents, mesh, options.balanced, trace)
    if mesh.rank > 0:
        return
    where = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "CPU"
    where += f" x {mesh.size}, zero {cfg.parallel.zero}" if mesh.size > 1 else ""
    predicted = predict_memory(cfg, mesh.size)
    what = f"{cfg.model.type}, documents {documents}" + (", balanced" if options.balanced else "")
    print(f"\n{where}, torch {torch.__version__}, {what}")
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
    if times := part_times(events, _PROFILED):
        _print_parts(times, cfg, mesh, pairs)
    if collectives := communication(events, _PROFILED):
        _print_table(collectives)
    if (stages := mesh.group("pp").size) > 1:
        rows, axes = cfg.data.rows_per_step // mesh.dp_size, cfg.parallel
        waits = bubble(axes.pp_schedule, stages, rows, axes.pp_parts)
        print(f"\nbubble: by the schedule a stage waits in {waits:.1%} of a step; the first one's is in idle")


def _print_parts(times, cfg, mesh, pairs):
    least = {}
    if mesh.size == 1:
        dtype = compute_dtype(mesh, cfg.train)
        ceilings = measure_ceilings(mesh.device, dtype)
        least = floors(cfg, pairs, ceilings, dtype.itemsize)
        print(f"\nceilings: matrix product {ceilings.flops / 1e12:,.0f} TFLOP/s, copy {ceilings.bytes / 1e9:,.0f} GB/s")
    _print_table(part_rows(times, least))


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
