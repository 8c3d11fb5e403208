"""Residual add and RMSNorm: the kernels on a GPU against torch's operations; on a CPU what is around them."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_free_memory_with_nan
from torch import nn

from minitrain import Batch, Qwen3Config, TrainConfig
from minitrain import add_norm as fused
from minitrain.models import build_model, init_weights, materialize
from minitrain.models.layers import add_norm
from minitrain.parallel import Mesh, parallelize

EPS = 1e-6
gpu = pytest.mark.gpu
SHAPES = [
    (1, 8), (7, 64), (300, 72), (5000, 64), (7, 1000), (1001, 768), (4099, 1024), (3000, 1280), (999, 2048),
    (2500, 2560), (777, 2880), (300, 3072), (301, 3584), (500, 4096), (333, 5120), (401, 8192), (13, 9216), (7, 16376),
    (100, 16384),
]  # fmt: skip


@pytest.fixture
def built():
    pytest.importorskip("minitrain.kernels", reason="the CUDA extension is not built")


def plain(x, delta, weight, eps=EPS):
    x = x if delta is None else x + delta
    return x, F.rms_norm(x, weight.shape, weight, eps)


def make(T, D, device="cuda"):
    """x, delta, weight, and the gradients of what comes out."""
    generator = torch.Generator(device).manual_seed(T)
    x, delta, d_sum, d_out = (torch.randn(T, D, device=device, generator=generator).bfloat16() for _ in range(4))
    return x, delta, (1 + torch.randn(D, device=device, generator=generator)).bfloat16(), d_sum, d_out


def results(function, x, delta, weight, d_sum, d_out, dtype=None):
    """-> sum, out, dx, d_delta if there is one, d_weight."""
    inputs = [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, delta, weight)]
    outs = function(*inputs, EPS)
    gradients = torch.autograd.grad(
        outs, [t for t in inputs if t is not None], [d.to(outs[0].dtype) for d in (d_sum, d_out)]
    )
    return *(out.detach() for out in outs), *gradients


def assert_as_good_as_bf16(ours, inputs, case=""):
    """The sum is torch's, bit for bit; what is made of it no further from fp32 than torch's in bf16, but a rounding."""
    x, delta, weight, *d = inputs
    total = plain(x, delta, weight)[0]
    assert torch.equal(ours[0], total), f"{case}: sum"
    exact, rounded = (results(plain, total, None, weight, *d, dtype=dtype) for dtype in (torch.float32, None))
    names = ("out", "dx", "d_weight")
    if delta is not None:
        assert torch.equal(ours[2], ours[3]), f"{case}: the gradient of delta"
        ours = [*ours[:3], ours[4]]
    for name, got, expected, bf16 in zip(names, ours[1:], exact[1:], rounded[1:], strict=True):
        error, allowed = ((value.float() - expected).norm() for value in (got, bf16))
        limit = 1.02 * allowed + 2**-12 * expected.norm()
        assert error <= limit, f"{case}: {name} is off by {error}, bf16 by {allowed}"


@gpu
@pytest.mark.parametrize("with_delta", [True, False])
def test_the_kernels_are_as_good_as_bf16_math(built, with_delta):
    for T, D in SHAPES:
        x, delta, *others = make(T, D)
        inputs = x, delta if with_delta else None, *others
        fill_free_memory_with_nan()
        assert_as_good_as_bf16(results(fused.add_norm, *inputs), inputs, f"{T} tokens of {D}")


@gpu
def test_it_reads_what_lies_anywhere_and_in_any_order(built):
    def unaligned(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    def columns(t):
        return torch.cat([t, t], -1)[..., : t.shape[-1]]

    x, delta, weight, d_sum, d_out = inputs = make(300, 2560)
    expected = results(fused.add_norm, *inputs)
    for move in (unaligned, columns, lambda t: t.T.contiguous().T):
        assert all(map(torch.equal, results(fused.add_norm, *map(move, inputs)), expected))
    ones = torch.ones((), dtype=x.dtype, device="cuda").expand(x.shape)
    assert_as_good_as_bf16(results(fused.add_norm, x, delta, weight, d_sum, ones), (x, delta, weight, d_sum, ones))
    assert_as_good_as_bf16(results(fused.add_norm, x, delta, weight, ones, d_out), (x, delta, weight, ones, d_out))


@gpu
def test_no_token_is_no_work(built):
    for with_delta in (True, False):
        x, delta, *others = make(0, 128)
        *rows, d_weight = results(fused.add_norm, x, delta if with_delta else None, *others)
        assert all(t.shape == (0, 128) for t in rows) and d_weight.shape == (128,) and not d_weight.any()


@gpu
@pytest.mark.parametrize("D", [1024, 2560, 8192])
def test_a_nan_stays_in_its_row_and_every_run_has_the_same_bits(built, D):
    x, *others = make(3000, D)
    before = results(fused.add_norm, x, *others)
    for again in range(20):
        assert all(map(torch.equal, results(fused.add_norm, x, *others), before)), again
    x[77, 5] = torch.nan
    _, *after = results(fused.add_norm, x, *others)
    for got, expected in zip(after[:3], before[1:4], strict=True):
        bad = got.isnan()
        assert bad[77].all() and bad.sum() == D
        assert torch.equal(got[~bad], expected[~bad])


@gpu
def test_large_and_small_rows_do_not_overflow_or_vanish(built):
    for scale in (2.0**60, 2.0**-60):
        x, _, weight, d_sum, d_out = make(100, 1024)
        inputs = x * scale, None, weight, d_sum, d_out
        _, out, dx, d_weight = results(fused.add_norm, *inputs)
        assert out.isfinite().all() and dx.isfinite().all() and d_weight.isfinite().all()
        assert_as_good_as_bf16(results(fused.add_norm, *inputs), inputs, f"{scale} times as large")


@gpu
@pytest.mark.parametrize("with_delta", [True, False])
def test_it_is_one_graph_for_compile_and_passes_opcheck(built, with_delta):
    x, delta, weight, d_sum, d_out = make(300, 1024)
    delta = delta if with_delta else None
    torch.library.opcheck(fused.add_norm_fwd, (x, delta, weight, EPS))
    torch.library.opcheck(fused.add_norm_bwd, (d_out, d_sum, x, weight, EPS))
    torch._dynamo.reset()
    compiled = torch.compile(fused.add_norm, fullgraph=True)
    inputs = x, delta, weight, d_sum, d_out
    assert all(map(torch.equal, results(compiled, *inputs), results(fused.add_norm, *inputs)))


@gpu
def test_a_compiled_block_gives_what_the_block_gives_and_is_compiled_once(built):
    model, batches = model_and_batches("cuda")
    block, rope = model.layers["0"], tuple(torch.randn(2, 50, 32, device="cuda"))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)

    def gradients(function, batch, x):
        x = x.detach().requires_grad_()
        y = function(x, rope, batch)
        return y, *torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))

    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in batches:
            x = torch.randn(50, 64, device="cuda").bfloat16()
            for got, expected in zip(gradients(compiled, batch, x), gradients(block, batch, x), strict=True):
                assert (got - expected).norm() <= 0.02 * expected.norm()


def model_and_batches(device):
    cfg = Qwen3Config(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model = build_model(cfg)
    materialize(model, device, torch.bfloat16)
    init_weights(model, seed=0)
    batches = (Batch.pack([torch.randint(101, (n,), device=device) for n in of]) for of in ((30, 20), (7, 43)))
    return model, [dataclasses.replace(batch, max_seqlen=50) for batch in batches]


@gpu
def test_blocks_use_it_where_their_norms_are_plain(built):
    model, (batch, _) = model_and_batches("cuda")

    def ops():
        with torch.profiler.profile() as profile:
            model(batch).float().sum().backward()
        names = [event.name for event in profile.events()]
        return names.count("minitrain::add_norm"), names.count("minitrain::add_norm_bwd")

    assert ops() == (4, 4)  # two a block
    seen = []
    model.layers["1"].input_layernorm.register_forward_hook(lambda *_: seen.append(1))
    assert ops() == (3, 3) and seen == [1]


# ---- on a CPU


@pytest.fixture
def on_cpu(monkeypatch):
    """torch's operations stand in for the kernels, in fp32 or fp64 inside; can_run believes that they run. -> calls"""
    calls = []

    def forward(x, delta, weight, eps):
        calls.append("forward")
        total = x if delta is None else x + delta
        out = F.rms_norm(wide(total), weight.shape, wide(weight), eps).to(x.dtype)
        return (x.new_empty(0) if delta is None else total), out

    def backward(d_out, d_sum, total, weight, eps):
        calls.append("backward")
        x, d, w = map(wide, (total, d_out, weight))
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        along = (d * w * x).mean(-1, keepdim=True) * scale.square()
        dx = scale * (d * w - along * x) + d_sum
        return dx.to(total.dtype), (d * x * scale).sum(0).to(weight.dtype)

    def wide(t):
        return t.to(torch.promote_types(t.dtype, torch.float32))

    monkeypatch.setattr(fused, "runs_on", lambda *_: True)
    with torch.library._scoped_library("minitrain", "FRAGMENT") as library:
        library.impl("add_norm", forward, "CPU")
        library.impl("add_norm_bwd", backward, "CPU")
        yield calls


