"""Speed of kernels: those bound by memory beside a copy of as many bytes, products beside cuBLAS and torch.compile.

    python tools/bench_kernels.py [--repeats 30]

32,768 tokens with 16 query and 8 key heads of 128 channels for RMSNorm with RoPE, (4,096, 151,936) logits for the
cross-entropy; bf16. Bytes are those that must be read and written once. Residual add with RMSNorm, and SwiGLU, of the
0.6B (32,768 tokens) and of the 4B (8,192), and their logits of 4,096 tokens, random numbers. Before each call L2 is
flushed; medians.
"""

import argparse
import datetime
import functools
import statistics

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import nn

from minitrain import norm_rotate as fused
from minitrain.add_norm import add_norm
from minitrain.extension import runs_on_hopper
from minitrain.loss import softmax_cross_entropy_, write_logits
from minitrain.models.layers import rotate
from minitrain.swiglu import swiglu_products, swiglu_products_bwd

T, HEADS, C, EPS = 32_768, (16, 8), 128, 1e-6


def milliseconds(call, repeats: int) -> float:
    flushed = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(3 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        torch.cuda._sleep(1_000_000)  # the call is queued by then
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times[3:])


def norm_rotate_cases():
    """-> {name: (bytes, ours, compiled)}: queries and keys of one layer, forward, then backward."""
    angles = torch.randn(T, C // 2, device="cuda")
    cos, sin, weight = (
        angles.cos(),
        angles.sin(),
        torch.ones(C, device="cuda", dtype=torch.bfloat16, requires_grad=True),
    )
    xs = [torch.randn(T, H, C, device="cuda").bfloat16().requires_grad_() for H in HEADS]
    d_outs = [torch.randn_like(x) for x in xs]

    def plain(x):
        return rotate(nn.functional.rms_norm(x, (C,), weight, EPS), cos, sin)

    def backward_of(function):
        outs = [function(x) for x in xs]
        return lambda: torch.autograd.grad(outs, [*xs, weight], d_outs, retain_graph=True)

    torch._functorch.config.donated_buffer = False  # its backward runs more than once
    compiled = torch.compile(plain)
    size = sum(x.numel() * 2 for x in xs)
    tables = len(HEADS) * 2 * cos.numel() * 4

    def ours(x):
        return fused.norm_rotate(x, weight, cos, sin, EPS)

    return {
        "norm + RoPE forward": (2 * size + tables, lambda: [ours(x) for x in xs], lambda: [compiled(x) for x in xs]),
        "norm + RoPE backward": (3 * size + tables, backward_of(ours), backward_of(compiled)),
    }


def add_norm_cases():
    """-> {name: (bytes, ours, compiled)}: before a half of a block, forward, then backward."""

    @functools.partial(torch.compile, dynamic=False)
    def compiled(x, delta, weight):
        x = x + delta
        return x, F.rms_norm(x, weight.shape, weight, EPS)

    def cases(model, T, D):
        x, delta, *gradients = (torch.randn(T, D, device="cuda").bfloat16() for _ in range(4))
        inputs = x, delta, torch.ones(D, device="cuda", dtype=torch.bfloat16)
        inputs = [t.requires_grad_() for t in inputs]

        def ours(*args):
            return add_norm(*args, EPS)

        def backward_of(function):
            outs = function(*inputs)
            return lambda: torch.autograd.grad(outs, inputs, gradients, retain_graph=True)

        size = 4 * T * D * 2
        return {
            f"{model}: add + norm forward": (size, lambda: ours(*inputs), lambda: compiled(*inputs)),
            f"{model}: add + norm backward": (size, backward_of(ours), backward_of(compiled)),
        }

    return cases("0.6B", 32_768, 1024) | cases("4B", 8192, 2560)


def cross_entropy_cases():
    logits = torch.randn(4096, 151_936, device="cuda").bfloat16()
    targets = torch.randint(151_936, (4096,), device="cuda")
    return {
        "softmax cross-entropy": (2 * logits.numel() * 2, lambda: softmax_cross_entropy_(logits, targets, True), None)
    }


def product_cases():
    """-> {name: (FLOPs, ours, peer)}, on Hopper."""
    act = torch.compile(lambda gate, up: F.silu(gate) * up, dynamic=False)

    @functools.partial(torch.compile, dynamic=False)
    def differentiate(d, gate, up):
        silu, gate_vjp = torch.func.vjp(F.silu, gate)
        return *gate_vjp(d * up), d * silu, silu * up

    def cases(model, T, D, inner):
        x, *weights, d_out = (
            torch.randn(shape, device="cuda").bfloat16()
            for shape in ((T, D), (inner, D), (inner, D), (D, inner), (151_936, D), (T, D))
        )
        gate_w, up_w, down_w, head = weights
        gate, up, _ = swiglu_products(x, gate_w, up_w)
        some, logits = x[:4096], x.new_empty(4096, len(head))
        return {
            f"{model}: SwiGLU's first products": (
                4 * T * D * inner,
                lambda: swiglu_products(x, gate_w, up_w),
                lambda: act(x @ gate_w.T, x @ up_w.T),
            ),
            f"{model}: gradient of its last": (
                2 * T * D * inner,
                lambda: swiglu_products_bwd(d_out, down_w, gate, up),
                lambda: differentiate(d_out @ down_w, gate, up),
            ),
            f"{model}: logits": (
                2 * some.numel() * len(head),
                lambda: write_logits(some, head, logits),
                lambda: torch.mm(some, head.T, out=logits),
            ),
        }

    return cases("0.6B", 32_768, 1024, 3072) | cases("4B", 8192, 2560, 9728)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {datetime.date.today()}\n")
    print("| kernel | MB | ms | GB/s | of a copy | torch.compile, ms |\n|---|---|---|---|---|---|")
    all_cases = norm_rotate_cases() | add_norm_cases() | cross_entropy_cases()
    for name, (size, ours, compiled) in all_cases.items():
        source = torch.empty(size // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = milliseconds(lambda a=target, b=source: a.copy_(b), options.repeats)
        ms = milliseconds(ours, options.repeats)
        peer = f"{milliseconds(compiled, options.repeats):.3f}" if compiled else "-"
        print(
            f"| {name} | {size / 1e6:.0f} | {ms:.3f} | {size / ms / 1e6:.0f} | {copy / ms:.0%} | {peer} |", flush=True
        )
    if not runs_on_hopper("cuda", 0):
        return
    print("\n| product | ms | TFLOP/s | torch, ms |\n|---|---|---|---|")
    for name, (flops, ours, peer) in product_cases().items():
        ms, peer_ms = (milliseconds(call, options.repeats) for call in (ours, peer))
        print(f"| {name} | {ms:.3f} | {flops / ms / 1e9:.0f} | {peer_ms:.3f} |", flush=True)


if __name__ == "__main__":
    main()
