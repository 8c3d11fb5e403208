"""Where the time of a training step goes: kernels of a trace by part, beside the least time that the part can take.

    part        kernels that the host launched inside of            floor
    loss        minitrain's loss, its matrix products, too          6 V D FLOPs a token; logits read and written once
    optimizer   Optimizer.step; moves and norm of gradients         bytes of each parameter: _optimizer_bytes
    attention   attention of any backend                            7 FLOPs a (query, key) pair and channel
    GEMMs       other matrix products                               6 FLOPs a token and parameter, recomputation's 2
    pointwise   anything else                                       passes over activations: _pointwise_elements
    idle        no kernel, or communication alone                   none

FLOPs take the time that they take in a large matrix product, bytes that of a large copy, both measured in the same run.
A pair, as in minitrain/metrics.py, is one without the causal mask, which halves it: 4 / 2 FLOPs forward, and 10 / 2
backward, where the scores are made again. Names of kernels do not matter, and a loss of your own counts as what its
operations are. Profiling slows the host down: where that is what the device waits for, idle is too long.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.benchmark import Timer

from minitrain.config import Config
from minitrain.metrics import Flops
from minitrain.models import build_model

_OPERATIONS = {  # of a part, by what the profiler calls them; the first part counts that has one around a launch
    "communication": r"^minitrain::Window",
    "loss": r"_LinearCrossEntropy",
    "optimizer": r"^Optimizer\.step|AccumulateGrad|^minitrain::global_norm|^aten::_foreach_",
    "attention": r"(::|^triton_tem_).*(attention|attn|flash)",
    "GEMMs": r"^aten::(mm|addmm|bmm|baddbmm|_grouped_mm)$|^minitrain::swiglu",
}
_PARTS = [*_OPERATIONS, "pointwise", "idle"]
PARTS = [part for part in _PARTS if part != "communication"]


# ---- times


def part_times(events: list[dict], steps: int) -> dict[str, float]:
    """Events of a Chrome trace by torch.profiler -> ms a step of each part, {} if no kernel ran.

    They sum up to the time from the first kernel's start to the last one's end: of kernels at the same time, the one
    that started first counts.
    """
    part_of = parts_of_launches(events)
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels = sorted((e for e in kernels if not communicates(e, part_of)), key=lambda e: e["ts"])
    if not kernels:
        return {}
    times, reached = dict.fromkeys(PARTS, 0.0), kernels[0]["ts"]
    for e in kernels:
        start, end = max(e["ts"], reached), max(e["ts"] + e["dur"], reached)
        times["idle"] += (start - reached) / steps / 1e3
        times[part_of.get(e["args"].get("correlation"), "pointwise")] += (end - start) / steps / 1e3
        reached = end
    return times


def communicates(kernel: dict, part_of: dict[int, str]) -> bool:
    """NCCL's kernels, and copies from windows."""
    return kernel["name"].startswith("nccl") or part_of.get(kernel["args"].get("correlation")) == "communication"


def parts_of_launches(events: list[dict]) -> dict[int, str]:
    """Correlation id -> part, or communication, by the operations that ran on the launching thread."""
    threads = defaultdict(list)
    for e in events:
        if e.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            threads[e["tid"]].append(e)
    parts = {}
    for thread in threads.values():
        around = [(float("inf"), _PARTS.index("pointwise"))]  # operations that have not ended: end, part's place
        for e in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while around[-1][0] < e["ts"]:
                around.pop()
            place = around[-1][1]
            if e["cat"].startswith("cuda_"):
                parts[e["args"].get("correlation")] = _PARTS[place]
            else:
                around.append((e["ts"] + e["dur"], min(place, _place(e["name"]))))
    return parts


def _place(operation) -> int:
    found = (i for i, pattern in enumerate(_OPERATIONS.values()) if re.search(pattern, operation))
    return next(found, len(_OPERATIONS))


# ---- floors


@dataclass(frozen=True)
class Ceilings:
    """What the device does in a second."""

    flops: float  # of a large matrix product of random numbers
    bytes: float  # of a large copy, read and written


