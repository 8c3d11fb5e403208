"""Attention: the reference against the definition, every backend against the reference, documents kept apart."""

import importlib
import logging
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from minitrain import extension, fused_attention
from minitrain.attention import BACKENDS, Facts, _document_and_place, attention, choose, why_not

module = importlib.import_module("minitrain.attention")

LAYOUTS = {  # name -> lengths of the documents: queries, keys (None: the same)
    "one document": ([9], None),
    "lengths of one": ([1, 1, 3, 1, 5, 1], None),
    "an empty document first": ([0, 3, 2], None),
    "an empty document in the middle": ([3, 0, 2], None),
    "an empty document last": ([3, 2, 0], None),
    "padded by repeats": ([4, 3, 0, 0, 0, 0], None),
    "equal lengths": ([4, 4, 4], None),
    "more keys than queries": ([1, 3, 2, 0, 2], [6, 3, 5, 2, 9]),
    "fewer keys than queries": ([4, 2, 3], [2, 0, 3]),  # so that some queries see nothing
}
HEADS = {"multi-head": (4, 4), "grouped-query": (4, 2), "multi-query": (4, 1)}
WINDOWS = [None, 0, 1, 5, 1000]

layouts = pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
windows = pytest.mark.parametrize("window", WINDOWS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def make(lengths, heads=(4, 2), C=16, dtype=torch.float32, device="cpu", requires_grad=False):
    """-> (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen), the values random."""
    n, m = lengths[0], lengths[1] or lengths[0]
    q, k, v = (torch.randn(sum(rows), H, C) for rows, H in ((n, heads[0]), (m, heads[1]), (m, heads[1])))
    cu_q, cu_k = (torch.tensor([0, *x], device=device).cumsum(0).to(torch.int32) for x in (n, m))
    tensors = (x.to(device, dtype).requires_grad_(requires_grad) for x in (q, k, v))
    return *tensors, cu_q, cu_k, max(*n, *m)


def visible(cu_q, cu_k, window):
    """Which keys each query sees, (T, S), pair by pair from the definition."""
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    seen = torch.zeros(ends_q[-1], ends_k[-1], dtype=torch.bool)
    for a, b, c, d in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True):
        n, m = b - a, d - c
        for i in range(n):
            for j in range(m):
                seen[a + i, c + j] = j <= i + m - n and (window is None or i + m - n - j <= window)
    return seen.to(cu_q.device)


def dense(q, k, v, seen):
    """Attention with a dense mask, every step in q's dtype; a query that sees nothing gives zeros."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thc,shc->hts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -1e30).softmax(-1) * seen
    return torch.einsum("hts,shc->thc", weights, v)


def with_gradients(run, q, k, v, d_out):
    """-> run(q, k, v) and the gradients of q, k and v."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = run(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), d_out)


def assert_all_close(actual, expected, **tolerance):
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), actual, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def skip_if_it_cannot_run(backend, q: Tensor, window=None):
    if reason := why_not(backend, Facts(q.device.type, q.dtype, q.shape[-1], window is not None)):
        pytest.skip(reason)


# ---- the reference is the definition


@windows
@heads
@layouts
def test_reference_matches_the_definition(lengths, heads, window):
    q, k, v, *rest = make(lengths, heads, C=8, dtype=torch.float64)
    seen, d_out = visible(*rest[:2], window), torch.randn_like(q)
    expected = with_gradients(lambda q, k, v: dense(q, k, v, seen), q, k, v, d_out)
    actual = with_gradients(lambda q, k, v: attention(q, k, v, *rest, window, "reference"), q, k, v, d_out)
    assert_all_close(actual, expected, rtol=1e-11, atol=1e-13)
    single = with_gradients(
        lambda q, k, v: attention(q, k, v, *rest, window, "reference"), q.float(), k.float(), v.float(), d_out.float()
    )
    assert_all_close(single, expected, rtol=1e-5, atol=3e-6)


def test_reference_of_bf16_sums_in_fp32():
    q, k, v, *rest = make(([50, 31], None), dtype=torch.bfloat16)
    exact = attention(q.double(), k.double(), v.double(), *rest, backend="reference")
    out = attention(q, k, v, *rest, backend="reference")
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()  # one rounding, at the end


