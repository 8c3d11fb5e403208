"""tools/bench_step.py and step_parts.py: what they make of a trace. The benchmark needs a GPU to mean anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

from minitrain import (
    Batch,
    Config,
    DataConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    TrainConfig,
    UserError,
    build_model,
)
from minitrain.models import init_weights

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from bench_step import balance, communication  # noqa: E402
from step_parts import PARTS, Ceilings, floors, measure_ceilings, part_rows, part_times  # noqa: E402


def kernel(name, start, end, **args):
    return {"cat": "kernel", "name": name, "ts": start, "dur": end - start, "args": args}


def on_host(name, start, end, thread=1, cat="cpu_op", **args):
    return {"cat": cat, "name": name, "ts": start, "dur": end - start, "tid": thread, "args": args}


def launched(start, end, correlation, **where):
    """A launch at `start`, and the kernel that runs from there to `end`."""
    launch = on_host("cudaLaunchKernel", start, start + 0.5, cat="cuda_runtime", correlation=correlation, **where)
    return [launch, kernel("nvjet", start, end, correlation=correlation)]


def test_bytes_bandwidth_and_hidden_time_of_a_trace():
    gather = {"Collective name": "all_gather", "In msg nelems": 1_000_000, "Out msg nelems": 4_000_000,
              "Group size": 4, "dtype": "BFloat16"}  # fmt: skip
    reduce = {"Collective name": "allreduce", "In msg nelems": 1_000_000, "Out msg nelems": 1_000_000,
              "Group size": 4, "dtype": "Float"}  # fmt: skip
    events = [
        on_host("nccl:all_gather", 0, 900, **gather),
        kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0, 100, **gather),
        kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 200, 300, **gather),
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 400, 450, **reduce),
        kernel("gemm", 50, 80),
        kernel("gemm", 60, 150),  # on another stream
        kernel("gemm", 200, 300),
    ]
    copy = kernel("Memcpy PtoP (Device -> Device)", 500, 600, correlation=7, bytes=30_000_000)
    events += [
        on_host("minitrain::Window.copy", 480, 500, cat="user_annotation"),
        on_host("cudaMemcpyAsync", 490, 491, cat="cuda_runtime", correlation=7),
        {**copy, "cat": "gpu_memcpy"},
        kernel("gemm", 520, 600),
    ]
    gathers, reduces, copies = communication(events, steps=2)
    assert gathers == {"collective": "AllGather", "a step": "1", "MB": "6", "ms": "0.1", "GB/s": "60", "hidden": "75%"}
    assert reduces == {"collective": "AllReduce", "a step": "0", "MB": "3", "ms": "0.0", "GB/s": "120", "hidden": "0%"}
    assert copies == {"collective": "copies", "a step": "0", "MB": "15", "ms": "0.1", "GB/s": "300", "hidden": "80%"}


@pytest.mark.slow
@pytest.mark.parametrize("axes, zero, rows, bubble", [
    (["--parallel.zero=3"], 3, 2, None),
    (["--parallel.pp=2", "--data.rows_per_step=3"], 0, 3, "25.0%"),
])  # fmt: skip
def test_it_runs_on_two_ranks(axes, zero, rows, bubble):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    flags = [f"--model.{key}={value}" for key, value in sizes.items()]
    flags += ["--train.steps=3", "--train.device=cpu", "--data.tokens_per_row=64", "--data.max_seqlen=32"]
    out = subprocess.run(
        [*torchrun, ROOT / "tools" / "bench_step.py", *flags, *axes],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip
    assert f"CPU x 2, zero {zero}" in out and out.count(f"| {rows} x 64 |") == 1 and "predicted GiB: weights" in out
    assert f"a stage waits in {bubble} of a step" in out if bubble else "bubble" not in out


def test_a_kernel_belongs_to_the_operations_that_launched_it():
    events = [
        on_host("aten::linear", 20, 48), on_host("aten::mm", 20, 30), *launched(40, 45, 10),  # after the product
        *launched(50, 60, 6),  # between operations
        on_host("_LinearCrossEntropy", 100, 200), on_host("aten::mm", 110, 190), *launched(120, 130, 1),
        *launched(140, 150, 2, thread=2),  # at the same time, on another thread
        on_host("aten::_grouped_mm", 210, 300), on_host("aten::copy_", 220, 240), *launched(230, 250, 3),
        on_host("autograd::engine::evaluate_function: _LinearCrossEntropyBackward", 310, 400), *launched(320, 321, 4),
        on_host("minitrain::attention_bwd", 410, 500), *launched(420, 424, 5),
        on_host("minitrain::norm_rotate", 510, 520), *launched(515, 520, 9),
        on_host("aten::_foreach_norm", 530, 560), *launched(540, 550, 7),
        on_host("torch::autograd::AccumulateGrad", 570, 580), *launched(572, 576, 11),
        on_host("Optimizer.step#AdamW.step", 600, 700, cat="user_annotation"), *launched(610, 640, 8),
        on_host("torch::autograd::AccumulateGrad", 650, 690),
        on_host("minitrain::Window.meet", 660, 680, cat="user_annotation"), *launched(670, 680, 12),  # counts as none
    ]  # fmt: skip
    times = part_times(events[::-1], steps=2)
    wanted = {"loss": 11, "optimizer": 44, "attention": 4, "GEMMs": 20, "pointwise": 5 + 10 + 10 + 5, "idle": 491}
    assert times == pytest.approx({part: us / 2e3 for part, us in wanted.items()})


def test_kernels_at_the_same_time_and_collectives_count_once():
    events = [
        kernel("first", 0, 100),
        kernel("inside", 20, 60),
        {**kernel("Memcpy HtoD", 90, 130), "cat": "gpu_memcpy"},
        kernel("ncclDevKernel_AllGather_RING_LL", 80, 400),
        kernel("last", 180, 200),
    ]
    times = part_times(events, steps=1)
    assert times["pointwise"] == pytest.approx(0.150) and times["idle"] == pytest.approx(0.050)
    assert sum(times.values()) == pytest.approx(0.200)
    assert part_times([], steps=1) == {}


def test_the_table_ends_with_the_step():
    times, least = {"loss": 3.0, "idle": 1.0}, {"loss": 2.0}
    loss, idle, step = part_rows(times, least)
    assert loss == {"part": "loss", "ms": "3.0", "share": "75.0%", "floor ms": "2.0", "ms / floor": "1.50"}
    assert idle["floor ms"] == idle["ms / floor"] == "-"
    assert step == {"part": "step", "ms": "4.0", "share": "100.0%", "floor ms": "2.0", "ms / floor": "2.00"}
    assert part_rows(times, {})[-1]["floor ms"] == "-"


def floors_of(model, recompute="none", rows=1, element_bytes=2):
    """In FLOPs or bytes: a part has one of them, the loss their sum."""
    data = DataConfig(tokens_per_row=64, max_seqlen=32, rows_per_step=rows)
    cfg = Config(model, data, train=TrainConfig(recompute=recompute))
    return floors(cfg, pairs=2 * 32**2, ceilings=Ceilings(1e3, 1e3), element_bytes=element_bytes)


def test_floors_are_what_a_count_by_hand_gives():
    D, F, L, V, H, K, C, T = 32, 48, 2, 101, 4, 2, 16, 64
    dense = floors_of(Qwen3Config(**TINY))
    matrices = L * (2 * D * H * C + 2 * D * K * C + 3 * D * F)
    assert dense["GEMMs"] == pytest.approx(6 * matrices * T)
    assert dense["loss"] == pytest.approx(6 * V * D * T + 2 * 2 * V * T)
    pairs = 2 * 32**2 / 2  # causal
    assert dense["attention"] == pytest.approx(L * H * C * (4 + 10) * pairs)
    parameters = matrices + V * D + L * (2 * D + 2 * C) + D
    assert dense["optimizer"] == pytest.approx(parameters * (2 * 2 + 3 * 8))
    block = 16 * D + 2 * (H + K) * C  # SwiGLU is done in its products, norms of heads backward in attention
    assert dense["pointwise"] == pytest.approx(2 * T * (L * block + 12 * D))
    assert [*dense, "idle"] == PARTS

    llama = floors_of(LlamaConfig(**TINY))
    assert llama["pointwise"] - dense["pointwise"] == pytest.approx(2 * T * L * 2 * (H + K) * C)
    wide = floors_of(Qwen3Config(**TINY), element_bytes=4)
    assert wide["optimizer"] == pytest.approx(parameters * (2 * 4 + 3 * 8))
    two_rows = floors_of(Qwen3Config(**TINY), rows=2)
    assert two_rows["optimizer"] == pytest.approx(parameters * (2 + 2 * 4 + 2 * 4 + 3 * 8))

    A, f = 2, 24
    moe = floors_of(Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=A, moe_intermediate_size=f))
    assert moe["pointwise"] - dense["pointwise"] == pytest.approx(2 * T * L * ((5 * A + 4) * D + 8 * A * f))


def test_recomputation_raises_the_floors_of_what_it_runs_again():
    model = Qwen3Config(**TINY)
    none, cheap, block, full = (floors_of(model, recompute) for recompute in ("none", "cheap", "block", "full"))
    assert none["pointwise"] < cheap["pointwise"] == block["pointwise"] == full["pointwise"]
    assert none["GEMMs"] == cheap["GEMMs"] == pytest.approx(block["GEMMs"] * 6 / 8) and block["GEMMs"] == full["GEMMs"]
    assert none["attention"] == block["attention"] == pytest.approx(full["attention"] * 7 / 9)


def test_ceilings_are_plausible():
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32, size=128)
    assert 1e8 < ceilings.flops < 1e13 and 1e7 < ceilings.bytes < 1e13


def test_balanced_experts_get_even_rows_and_the_router_its_choice():
    model = build_model(Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24), "cpu")
    init_weights(model, 0)
    balance(model)
    got = []
    for moe in (layer.mlp for layer in model.layers.values()):
        moe.load.zero_()
        moe.experts.register_forward_pre_hook(lambda _, args: got.append(args[1].tolist()))
    batch = Batch.pack([torch.arange(33)])
    batch.share = 1.0
    model(batch).sum().backward()
    assert got == [[16, 17, 16, 17]] * 2
    loads = [layer.mlp.load.tolist() for layer in model.layers.values()]
    assert all(sum(load) == 66 and load != [16, 17, 16, 17] for load in loads)
    with pytest.raises(UserError, match="Qwen3ForCausalLM has no experts"):
        balance(build_model(Qwen3Config(**TINY)))


@pytest.mark.slow
def test_the_trace_of_a_run_has_the_operations_that_parts_are_known_by(tmp_path):
    sizes = TINY | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    flags = [f"--model.{key}={value}" for key, value in sizes.items()]
    flags += ["--model.type=qwen3_moe", "--train.steps=3", "--train.device=cpu", "--train.attention=sdpa"]
    flags += ["--data.tokens_per_row=64", "--data.max_seqlen=32", "--balanced", f"--profile={tmp_path / 'trace.json'}"]
    out = subprocess.run(
        [sys.executable, ROOT / "tools" / "bench_step.py", *flags],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip
    assert "balanced" in out and "| part |" not in out  # no kernels on the CPU
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]

    def parts_of(operation):  # as if it launched a kernel when it ends
        ends = [(e["ts"] + e["dur"], e["tid"]) for e in events if e["name"] == operation]
        kernels = [e for i, (end, thread) in enumerate(ends) for e in launched(end, end + 1, i, thread=thread)]
        times = part_times(events + kernels, steps=1)
        return {part for part in times if times[part] > 0} - {"idle"}

    assert parts_of("minitrain::softmax_cross_entropy_") == {"loss"}
    assert parts_of("aten::mm") == {"loss", "GEMMs"}
    assert parts_of("aten::_scaled_dot_product_flash_attention_for_cpu_backward") == {"attention"}
    assert parts_of("aten::_fused_adamw_") == parts_of("aten::linalg_vector_norm") == {"optimizer"}
    assert parts_of("aten::silu_backward") == parts_of("aten::embedding_dense_backward") == {"pointwise"}
