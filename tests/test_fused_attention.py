"""Our attention kernels on a GPU, every promise; and on any machine what is refused, and merge.

GPU tests run for each kernel and head dim that the GPU has (the fixture `kernel`), against attention in fp32, and fill
the memory that a call will get with NaN before it: what is not written shows. Documents are packed as in attention.py.
"""

import dataclasses
import re
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from minitrain.attention import attention, choose
from minitrain.fused_attention import check_documents, fused_attention, merge, why_not

DEVICE = "cuda"
MB = 1 << 20
MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window 1": {"window": 1},
    "window 64": {"window": 64},
    "window 100": {"window": 100},
    "window 1024": {"window": 1024},
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
some_masks = pytest.mark.parametrize("mask", [{}, {"causal": False}, {"window": 100}], ids=["causal", "full", "window"])
gpu = pytest.mark.gpu


class Kernel(NamedTuple):
    name: str
    C: int


KERNELS = [Kernel("hopper", C) for C in (64, 128)] + [Kernel("portable", C) for C in (64, 96, 128, 192, 256)]


@pytest.fixture(params=KERNELS, ids=lambda kernel: f"{kernel.name}-{kernel.C}")
def kernel(request):
    pytest.importorskip("minitrain.kernels", reason="the CUDA extension is not built")
    if request.param.name == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    return request.param


one_of_each = pytest.mark.parametrize("kernel", [Kernel("hopper", 128), Kernel("portable", 128)], indirect=True)


@pytest.fixture(autouse=True)
def exact_references():
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- batches, the reference, the rule for errors


@dataclasses.dataclass
class Batch:
    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    d_out: Tensor
    max_seqlen: int

    def documents(self):
        """-> (slice of the queries, slice of the keys) of each."""
        ends = zip(self.cu_q.tolist(), self.cu_k.tolist(), strict=True)
        before = next(ends)
        for after in ends:
            yield tuple(slice(a, b) for a, b in zip(before, after, strict=True))
            before = after

    def only(self, queries, keys):
        """One document as a batch."""
        n, m = queries.stop - queries.start, keys.stop - keys.start
        cu_q, cu_k = (torch.tensor([0, x], dtype=torch.int32, device=self.q.device) for x in (n, m))
        q, k, v, d_out = self.q[queries], self.k[keys], self.v[keys], self.d_out[queries]
        return Batch(q, k, v, cu_q, cu_k, d_out, max(n, m))

    def copy(self, **changes):
        clones = {f.name: getattr(self, f.name).clone() for f in dataclasses.fields(self)[:-1]}
        return dataclasses.replace(self, **clones | changes)


def cumulated(lengths, device=None):
    return torch.tensor([0, *lengths], device=device or DEVICE).cumsum(0).to(torch.int32)


def make(lengths, keys=None, heads=(4, 2), C=64, unused=0, max_seqlen=None, device=None):
    """Random documents of these lengths, and `unused` rows after them that hold NaN."""
    keys = lengths if keys is None else keys

    def rows(number, heads):
        x = torch.randn(number + unused, heads, C, device=device or DEVICE)
        x[number:] = torch.nan
        return x.bfloat16()

    n, m = sum(lengths), sum(keys)
    q, k, v, d_out = rows(n, heads[0]), rows(m, heads[1]), rows(m, heads[1]), rows(n, heads[0])
    longest = max([0, *lengths, *keys])
    return Batch(q, k, v, cumulated(lengths, device), cumulated(keys, device), d_out, max_seqlen or longest)


