"""The portable attention kernels without a GPU: their sources, compiled for the host, against attention in fp32.

cuda_on_the_host.h stands for CUDA. A copy that is not waited for, most missing barriers, bank conflicts of ldmatrix and
memory that is written beside its place show; speed and what the hardware reorders do not. The batches, the reference
and the rule for errors are those of test_fused_attention.py, which asks a GPU.
"""

import ctypes
import re
from ctypes import byref, c_bool, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from conftest import Rooms, compile_for_the_host, raise_errors
from test_fused_attention import (
    Results,
    assert_as_good_as_bf16,
    assert_same_bits,
    assert_the_blind_and_the_unseen_are_zero,
    make,
    visible,
)

pytestmark = pytest.mark.slow  # a minute
ROOT = Path(__file__).resolve().parent.parent
SOURCES = {  # of a build folder
    "attention_plan.inc": "attention_plan.cu",
    **{f"{name}.cpp": f"{name}.cu" for name in ("attention_prepare", "attention_fwd_sm80", "attention_bwd_sm80")},
    "sm80.cuh": "sm80.cuh",
}


def of(kind, names):
    return [(name, kind) for name in names.split()]


# The structs of attention.h.
class Shape(ctypes.Structure):
    sizes = "num_queries num_keys num_documents heads kv_heads head_dim look_back look_ahead"
    _fields_ = of(c_int, sizes) + of(c_float, "scale")


class Packed(ctypes.Structure):
    _fields_ = of(c_void_p, "data") + of(c_int64, "row_stride head_stride")


class Forward(ctypes.Structure):
    _fields_ = of(Shape, "shape") + of(c_void_p, "plan") + of(Packed, "q k v") + of(c_void_p, "out lse")


class Backward(ctypes.Structure):
    _fields_ = of(Shape, "shape") + of(c_void_p, "plan") + of(Packed, "q k v out d_out")
    _fields_ += of(c_void_p, "lse d_lse dq") + of(Packed, "dk dv") + of(c_void_p, "rows dq_sum turns")
    _fields_ += of(c_bool, "deterministic")
    _fields_ += of(c_void_p, "dkv_sum dkv_turns")


HARNESS = r"""
#include "attention_plan.inc"
using namespace minitrain;
static_assert(sizeof(AttentionForward) == FORWARD_BYTES && sizeof(AttentionBackward) == BACKWARD_BYTES, "");
AttentionTiles tiles(const AttentionShape& shape) { return attention_tiles(shape.head_dim, false); }
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
    sources = {name: on_the_host((ROOT / "kernels" / file).read_text()) for name, file in SOURCES.items()}
    sizes = [f"-DFORWARD_BYTES={ctypes.sizeof(Forward)}", f"-DBACKWARD_BYTES={ctypes.sizeof(Backward)}"]
    folder, sources = tmp_path_factory.mktemp("portable"), sources | {"harness.cpp": HARNESS}
    library = compile_for_the_host(folder, sources, "-fno-strict-aliasing", *sizes)
    library.plan_ints.restype = library.padded_rows.restype = c_int64
    raise_errors(library.plan, library.forward, library.backward)
    return library


def run(host, batch, d_lse=None, deterministic=False, causal=True, window=None):
    """Forward and backward. What they may write to begins as NaN (as int32: -1), and what lies around stays so."""
    (T, H, C), (S, K, _) = batch.q.shape, batch.k.shape
    room, alive = Rooms(), []

    def packed(x):
        wide = torch.cat([x, torch.full_like(x[:, :1], torch.nan)], 1)  # rows further apart than they are long
        alive.append(wide)
        return Packed(wide.data_ptr(), *wide.stride()[:2])

    everything = 1 << 29  # kUnbounded
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
    workspaces = (x.data_ptr() for x in (rows, dq_sum, room(H, R // 64, dtype=torch.int32)))
    written = grads[0].data_ptr(), *(Packed(x.data_ptr(), *x.stride()[:2]) for x in grads[1:]), *workspaces
    d_lse = None if d_lse is None else d_lse.data_ptr()
    saved = Packed(out.data_ptr(), *out.stride()[:2]), packed(batch.d_out), lse.data_ptr(), d_lse
    host.backward(byref(Backward(*inputs, *saved, *written, deterministic)))
    room.assert_nothing_else_was_written()
    return Results(out, lse, *grads)


CASES = [  # head dim, KB of shared memory that a CTA may have, heads, whether deterministic, mask
    (64, 99, (4, 2), False, {}),
    (64, 99, (2, 1), True, {"causal": False}),
    (64, 99, (2, 2), True, {"window": 40}),
    (96, 99, (2, 1), False, {"window": 40}),
    (128, 99, (4, 2), True, {}),
    (128, 227, (2, 1), False, {"window": 40}),  # two stages
    (192, 99, (2, 1), True, {}),
    (256, 99, (2, 1), False, {"window": 100}),
]


@pytest.mark.parametrize("C, shared_kb, heads, deterministic, mask", CASES)
def test_errors_are_those_of_bf16(host, C, shared_kb, heads, deterministic, mask):
    """Tails, an empty document, more and fewer keys than queries, rows outside of documents that hold NaN."""
    host.set_shared_bytes(shared_kb << 10)
    batch = make([130, 0, 5, 63], [130, 3, 140, 30], heads, C, unused=5, device="cpu")
    batch.k[70:130] *= 6  # the first document's scores rise so much that what was summed is rescaled
    d_lse = torch.randn(heads[0], len(batch.q)) if deterministic else None
    results = run(host, batch, d_lse, deterministic, **mask)
    assert_as_good_as_bf16(results, batch, "packed", d_lse, **mask)
    assert_the_blind_and_the_unseen_are_zero(results, visible(batch, **mask))


@pytest.mark.parametrize("C, mask", [(64, {}), (128, {"window": 40})])
def test_a_packed_document_has_the_bits_of_a_call_of_its_own(host, C, mask):
    batch = make([65, 0, 130], [65, 3, 70], (2, 1), C, unused=3, device="cpu")
    d_lse = torch.randn(2, len(batch.q))
    packed = run(host, batch, d_lse, deterministic=True, **mask)
    for queries, keys in list(batch.documents())[::2]:
        alone = run(host, batch.only(queries, keys), d_lse[:, queries].contiguous(), deterministic=True, **mask)
        assert_same_bits(packed.only(queries, keys), alone)
