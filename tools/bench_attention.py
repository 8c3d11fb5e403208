"""Speed of attention: TFLOP/s of our kernels and of every peer that runs here, forward and backward, as a table.

    python tools/bench_attention.py [--shapes 4k] [--backends native,cudnn] [--repeats 15] [--plot FILE.png]

Every row is 32,768 tokens of random normal data. Backends take turns inside one process; before each timed call 256 MB
are written, so that L2 holds nothing, and the GPU is kept busy until the call is queued, so that the host's time is not
measured. A cell is the median of CUDA-event times, forward / whole backward without its forward.

Counted: 4 * C * H for each pair of a query and a key that it sees, 2.5 times that for the backward. Causal documents
of n tokens have n^2 / 2 pairs, full ones n^2; with a window the pairs are counted one by one.
"""

import argparse
import datetime
import importlib
import statistics
import sys
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from minitrain.attention import _VARLEN_OPTIONS, BACKENDS, _document_and_place
from minitrain.fused_attention import fused_attention, why_not

TOKENS = 32_768


class Shape(NamedTuple):
    name: str
    lengths: list[int]
    heads: int = 16
    kv_heads: int = 8
    C: int = 128
    causal: bool = True
    window: int | None = None

    @property
    def flops(self) -> float:
        if self.window is not None:
            pairs = sum(sum(min(i, self.window) + 1 for i in range(n)) for n in self.lengths)
        else:
            pairs = sum(n * n / (2 if self.causal else 1) for n in self.lengths)
        return 4 * self.C * self.heads * pairs

    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *self.lengths], device="cuda").cumsum(0).to(torch.int32)


def log_uniform(low: int, high: int) -> list[int]:
    """Lengths drawn log-uniformly, the last cut off at TOKENS."""
    generator, lengths = torch.Generator().manual_seed(0), []
    while (left := TOKENS - sum(lengths)) > 0:
        lengths.append(min(left, round(low * (high / low) ** torch.rand(1, generator=generator).item())))
    return lengths


def documents(k: int) -> list[int]:
    return [1024 * k] * (TOKENS // 1024 // k)


SHAPES = [
    *(Shape(f"128 causal 16/8 {k}k", documents(k)) for k in (1, 2, 4, 8, 16, 32)),
    *(Shape(f"128 causal 32/4 {k}k", documents(k), 32, 4) for k in (4, 16)),
    *(Shape(f"128 full 16/8 {k}k", documents(k), causal=False) for k in (4, 16)),
    Shape("64 causal 32/32 4k", documents(4), 32, 32, 64),
    Shape("packed 64 to 8192, 16/8", log_uniform(64, 8192)),
    Shape("window 1024, 16/8 16k", documents(16), window=1024),
]


# ---- the backends: each takes a shape and gives attend(q, k, v) -> out, which is timed, and how its inputs lie;
#      or raises ValueError, ImportError or RuntimeError with the reason why it cannot


def packed(shape: Shape, heads: int) -> tuple[int, ...]:
    return TOKENS, heads, shape.C


def native(kernel, shape, deterministic=False):
    if reason := why_not("cuda", torch.bfloat16, shape.C):
        raise ValueError(reason)
    cu = shape.cu_seqlens()
    cu.plans = {}  # made once for all calls, as in training
    mask = {"causal": shape.causal, "window": shape.window}
    options = {**mask, "kernel": kernel, "deterministic": deterministic}
    return lambda q, k, v: fused_attention(q, k, v, cu, cu, max(shape.lengths), **options)[0], packed


def sdpa(backend, shape):
    """Documents of equal length are a batch; of unequal ones cuDNN gets each padded to the longest."""
    if shape.window is not None or (len(set(shape.lengths)) > 1 and backend != SDPBackend.CUDNN_ATTENTION):
        raise ValueError("it has no windows, and no documents of unequal length")

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            grouped = shape.heads != shape.kv_heads
            return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=grouped)

    return attend, lambda shape, heads: (len(shape.lengths), max(shape.lengths), heads, shape.C)


def varlen(shape):
    cu, longest = shape.cu_seqlens(), max(shape.lengths)
    if shape.causal:
        return lambda q, k, v: BACKENDS["varlen"](q, k, v, cu, cu, longest, shape.window), packed
    options = {"enable_gqa": True} if "enable_gqa" in _VARLEN_OPTIONS else {}
    return lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest, **options), packed


def flex(shape):
    document, place = _document_and_place(TOKENS, shape.cu_seqlens())
    look_back = torch.tensor(TOKENS if shape.window is None else shape.window, device="cuda")
    look_ahead = torch.tensor(0 if shape.causal else TOKENS, device="cuda")

    def seen(b, h, i, j):  # tensors alone differ between shapes: compiled once for all of the same heads
        back = place[i] - place[j]
        return (document[i] == document[j]) & (back <= look_back) & (-back <= look_ahead)

    mask = torch.compile(create_block_mask)(seen, None, None, TOKENS, TOKENS, device="cuda")
    attend = partial(torch.compile(flex_attention), block_mask=mask, enable_gqa=shape.heads != shape.kv_heads)
    return attend, lambda shape, heads: (1, heads, TOKENS, shape.C)


def flash(module, shape):
    function = importlib.import_module(module).flash_attn_varlen_func
    cu, longest = shape.cu_seqlens(), max(shape.lengths)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
    options |= {} if shape.window is None else {"window_size": (shape.window, 0)}

    def attend(q, k, v):
        out = function(q, k, v, causal=shape.causal, **options)
        return out[0] if isinstance(out, tuple) else out

    return attend, packed