@pytest.mark.parametrize("with_delta", [True, False])
def test_what_is_made_of_the_kernels_results_are_the_gradients(on_cpu, with_delta):
    for dtype in (torch.float64, torch.float32):
        x, delta, *others = (t.to(dtype) for t in make(9, 24, device="cpu"))
        inputs = x, delta if with_delta else None, *others
        for got, expected in zip(results(fused.add_norm, *inputs), results(plain, *inputs), strict=True):
            torch.testing.assert_close(got, expected)
    x, delta, *others = make(200, 64, device="cpu")
    inputs = x, delta if with_delta else None, *others
    ours = results(fused.add_norm, *inputs)
    assert_as_good_as_bf16(ours, inputs)
    assert with_delta or ours[0].data_ptr() == x.data_ptr(), "copied"


def test_a_gradient_that_nobody_has_is_zero(on_cpu):
    x, _, weight, d_sum, d_out = (t.double() for t in make(9, 24, device="cpu"))
    for i, d in enumerate((d_sum, d_out)):
        for delta in (None, d_sum):
            a, b = (t.clone().requires_grad_() for t in (x, x))
            fused.add_norm(a, delta, weight, EPS)[i].backward(d)
            plain(b, delta, weight)[i].backward(d)
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("frozen", ["x", "delta", "weight"])
def test_frozen_inputs_have_no_gradient_and_the_others_theirs(on_cpu, frozen):
    x, delta, weight, *d = (t.double() for t in make(9, 24, device="cpu"))
    inputs = {"x": x, "delta": delta, "weight": weight}
    expected = dict(zip(inputs, results(plain, *inputs.values(), *d)[2:], strict=True))
    inputs = {name: t.clone().requires_grad_(name != frozen) for name, t in inputs.items()}
    torch.autograd.backward(fused.add_norm(*inputs.values(), EPS), d)
    for name, t in inputs.items():
        if name == frozen:
            assert t.grad is None
        else:
            torch.testing.assert_close(t.grad, expected[name])


