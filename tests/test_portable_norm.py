"""add_norm's kernels without a GPU: their sources, compiled for the host, against torch's operations in fp64 and bf16.

cuda_on_the_host.h stands for CUDA, as for test_portable_kernels.py. test_add_norm.py asks a GPU.
"""

import ctypes
import re
from ctypes import c_float, c_int, c_void_p
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Rooms, compile_for_the_host, raise_errors

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
EPS = 1e-6
HARNESS = r"""
extern "C" {
const char* forward(minitrain::AddNorm args, void* x, void* delta, void* sum, void* out) {
    return error_of([&] { minitrain::add_norm(args, x, delta, sum, out, 0, nullptr); });
}
const char* backward(minitrain::AddNorm args, void* d_out, void* d_sum, void* sum, void* dx, void* weight_grad,
                     float* parts, int num_parts) {
    return error_of([&] {
        minitrain::add_norm_backward(args, d_out, d_sum, sum, dx, weight_grad, parts, num_parts, 0, nullptr);
    });
}
}
"""


class AddNorm(ctypes.Structure):
    _fields_ = (("tokens", c_int), ("channels", c_int), ("weight", c_void_p), ("eps", c_float))


def on_the_host(source):
    """CUDA's own syntax put into C++'s, and without what cuda_on_the_host.h has."""
    source = re.sub(r"(\w+(?:<\w+>)?)\s*<<<([^>]*)>>>\(", r"Launch{\2}(\1, ", source)
    source = re.sub(r"__device__ void sync\(.*?\n}\n", "", source, flags=re.S)
    source = re.sub(r"asm volatile\(\"\" : .*?\);", ";", source, flags=re.S)
    assert not re.search(r"<<<|\basm\b", source)
    return source


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    sources = {"add_norm.cpp": on_the_host((KERNELS / "add_norm.cu").read_text()) + HARNESS}
    sources["sum_parts.cuh"] = on_the_host((KERNELS / "sum_parts.cuh").read_text())
    library = compile_for_the_host(tmp_path_factory.mktemp("norm"), sources)
    raise_errors(library.forward, library.backward)
    return library


def run(host, x, delta, weight, d_sum, d_out):
    """-> sum, out, dx, d_weight. What is written to begins as NaN, and what lies around stays so."""
    room = Rooms()

    def call(function, *args):
        places = (c_void_p(None if t is None else t.data_ptr()) if not isinstance(t, int) else c_int(t) for t in args)
        function(AddNorm(*x.shape, weight.data_ptr(), EPS), *places)

    total, out, dx, d_weight = x if delta is None else room(*x.shape), room(*x.shape), room(*x.shape), room(len(weight))
    call(host.forward, x, delta, None if delta is None else total, out)
    parts = room(70 if len(weight) < 100 else 5, len(weight), dtype=torch.float32)
    call(host.backward, d_out, d_sum, total, dx, d_weight, parts, len(parts))
    room.assert_nothing_else_was_written()
    return total, out, dx, d_weight


def make(T, D):
    x, delta, d_sum, d_out = (torch.randn(T, D).bfloat16() for _ in range(4))
    return x, delta, (1 + torch.randn(D)).bfloat16(), d_sum, d_out


def exact(total, weight, d_sum, d_out, dtype):
    """-> out, dx, d_weight by autograd."""
    total, weight = (t.detach().to(dtype).requires_grad_() for t in (total, weight))
    out = F.rms_norm(total, weight.shape, weight, EPS)
    dx, d_weight = torch.autograd.grad(out, (total, weight), d_out.to(dtype))
    return out.detach(), dx + d_sum.to(dtype), d_weight


# A warp with some of its lanes; 1 to 16 warps a row, with 2 or 4 vectors a thread; more rows than CTAs have at a time.
SHAPES = [
    (1, 8), (300, 64), (3000, 72), (7, 1000), (500, 1024), (40, 1280), (40, 2048), (33, 2560), (300, 2560), (9, 2880),
    (40, 3072), (50, 3584), (30, 4096), (9, 5120), (40, 8192), (300, 9216), (3, 16384), (7, 16376),
]  # fmt: skip


@pytest.mark.parametrize("T, D", SHAPES)
def test_the_portable_norm_is_as_good_as_bf16_math(host, T, D):
    for with_delta in (True, False):
        x, delta, weight, d_sum, d_out = make(T, D)
        if not with_delta:
            delta = None
        total, *ours = run(host, x, delta, weight, d_sum, d_out)
        assert torch.equal(total, x if delta is None else x + delta)
        right, rounded = (exact(total, weight, d_sum, d_out, dtype) for dtype in (torch.float64, torch.bfloat16))
        for name, got, expected, bf16 in zip(("out", "dx", "d_weight"), ours, right, rounded, strict=True):
            error, allowed = ((value.double() - expected).norm() for value in (got, bf16))
            assert error <= 1.02 * allowed, f"{name} is off by {error}, bf16 by {allowed}"


@pytest.mark.parametrize("D", [1024, 2560, 4096])
def test_a_nan_stays_in_its_row_and_every_run_has_the_same_bits(host, D):
    x, *others = make(70, D)
    before = run(host, x, *others)
    assert all(map(torch.equal, run(host, x, *others), before))
    x[13, 5] = torch.nan
    for got, expected in zip(run(host, x, *others)[1:3], before[1:3], strict=True):
        assert got[13].isnan().all()
        assert torch.equal(torch.cat([got[:13], got[14:]]), torch.cat([expected[:13], expected[14:]]))


@pytest.mark.parametrize("D", [12, 16392])
def test_a_width_that_it_does_not_take_is_refused(host, D):
    with pytest.raises(AssertionError, match=f"channels={D} is not a multiple of 8 between 8 and 16384"):
        run(host, *make(1, D))
