"""The portable attention kernels without a GPU: their sources, compiled for the host, against attention in fp32.

cuda_on_the_host.h stands for CUDA. A copy that is not waited for, most missing barriers, bank conflicts of ldmatrix and
memory that is written beside its place show; speed and what the hardware reorders do not. The batches, the reference
and the rule for errors are those of test_fused_attention.py, which asks a GPU.
"""

import ctypes
import re
import shutil
import subprocess
from ctypes import byref, c_char_p, c_float, c_int, c_int64, c_void_p
from math import prod
from pathlib import Path

import pytest
import torch
from test_fused_attention import (
    Results,
    assert_as_good_as_bf16,
    assert_same_bits,
    assert_the_blind_and_the_unseen_are_zero,
    make,
    some_masks,
    visible,
)

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("attention_plan", "attention_prepare", "attention_fwd_sm80", "attention_bwd_sm80")


class Shape(ctypes.Structure):
    sizes = "num_queries num_keys num_documents heads kv_heads head_dim look_back look_ahead"
    _fields_ = [*((name, c_int) for name in sizes.split()), ("scale", c_float)]


class Packed(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("row_stride", c_int64), ("head_stride", c_int64)]


def of(kind, names):
    return [(name, kind) for name in names.split()]


class Forward(ctypes.Structure):
    _fields_ = [("shape", Shape), ("plan", c_void_p), *of(Packed, "q k v"), *of(c_void_p, "out lse")]


class Backward(ctypes.Structure):
    _fields_ = [
        *(("shape", Shape), ("plan", c_void_p), *of(Packed, "q k v out d_out")),
        *(*of(c_void_p, "lse d_lse dq dk dv rows dq_sum turns"), ("deterministic", ctypes.c_bool)),
    ]


HARNESS = (
    f"""
#include <cuda_runtime.h>
#include "attention.h"
using namespace minitrain;
static_assert(sizeof(AttentionForward) == {ctypes.sizeof(Forward)}, "");
static_assert(sizeof(AttentionBackward) == {ctypes.sizeof(Backward)}, "");
"""
    + r"""
AttentionTiles tiles(const AttentionShape& shape) { return attention_tiles(shape.head_dim, false); }
template <typename Call>
const char* error_of(Call call) {
    static std::string error;
    try {
        return call(), nullptr;
    } catch (const std::exception& e) {
        return (error = e.what()).c_str();
    }
}
extern "C" {
void set_shared_bytes(int bytes) { shared_bytes = bytes; }
int64_t plan_ints(const AttentionShape& shape) { return attention_plan_ints(shape, tiles(shape)); }
int64_t padded_rows(const AttentionShape& shape) { return attention_padded_rows(shape); }
const char* plan(const AttentionShape& shape, const int* cu_q, const int* cu_k, int* out) {
    return error_of([&] { attention_plan(shape, tiles(shape), cu_q, cu_k, out, 0, nullptr); });
}
const char* forward(const AttentionForward& args) {
    return error_of([&] { attention_forward_sm80(args, 0, nullptr); });
}
const char* backward(const AttentionBackward& args) {
    return error_of([&] { attention_backward_sm80(args, 0, nullptr); });
}
}
"""
)


