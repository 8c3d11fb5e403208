"""Speed and memory of the training step itself: random weights, made-up tokens, everything of a step inside the time.

    python tools/bench_step.py --config configs/qwen3_0.6b.toml [--documents 4096 | 64:8192] [--section.key value ...]

--documents: every document of this length (default: data.max_seqlen), or lengths drawn log-uniformly from a range.
It runs minitrain's own train() and reads its metrics; the first third of the steps is warm-up. It takes 30 steps of
one row unless told otherwise.
Prints one row of a table, with the figures that minitrain/metrics.py defines.
"""

import argparse
import json
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
from minitrain.parallel.mesh import init_mesh


def made_up_rows(cfg: Config, documents: str, device: torch.device) -> Iterator[list[mt.Batch]]:
    """Rows of random tokens in documents of made-up lengths, new ones every step."""
    generator = torch.Generator().manual_seed(0)
    low, _, high = documents.partition(":")
    low, high = int(low), int(high or low)
    T = cfg.data.tokens_per_row

    def lengths():
        drawn = []
        while sum(drawn) < T:
            length = round(low * (high / low) ** torch.rand(1, generator=generator).item())
            drawn.append(min(length, T - sum(drawn)))
        return drawn

    rows = [lengths() for _ in range(cfg.train.steps * cfg.data.rows_per_step)]
    fullest = max(map(len, rows))  # cu_seqlens of one size, as the data loader makes them

    def batch(lengths):
        tokens = torch.randint(0, cfg.model.vocab_size, (T,), generator=generator)
        row = mt.Batch.pack(list(tokens.split(lengths)), max_seqlen=high)
        row.cu_seqlens_q = row.cu_seqlens_k = F.pad(row.cu_seqlens_q, (0, fullest - len(lengths)), value=T)
        return (row.pin_memory() if device.type == "cuda" else row).to(device)

    for step in range(cfg.train.steps):
        yield [batch(row) for row in rows[step * cfg.data.rows_per_step :][: cfg.data.rows_per_step]]


def bench(cfg: Config, documents: str) -> dict:
    """The medians over the later two thirds of a run's steps."""
    device = init_mesh(cfg.train.device).device
    mt.train(cfg, data=made_up_rows(cfg, documents, device))
    rows = [json.loads(line) for line in (Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()]
    rows = rows[len(rows) // 3 :]
    numbers = [key for key in rows[-1] if isinstance(rows[-1][key], int | float)]
    return {key: statistics.median(row[key] for row in rows) for key in numbers}


def main() -> None:
    path, flags = take_config(sys.argv[1:])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--documents", help="length, or shortest:longest")
    options, flags = parser.parse_known_args(flags)
    with tempfile.TemporaryDirectory() as folder:
        defaults = ["--train.steps=30", "--train.log_every=5", "--data.rows_per_step=1"]
        fixed = ["--checkpoint.every=0", "--checkpoint.export=false", f"--run_dir={folder}"]
        cfg = load_config(path, [*defaults, *flags, *fixed], default_config)
        documents = options.documents or str(cfg.data.max_seqlen)
        if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", documents):
            raise UserError(f"--documents {documents}: give a length, or two as 64:8192")
        result = bench(cfg, documents)
    where = torch.cuda.get_device_name() if init_mesh(cfg.train.device).device.type == "cuda" else "CPU"
    print(f"\n{where}, torch {torch.__version__}, {cfg.model.type}, documents {documents}")
    columns = {
        "tokens a step": f"{cfg.data.rows_per_step} x {cfg.data.tokens_per_row:,}",
        "tokens/s": f"{result['tokens_per_s']:,.0f}",
        "ms a step": f"{result['step_ms']:,.1f}",
        "TFLOP/s (C)": f"{result['tflops_c']:.1f}",
        "MFU C": f"{result['mfu_c']:.1%}" if "mfu_c" in result else "-",
        "MFU F": f"{result['mfu_f']:.1%}" if "mfu_f" in result else "-",
        "HFU": f"{result['hfu']:.1%}" if "hfu" in result else "-",
        "peak GiB": f"{result['peak_gib']:.1f}" if "peak_gib" in result else "-",
        "data wait ms": f"{result['data_wait_ms']:.2f}",
    }
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    print("| " + " | ".join(columns.values()) + " |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with(error)
