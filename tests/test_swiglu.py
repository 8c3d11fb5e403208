"""SwiGLU inside its products: the kernels on a Hopper GPU against the plain function of models/layers.py."""

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_free_memory_with_nan
from torch import nn

from minitrain import swiglu as fused
from minitrain.models.layers import SwiGLU

gpu = pytest.mark.gpu
SHAPES = [(1, 64, 512), (7, 128, 320), (129, 64, 192), (1000, 192, 1024), (3001, 1024, 3072), (8192, 2560, 9728)]


@pytest.fixture
def hopper():
    if not torch.cuda.is_available() or not fused.runs_on_hopper("cuda", 0):
        pytest.skip("needs a Hopper GPU and the CUDA extension")


def make(T, D, F, device="cuda"):
    """x, three weights, and the gradient of what comes out."""
    generator = torch.Generator(device).manual_seed(T)
    shapes = (T, D), (F, D), (F, D), (D, F), (T, D)
    tensors = [torch.randn(shape, device=device, generator=generator) for shape in shapes]
    return [t.mul(t.shape[1] ** -0.5 if 0 < i < 4 else 1).bfloat16() for i, t in enumerate(tensors)]


def plain(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def results(function, *inputs, dtype=torch.bfloat16):
    """-> out, and the gradients of x and of the weights."""
    *inputs, d_out = (t.to(dtype) for t in inputs)
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, d_out)


def layer_of(gate, up, down):
    layer = SwiGLU(gate.shape[1], len(gate))
    for linear, weight in zip((layer.gate_proj, layer.up_proj, layer.down_proj), (gate, up, down), strict=True):
        linear.weight = nn.Parameter(weight)
    return layer


@gpu
@pytest.mark.parametrize("T, D, F", SHAPES)
def test_the_kernels_are_as_good_as_bf16_math(hopper, T, D, F):
    """No more than 1.2 times as far from fp32 as the plain function in bf16, and a rounding; memory was NaN before."""
    inputs = make(T, D, F)
    fill_free_memory_with_nan()
    ours = results(fused.swiglu, *inputs)
    exact, rounded = results(plain, *inputs, dtype=torch.float32), results(plain, *inputs)
    for name, got, expected, bf16 in zip(("out", "dx", "d_gate", "d_up", "d_down"), ours, exact, rounded, strict=True):
        error, allowed = ((x.float() - expected).norm() / expected.norm() for x in (got, bf16))
        assert error <= 1.2 * allowed + 2**-9, f"{name} is off by {error}, bf16 by {allowed}"


@gpu
@pytest.mark.parametrize("T, D, F", [(32_768, 64, 3072), (8192, 128, 9728), (8192, 192, 1024)])
def test_short_products_of_many_tiles_are_right_every_time(hopper, T, D, F):
    """A CTA has many tiles, and no time between their ends."""
    x, gate_w, up_w, down_w, d_out = make(T, D, F)
    gate, up, act = fused.swiglu_products(x, gate_w, up_w)
    gradients = fused.swiglu_products_bwd(d_out, down_w, gate, up)
    _, d_up, again = gradients.chunk(3, 1)
    torch.testing.assert_close(gate, x @ gate_w.T)
    torch.testing.assert_close(d_up, d_out @ down_w * nn.functional.silu(gate), rtol=2**-6, atol=2**-6)
    for _ in range(50):
        assert all(map(torch.equal, fused.swiglu_products(x, gate_w, up_w), (gate, up, act)))
        assert torch.equal(fused.swiglu_products_bwd(d_out, down_w, gate, up), gradients)
    assert torch.equal(again, act)


@gpu
def test_every_run_has_the_same_bits_and_a_nan_stays_in_its_row(hopper):
    x, *others = make(500, 256, 768)
    before = results(fused.swiglu, x, *others)
    for _ in range(20):
        assert all(map(torch.equal, results(fused.swiglu, x, *others), before))
    x[77, 5] = torch.nan
    for got, expected in zip(results(fused.swiglu, x, *others)[:2], before[:2], strict=True):
        bad = got.isnan()
        assert bad[77].all() and bad.sum() == bad.shape[1]
        assert torch.equal(got[~bad], expected[~bad])


@gpu
def test_it_is_one_graph_for_compile_passes_opcheck_and_takes_no_tokens(hopper):
    x, gate, up, down, d_out = inputs = make(300, 128, 320)
    torch.library.opcheck(fused.swiglu_products, (x, gate, up))
    products = torch.randn(2, 300, 320, device="cuda", dtype=torch.bfloat16)
    torch.library.opcheck(fused.swiglu_products_bwd, (d_out, down, *products))
    compiled = torch.compile(fused.swiglu, fullgraph=True)
    for got, expected in zip(results(compiled, *inputs), results(fused.swiglu, *inputs), strict=True):
        assert torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=2**-7)
    none = results(fused.swiglu, x[:0], gate, up, down, d_out[:0])
    assert none[0].shape == (0, 128) and not any(grad.any() for grad in none[2:])