def on_the_host(source):
    """A kernel file with CUDA's own syntax put into C++'s, and without the wrappers that cuda_on_the_host.h has."""
    source = re.sub(r"(\w+(?:<[\w, ]+>)?)<<<([^>]*)>>>\(", r"Launch{\2}(\1, ", source)
    source = re.sub(r"extern __shared__ \S+ char shared\[\];", "char* const shared = dynamic_shared;", source)
    source = re.sub(r"__device__ inline uint32_t shared_address.*(?=// Chunk c of row r)", "", source, flags=re.S)
    assert not re.search(r"<<<|extern __shared__|\basm\b", source)
    return source


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """The portable kernels, compiled for the host."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("portable")
    for name in SOURCES:
        (folder / f"{name}.cpp").write_text(on_the_host((ROOT / f"kernels/{name}.cu").read_text()))
    (folder / "sm80.cuh").write_text(on_the_host((ROOT / "kernels/sm80.cuh").read_text()))
    (folder / "harness.cpp").write_text(HARNESS)
    for name in ("cuda_runtime.h", "cuda_runtime_api.h", "cuda_bf16.h"):
        (folder / name).write_text('#include "cuda_on_the_host.h"\n')
    options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
    includes = [f"-I{path}" for path in (folder, ROOT / "tests", ROOT / "kernels")]
    command = [compiler, *options, *includes, *map(str, folder.glob("*.cpp")), "-o", str(folder / "host.so")]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "host.so"))
    library.plan_ints.restype = library.padded_rows.restype = c_int64
    for call in (library.plan, library.forward, library.backward):
        call.restype, call.errcheck = c_char_p, raise_error
    return library


def raise_error(error, *_):
    assert error is None, error.decode()


def run(host, batch, d_lse=None, deterministic=False, causal=True, window=None):
    """Forward and backward. What they may write to begins as NaN (as int32: -1), and what lies around stays so."""
    (T, H, C), (S, K, _) = batch.q.shape, batch.k.shape
    around = []

    def room(*shape, dtype=torch.bfloat16):
        memory = torch.full((prod(shape) * dtype.itemsize + 8192,), 0xFF, dtype=torch.uint8)
        around.extend((memory[:4096], memory[-4096:]))
        return memory[4096:-4096].view(dtype).view(shape)

    def packed(x, pad=1):
        wide = torch.cat([x, torch.full_like(x[:, :pad], torch.nan)], 1)  # rows further apart than they are long
        around.append(wide)
        return Packed(wide.data_ptr(), *wide.stride()[:2])

    everything = 1 << 29
    back, ahead = everything if window is None else window, 0 if causal else everything
    shape = Shape(T, S, len(batch.cu_q) - 1, H, K, C, back, ahead, C**-0.5)
    plan = room(host.plan_ints(byref(shape)), dtype=torch.int32)
    host.plan(byref(shape), *(c_void_p(x.data_ptr()) for x in (batch.cu_q, batch.cu_k, plan)))

    inputs = shape, plan.data_ptr(), *map(packed, (batch.q, batch.k, batch.v))
    out, lse = room(T, H, C), room(H, T, dtype=torch.float32)
    host.forward(byref(Forward(*inputs, out.data_ptr(), lse.data_ptr())))

    R = host.padded_rows(byref(shape))
    grads = [room(*x.shape) for x in (batch.q, batch.k, batch.v)]
    rows, dq_sum = room(2, H, R, dtype=torch.float32), room(H, R, C, dtype=torch.float32)
    written = (*grads, rows, dq_sum, room(H, R // 64, dtype=torch.int32))
    d_lse = None if d_lse is None else d_lse.data_ptr()
    saved = Packed(out.data_ptr(), *out.stride()[:2]), packed(batch.d_out), lse.data_ptr(), d_lse
    host.backward(byref(Backward(*inputs, *saved, *(x.data_ptr() for x in written), deterministic)))
    assert all((x == 0xFF).all() for x in around if x.dtype == torch.uint8), "written outside of the results"
    return Results(out, lse, *grads)


BATCHES = {  # queries, keys, rows outside of documents, heads
    "tails, an empty document": ([150, 0, 37, 133], None, 10, (2, 1)),
    "more and fewer keys": ([70, 63, 2, 5], [200, 30, 70, 0], 5, (4, 2)),
}


@pytest.mark.parametrize("C, shared_kb", [(64, 99), (96, 99), (128, 99), (128, 227), (192, 99), (256, 99)])
@some_masks
def test_errors_are_those_of_bf16(host, C, shared_kb, mask):
    host.set_shared_bytes(shared_kb << 10)
    for case, (lengths, keys, unused, heads) in BATCHES.items():
        batch = make(lengths, keys, heads, C, unused, device="cpu")
        for deterministic in (False, True):
            d_lse = torch.randn(heads[0], len(batch.q)) if deterministic else None
            results = run(host, batch, d_lse, deterministic, **mask)
            assert_as_good_as_bf16(results, batch, f"{case}, deterministic={deterministic}", d_lse, **mask)
            assert_the_blind_and_the_unseen_are_zero(results, visible(batch, **mask))


@pytest.mark.parametrize("C", [64, 128])
@some_masks
def test_a_packed_document_has_the_bits_of_a_call_of_its_own(host, C, mask):
    batch = make([65, 0, 130, 64], [65, 3, 200, 20], (2, 1), C, unused=3, device="cpu")
    d_lse = torch.randn(2, len(batch.q))
    packed = run(host, batch, d_lse, deterministic=True, **mask)
    for document in batch.documents():
        if min(len(batch.q[document[0]]), len(batch.k[document[1]])):
            alone = run(host, batch.only(*document), d_lse[:, document[0]].contiguous(), deterministic=True, **mask)
            assert_same_bits(packed.only(*document), alone)
