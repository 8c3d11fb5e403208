"""RMSNorm and RoPE of heads: the kernel on a GPU against the plain functions of models/layers.py, in fp32 and bf16."""

import pytest
import torch
from conftest import fill_free_memory_with_nan
from torch import nn

from minitrain import Batch, Qwen3Config
from minitrain import norm_rotate as fused_norm_rotate
from minitrain.models import build_model, init_weights, materialize
from minitrain.models.layers import norm_rotate, rotate

EPS = 1e-6
gpu = pytest.mark.gpu


@pytest.fixture
def fused():
    pytest.importorskip("minitrain.kernels", reason="the CUDA extension is not built")
    return fused_norm_rotate.norm_rotate


def plain(x_THC, weight_C, cos_TC2, sin_TC2, eps):
    return rotate(nn.functional.rms_norm(x_THC, weight_C.shape, weight_C, eps), cos_TC2, sin_TC2)


def make(T, H, C, device="cuda"):
    """x, weight, cos, sin, and the gradient of what comes out."""
    x, d_out = (torch.randn(T, H, C, device=device).bfloat16() for _ in range(2))
    angles = torch.randn(T, C // 2, device=device) * 100
    return x, (1 + torch.randn(C, device=device)).bfloat16(), angles.cos(), angles.sin(), d_out


def results(function, x, weight, cos, sin, d_out, dtype=None):
    """-> out, dx, d_weight."""
    x, weight = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight))
    out = function(x, weight, cos, sin, EPS)
    return out.detach(), *torch.autograd.grad(out, (x, weight), d_out.to(out.dtype))


def assert_as_good_as_bf16(ours, inputs, case):
    """No more than twice as far from fp32 as the plain functions in bf16, and the rounding of what is returned."""
    exact, rounded = results(plain, *inputs, dtype=torch.float32), results(plain, *inputs)
    for name, got, expected, bf16 in zip(("out", "dx", "d_weight"), ours, exact, rounded, strict=True):
        error, allowed = (got.float() - expected).abs().max(), (bf16.float() - expected).abs().max()
        assert error <= 2 * allowed + 2**-9 * expected.abs().max(), (
            f"{case}: {name} is off by {error}, bf16 by {allowed}"
        )


@gpu
@pytest.mark.parametrize("C", [64, 128, 256])
def test_the_kernel_is_as_good_as_bf16_math(fused, C):
    for T, H in [(1, 1), (7, 2), (8, 3), (9, 5), (1000, 16), (4096, 8), (333, 40), (3000, 1)]:
        inputs = make(T, H, C)
        fill_free_memory_with_nan()
        assert_as_good_as_bf16(results(fused, *inputs), inputs, f"{T} tokens, {H} heads")


@gpu
def test_it_reads_slices_of_a_packed_projection_and_what_it_cannot_address(fused):
    qkv = torch.randn(100, 8, 128, device="cuda").bfloat16()
    odd = torch.randn(100, 4, 131, device="cuda").bfloat16()
    for name, x in {"slice": qkv[:, 2:6], "transposed": qkv[:4].transpose(0, 1), "odd": odd[..., 3:]}.items():
        _, weight, cos, sin, _ = make(len(x), x.shape[1], 128)
        inputs = x, weight, cos, sin, x.flip(0)
        assert_as_good_as_bf16(results(fused, *inputs), inputs, name)
        expanded = x, weight, cos, sin, torch.ones((), dtype=x.dtype, device="cuda").expand(x.shape)
        assert_as_good_as_bf16(results(fused, *expanded), expanded, f"{name}, gradient of a sum")


@gpu
def test_no_token_is_no_work(fused):
    out, dx, d_weight = results(fused, *make(0, 4, 128))
    assert out.shape == dx.shape == (0, 4, 128) and not d_weight.any()


@gpu
def test_a_nan_stays_in_its_head_and_every_run_has_the_same_bits(fused):
    x, *rest = make(500, 6, 128)
    before = results(fused, x, *rest)
    for again in range(20):
        for got, expected in zip(results(fused, x, *rest), before, strict=True):
            assert torch.equal(got, expected), again
    x[77, 3, 5] = torch.nan
    after = results(fused, x, *rest)
    for got, expected in zip(after[:2], before[:2], strict=True):
        bad = got.isnan()
        assert bad[77, 3].all() and bad.sum() == 128
        assert torch.equal(got[~bad], expected[~bad])


@gpu
def test_it_is_one_node_for_compile_and_passes_opcheck(fused):
    x, weight, cos, sin, _ = make(40, 4, 128)
    torch.library.opcheck(fused, (x.requires_grad_(), weight.requires_grad_(), cos, sin, EPS))
    inputs = make(300, 4, 128)
    compiled = torch.compile(lambda *args: fused(*args[:4], EPS), fullgraph=True)
    for got, expected in zip(results(compiled, *inputs), results(fused, *inputs), strict=True):
        assert torch.equal(got, expected)


@gpu
def test_shapes_that_do_not_fit_are_refused(fused):
    x, weight, cos, sin, _ = make(40, 4, 128)
    with pytest.raises(ValueError, match=r"weight is \(64,\), not \(128,\)"):
        fused(x, weight[:64], cos, sin, EPS)
    with pytest.raises(ValueError, match=r"sin is \(39, 64\), not \(40, 64\)"):
        fused(x, weight, cos, sin[1:], EPS)


@gpu
def test_the_model_uses_it_where_it_can_and_leaves_it_out_when_told(fused):
    cfg = Qwen3Config(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model = build_model(cfg)
    materialize(model, "cuda", torch.bfloat16)
    init_weights(model, seed=0)
    batch = Batch.pack([torch.randint(101, (n,), device="cuda") for n in (30, 20)])

    def ops():
        with torch.profiler.profile() as profile:
            hidden = model(batch)
        return hidden, sum(event.name == "minitrain::norm_rotate" for event in profile.events())

    fast, used = ops()
    assert used == 4  # q and k of two layers
    for layer in model.layers.values():
        layer.self_attn.norm_rotate = lambda x, norm, cos, sin: rotate(norm(x), cos, sin)
    slow, used = ops()
    assert used == 0
    torch.testing.assert_close(fast, slow, rtol=0.05, atol=0.05)


def test_without_a_kernel_it_is_the_plain_functions():
    x, _, cos, sin, _ = make(10, 4, 64, device="cpu")
    for norm in (nn.RMSNorm(64, EPS), nn.Identity()):
        for dtype in (torch.bfloat16, torch.float32):
            x_THC, norm = x.to(dtype), norm.to(dtype)
            assert torch.equal(norm_rotate(x_THC, norm, cos, sin), rotate(norm(x_THC), cos, sin))