# ---- every backend is the reference


@pytest.mark.parametrize("window", [None, 1])
@heads
@layouts
@backends
def test_backends_match_reference_in_fp32(backend, lengths, heads, window):
    q, k, v, *rest = make(lengths, heads)
    skip_if_it_cannot_run(backend, q, window)
    d_out = torch.randn_like(q)
    expected, actual = (
        with_gradients(lambda q, k, v, name=name: attention(q, k, v, *rest, window, name), q, k, v, d_out)
        for name in ("reference", backend)
    )
    assert_all_close(actual, expected, rtol=1e-5, atol=3e-6)


@windows
@layouts
def test_flex_sees_what_reference_sees_also_where_it_has_no_backward(lengths, window):
    inputs = make(lengths)
    expected = attention(*inputs, window, "reference")
    torch.testing.assert_close(BACKENDS["flex"](*inputs, window), expected, rtol=1e-5, atol=3e-6)


@layouts
@backends
def test_backends_match_reference_in_bf16(backend, lengths):
    q, k, v, *rest = make(lengths, dtype=torch.bfloat16)
    skip_if_it_cannot_run(backend, q)
    exact = attention(q.double(), k.double(), v.double(), *rest, backend="reference")
    assert_no_worse_than_plain_bf16(
        attention(q, k, v, *rest, backend=backend), dense(q, k, v, visible(*rest[:2], None)), exact
    )


def assert_no_worse_than_plain_bf16(actual, plain, exact, name="out"):
    """Its error is at most twice that of plain bf16 torch, beside one rounding to bf16."""
    exact = exact.double()
    error, allowed = ((x.double() - exact).abs().max() for x in (actual, plain))
    assert error <= 2 * allowed + 2**-8 * exact.abs().max(), f"{name}: {error:.2e}, plain bf16: {allowed:.2e}"


@backends
def test_documents_of_equal_length_in_one_call_equal_the_loop(backend):
    q, k, v, cu, _, max_seqlen = make(([16, 16, 16], None))
    skip_if_it_cannot_run(backend, q)
    padded = torch.cat([cu, cu[-1:]])  # with an empty document, lengths are not equal any more
    d_out = torch.randn_like(q)
    one_call, loop = (
        with_gradients(lambda q, k, v, cu=cu: attention(q, k, v, cu, cu, max_seqlen, None, backend), q, k, v, d_out)
        for cu in (cu, padded)
    )
    assert_all_close(one_call, loop, rtol=1e-5, atol=1e-6)


def test_sdpa_does_not_loop_over_documents_of_equal_length(monkeypatch):
    monkeypatch.delattr(module, "_each_document")
    q, k, v, cu, _, max_seqlen = make(([16, 16, 16], None))
    attention(q, k, v, cu, cu, max_seqlen, backend="sdpa")
    with pytest.raises(NameError):
        attention(q, k, v, torch.cat([cu, cu[-1:]]), torch.cat([cu, cu[-1:]]), max_seqlen, backend="sdpa")


def test_flex_counts_places_from_each_documents_end():
    cu = torch.tensor([0, 0, 3, 3, 5, 6, 6], dtype=torch.int32)
    doc, place = _document_and_place(6, cu)
    assert doc.tolist() == [1, 1, 1, 3, 3, 4]
    assert place.tolist() == [-3, -2, -1, -2, -1, -1]


# ---- documents never see each other

MIDDLE = ([3, 0, 5, 1, 4], None)  # the document of 5 tokens, rows 3 to 8, is the one that is changed


def everything(backend, q, k, v, cu, max_seqlen, d_out):
    return with_gradients(lambda q, k, v: attention(q, k, v, cu, cu, max_seqlen, None, backend), q, k, v, d_out)


