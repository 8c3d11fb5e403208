"""tools/bench_step.py: what it makes of a trace. The benchmark itself needs a GPU to mean anything."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from bench_step import communication  # noqa: E402


def kernel(name, start, end, **args):
    return {"cat": "kernel", "name": name, "ts": start, "dur": end - start, "args": args}


def test_bytes_bandwidth_and_hidden_time_of_a_trace():
    gather = {"Collective name": "all_gather", "In msg nelems": 1_000_000, "Out msg nelems": 4_000_000,
              "Group size": 4, "dtype": "BFloat16"}  # fmt: skip
    reduce = {"Collective name": "allreduce", "In msg nelems": 1_000_000, "Out msg nelems": 1_000_000,
              "Group size": 4, "dtype": "Float"}  # fmt: skip
    events = [
        {"cat": "cpu_op", "name": "nccl:all_gather", "ts": 0, "dur": 900, "args": gather},
        kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0, 100, **gather),
        kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 200, 300, **gather),
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 400, 450, **reduce),
        kernel("gemm", 50, 80),
        kernel("gemm", 60, 150),  # on another stream
        kernel("gemm", 200, 300),
    ]
    gathers, reduces = communication(events, steps=2)
    assert gathers == {"collective": "AllGather", "a step": "1", "MB": "6", "ms": "0.1", "GB/s": "60", "hidden": "75%"}
    assert reduces == {"collective": "AllReduce", "a step": "0", "MB": "3", "ms": "0.0", "GB/s": "120", "hidden": "0%"}


def test_it_runs_on_two_ranks(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    flags = [f"--model.{key}={value}" for key, value in sizes.items()]
    flags += ["--train.steps=3", "--train.device=cpu", "--data.tokens_per_row=64", "--data.max_seqlen=32"]
    out = subprocess.run(
        [*torchrun, ROOT / "tools" / "bench_step.py", *flags, "--parallel.zero=3"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip
    assert "CPU x 2, zero 3" in out and out.count("| 2 x 64 |") == 1 and "predicted GiB: weights" in out