class Results(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def only(self, queries, keys):
        return Results(self.out[queries], self.lse[:, queries], self.dq[queries], self.dk[keys], self.dv[keys])


def poison():
    """Fill all that the caching allocator can hand out, and so what a call will get, with NaN (as int32: -1)."""

    def block(size):
        return torch.empty(size, dtype=torch.uint8, device=DEVICE)

    device, stream = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
    held = [
        block(1 << 29),
        *(block(MB) for _ in range(16)),
    ]  # from both of its pools, that of large and of small blocks
    del held
    sizes = []
    for segment in torch.cuda.memory_snapshot():
        is_ours = segment["device"] == device and segment["stream"] == stream
        if is_ours and tuple(segment["segment_pool_id"]) == (0, 0):  # not a CUDA graph's
            free = [piece["size"] for piece in segment["blocks"] if piece["state"] == "inactive"]
            if segment["segment_type"] == "small":  # more than 1 MB would come from the other pool
                free = [size for whole in free for size in [MB] * (whole // MB) + [whole % MB] * (whole % MB > 0)]
            sizes += free
    held = [block(size).fill_(0xFF) for size in sorted(sizes, reverse=True)]
    del held


def with_gradients(forward, batch, d_lse=None, before_backward=lambda: None):
    """forward(q, k, v) -> out, lse; their gradients by d_out and, if it is given, d_lse."""
    leaves = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    out, lse = forward(*leaves)
    before_backward()
    ends = ((out,), (batch.d_out,)) if d_lse is None else ((out, lse), (batch.d_out, d_lse))
    return Results(out.detach(), lse.detach(), *torch.autograd.grad(ends[0], leaves, ends[1]))


def run(kernel, batch, d_lse=None, call=fused_attention, **options):
    def forward(q, k, v):
        return call(q, k, v, batch.cu_q, batch.cu_k, batch.max_seqlen, kernel=kernel.name, **options)

    poison()
    return with_gradients(forward, batch, d_lse, before_backward=poison)


def visible(batch, causal=True, window=None):
    """Which keys each query sees, (T, S)."""

    def document_and_place(x, cu):
        row = torch.arange(len(x), dtype=torch.int32, device=x.device)
        document = torch.bucketize(row, cu[1:].contiguous(), right=True)
        return document, row - torch.cat([cu, cu[-1:]])[document + 1]

    (doc_T, place_T), (doc_S, place_S) = (
        document_and_place(batch.q, batch.cu_q),
        document_and_place(batch.k, batch.cu_k),
    )
    back = place_T[:, None] - place_S
    seen = (doc_T[:, None] == doc_S) & (doc_T[:, None] < len(batch.cu_q) - 1)
    if causal:
        seen &= back >= 0
    if window is not None:
        seen &= back <= window
    return seen


def by_torch(dtype, batch, d_lse=None, scale=None, **mask):
    """The same by torch's operations, each in dtype. A query that sees nothing gives zeros and -inf."""
    seen = visible(batch, **mask)
    blind = ~seen.any(1)[:, None]

    def forward(q, k, v):
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("nhc,mhc->hnm", q, k * (scale or q.shape[-1] ** -0.5))
        scores = scores.masked_fill(~seen, -torch.inf).masked_fill(blind, 0)
        out = torch.einsum("hnm,mhc->nhc", scores.softmax(-1).masked_fill(blind, 0), v)
        return out, scores.float().logsumexp(-1).masked_fill(blind[:, 0], -torch.inf)

    q, k, v, d_out = (x.nan_to_num(0).to(dtype) for x in (batch.q, batch.k, batch.v, batch.d_out))
    wide = dataclasses.replace(batch, q=q, k=k, v=v, d_out=d_out)
    return with_gradients(forward, wide, d_lse)


def assert_as_good_as_bf16(actual, batch, case, d_lse=None, lse_rtol=0, **options):
    """The largest error at most twice, the mean at most 1.1 times that of torch's bf16 math, beside rounding.

    The rule of Dao-AILab/flash-attention, hopper/test_flash_attn.py.
    """
    exact, plain = (by_torch(dtype, batch, d_lse, **options) for dtype in (torch.float32, torch.bfloat16))
    for name in ("out", "dq", "dk", "dv"):
        a, p, e = (getattr(x, name).float() for x in (actual, plain, exact))
        if a.numel() == 0:
            continue
        error, allowed, rounded = (a - e).abs(), (p - e).abs(), e.bfloat16()
        floor = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item() + 1e-4  # 1e-4: sums of fp32, where all cancels
        largest, limit = error.max().item(), 2 * allowed.max().item() + floor
        assert largest <= limit, f"{name}, {case}: largest error {largest:.2e}, allowed {limit:.2e}"
        if len(a) >= 63:  # the mean of fewer is noise
            few_keys = options.get("window") == 1 or batch.max_seqlen <= 2  # of two keys plain bf16 rounds hardly more
            ratio = 1.3 if few_keys else 1.1
            mean, limit = error.mean().item(), ratio * allowed.mean().item() + 1e-5
            assert mean <= limit, f"{name}, {case}: mean error {mean:.2e}, allowed {limit:.2e}"
    tolerance = {"rtol": lse_rtol, "atol": 1e-3}
    torch.testing.assert_close(actual.lse, exact.lse, **tolerance, msg=lambda text: f"lse, {case}: {text}")


def assert_same_bits(actual, expected, names=Results._fields, case=""):
    for name in names:
        a, b = getattr(actual, name), getattr(expected, name)
        assert a.equal(b), f"{name}, {case}: {(a != b).sum()} of {a.numel()} differ"


# ---- errors


@gpu
def test_poison_fills_what_is_handed_out_next():
    poison()
    kinds = [((3,), torch.float32), ((700, 300), torch.bfloat16), ((5000, 4, 128), torch.float32), (100, torch.int32)]
    *floats, ints = [torch.empty(shape, dtype=dtype, device=DEVICE) for shape, dtype in kinds]  # all before a result is
    assert all(x.isnan().all() for x in floats) and (ints == -1).all()


@gpu
@masks
def test_errors_are_those_of_bf16(kernel, mask):
    lengths = [4097, 63, 1000, 65, 127, 64, 177, 129, 4095, 176, 192, 193, 191, 255, 128, 175, 257]
    for groups, heads in {1: (2, 2), 2: (4, 2), 4: (8, 2), 8: (8, 1)}.items():
        for length in (1, 2):  # many together: the largest error of a few numbers is luck
            batch = make([length] * 64, heads=heads, C=kernel.C)
            assert_as_good_as_bf16(run(kernel, batch, **mask), batch, f"{length} tokens, {groups} query heads", **mask)
        batch = make(lengths, heads=heads, C=kernel.C)
        results = run(kernel, batch, **mask)
        for length, document in zip(lengths, batch.documents(), strict=True):
            case = f"{length} tokens, {groups} query heads per key head"
            assert_as_good_as_bf16(results.only(*document), batch.only(*document), case, **mask)


PAIRS = [
    (1, 300), (300, 1), (64, 200), (200, 64), (128, 129), (129, 128), (5, 0), (0, 5),
    (1000, 999), (65, 1000), (1000, 65), (1, 1), (191, 193), (257, 128),
]  # fmt: skip


@gpu
@masks
def test_documents_with_more_or_fewer_keys_than_queries(kernel, mask):
    queries, keys = zip(*PAIRS, strict=True)
    batch = make(queries, keys, C=kernel.C)
    results = run(kernel, batch, **mask)
    for pair, document in zip(PAIRS, batch.documents(), strict=True):
        assert_as_good_as_bf16(results.only(*document), batch.only(*document), f"queries, keys {pair}", **mask)
    assert_the_blind_and_the_unseen_are_zero(results, visible(batch, **mask))


def assert_the_blind_and_the_unseen_are_zero(results, seen):
    blind, unseen = ~seen.any(1), ~seen.any(0)
    assert (results.out[blind] == 0).all() and (results.dq[blind] == 0).all()
    assert (results.lse[:, blind] == -torch.inf).all() and results.lse[:, ~blind].isfinite().all()
    assert (results.dk[unseen] == 0).all() and (results.dv[unseen] == 0).all()


@gpu
def test_queries_that_see_nothing_are_zero_with_their_gradients(kernel):
    batch = make([300, 70, 64], [128, 0, 1], C=kernel.C)
    seen = visible(batch)
    assert (~seen.any(1)).sum() == 172 + 70 + 63
    assert_the_blind_and_the_unseen_are_zero(run(kernel, batch, torch.randn(4, 434, device=DEVICE)), seen)


@gpu
@some_masks
def test_gradients_through_the_lse_too(kernel, mask):
    lengths, keys = [257, 0, 1, 64, 500, 100], [257, 3, 1, 200, 500, 30]
    batch = make(lengths, keys, (8, 2), kernel.C)
    for what, d_out in {"of both": batch.d_out, "of lse alone": torch.zeros_like(batch.d_out)}.items():
        batch = batch.copy(d_out=d_out)
        d_lse = 3 * torch.randn(8, sum(lengths), device=DEVICE)
        results = run(kernel, batch, d_lse, **mask)
        assert_as_good_as_bf16(results, batch, f"gradients {what}", d_lse, **mask)


@gpu
def test_the_scale_is_the_one_that_is_given(kernel):
    batch = make([200, 129], C=kernel.C)
    assert_as_good_as_bf16(run(kernel, batch, scale=0.3), batch, "scale 0.3", scale=0.3)
    assert_same_bits(run(kernel, batch), run(kernel, batch, scale=kernel.C**-0.5), ("out", "lse", "dk", "dv"))


@gpu
def test_many_heads_and_one(kernel):
    for heads in [(1, 1), (3, 3), (6, 2), (5, 1), (40, 8), (64, 1)]:
        batch = make([65, 300, 1, 129], heads=heads, C=kernel.C)
        assert_as_good_as_bf16(run(kernel, batch), batch, f"heads {heads}")


@gpu
def test_parts_of_a_group_never_wait_for_one_that_does_not_begin(kernel):
    """One long document and many short ones, whose parts all have a place near the beginning of the plan."""
    batch = make([2048] + [100] * 20, heads=(32, 4), C=kernel.C)
    for _ in range(20):
        results = run(kernel, batch)
    assert_as_good_as_bf16(results, batch, "32 heads on 4")


# ---- documents

LAYOUTS = {
    "lengths around tiles": [n + d for n in (64, 80, 96, 112, 128, 176, 192) for d in (-1, 0, 1)],
    "the first is empty": [0, 100, 30],
    "one in the middle is empty": [100, 0, 0, 30],
    "the last is empty": [100, 30, 0],
    "padded by repeats": [200, 77, *[0] * 50],
    "lengths of one": [1] * 130,
    "1,000 of three tokens": [3] * 1000,
    "one and a half tiles, long and short": [1, 2000, 3, 96, 0, 500, 1, 1, 127],
}


@gpu
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_documents_of_all_sorts(kernel, lengths):
    for unused in (0, 77):
        batch = make(lengths, C=kernel.C, unused=unused)
        results = run(kernel, batch, deterministic=unused > 0)
        assert_as_good_as_bf16(results, batch, f"{unused} rows unused")
        used = len(batch.q) - unused
        for x in (results.out, results.dq, results.dk, results.dv):
            assert (x[used:] == 0).all(), "rows outside of all documents are not zero"
        assert (results.lse[:, used:] == -torch.inf).all()


@gpu
@pytest.mark.parametrize("rows, keys, documents", [(0, 0, 3), (100, 100, 3), (100, 100, 0), (0, 9, 2), (70, 0, 1)])
def test_without_any_pair_all_is_zero(kernel, rows, keys, documents):
    """No rows, no keys, no documents, or documents that are all empty."""
    q, d_out = (torch.randn(rows, 4, kernel.C, device=DEVICE).bfloat16() for _ in range(2))
    k, v = (torch.randn(keys, 2, kernel.C, device=DEVICE).bfloat16() for _ in range(2))
    batch = Batch(q, k, v, cumulated([0] * documents), cumulated([0] * documents), d_out, 0)
    if documents == 1:
        batch.cu_q[1] = batch.max_seqlen = rows  # one document of queries without keys
    for deterministic in (False, True):
        results = run(kernel, batch, torch.ones(4, rows, device=DEVICE), deterministic=deterministic)
        assert [x.shape for x in results] == [q.shape, (4, rows), q.shape, k.shape, v.shape]
        assert (results.lse == -torch.inf).all() and all((x == 0).all() for x in (results.out, *results[2:]))


# What keeps its bits: dq is summed in any order unless it is to be deterministic, which also goes another way.
BITWISE = {True: Results._fields, False: ("out", "lse", "dk", "dv")}
both_modes = pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])


@gpu
@both_modes
@some_masks
def test_packed_documents_are_bitwise_those_of_one_call_each(kernel, mask, deterministic):
    lengths = [257, 1, 63, 1000, 2, 0, 65, 127, 64, 177, 129, 176, 255, 128, 175]
    keys = [257, 1, 63, 1000, 50, 3, 65, 200, 64, 177, 100, 176, 255, 128, 175]
    batch = make(lengths, keys, C=kernel.C)
    d_lse = torch.randn(4, sum(lengths), device=DEVICE)
    packed = run(kernel, batch, d_lse, deterministic=deterministic, **mask)
    for i, document in enumerate(batch.documents()):
        alone = run(kernel, batch.only(*document), d_lse[:, document[0]], deterministic=deterministic, **mask)
        assert_same_bits(packed.only(*document), alone, BITWISE[deterministic], f"document {i} of {lengths[i]}")


NEIGHBOURS = [40, 50, 30, 200, 7, 128, 60]  # several share each tile


def assert_others_are_untouched(before, after, batch, j, deterministic, case):
    for i, document in enumerate(batch.documents()):
        if i != j:
            a, b = after.only(*document), before.only(*document)
            assert_same_bits(a, b, BITWISE[deterministic], f"document {i}, {case}")
            assert a.dq.isfinite().all(), f"document {i}, {case}"


@gpu
@both_modes
@some_masks
def test_a_changed_document_leaves_the_others_bitwise_equal(kernel, mask, deterministic):
    batch = make(NEIGHBOURS, C=kernel.C)
    before = run(kernel, batch, deterministic=deterministic, **mask)
    for j, document in enumerate(batch.documents()):
        for name, rows, what in [("q", 0, "dk"), ("k", 1, "out"), ("v", 1, "out"), ("d_out", 0, "dv")]:
            changed = batch.copy()
            getattr(changed, name)[document[rows]] *= -7
            after = run(kernel, changed, deterministic=deterministic, **mask)
            assert_others_are_untouched(before, after, batch, j, deterministic, f"{name} of {j} changed")
            assert not getattr(after.only(*document), what).equal(getattr(before.only(*document), what))


@gpu
@both_modes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_stay_in_their_document(kernel, value, deterministic):
    batch = make(NEIGHBOURS, C=kernel.C, unused=5)
    for mask in ({}, {"causal": False}, {"window": 10}):
        before = run(kernel, batch, deterministic=deterministic, **mask)
        for j in (1, 3, 6):
            queries, keys = list(batch.documents())[j]
            for name, own in [("q", "dk"), ("k", "dq"), ("v", "out"), ("d_out", "dv")]:
                bad = batch.copy()
                getattr(bad, name)[(queries if name in ("q", "d_out") else keys).start + 3, :, 5] = value
                after = run(kernel, bad, deterministic=deterministic, **mask)
                case = f"{value} in {name} of {j}, {mask}"
                assert_others_are_untouched(before, after, batch, j, deterministic, case)
                assert not getattr(after.only(queries, keys), own).isfinite().all(), f"{case}: {own} hides it"
                if name == "q":  # and in its row
                    rest = [i for i in range(queries.start, queries.stop) if i != queries.start + 3]
                    assert after.out[rest].equal(before.out[rest]) and after.lse[:, rest].equal(before.lse[:, rest])
                    assert value in (torch.inf, -torch.inf) or after.out[queries.start + 3].isnan().all()


@gpu
def test_what_surrounds_the_tensors_is_never_read_nor_written(kernel):
    batch = make([100, 3, 150], C=kernel.C)
    expected = run(kernel, batch, deterministic=True)

    def surrounded(x):
        buffer = torch.full((len(x) + 512, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device)
        buffer[256:-256] = x
        return buffer

    buffers = [surrounded(x) for x in (batch.q, batch.k, batch.v, batch.d_out)]
    q, k, v, d_out = (x[256:-256] for x in buffers)
    assert_same_bits(run(kernel, batch.copy(q=q, k=k, v=v, d_out=d_out), deterministic=True), expected)
    assert all(x[:256].isnan().all() and x[-256:].isnan().all() for x in buffers)


# ---- values


@gpu
@some_masks
def test_scores_a_hundred_times_larger(kernel, mask):
    batch = make([300, 64, 513], C=kernel.C)
    batch.q *= 100
    results = run(kernel, batch, **mask)
    assert_as_good_as_bf16(results, batch, "q x 100", lse_rtol=1e-5, **mask)
    exact = by_torch(torch.float32, batch, **mask)
    assert (results.out - exact.out).abs().max() <= 2**-7 * batch.v.abs().max()


@gpu
@pytest.mark.parametrize("rise", [0.5, 3.0, 30.0])  # of scores, from one block of 128 keys to the next
def test_scores_that_rise_by_a_little_and_by_much(kernel, rise):
    batch = make([900], C=kernel.C)
    batch.q[:, :, 0] = 1.0
    steps = torch.arange(900, 0, -1, device=DEVICE) // 128  # blocks are seen from the last one on
    batch.k[:, :, 0] = (steps * rise * kernel.C**0.5)[:, None]
    for causal in (False, True):
        results, exact = (f(batch, causal=causal) for f in (partial(run, kernel), partial(by_torch, torch.float32)))
        assert (results.out - exact.out).abs().max() <= 2**-7 * batch.v.abs().max()
        torch.testing.assert_close(results.lse, exact.lse, rtol=1e-5, atol=1e-3)


@gpu
@some_masks
def test_equal_keys_give_the_mean_of_the_values_that_are_seen(kernel, mask):
    batch = make([300, 64, 513], C=kernel.C)
    batch.k[:] = batch.k[:1]
    results, seen = run(kernel, batch, **mask), visible(batch, **mask).float()
    v = batch.v.float().repeat_interleave(2, 1)
    mean = torch.einsum("ts,shc->thc", seen / seen.sum(1, keepdim=True), v)
    assert ((results.out - mean).abs() <= 2**-8 * mean.abs() + 1e-5).all()
    scores = torch.einsum("thc,hc->ht", batch.q.float(), batch.k[0].float().repeat_interleave(2, 0)) * kernel.C**-0.5
    torch.testing.assert_close(results.lse, scores + seen.sum(1).log(), rtol=0, atol=1e-3)


@gpu
@some_masks
def test_constant_values_come_back_within_one_ulp(kernel, mask):
    batch = make([300, 64, 513, 1, 2], C=kernel.C)
    batch.v[:] = batch.v[:1]
    out = run(kernel, batch, **mask).out
    v = batch.v[0].repeat_interleave(2, 0).expand_as(out).contiguous()
    ulps = out.view(torch.int16).int() - v.view(torch.int16).int()  # away from zero, whatever the sign
    assert (ulps.abs() <= 1).all()
    assert ulps.float().mean().abs() < 0.05, "the weights are not rounded to the nearest"


@gpu
@some_masks
def test_zeros_in_d_out_are_gradients_of_exactly_zero(kernel, mask):
    batch = make([300, 64, 513], C=kernel.C)
    batch.d_out[100:364] = 0  # the end of the first document, and the second
    results = run(kernel, batch, **mask)
    assert (results.dq[100:364] == 0).all()
    assert (results.dk[300:364] == 0).all() and (results.dv[300:364] == 0).all()
    assert (results.dq[1:100] != 0).any() and (results.dv[364:] != 0).any()
    batch.d_out.zero_()
    assert all((x == 0).all() for x in run(kernel, batch, **mask)[2:])


# ---- repeats


@gpu
@pytest.mark.parametrize("repeats", [200, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_repeats_are_bitwise_equal_beside_a_bandwidth_hog(kernel, deterministic, repeats):
    names = Results._fields if deterministic else ("out", "lse", "dk", "dv")
    hog, source = (torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    side = torch.cuda.Stream()
    for lengths, keys, heads in [([1000, 37, 511, 129, 1, 300, 177], None, (8, 2)), ([2000, 100], [1111, 601], (4, 4))]:
        batch = make(lengths, keys, heads, kernel.C)
        expected = run(kernel, batch, deterministic=deterministic)
        attend = partial(
            fused_attention,
            cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, max_seqlen=batch.max_seqlen,
            kernel=kernel.name, deterministic=deterministic,
        )  # fmt: skip
        differ = torch.zeros(len(names), dtype=torch.int64, device=DEVICE)
        for i in range(repeats // 2):
            with torch.cuda.stream(side):
                for _ in range(i % 5):
                    hog.copy_(source)
            results = with_gradients(attend, batch)
            differ += torch.stack([(getattr(results, x) != getattr(expected, x)).any() for x in names])
        assert not differ.any(), f"{dict(zip(names, differ.tolist(), strict=True))} of {repeats // 2} calls"
    side.synchronize()


@gpu
def test_sums_of_dq_in_any_order_differ_by_rounding(kernel):
    batch = make([2000, 300, 65], heads=(4, 2), C=kernel.C)
    fixed, free = run(kernel, batch, deterministic=True), run(kernel, batch, deterministic=False)
    assert_same_bits(fixed, free, ("out", "lse"))
    for name in ("dq", "dk", "dv"):  # blocks of queries may come in another order, too
        largest = getattr(fixed, name).abs().max().item()
        torch.testing.assert_close(getattr(free, name), getattr(fixed, name), rtol=2**-7, atol=1e-4 * largest)


# ---- strides


@gpu
def test_slices_of_one_packed_qkv_are_bitwise_as_good(kernel):
    batch, C = make([200, 1, 129, 64], heads=(4, 2), C=kernel.C), kernel.C
    expected = run(kernel, batch, deterministic=True)
    qkv = torch.cat([x.flatten(1) for x in (batch.q, batch.k, batch.v)], 1)
    assert qkv.shape == (len(batch.q), (4 + 2 * 2) * C)
    q, k, v = (x.unflatten(1, (-1, C)) for x in qkv.split([4 * C, 2 * C, 2 * C], 1))
    sliced = batch.copy(q=q, k=k, v=v)
    assert not sliced.k.is_contiguous()
    assert_same_bits(run(kernel, sliced, deterministic=True), expected)

    leaf = qkv.detach().requires_grad_()  # and its gradient
    q, k, v = (x.unflatten(1, (-1, C)) for x in leaf.split([4 * C, 2 * C, 2 * C], 1))
    out, _ = fused_attention(q, k, v, batch.cu_q, batch.cu_k, batch.max_seqlen, kernel=kernel.name, deterministic=True)
    out.backward(batch.d_out)
    assert leaf.grad.equal(torch.cat([x.flatten(1) for x in expected[2:]], 1))


def misaligned(x):
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return buffer[1:].view(x.shape).copy_(x)


def padded_heads(x):
    """Each head followed by 3 channels that hold NaN: strides that are no multiple of 8."""
    buffer = torch.full((*x.shape[:2], x.shape[2] + 3), torch.nan, dtype=x.dtype, device=x.device)
    buffer[..., : x.shape[2]] = x
    return buffer[..., : x.shape[2]]


LAYOUTS_OF_MEMORY = {
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every second channel": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "misaligned by one element": misaligned,
    "heads of odd stride": padded_heads,
    "one row for all": lambda x: x[:1].expand_as(x),
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "one channel for all": lambda x: x[..., :1].expand_as(x),
}


@gpu
@pytest.mark.parametrize("layout", LAYOUTS_OF_MEMORY.values(), ids=LAYOUTS_OF_MEMORY)
def test_any_layout_in_memory_gives_the_same_bits_or_is_refused_by_name(kernel, layout):
    batch = make([100, 65, 1], C=kernel.C)
    for name in ("q", "k", "v", "d_out"):
        strange = layout(getattr(batch, name))
        assert not strange.is_contiguous() or strange.data_ptr() % 16
        plain = batch.copy(**{name: strange.clone(memory_format=torch.contiguous_format)})
        expected = run(kernel, plain, deterministic=True)
        try:
            actual = run(kernel, batch.copy(**{name: strange}), deterministic=True)
        except ValueError as error:
            assert name != "d_out" and re.search(rf"\b{name}\b", str(error)), error
        else:
            assert_same_bits(actual, expected, case=name)


@gpu
def test_the_gradient_of_a_plain_sum(kernel):
    """Its d_out is one number with strides of zero."""
    batch = make([100, 65, 1], C=kernel.C)
    batch.d_out = torch.ones((), dtype=torch.bfloat16, device=DEVICE).expand_as(batch.q)
    assert_as_good_as_bf16(run(kernel, batch), batch, "sum")


@gpu
def test_only_what_needs_a_gradient_gets_one(kernel):
    batch = make([100, 65, 1], C=kernel.C)
    expected = run(kernel, batch, deterministic=True)
    for i, name in enumerate(("q", "k", "v")):
        inputs = [batch.q, batch.k, batch.v]
        inputs[i] = inputs[i].detach().requires_grad_()
        out, lse = fused_attention(
            *inputs, batch.cu_q, batch.cu_k, batch.max_seqlen, kernel=kernel.name, deterministic=True
        )
        [grad] = torch.autograd.grad(out, inputs[i], batch.d_out)
        assert grad.equal(getattr(expected, f"d{name}"))
    with torch.no_grad():
        out, lse = fused_attention(*inputs, batch.cu_q, batch.cu_k, batch.max_seqlen, kernel=kernel.name)
    assert not out.requires_grad and out.equal(expected.out) and lse.equal(expected.lse)


# ---- what it refuses

REFUSED = {
    "q of two dimensions": (lambda b: {"q_THC": b.q[:, 0]}, r"\bq"),
    "k of four dimensions": (lambda b: {"k_SKC": b.k[None]}, r"\bk"),
    "fp32": (lambda b: {"q_THC": b.q.float(), "k_SKC": b.k.float(), "v_SKC": b.v.float()}, "bfloat16"),
    "k of another dtype": (lambda b: {"k_SKC": b.k.float()}, r"\bk\b.*(bfloat16|float32)"),
    "v on another device": (lambda b: {"v_SKC": b.v.cpu()}, r"\bv\b.*(cpu|cuda)"),
    "k and v of different lengths": (lambda b: {"k_SKC": b.k[1:]}, r"\bk\b"),
    "q of another head dim": (lambda b: {"q_THC": b.q[..., :32]}, r"\bq\b"),
    "heads that are no multiple": (lambda b: {"q_THC": b.q[:, :3]}, "3 query heads"),
    "cu_seqlens of int64": (lambda b: {"cu_seqlens_q": b.cu_q.long()}, "cu_seqlens_q.*int32"),
    "cu_seqlens on the CPU": (lambda b: {"cu_seqlens_k": b.cu_k.cpu()}, "cu_seqlens_k.*cuda"),
    "cu_seqlens of different lengths": (lambda b: {"cu_seqlens_k": b.cu_k[1:]}, "cu_seqlens_k"),
    "cu_seqlens of two dimensions": (lambda b: {"cu_seqlens_q": b.cu_q[None]}, "cu_seqlens_q"),
    "a window that is not causal": (lambda b: {"causal": False, "window": 5}, "window"),
    "a negative window": (lambda b: {"window": -1}, "window"),
    "a kernel of no such name": (lambda b: {"kernel": "best"}, "best.*(hopper|portable)"),
    "a head dim that is not built": (
        lambda b: {"q_THC": b.q[..., :72], "k_SKC": b.k[..., :72], "v_SKC": b.v[..., :72]},
        "72.*64.*128",
    ),
    "a head dim that hopper's kernels do not have": (
        lambda b: {"q_THC": b.q[..., :96], "k_SKC": b.k[..., :96], "v_SKC": b.v[..., :96], "kernel": "hopper"},
        "hopper.*64",
    ),
}


@gpu
@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_take_is_a_value_error_that_says_what_it_can(change, message):
    pytest.importorskip("minitrain.kernels", reason="the CUDA extension is not built")
    b = make([30, 50], C=128)
    arguments = {
        "q_THC": b.q, "k_SKC": b.k, "v_SKC": b.v, "cu_seqlens_q": b.cu_q, "cu_seqlens_k": b.cu_k, "max_seqlen": 50
    }  # fmt: skip
    assert fused_attention(**arguments)[0].shape == b.q.shape
    with pytest.raises(ValueError, match=message):
        fused_attention(**arguments | change(b))


def test_tensors_on_the_cpu_are_refused():
    b = make([30, 50], device="cpu")
    with pytest.raises(ValueError, match="CUDA"):
        fused_attention(b.q, b.k, b.v, b.cu_q, b.cu_k, 50)


def test_why_it_cannot_run_is_said():
    assert "cpu" in why_not("cpu", torch.bfloat16, 128)
    for dtype, head_dim in [(torch.float32, 128), (torch.bfloat16, 72), (torch.bfloat16, 512)]:
        assert why_not("cuda", dtype, head_dim)


@gpu
def test_auto_takes_it_on_every_gpu_it_is_built_for():
    pytest.importorskip("minitrain.kernels", reason="the CUDA extension is not built")
    for C in (64, 96, 128, 192, 256):
        assert why_not("cuda", torch.bfloat16, C) is None
        assert choose("auto", "cuda", torch.bfloat16, C) == "native"
    batch = make([300, 20], C=128)
    for window in (None, 30):
        out = attention(batch.q, batch.k, batch.v, batch.cu_q, batch.cu_k, 300, window)
        assert_same_bits(Results(out, *[None] * 4), run(Kernel("auto", 128), batch, window=window), ("out",))


@pytest.mark.parametrize(
    "cu_q, cu_k, message",
    [
        ([0, 5, 10], [0, 4, 12], None),
        ([0, 0, 0], [0, 0, 0], None),
        ([0, 3, 3], [0, 11, 11], None),  # rows beyond the last document
        ([0, 6, 5, 10], [0, 1, 2, 3], r"cu_seqlens_q\[2\] = 5 .* 6 "),
        ([0, 1, 2, 3], [0, 6, 5, 10], r"cu_seqlens_k\[2\] = 5 .* 6 "),
        ([0, 5, 11], [0, 5, 11], r"cu_seqlens_q\[2\] = 11 .* 10\b"),
        ([0, 5, 10], [0, 5, 13], r"cu_seqlens_k\[2\] = 13 .* 12\b"),
        ([-1, 5, 10], [0, 5, 10], r"cu_seqlens_q\[0\] = -1 "),
        ([0, 5, 10], [2, 5, 10], r"cu_seqlens_k\[0\] = 2 "),
    ],
)
def test_documents_are_checked_when_asked(cu_q, cu_k, message):
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k))
    if message is None:
        check_documents(cu_q, cu_k, 10, 12)
    else:
        with pytest.raises(ValueError, match=message):
            check_documents(cu_q, cu_k, 10, 12)


@gpu
@pytest.mark.parametrize("cu", [[5, 100, 300], [0, 200, 100], [0, 100, 301], [0, 300] * 3, [0, -5, 300]])
def test_nonsense_in_cu_seqlens_is_no_documents_and_no_harm(kernel, cu):
    batch = make([100, 200], C=kernel.C)
    wrong = torch.tensor(cu, dtype=torch.int32, device=DEVICE)
    right = torch.arange(len(cu), dtype=torch.int32, device=DEVICE)
    for cu_q, cu_k in [(wrong, wrong), (right, wrong), (wrong, right)]:
        for deterministic in (False, True):
            results = run(kernel, batch.copy(cu_q=cu_q, cu_k=cu_k), deterministic=deterministic)
            assert (results.lse == -torch.inf).all() and all((x == 0).all() for x in (results.out, *results[2:]))


# ---- one after another, compiled, captured, on other streams and GPUs


@gpu
@one_of_each
@pytest.mark.parametrize("kept", [False, True], ids=["", "plans kept"])
def test_batches_that_take_turns_get_their_own_plans(kernel, kept):
    """Two of one shape, one that is changed in place, other heads, and many that live at the same address."""

    def keep(batch):
        if kept:
            batch.cu_q.plans = {}  # as minitrain.Batch does: see make_plan
        return batch

    first, second = (keep(make(lengths, C=128, max_seqlen=400)) for lengths in ([10, 300, 90], [200, 0, 200]))
    expected = [run(kernel, batch, deterministic=True) for batch in (first, second)]
    for _ in range(3):
        for batch, results in zip((first, second), expected, strict=True):
            assert_same_bits(run(kernel, batch, deterministic=True), results)
            assert_as_good_as_bf16(results, batch, "in turns")
            assert not kept or len(batch.cu_q.plans) == 1, "made more than once"
    for heads in [(2, 2), (4, 4), (8, 2)]:
        other = make([10, 300, 90], heads=heads, C=128)
        other = dataclasses.replace(other, cu_q=first.cu_q, cu_k=first.cu_k)
        assert_as_good_as_bf16(run(kernel, other), other, f"heads {heads}, the same cu_seqlens")
    changing = keep(first.copy())
    for lengths in ([400, 0, 0], [1, 2, 397], [10, 300, 90]):
        changing.cu_q.copy_(cumulated(lengths))
        changing.cu_k.copy_(cumulated(lengths))
        assert_as_good_as_bf16(run(kernel, changing), changing, f"changed in place to {lengths}")
        assert not kept or len(changing.cu_q.plans) == 1, "former plans pile up"
    for i in range(10):
        lengths = [10 + 30 * i, 90, 300 - 30 * i]
        both = keep(dataclasses.replace(first, cu_q=(cu := cumulated(lengths)), cu_k=cu))
        keys = dataclasses.replace(first, cu_k=cumulated(lengths))  # the same queries
        for batch in (both, keys):
            assert_as_good_as_bf16(run(kernel, batch), batch, f"new at an old address, {i}")
        del both, keys, batch, cu


class Calls(TorchDispatchMode):
    """Notes the arguments of our ops."""

    def __init__(self):
        super().__init__()
        self.of = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "minitrain":
            self.of[op] = (args, kwargs or {})
        return op(*args, **kwargs or {})


@gpu
@one_of_each
def test_torch_accepts_the_ops(kernel):
    batch = make([100, 0, 65], heads=(4, 2), C=128)
    with Calls() as calls:
        run(kernel, batch, torch.randn(4, 165, device=DEVICE), deterministic=True)
    ops = [torch.ops.minitrain.attention_fwd.default, torch.ops.minitrain.attention_bwd.default]
    assert set(ops) <= set(calls.of)
    for op in ops:
        args, kwargs = calls.of[op]
        args = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
        if op is ops[0]:
            args = [x.requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in args]
        torch.library.opcheck(op, tuple(args), kwargs)


@gpu
@one_of_each
@pytest.mark.timeout(600)
def test_compiled_it_is_one_graph_and_the_same_bits(kernel):
    torch._dynamo.reset()
    compiled = torch.compile(fused_attention, fullgraph=True)
    counters.clear()
    for lengths in ([300, 0, 65, 35], [100, 100, 100, 100], [1, 2, 3, 394]):
        batch = make(lengths, C=128, max_seqlen=400)
        d_lse = torch.randn(4, 400, device=DEVICE)
        expected = run(kernel, batch, d_lse, deterministic=True)
        assert_same_bits(run(kernel, batch, d_lse, compiled, deterministic=True), expected, case=str(lengths))
    assert counters["stats"]["unique_graphs"] == 1
    batch = make([600, 0, 65, 35], C=128, max_seqlen=700)  # another T: compiled again, for any
    assert_same_bits(run(kernel, batch, None, compiled, deterministic=True), run(kernel, batch, deterministic=True))


@gpu
@one_of_each
@some_masks
def test_a_captured_graph_replays_with_other_inputs_and_other_documents(kernel, mask):
    batches = [make(lengths, C=128, max_seqlen=400) for lengths in ([10, 300, 90], [200, 0, 200], [1, 398, 1])]
    expected = [run(kernel, batch, deterministic=True, **mask) for batch in batches]
    static = batches[0].copy()
    leaves = [x.requires_grad_() for x in (static.q, static.k, static.v)]

    def step():
        out, lse = fused_attention(
            *leaves, static.cu_q, static.cu_k, 400, kernel=kernel.name, deterministic=True, **mask
        )
        return Results(out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, static.d_out))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for i in (1, 0, 2, 2, 1):
        with torch.no_grad():
            for field in dataclasses.fields(Batch)[:-1]:
                getattr(static, field.name).copy_(getattr(batches[i], field.name))
            for x in results:
                x.fill_(torch.nan)
        graph.replay()
        assert_same_bits(results, expected[i], case=f"batch {i}")


@gpu
@one_of_each
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_it_never_waits_for_the_gpu(kernel, deterministic):
    def attend(batch, q, k, v):
        return fused_attention(q, k, v, batch.cu_q, batch.cu_k, 400, kernel=kernel.name, deterministic=deterministic)

    warm, batch = (make(lengths, C=128, max_seqlen=400) for lengths in ([10, 300, 90], [200, 0, 200]))
    d_lse = torch.randn(4, 400, device=DEVICE)
    with_gradients(partial(attend, warm), warm, d_lse)  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = with_gradients(partial(attend, batch), batch, d_lse)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_as_good_as_bf16(results, batch, "", d_lse)


@gpu
@one_of_each
def test_it_runs_on_the_current_stream(kernel):
    source = make([100, 20, 300], C=128)
    expected = run(kernel, source, deterministic=True)
    late = source.copy()
    for field in dataclasses.fields(Batch)[:-1]:
        getattr(late, field.name).zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # clock cycles: what is launched on another stream sees the zeros
        for field in dataclasses.fields(Batch)[:-1]:
            getattr(late, field.name).copy_(getattr(source, field.name))
        options = {"kernel": kernel.name, "deterministic": True}
        results = with_gradients(
            lambda q, k, v: fused_attention(q, k, v, late.cu_q, late.cu_k, late.max_seqlen, **options), late
        )
    side.synchronize()
    assert_same_bits(results, expected)


@gpu
@one_of_each
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_on_the_tensors_device_and_leaves_the_current_one(kernel):
    there = make([100, 20, 300], C=128, device="cuda:1")
    here = dataclasses.replace(
        there, **{f.name: getattr(there, f.name).to("cuda:0") for f in dataclasses.fields(Batch)[:-1]}
    )
    torch.cuda.set_device(0)
    expected, results = (run(kernel, batch, deterministic=True) for batch in (here, there))
    assert torch.cuda.current_device() == 0 and results.dq.device.index == 1
    assert_same_bits(Results(*(x.to("cuda:0") for x in results)), expected)


# ---- merging partial results


def part(batch, queries, keys, lengths_q, lengths_k):
    """Some of the rows, packed as documents of these lengths."""
    cu_q, cu_k = cumulated(lengths_q), cumulated(lengths_k)
    longest = max(*lengths_q, *lengths_k)
    return Batch(batch.q[queries], batch.k[keys], batch.v[keys], cu_q, cu_k, batch.d_out[queries], longest)


@gpu
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_two_blocks_of_keys_merged_are_one_call(kernel, causal):
    """Two documents, their keys halved. Causal: their later halves see the earlier in full and themselves causally."""
    lengths, halves = [300, 130], [150, 65]
    batch = make(lengths, C=kernel.C)
    early, late = [*range(150), *range(300, 365)], [*range(150, 300), *range(365, 430)]
    queries, lengths_q = (late, halves) if causal else (early + late, lengths)
    if not causal:
        queries = list(range(430))
    whole = part(batch, queries, range(430), lengths_q, lengths)
    blocks = [part(batch, queries, keys, lengths_q, halves) for keys in (early, late)]
    d_lse = torch.randn(4, len(queries), device=DEVICE)

    def both(q, k, v):
        partial_results = [
            fused_attention(
                q, k[keys], v[keys], b.cu_q, b.cu_k, b.max_seqlen, kernel=kernel.name, causal=causal and keys is late
            )
            for keys, b in zip((early, late), blocks, strict=True)
        ]
        return merge(*partial_results[0], *partial_results[1])

    poison()
    merged = with_gradients(both, whole, d_lse)
    assert merged.out.dtype == torch.bfloat16 and merged.lse.dtype == torch.float32
    assert_as_good_as_bf16(merged, whole, "merged", d_lse, causal=causal)
    once = run(kernel, whole, d_lse, causal=causal)
    torch.testing.assert_close(merged.out, once.out, rtol=2**-6, atol=2**-7)
    torch.testing.assert_close(merged.lse, once.lse, rtol=0, atol=1e-5)


def partial_results(T=5, H=3, C=4):
    out = torch.randn(T, H, C, dtype=torch.float64)
    return out, torch.randn(H, T, dtype=torch.float64) * 3


def test_merge_is_attention_over_all_keys():
    q, k, v = (torch.randn(n, 2, 8, dtype=torch.float64) for n in (5, 9, 9))

    def attend(k, v):
        scores = torch.einsum("thc,shc->hts", q, k)
        return torch.einsum("hts,shc->thc", scores.softmax(-1), v), scores.logsumexp(-1)

    out, lse = merge(*attend(k[:3], v[:3]), *attend(k[3:], v[3:]))
    torch.testing.assert_close((out, lse), attend(k, v), rtol=1e-12, atol=1e-12)


def test_merge_has_the_right_gradient():
    inputs = [x.requires_grad_() for x in (*partial_results(), *partial_results())]
    assert torch.autograd.gradcheck(merge, inputs)


def test_merge_with_one_that_saw_nothing_is_the_other():
    (a, lse_a), (b, lse_b) = partial_results(), partial_results()
    lse_a[:, 1:3], lse_b[:, 2:4] = -torch.inf, -torch.inf  # token 1: only b saw; 2: neither; 3: only a
    a[1:3], b[2:4] = 0, 0
    inputs = [x.requires_grad_() for x in (a, lse_a, b, lse_b)]
    out, lse = merge(*inputs)
    assert out[1].equal(b[1]) and lse[:, 1].equal(lse_b[:, 1])
    assert out[3].equal(a[3]) and lse[:, 3].equal(lse_a[:, 3])
    assert (out[2] == 0).all() and (lse[:, 2] == -torch.inf).all()
    d_a, d_lse_a, d_b, d_lse_b = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
    assert all(x.isfinite().all() for x in (d_a, d_lse_a, d_b, d_lse_b))
    assert (d_b[1] == 1).all() and (d_a[3] == 1).all() and (d_a[1] == 0).all() and (d_b[3] == 0).all()
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close((d_lse_b[:, 1], d_lse_a[:, 3]), (ones, ones))
    assert (d_lse_a[:, 1:3] == 0).all() and (d_lse_b[:, 2:4] == 0).all()


def test_merge_does_not_overflow():
    (a, _), (b, _) = partial_results(), partial_results()
    low, high = (torch.full((3, 5), x) for x in (-1000.0, 1000.0))
    out, lse = merge(a.float(), low, b.float(), high)
    assert out.equal(b.float()) and lse.equal(high)
    out, lse = merge(a.float(), high, b.float(), high)
    torch.testing.assert_close(out, (a + b).float() / 2, rtol=1e-4, atol=1e-5)  # a ulp of lse is 6e-5
    torch.testing.assert_close(lse, high + torch.tensor(2.0).log())