@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_is_one_graph_when_compiled(on_cpu, backend, with_delta):
    x, delta, *others = make(30, 64, device="cpu")
    inputs = x, delta if with_delta else None, *others
    torch._dynamo.reset()
    compiled = torch.compile(fused.add_norm, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert all(map(torch.equal, results(compiled, *inputs), results(fused.add_norm, *inputs)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_are_right_where_a_graph_ends_between(on_cpu, backend):
    """The first graph returns its input, which is a view to autograd."""

    def half(function):
        def call(x, _, weight, eps):
            total, out = function(x, None, weight, eps)
            torch._dynamo.graph_break()
            return function(total, out.sin(), weight, eps)

        return call

    inputs = make(30, 64, device="cpu")
    torch._dynamo.reset()
    x, _, *others = (t.float() for t in inputs)
    compiled = torch.compile(half(fused.add_norm), backend=backend)
    for got, expected in zip(*(results(f, x, None, *others) for f in (compiled, half(plain))), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("with_delta", [True, False])
def test_its_operations_say_what_they_give(on_cpu, with_delta):
    x, delta, weight, d_sum, d_out = make(30, 64, device="cpu")
    torch.library.opcheck(fused.add_norm_fwd, (x, delta if with_delta else None, weight, EPS))
    torch.library.opcheck(fused.add_norm_bwd, (d_out, d_sum, x, weight, EPS))


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("recompute", ["none", "cheap", "block", "full"])
def test_a_block_is_one_graph_compiled_once_whatever_it_recomputes(on_cpu, monkeypatch, recompute, compile):
    def attend(q, k, v, *_):
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    model, batches = model_and_batches("cpu")
    for layer in model.layers.values():
        layer.self_attn.attention = attend

    def gradients():
        model.zero_grad()
        for batch in batches:
            model(batch).float().square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with monkeypatch.context() as patch:
        patch.setattr(fused, "can_run", lambda *_: False)
        expected = gradients()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole = functools.partial(torch.compile, fullgraph=True, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", whole)
    on_cpu.clear()
    parallelize(model, Mesh(torch.device("cpu")), TrainConfig(recompute=recompute, compile=compile))
    for name, got in gradients().items():
        assert (got - expected[name]).norm() <= 0.02 * expected[name].norm(), name
    again = recompute != "none"
    assert (on_cpu.count("forward"), on_cpu.count("backward")) == (2 * 4 * (1 + again), 2 * 4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (compile == "on")


def test_a_norm_that_is_not_plain_is_called(on_cpu):
    calls, (x, delta, weight, *_) = on_cpu, make(10, 64, device="cpu")

    class Own(nn.RMSNorm):
        pass

    class OwnWeight(nn.Parameter):
        pass

    changes = {
        "class": lambda norm: setattr(norm, "__class__", Own),
        "hook before": lambda norm: norm.register_forward_pre_hook(lambda *_: None),
        "hook": lambda norm: norm.register_forward_hook(lambda *_: None),
        "hook of gradients": lambda norm: norm.register_full_backward_hook(lambda *_: None),
        "weight": lambda norm: norm.register_parameter("weight", OwnWeight(weight)),
        "no weight": lambda norm: norm.register_parameter("weight", None),
        "forward": lambda norm: setattr(norm, "forward", lambda x: F.rms_norm(x, weight.shape, norm.weight, EPS)),
        "eps": lambda norm: setattr(norm, "eps", None),
    }
    for name, change in changes.items():
        norm = nn.RMSNorm(64, EPS, dtype=torch.bfloat16)
        add_norm(x, delta, norm)
        assert calls.pop(), name
        change(norm)
        total, normed = add_norm(x.requires_grad_(), delta, norm)
        assert not calls, name
        assert torch.equal(total, x + delta) and torch.equal(normed, norm(x + delta)), name
    norm = nn.LayerNorm(64, dtype=torch.bfloat16)
    assert torch.equal(add_norm(x, None, norm)[1], norm(x)) and not calls


def test_a_hook_of_a_norm_is_called_and_may_change_what_it_gives(on_cpu):
    x, delta, *_ = make(10, 64, device="cpu")
    norm = nn.RMSNorm(64, EPS, dtype=torch.bfloat16)
    norm.register_forward_hook(lambda _module, _args, y: 2 * y)
    assert torch.equal(add_norm(x, delta, norm)[1], 2 * F.rms_norm(x + delta, (64,), norm.weight, EPS))


def test_what_the_kernels_do_not_take_is_left_to_torch(on_cpu):
    x, delta, weight, *_ = make(10, 64, device="cpu")
    assert fused.can_run(x, weight) and fused.can_run(x, weight, delta)
    wide = torch.zeros(1, 16_384, dtype=torch.bfloat16)
    assert fused.can_run(wide, wide[0])
    for case in (
        (x.float(), weight), (x, weight.float()), (x, weight, delta.float()), (x, weight, delta[:1]), (x, weight[:32]),
        (x[:, :63], weight[:63]), (x[0], weight), (x[None], weight), (x[:, :0], weight[:0]),
        (torch.cat([wide, wide], 1), torch.cat([wide[0], wide[0]])),
    ):  # fmt: skip
        assert not fused.can_run(*case), [t.shape for t in case]


def test_without_a_kernel_it_is_torchs_operations_bit_for_bit():
    x, delta, *_ = make(10, 64, device="cpu")
    for dtype in (torch.bfloat16, torch.float32):
        norm, x_TD, delta_TD = nn.RMSNorm(64, EPS, dtype=dtype), x.to(dtype), delta.to(dtype)
        total, normed = add_norm(x_TD, delta_TD, norm)
        assert torch.equal(total, x_TD + delta_TD) and torch.equal(normed, norm(x_TD + delta_TD))
        same, normed = add_norm(x_TD, None, norm)
        assert same is x_TD and torch.equal(normed, norm(x_TD))


def test_what_does_not_fit_is_refused():
    x, delta, weight, d_sum, d_out = make(10, 64, device="cpu")
    with pytest.raises(ValueError, match=r"weight is \(32,\), torch.bfloat16, not \(64,\)"):
        fused._check(weight[:32], x=x)
    with pytest.raises(ValueError, match=r"delta is \(10, 64\), torch.float32, not \(10, 64\), torch.bfloat16"):
        fused._check(weight, x=x, delta=delta.float())
    with pytest.raises(ValueError, match=r"d_sum is \(9, 64\)"):
        fused._check(weight, sum=x, d_out=d_out, d_sum=d_sum[:9])
    with pytest.raises(ValueError, match=r"\(10, 12\) are not rows of a multiple of 8 channels"):
        fused._check(weight[:12], x=x[:, :12], delta=None)