@pytest.mark.parametrize("which", ["q", "k", "v", "d_out"])
@backends
def test_a_changed_document_leaves_the_others_bitwise_equal(backend, which):
    q, k, v, cu, _, max_seqlen = make(MIDDLE)
    skip_if_it_cannot_run(backend, q)
    inputs = {"q": q, "k": k, "v": v, "d_out": torch.randn_like(q)}
    before = everything(backend, cu=cu, max_seqlen=max_seqlen, **inputs)
    inputs[which][3:8] = inputs[which][3:8].flip(0) * 7
    after = everything(backend, cu=cu, max_seqlen=max_seqlen, **inputs)
    others = [0, 1, 2, 8, 9, 10, 11, 12]
    assert all(a[others].equal(b[others]) for a, b in zip(before, after, strict=True))
    assert not all(a[3:8].equal(b[3:8]) for a, b in zip(before, after, strict=True))


@backends
def test_a_nan_stays_in_its_document(backend):
    q, k, v, cu, _, max_seqlen = make(MIDDLE)
    skip_if_it_cannot_run(backend, q)
    if backend == "flex":
        pytest.skip("multiplies masked values by 0, and 0 * NaN is NaN")
    d_out = torch.randn_like(q)
    before = everything(backend, q, k, v, cu, max_seqlen, d_out)
    for x in (q, k, v, d_out):
        x[5] = torch.nan
    after = everything(backend, q, k, v, cu, max_seqlen, d_out)
    others = [0, 1, 2, 8, 9, 10, 11, 12]
    assert all(a[others].equal(b[others]) for a, b in zip(before, after, strict=True))
    assert after[0][5].isnan().all()


# ---- what it refuses


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v, a, b: (q[None], k, v, a, b), r"q has shape \(1, 5, 4, 16\)"),
        (lambda q, k, v, a, b: (q, k[:, 0], v, a, b), r"k has shape \(5, 16\)"),
        (lambda q, k, v, a, b: (q, k, v.flatten(1), a, b), r"v has shape \(5, 32\)"),
        (lambda q, k, v, a, b: (q, k.double(), v, a, b), "k is torch.float64 on cpu, but q is torch.float32"),
        (lambda q, k, v, a, b: (q, k, v.bfloat16(), a, b), "v is torch.bfloat16 on cpu, but q is torch.float32"),
        (lambda q, k, v, a, b: (q, k.to("meta"), v, a, b), "k is torch.float32 on meta, but q is .* on cpu"),
        (lambda q, k, v, a, b: (q, k, v[:, :1], a, b), r"k \(5, 2, 16\), v \(5, 1, 16\)"),
        (lambda q, k, v, a, b: (q, k[1:], v, a, b), r"k \(4, 2, 16\), v \(5, 2, 16\)"),
        (lambda q, k, v, a, b: (q[..., :8], k, v, a, b), r"q \(5, 4, 8\), k \(5, 2, 16\)"),
        (lambda q, k, v, a, b: (q[:, :3], k, v, a, b), "3 query heads are not a multiple of 2"),
        (lambda q, k, v, a, b: (q, k[:, :0], v[:, :0], a, b), "4 query heads are not a multiple of 0"),
        (lambda q, k, v, a, b: (q, k, v, a.long(), b), "cu_seqlens_q must be"),
        (lambda q, k, v, a, b: (q, k, v, a, b.float()), "cu_seqlens_k must be"),
        (lambda q, k, v, a, b: (q, k, v, a[None], b), "cu_seqlens_q must be"),
        (lambda q, k, v, a, b: (q, k, v, a, b[1:]), "cu_seqlens_k must be"),
        (lambda q, k, v, a, b: (q, k, v, a[:0], b[:0]), "cu_seqlens_q must be"),
        (lambda q, k, v, a, b: (q, k, v, a, b.to("meta")), "cu_seqlens_k must be"),
    ],
)
@pytest.mark.parametrize("function", [attention, fused_attention.fused_attention])
def test_wrong_arguments_are_named(function, change, message):
    q, k, v, cu_q, cu_k, max_seqlen = make(([2, 3], None))
    with pytest.raises(ValueError, match=message):
        function(*change(q, k, v, cu_q, cu_k), max_seqlen)