def measure_ceilings(device: torch.device, dtype: torch.dtype, size: int = 8192) -> Ceilings:
    """From products of (size, size) and copies of 8 times as much, each for half a second."""
    a, b, product = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    x = torch.randn(8, size, size, device=device, dtype=dtype)
    y = torch.empty_like(x)

    def seconds(call):
        return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.5).median

    product_s, copy_s = seconds(lambda: torch.mm(a, b, out=product)), seconds(lambda: y.copy_(x))
    return Ceilings(2 * size**3 / product_s, 2 * x.nbytes / copy_s)


def floors(cfg: Config, pairs: float, ceilings: Ceilings, element_bytes: int) -> dict[str, float]:
    """ms a step of each part but idle, on one GPU. pairs: of a step, sums of squared document lengths."""
    model = build_model(cfg.model)
    flops, tokens = Flops.of(model), cfg.data.rows_per_step * cfg.data.tokens_per_row
    forwards = 2 if cfg.train.recompute != "none" else 1
    head = 6 * flops.head * tokens
    work = {  # FLOPs, bytes
        "loss": (head, 2 * tokens * cfg.model.vocab_size * element_bytes),
        "optimizer": (0, _optimizer_bytes(cfg, element_bytes) * sum(p.numel() for p in model.parameters())),
        "attention": ((9 if cfg.train.recompute == "full" else 7) * flops.attention * pairs, 0),
        "GEMMs": (flops.hardware(tokens, 0, cfg.train.recompute) - head, 0),
        "pointwise": (0, _pointwise_elements(model, forwards) * tokens * element_bytes),
    }
    return {part: 1e3 * (n / ceilings.flops + size / ceilings.bytes) for part, (n, size) in work.items()}


def _optimizer_bytes(cfg, element_bytes) -> int:
    """AdamW on one parameter: gradient read for the norm and for the step; moments; fp32 weights, or both their halves.

    Gradients of further rows are read and added to those before, in fp32.
    """
    further = cfg.data.rows_per_step - 1
    gradient = 4 if further else element_bytes
    moment = getattr(torch, cfg.optim.moments).itemsize
    return further * (element_bytes + 2 * 4) + 2 * gradient + 2 * (4 + 2 * moment)


def _pointwise_elements(model: nn.Module, forwards: int) -> int:
    """Elements of activations that a token needs read and written, if one pass lies between what other parts do.

                    forward, read -> written                backward
        norm        x, y -> x + y, its norm     4 D         d_out, d_sum, x + y -> d_x      4 D
        heads       q, k -> normed, turned      2 (q + k)   none: attention's, on Hopper    0, without norm 2 (q + k)
        SwiGLU      none: done by its products, on Hopper
        experts     x -> A copies               (A + 1) D   theirs -> d_x                   (A + 1) D
                    SwiGLU of each              3 A F       its; gate, up -> theirs         5 A F
                    A results -> their sum      (A + 1) D   its; A results -> theirs        (2 A + 1) D

    Two norms a block, one more and the embedding around them. Recomputation runs the forward of blocks again. Left out
    is what is small: the router's (T, E), gradients of norms' weights.
    """
    cfg = model.config
    D, heads = cfg.hidden_size, (cfg.num_attention_heads + cfg.num_key_value_heads) * cfg.head_dim
    has_norms = any("q_norm" in name for name, _ in model.named_parameters())
    forward = 2 * 4 * D + 2 * heads
    backward = 2 * 4 * D + (0 if has_norms else 2) * heads
    if A := getattr(cfg, "num_experts_per_tok", 0):
        forward += 2 * (A + 1) * D + 3 * A * cfg.moe_intermediate_size
        backward += (3 * A + 2) * D + 5 * A * cfg.moe_intermediate_size
    ends = 2 * (2 + 4) * D  # embedding, last norm
    return cfg.num_hidden_layers * (forwards * forward + backward) + ends


def part_rows(times: dict[str, float], floors: dict[str, float]) -> list[dict[str, str]]:
    """Of a table, with the step as their sum; "-" where there is no floor."""
    times, floors = ({**of, "step": sum(of.values())} for of in (times, floors))
    rows = []
    for part, ms in times.items():
        floor = floors.get(part)
        rows.append({
            "part": part,
            "ms": f"{ms:.1f}",
            "share": f"{ms / times['step']:.1%}",
            "floor ms": f"{floor:.1f}" if floor else "-",
            "ms / floor": f"{ms / floor:.2f}" if floor else "-",
        })  # fmt: skip
    return rows