@gpu
def test_it_reads_what_lies_anywhere_and_in_any_order(hopper):
    x, gate, up, down, d_out = make(300, 128, 320)
    products = fused.swiglu_products(x, gate, up)
    gradients = fused.swiglu_products_bwd(d_out, down, *products[:2])
    for move in (lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape), lambda t: t.T.contiguous().T):
        assert all(map(torch.equal, fused.swiglu_products(*map(move, (x, gate, up))), products))
        assert torch.equal(fused.swiglu_products_bwd(*map(move, (d_out, down, *products[:2]))), gradients)


@gpu
def test_frozen_weights_have_no_gradient_and_the_others_theirs(hopper):
    x, gate, up, down, d_out = make(200, 128, 320)
    expected = dict(zip(("x", "gate", "up", "down"), results(fused.swiglu, x, gate, up, down, d_out)[1:], strict=True))
    for trained in expected:
        inputs = {"x": x, "gate": gate, "up": up, "down": down}
        inputs = {name: t.detach().requires_grad_(name == trained) for name, t in inputs.items()}
        fused.swiglu(*inputs.values()).backward(d_out)
        assert {name for name, t in inputs.items() if t.grad is not None} == {trained}
        assert torch.equal(inputs[trained].grad, expected[trained])


@gpu
def test_a_layer_whose_linears_are_not_plain_calls_them(hopper, monkeypatch):
    x, gate, up, down, _ = make(100, 128, 320)
    calls = []
    monkeypatch.setattr(fused, "swiglu", lambda *_: calls.append("fused"))
    layer_of(gate, up, down)(x)
    assert calls.pop() == "fused"

    class Own(nn.Linear):
        pass

    class OwnWeight(nn.Parameter):
        pass

    changes = {
        "class": lambda layer: setattr(layer.up_proj, "__class__", Own),
        "bias": lambda layer: setattr(layer.gate_proj, "bias", nn.Parameter(x.new_zeros(320))),
        "hook before": lambda layer: layer.down_proj.register_forward_pre_hook(lambda *_: None),
        "hook": lambda layer: layer.up_proj.register_forward_hook(lambda *_: None),
        "hook of gradients": lambda layer: layer.up_proj.register_full_backward_hook(lambda *_: None),
        "weight": lambda layer: layer.up_proj.register_parameter("weight", OwnWeight(up)),
        "forward": lambda layer: setattr(layer.gate_proj, "forward", lambda x: F.linear(x, gate)),
    }
    for name, change in changes.items():
        layer = layer_of(gate, up, down)
        change(layer)
        layer(x.detach().requires_grad_())
        assert not calls, name


@gpu
def test_weights_that_do_not_fit_are_refused(hopper):
    x, gate, up, _, _ = make(100, 128, 320)
    with pytest.raises(ValueError, match="up takes 64 to 320, not 128 to 320"):
        fused.swiglu_products(x, gate, up[:, :64].contiguous())
    with pytest.raises(ValueError, match=r"takes bfloat16, not torch\.float16"):
        fused.swiglu_products(x.half(), gate, up)


def test_on_a_cpu_it_is_the_plain_function():
    x, gate, up, down, _ = make(10, 64, 64, device="cpu")
    assert torch.equal(layer_of(gate, up, down)(x), plain(x, gate, up, down))


@pytest.mark.parametrize("frozen", [None, "x", "gate", "up", "down"])
def test_what_is_made_of_the_kernels_results_are_the_gradients(monkeypatch, frozen):
    """In float64 on a CPU, with torch's operations for the kernels."""

    def products(x, gate, up):
        gate, up = F.linear(x, gate), F.linear(x, up)
        return gate, up, F.silu(gate) * up

    def products_bwd(d_out, down, gate, up):
        silu, vjp = torch.func.vjp(F.silu, gate)
        return torch.cat([*vjp(d_out @ down * up), d_out @ down * silu, silu * up], 1)

    monkeypatch.setattr(fused, "swiglu_products", products)
    monkeypatch.setattr(fused, "swiglu_products_bwd", products_bwd)
    *inputs, d_out = (t.double() for t in make(5, 8, 12, device="cpu"))
    inputs = dict(zip(("x", "gate", "up", "down"), inputs, strict=True))
    trained = [t.requires_grad_() for name, t in inputs.items() if name != frozen]
    out, expected = fused.swiglu(*inputs.values()), plain(*inputs.values())
    torch.testing.assert_close(out, expected)
    gradients = (torch.autograd.grad(y, trained, d_out) for y in (out, expected))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)