def xformers(shape):
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import attn_bias

    kind = attn_bias.BlockDiagonalCausalMask if shape.causal else attn_bias.BlockDiagonalMask
    mask = kind.from_seqlens(shape.lengths)
    if shape.window is not None:
        mask = mask.make_local_attention(shape.window + 1)

    def attend(q, k, v):
        q, k, v = (x[None].unflatten(2, (shape.kv_heads, -1)) for x in (q, k, v))
        k, v = (x.expand(-1, -1, -1, q.shape[3], -1) for x in (k, v))
        return memory_efficient_attention(q, k, v, mask)

    return attend, packed


ALL = {
    "native hopper": partial(native, "hopper"),
    "native portable": partial(native, "portable"),
    "native deterministic": partial(native, "auto", deterministic=True),
    "cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa FA2": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "varlen FA2": varlen,
    "flex": flex,
}
PACKAGES = {
    "flash_attn": partial(flash, "flash_attn"),
    "flash_attn_interface": partial(flash, "flash_attn_interface"),  # FA3
    "flash_attn.cute": partial(flash, "flash_attn.cute"),  # FA4
    "xformers": xformers,
}


# ---- time


def prepare(backend, shape):
    """-> (forward, backward) to be timed: forward() -> out, backward(out). Each was run once."""
    attend, layout = backend(shape)
    sizes = (layout(shape, heads) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    leaves = [torch.randn(size, dtype=torch.bfloat16, device="cuda", requires_grad=True) for size in sizes]
    d_out = torch.randn_like(out := attend(*leaves))

    def backward(out):
        torch.autograd.grad(out, leaves, d_out, retain_graph=True)

    backward(out)
    return lambda: attend(*leaves), backward


def measure(cases: dict, repeats: int) -> dict:
    """-> {name: (forward, backward) in seconds}, medians, the cases in turn."""
    flushed = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def timed(call):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        torch.cuda._sleep(1_000_000)  # cycles, half a millisecond: the call is queued by then
        start.record()
        result = call()
        end.record()
        return result, (start, end)

    events = {name: ([], []) for name in cases}
    for _ in range(repeats):
        for name, (forward, backward) in cases.items():
            out, times = timed(forward)
            events[name][0].append(times)
            events[name][1].append(timed(partial(backward, out))[1])
            del out
    torch.cuda.synchronize()
    return {
        name: tuple(statistics.median(a.elapsed_time(b) for a, b in times) / 1e3 for times in both)
        for name, both in events.items()
    }


def bench(shape, backends, repeats) -> dict:
    """-> {name: (forward, backward) in TFLOP/s} of what can run; says on stderr why the others cannot."""
    cases = {}
    for name, backend in backends.items():
        try:
            cases[name] = prepare(backend, shape)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and name.startswith("native"):
                raise  # ours may refuse, not fail
            print(f"{shape.name}: no {name}: {(str(error).splitlines() or [error])[0]}", file=sys.stderr)
    seconds = measure(cases, repeats)
    return {name: (shape.flops / a / 1e12, 2.5 * shape.flops / b / 1e12) for name, (a, b) in seconds.items()}


# ---- what it prints


def ratio(result: dict) -> str:
    """Our best to the best peer, forward and backward each."""
    ours, peers = ([v for n, v in result.items() if n.startswith("native") == own] for own in (True, False))
    if not ours or not peers:
        return "-"
    return " / ".join(f"{max(x[i] for x in ours) / max(x[i] for x in peers):.2f}" for i in (0, 1))


def plot(results: dict, names: list, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(12, 9), sharex=True, layout="constrained")
    for direction, axis in enumerate(axes):
        for i, name in enumerate(names):
            heights = [result[name][direction] if name in result else 0 for result in results.values()]
            places = [x + 0.8 * (i / len(names) - 0.5) for x in range(len(results))]
            axis.bar(places, heights, 0.8 / len(names), align="edge", label=name)
        axis.set_ylabel(("forward", "backward")[direction] + ", TFLOP/s")
    axes[0].legend(ncols=4)
    axes[1].set_xticks(range(len(results)), list(results), rotation=30, ha="right")
    axes[0].set_title(f"attention, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shapes", default="", help="only shapes whose name contains this, or one of a,b")
    parser.add_argument("--backends", default="", help="the same for backends")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--plot", metavar="FILE.png", help="a picture of the table (needs matplotlib)")
    options = parser.parse_args()
    if options.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is no dependency of minitrain: pip install matplotlib")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    available = ALL | {name: run for name, run in PACKAGES.items() if find_spec(name.partition(".")[0])}
    backends = {n: run for n, run in available.items() if any(part in n for part in options.backends.split(","))}
    shapes = [shape for shape in SHAPES if any(part in shape.name for part in options.shapes.split(","))]
    if not backends or not shapes:
        parser.error(f"there are: {'; '.join(shape.name for shape in SHAPES)}. Backends: {', '.join(available)}")
    torch._dynamo.config.recompile_limit = 64

    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    print(f"{torch.cuda.get_device_name()}, {versions}, {datetime.date.today()}")
    print(f"TFLOP/s, forward / backward, {TOKENS:,} tokens, medians of {options.repeats}\n")
    print("| " + " | ".join(["shape", *backends, "native to the best peer"]) + " |")
    print("|---" * (len(backends) + 2) + "|")
    results = {}
    for shape in shapes:
        result = results[shape.name] = bench(shape, backends, options.repeats)
        cells = [f"{result[n][0]:.0f} / {result[n][1]:.0f}" if n in result else "-" for n in backends]
        print("| " + " | ".join([shape.name, *cells, ratio(result)]) + " |", flush=True)
        torch.cuda.empty_cache()
    if options.plot:
        plot(results, list(backends), options.plot)


if __name__ == "__main__":
    main()