@pytest.mark.parametrize(
    "backend, window, message",
    [
        ("varlen", None, "'varlen' cannot run here: it runs on CUDA devices only, not on cpu"),
        ("flash_attn", None, "'flash_attn' cannot run here: it runs on CUDA devices only"),
        ("flex", None, "'flex' cannot run here: it has no backward on cpu"),
        ("xformers", 3, "'xformers' cannot run here: it has no sliding window"),
        ("sdpa", 3, "'sdpa' cannot run here: it has no sliding window"),
        ("nothing", None, "'nothing' is unknown; there are: auto, native, sdpa, flash_attn, varlen, .*, reference"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend, window, message):
    with pytest.raises(ValueError, match=message):
        attention(*make(([2, 3], None)), window, backend)


def test_what_a_gpu_backend_needs_is_said():
    bf16, fp32 = torch.bfloat16, torch.float32
    for name, facts, message in [
        ("varlen", Facts("cuda", fp32, 64, False), "bfloat16 or float16, not torch.float32"),
        ("varlen", Facts("cuda", bf16, 60, False), "head dim 60 is not a multiple of 8"),
        ("varlen", Facts("cuda", bf16, 264, False), "head dim 264 is not a multiple of 8 up to 256"),
        ("flex", Facts("cuda", bf16, 96, False), "head dim 96 is not a power of two"),
    ]:
        assert message in why_not(name, facts)
    assert why_not("varlen", Facts("cuda", bf16, 128, False)) is None
    assert why_not("flex", Facts("cuda", fp32, 64, True)) is None


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An empty folder, the only one that flash_attn and xformers can be imported from; our kernels are not built."""
    monkeypatch.setattr(extension, "kernels", None)
    extension.why_not.cache_clear()
    for name in ("flash_attn", "xformers"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)  # put back at the end as it was
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find_spec(name) if (tmp_path / f"{name}.py").exists() else None
    )
    monkeypatch.syspath_prepend(tmp_path)
    module._import_fails.cache_clear()
    yield tmp_path
    extension.why_not.cache_clear()
    module._import_fails.cache_clear()


def test_a_package_that_is_missing_or_broken_is_named(packages):
    facts = Facts("cuda", torch.bfloat16, 64, False)
    (packages / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    assert why_not("flash_attn", facts) == "the package flash_attn cannot be imported: undefined symbol: _ZN3c10"
    assert why_not("xformers", facts) == "the package xformers is not installed"
    assert choose("auto", "cuda", torch.bfloat16, 64) == "varlen"


# ---- auto


def test_auto_takes_what_can_run_fastest(packages):
    bf16, fp32 = torch.bfloat16, torch.float32
    assert choose("auto", "cpu", fp32, 64) == "sdpa"
    assert choose("auto", "cpu", fp32, 64, window=True) == "reference"
    assert choose("auto", "cuda", bf16, 64) == "varlen"
    assert choose("auto", "cuda", bf16, 64, equal_lengths=True) == "sdpa"
    assert choose("auto", "cuda", fp32, 64) == "flex"
    assert choose("auto", "cuda", fp32, 60) == "reference"
    module._import_fails.cache_clear()
    (packages / "flash_attn.py").touch()
    assert choose("auto", "cuda", bf16, 64) == "flash_attn"


def test_auto_takes_our_kernels_where_they_can_run(monkeypatch):
    monkeypatch.setattr(fused_attention, "why_not", lambda device, dtype, head_dim: None if head_dim == 64 else "no")
    for options in ({}, {"equal_lengths": True}, {"window": True}):
        assert choose("auto", "cuda", torch.bfloat16, 64, **options) == "native"
        assert choose("auto", "cuda", torch.bfloat16, 72, **options) != "native"


def test_auto_says_once_what_it_chose(monkeypatch, caplog):
    monkeypatch.setattr(module, "_said", set())
    caplog.set_level(logging.INFO, logger="minitrain.attention")
    inputs = make(([2, 3], None))
    for _ in range(3):
        attention(*inputs)
        attention(*inputs, backend="auto")
    assert [r.getMessage() for r in caplog.records] == ["attention: sdpa (cpu, torch.float32, head dim 16)"]
    attention(*inputs, backend="reference")  # asked for by name: nothing to say
    assert len(caplog.records) == 1
    attention(*make(([2, 3], None), dtype=torch.bfloat16))
    assert len(caplog.records) == 2


# ---- on the GPU

GPU_LAYOUTS = {
    "packed": ([1, 200, 0, 37, 512, 129, 0], None),
    "equal lengths": ([256, 256, 256], None),
    "more keys than queries": ([1, 100, 64], [300, 101, 64]),
}


def assert_as_good_as_plain_bf16(backend, inputs, window, attention_=attention):
    """Forward and gradients, against the reference in fp32."""
    q, k, v, *rest = inputs
    d_out, seen = torch.randn_like(q), visible(*rest[:2], window)
    wide = [x.float() for x in (q, k, v)]
    exact = with_gradients(lambda q, k, v: attention(q, k, v, *rest, window, "reference"), *wide, d_out.float())
    plain = with_gradients(lambda q, k, v: dense(q, k, v, seen), q, k, v, d_out)
    actual = with_gradients(lambda q, k, v: attention_(q, k, v, *rest, window, backend), q, k, v, d_out)
    for name, *three in zip(("out", "d_q", "d_k", "d_v"), actual, plain, exact, strict=True):
        assert_no_worse_than_plain_bf16(*three, name)


@pytest.mark.gpu
@pytest.mark.timeout(600)  # flex is compiled for each case
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("C", [64, 128])
@pytest.mark.parametrize("lengths", GPU_LAYOUTS.values(), ids=GPU_LAYOUTS)
@backends
def test_gpu_backends_are_no_worse_than_plain_bf16(backend, lengths, C, window):
    inputs = make(lengths, (8, 2), C, torch.bfloat16, "cuda")
    skip_if_it_cannot_run(backend, inputs[0], window)
    assert_as_good_as_plain_bf16(backend, inputs, window)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["auto", "varlen", "flex"])
def test_compiled_attention_is_no_worse_than_plain_bf16_and_never_waits(backend):
    compiled = torch.compile(attention, dynamic=False, fullgraph=True)
    for documents in ([300, 0, 700, 24], [1, 1000, 0, 23], [512, 256, 255, 1]):  # equal shapes: compiled once
        *inputs, _ = make((documents, None), (8, 2), 64, torch.bfloat16, "cuda")
        assert_as_good_as_plain_bf16(backend, (*inputs, 1024), None, compiled)
    before = counters["stats"]["unique_graphs"]
    q, k, v, *rest = make(([24, 700, 300, 0], None), (8, 2), 64, torch.bfloat16, "cuda")
    d_out = torch.randn_like(q)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(lambda q, k, v: compiled(q, k, v, *rest[:2], 1024, None, backend), q, k, v, d_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.gpu
@pytest.mark.parametrize("C", [64, 128])
@pytest.mark.parametrize("kernel", module._SDPA_ORDER, ids=lambda kernel: kernel.name)
def test_each_kernel_behind_sdpa_is_no_worse_than_plain_bf16(monkeypatch, kernel, C):
    monkeypatch.setattr(module, "_SDPA_ORDER", [kernel])
    heads = (8, 8) if kernel.name == "EFFICIENT_ATTENTION" else (8, 2)  # it knows no groups
    assert_as_good_as_plain_bf16("sdpa", make(GPU_LAYOUTS["equal lengths"], heads, C, torch.bfloat16, "cuda"), None)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", GPU_LAYOUTS.values(), ids=GPU_LAYOUTS)
def test_auto_on_the_gpu_never_waits_for_it(lengths):
    q, k, v, *rest = make(lengths, (8, 2), 64, torch.bfloat16, "cuda", requires_grad=True)
    d_out = torch.randn_like(q)
    attention(q, k, v, *rest).backward(d_out)  # the first call may compile and load
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, k, v, *rest).backward(d_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_auto_on_the_gpu_keeps_documents_apart_bitwise():
    q, k, v, cu, _, max_seqlen = make(([100, 0, 300, 1, 111], None), (8, 2), 64, torch.bfloat16, "cuda")
    d_out = torch.randn_like(q)
    others = [*range(100), *range(400, 512)]
    before = everything(None, q, k, v, cu, max_seqlen, d_out)
    for x in (q, k, v, d_out):
        x[100:400] = torch.nan
    after = everything(None, q, k, v, cu, max_seqlen, d_out)
    assert all(a[others].equal(b[others]) for a, b in zip(before, after, strict=True))
