"""Speed of the kernels that are bound by memory: GB/s beside a copy of as many bytes and beside torch.compile.

    python tools/bench_kernels.py [--repeats 30]

32,768 tokens with 16 query and 8 key heads of 128 channels for RMSNorm with RoPE, (4,096, 151,936) logits for the
cross-entropy; bf16. Bytes are those that must be read and written once. Before each call L2 is flushed; medians.
"""

import argparse
import datetime
import statistics

import torch
from torch import nn

from minitrain import norm_rotate as fused
from minitrain.loss import softmax_cross_entropy_
from minitrain.models.layers import rotate

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


def cross_entropy_cases():
    logits = torch.randn(4096, 151_936, device="cuda").bfloat16()
    targets = torch.randint(151_936, (4096,), device="cuda")
    return {
        "softmax cross-entropy": (2 * logits.numel() * 2, lambda: softmax_cross_entropy_(logits, targets, True), None)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {datetime.date.today()}\n")
    print("| kernel | MB | ms | GB/s | of a copy | torch.compile, ms |\n|---|---|---|---|---|---|")
    for name, (size, ours, compiled) in (norm_rotate_cases() | cross_entropy_cases()).items():
        source = torch.empty(size // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = milliseconds(lambda a=target, b=source: a.copy_(b), options.repeats)
        ms = milliseconds(ours, options.repeats)
        peer = f"{milliseconds(compiled, options.repeats):.3f}" if compiled else "-"
        print(
            f"| {name} | {size / 1e6:.0f} | {ms:.3f} | {size / ms / 1e6:.0f} | {copy / ms:.0%} | {peer} |", flush=True
        )


if __name__ == "__main__":
    main()
