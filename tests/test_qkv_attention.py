"""Attention from a block's input on: the kernels on a Hopper GPU against the steps of models/layers.py."""

import functools

import pytest
import torch
from conftest import fill_free_memory_with_nan
from torch import nn
from torch.utils.checkpoint import checkpoint

from minitrain import Batch, Qwen3Config
from minitrain import qkv_attention as fused
from minitrain.attention import attention, reference
from minitrain.models import build_model, init_weights, materialize
from minitrain.models.layers import Attention, rotate

gpu = pytest.mark.gpu
EPS = 1e-6
CASES = {  # heads, key/value heads, channels: lengths of documents, rows outside of all
    (4, 2, 128): ([300, 1, 64, 130], 7),
    (2, 2, 64): ([200, 63], 0),
    (8, 1, 128): ([128, 257, 5], 3),
    (6, 2, 64): ([500], 100),
    (16, 8, 128): ([1000, 24], 0),
    (2, 1, 128): ([70, 1], 0),
}


@pytest.fixture
def hopper():
    if not torch.cuda.is_available() or not fused.can_run(torch.zeros(1, 1, device="cuda").bfloat16(), 128):
        pytest.skip("needs a Hopper GPU and the CUDA extension")


def make(heads, lengths, outside=0, D=192, device="cuda"):
    """x, weights, norms, cos, sin, cu_seqlens, and the gradient of what comes out."""
    H, K, C = heads
    T, generator = sum(lengths) + outside, torch.Generator(device).manual_seed(H + K + C)
    random = functools.partial(torch.randn, device=device, generator=generator)
    weights = [random(n * C, D).mul(D**-0.5).bfloat16() for n in (H, K, K)]
    norms = [(1 + random(C) / 2).bfloat16() for _ in range(2)]
    angles = random(T, C // 2) * 100
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return random(T, D).bfloat16(), weights, norms, angles.cos(), angles.sin(), cu, random(T, H, C).bfloat16()


def in_steps(x, weights, norms, eps, cos, sin, cu_q, cu_k, attend=None):
    attend = attend or functools.partial(reference, max_seqlen=0, window=None)
    q, k, v = ((x @ weight.T).unflatten(1, (-1, len(norms[0]))) for weight in weights)
    q, k = (rotate(nn.functional.rms_norm(t, n.shape, n, eps), cos, sin) for t, n in zip((q, k), norms, strict=True))
    out = attend(q, k, v, cu_q, cu_k)
    return torch.cat([out, out.new_zeros(len(x) - len(out), *out.shape[1:])])


def results(function, x, weights, norms, cos, sin, cu, d_out, dtype=torch.bfloat16):
    """-> what comes out, and the gradients of x, of the weights and of the norms, by name."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *weights, *norms)]
    out = function(leaves[0], leaves[1:4], leaves[4:], EPS, cos, sin, cu, cu)
    grads = torch.autograd.grad(out, leaves, d_out.to(dtype))
    return dict(zip(("out", "x", "q", "k", "v", "q_norm", "k_norm"), (out.detach(), *grads), strict=True))


@gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("heads", CASES, ids=str)
def test_it_is_as_good_as_the_steps_in_bf16(hopper, heads, deterministic):
    """No more than 1.5 times as far from fp32 as the steps in bf16, and a rounding; memory was NaN before."""
    inputs = make(heads, *CASES[heads])
    exact, rounded = results(in_steps, *inputs, dtype=torch.float32), results(in_steps, *inputs)
    torch.use_deterministic_algorithms(deterministic)
    try:
        fill_free_memory_with_nan()
        ours = results(fused.qkv_attention, *inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, expected in exact.items():
        error, allowed = ((x[name].float() - expected).norm() for x in (ours, rounded))
        assert error <= 1.5 * allowed + 2**-8 * expected.norm(), f"{name} is off by {error}, bf16 by {allowed}"


@gpu
@pytest.mark.parametrize("heads", CASES, ids=str)
def test_of_keys_and_values_it_has_the_bits_of_the_kernels_in_steps(hopper, heads):
    """And of queries what differs by the order of a sum."""
    inputs = make(heads, *CASES[heads])
    attend = functools.partial(attention, max_seqlen=max(CASES[heads][0]))
    ours, steps = (results(f, *inputs) for f in (fused.qkv_attention, functools.partial(with_kernels, attend)))
    for name in ("out", "k", "v", "k_norm"):
        assert torch.equal(ours[name], steps[name]), name
    for name in ("x", "q", "q_norm"):
        torch.testing.assert_close(ours[name], steps[name], rtol=2**-6, atol=2**-7 * float(steps[name].abs().max()))


def with_kernels(attend, x, weights, norms, eps, cos, sin, cu_q, cu_k):
    C = len(norms[0])
    qkv = (x @ torch.cat(list(weights)).T).unflatten(1, (-1, C))
    q, k, v = qkv.split([len(weight) // C for weight in weights], 1)
    q, k = (fused.heads.norm_rotate(t, norm, cos, sin, eps) for t, norm in zip((q, k), norms, strict=True))
    return attend(q, k, v, cu_q, cu_k)


@gpu
def test_deterministic_runs_have_the_same_bits_and_a_nan_stays_in_its_document(hopper):
    x, *rest = make((4, 2, 128), [300, 200])
    torch.use_deterministic_algorithms(True)
    try:
        before = results(fused.qkv_attention, x, *rest)
        for _ in range(10):
            again = results(fused.qkv_attention, x, *rest)
            assert all(torch.equal(again[name], before[name]) for name in before)
        x[299, 5] = torch.nan
        after = results(fused.qkv_attention, x, *rest)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("out", "x"):
        assert after[name][:300].isnan().any() and torch.equal(after[name][300:], before[name][300:]), name


@gpu
def test_it_is_one_graph_for_compile_passes_opcheck_and_takes_no_tokens(hopper, monkeypatch):
    inputs, calls = make((4, 2, 128), [300, 200]), []
    backward = fused.qkv_attention_bwd
    monkeypatch.setattr(fused, "qkv_attention_bwd", lambda *args: calls.append(args) or backward(*args))
    ours = results(fused.qkv_attention, *inputs)
    torch.library.opcheck(backward, tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in calls.pop()))
    monkeypatch.undo()
    compiled = results(torch.compile(fused.qkv_attention, fullgraph=True), *inputs)
    for name, expected in ours.items():
        close = torch.allclose(compiled[name], expected, rtol=2**-6, atol=2**-7 * float(expected.abs().max()))
        assert close, name
    none = results(fused.qkv_attention, *make((4, 2, 128), [0]))
    assert none["out"].shape == (0, 4, 128) and not any(none[name].any() for name in ("q", "k", "v", "q_norm"))


@gpu
def test_a_layer_uses_it_as_it_was_made_and_not_with_anything_changed(hopper, monkeypatch):
    cfg = Qwen3Config(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    batch, calls, hooked, run = (
        Batch.pack([torch.arange(n, device="cuda") for n in (30, 20)]),
        [],
        [],
        fused.qkv_attention,
    )
    monkeypatch.setattr(fused, "qkv_attention", lambda *args: calls.append(1) or run(*args))

    def hidden(change=lambda layer: None):
        model = build_model(cfg)
        materialize(model, "cuda", torch.bfloat16)
        init_weights(model, seed=0)
        change(model.layers["0"].self_attn)
        return model(batch)

    as_made = hidden()
    assert calls.pop()
    for change in (
        lambda layer: setattr(layer, "attention", functools.partial(attention, backend="native")),
        lambda layer: setattr(layer, "norm_rotate", lambda x, norm, cos, sin: rotate(norm(x), cos, sin)),
        lambda layer: layer.q_norm.register_forward_hook(lambda *_: hooked.append(1)),
        lambda layer: setattr(layer.k_norm, "eps", 1e-7),
        lambda layer: setattr(layer.k_proj, "forward", lambda x: nn.functional.linear(x, layer.k_proj.weight)),
    ):
        torch.testing.assert_close(hidden(change), as_made, rtol=0.05, atol=0.05)
        assert not calls
    assert hooked
    hidden(lambda layer: setattr(layer, "q_norm", nn.Identity()))
    assert not calls


@pytest.mark.parametrize("frozen, again", [(None, False), (0, False), (2, False), (4, False), (None, True)])
def test_what_is_made_of_the_kernels_results_are_the_gradients(monkeypatch, frozen, again):
    """In float64 on a CPU, with torch's operations for the kernels. again: its forward is run again in backward."""
    x, weights, norms, cos, sin, cu, d_out = make((4, 2, 8), [5, 3], D=16, device="cpu")
    cos, sin, d_out = cos.double(), sin.double(), d_out.double()

    def turned(x, norm, cos, sin, eps):
        return rotate(nn.functional.rms_norm(x, norm.shape, norm, eps), cos, sin)

    def attend(q, k, v, cu_q, cu_k, *_):
        return reference(q, k, v, cu_q, cu_k, 0, None), q.new_zeros(q.shape[1], len(q))

    def backward(d_out, qkv, _q, _out, _lse, q_norm, k_norm, cos, sin, cu_q, cu_k, eps, _deterministic):
        def forward(qkv, q_norm, k_norm):
            q, k, v = qkv.split([4, 2, 2], 1)
            return attend(turned(q, q_norm, cos, sin, eps), turned(k, k_norm, cos, sin, eps), v, cu_q, cu_k)[0]

        return torch.func.vjp(forward, qkv, q_norm, k_norm)[1](d_out)

    class Kernels:
        UNBOUNDED = 0

    for name, stand_in in {"attention_fwd": attend, "qkv_attention_bwd": backward, "kernels": Kernels}.items():
        monkeypatch.setattr(fused, name, stand_in)
    monkeypatch.setattr(fused.heads, "norm_rotate", turned)
    fast = functools.partial(checkpoint, fused.qkv_attention, use_reentrant=False) if again else fused.qkv_attention
    leaves = [t.double().requires_grad_(i != frozen) for i, t in enumerate((x, *weights, *norms))]
    expected, got = (
        torch.autograd.grad(f(leaves[0], leaves[1:4], leaves[4:], EPS, cos, sin, cu, cu), wanted, d_out)
        for f, wanted in ((f, [t for t in leaves if t.requires_grad]) for f in (in_steps, fast))
    )
    torch.testing.assert_close(got, expected)


def test_on_a_cpu_a_layer_does_the_steps():
    cfg = Qwen3Config(vocab_size=7, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    layer, x = Attention(cfg, qk_norm=True), torch.randn(8, 16)
    _, _, _, cos, sin, cu, _ = make((4, 2, 8), [5, 3], device="cpu")
    batch = Batch.pack([torch.arange(5), torch.arange(3)])
    weights = [m.weight for m in (layer.q_proj, layer.k_proj, layer.v_proj)]
    out = in_steps(x, weights, [layer.q_norm.weight, layer.k_norm.weight], layer.q_norm.eps, cos, sin, cu, cu)
    torch.testing.assert_close(layer(x, (cos, sin), batch), layer.o_proj(out.flatten(1)))
