"""The optimizer: its update, the learning rate, master weights, clipping, NaN, and accumulation over rows."""

import contextlib
import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, read_metrics, tiny_run
from torch import nn

from minitrain import multi_tensor
from minitrain.batch import IGNORE, Batch
from minitrain.config import OptimConfig, UserError
from minitrain.loss import cross_entropy
from minitrain.masters import is_split, split, value_of
from minitrain.models import build_model, init_weights
from minitrain.models.llama import LlamaConfig
from minitrain.models.qwen3 import Qwen3Config
from minitrain.models.qwen3_moe import Qwen3MoeConfig
from minitrain.multi_tensor import add_, global_norm
from minitrain.optim import adamw, lr_at, muon, orthogonalize
from minitrain.parallel.offload import scalars_on
from minitrain.parallel.zero import MasterOptimizer
from minitrain.train import forward_backward, train


class Lion(torch.optim.Optimizer):
    """An optimizer as a user writes it: knows nothing of grad_scale and found_inf (Chen et al. 2023)."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.9 * m + 0.1 * p.grad).sign())
                m.lerp_(p.grad, 0.01)


OPTIMIZERS = {
    "adamw": adamw(OptimConfig()),
    "sgd": lambda params: torch.optim.SGD(params, momentum=0.9),
    "lion": Lion,
}
optimizers = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def small_model(dtype=torch.float32, device="cpu"):
    """A matrix, a bias and a norm."""
    return nn.Sequential(nn.Linear(6, 4), nn.RMSNorm(4)).to(device, dtype)


def give_gradients(model, factor=1.0):
    """Random gradients, through autograd, so that hooks run; the same for the same seed and shapes."""
    for p in model.parameters():
        (p * (factor * torch.randn(p.shape)).to(p)).sum().backward()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# ---- AdamW


def test_adamw_is_the_update_in_the_paper_and_decays_matrices_only():
    cfg = OptimConfig(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5)
    model = small_model()
    opt = MasterOptimizer(model, adamw(cfg))
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    for step in range(1, 6):
        give_gradients(model)
        lr = cfg.lr / step
        for name, p in model.named_parameters():
            g = p.grad.double()
            m[name] = cfg.beta1 * m[name] + (1 - cfg.beta1) * g
            v[name] = cfg.beta2 * v[name] + (1 - cfg.beta2) * g * g
            m_hat, v_hat = m[name] / (1 - cfg.beta1**step), v[name] / (1 - cfg.beta2**step)
            decay = cfg.weight_decay if p.ndim > 1 else 0
            expected[name] = expected[name] - lr * (m_hat / (v_hat.sqrt() + cfg.eps) + decay * expected[name])
        opt.clip_grad_norm(0)
        opt.step(lr)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_decay_is_for_what_has_more_than_one_dimension():
    shapes = [(4, 6), (4,), (3, 4, 6), (1,)]
    params = [nn.Parameter(torch.zeros(s)) for s in shapes]
    decayed, free = adamw(OptimConfig(weight_decay=0.1))(params).param_groups
    assert decayed["weight_decay"] == 0.1 and [tuple(p.shape) for p in decayed["params"]] == [(4, 6), (3, 4, 6)]
    assert free["weight_decay"] == 0.0 and [tuple(p.shape) for p in free["params"]] == [(4,), (1,)]
    assert len(adamw(OptimConfig())([nn.Parameter(torch.zeros(3))]).param_groups) == 1


# ---- Muon


def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions():
    for shape in ((40, 24), (24, 40), (3, 16, 16)):
        g = torch.randn(shape, dtype=torch.float64)
        u, s, v = torch.linalg.svd(g, full_matrices=False)
        o = orthogonalize(g)
        values = u.mT @ o @ v.mT  # diagonal where o has g's directions
        assert (values - torch.diag_embed(values.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-6
        large = s > 0.05 * s.amax(-1, keepdim=True)  # five steps do not reach the smallest
        assert values.diagonal(dim1=-2, dim2=-1)[large].min() > 0.6 and values.max() < 1.3


def test_muon_is_its_update_on_hidden_matrices_and_adamw_elsewhere():
    cfg = OptimConfig(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5)
    hidden, experts, table, vector = (nn.Parameter(torch.randn(s)) for s in ((6, 4), (2, 4, 6), (11, 4), (5,)))
    params = [hidden, experts, table, vector]
    twins = [nn.Parameter(p.detach().clone()) for p in (table, vector)]
    optimizer, plain = muon(cfg, vocab_size=11)(params), adamw(cfg)(twins)
    matrices = {p: (p.detach().clone(), torch.zeros_like(p)) for p in (hidden, experts)}
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        for twin, p in zip(twins, params[2:], strict=True):
            twin.grad = p.grad.clone()
        for p, (expected, momentum) in matrices.items():
            momentum.mul_(0.95).add_(0.05 * p.grad)
            ahead = 0.05 * p.grad + 0.95 * momentum
            each = ahead if p.ndim == 3 else ahead[None]
            update = torch.stack([orthogonalize(g) for g in each]).view_as(p)
            expected -= cfg.lr * (cfg.weight_decay * expected + 0.2 * max(p.shape[-2:]) ** 0.5 * update)
        optimizer.step()
        plain.step()
    for p, (expected, _) in matrices.items():
        torch.testing.assert_close(p.detach(), expected)
    for twin, p in zip(twins, params[2:], strict=True):
        torch.testing.assert_close(p, twin)


def test_muon_makes_its_state_once(monkeypatch):
    p, q = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
    optimizer = muon(OptimConfig(), vocab_size=11)([p, q])
    for _ in range(2):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        monkeypatch.setattr(torch, "zeros_like", None)


def test_muon_leaves_what_has_no_gradient():
    p, q = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    p.grad = torch.eye(3)
    muon(OptimConfig(lr=0.1), vocab_size=11)([p, q]).step()
    assert (q == 1).all() and not (p == 1).any()


# ---- the learning rate


@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_the_rate_rises_to_its_peak_and_falls_to_its_minimum(schedule, warmup_steps):
    steps, decay_steps = 50, 20 if schedule == "wsd" else 0
    cfg = OptimConfig(lr=3.0, schedule=schedule, warmup_steps=warmup_steps, decay_steps=decay_steps, min_lr_ratio=0.1)
    rates = [lr_at(step, cfg, steps) for step in range(steps)]
    rise, fall = rates[: warmup_steps + 1], rates[warmup_steps:]
    assert rates[warmup_steps] == max(rates) == 3.0
    assert rise == pytest.approx([3.0 * (i + 1) / (warmup_steps + 1) for i in range(warmup_steps + 1)])
    assert fall == sorted(fall, reverse=True)
    assert rates[-1] == pytest.approx(3.0 if schedule == "constant" else 0.3)


def test_cosine_and_linear_are_half_way_down_in_the_middle():
    for schedule in ("cosine", "linear"):
        cfg = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=10, min_lr_ratio=0.2)
        assert lr_at(30, cfg, 51) == pytest.approx(0.6)
    cosine = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=10, min_lr_ratio=0.2)
    assert lr_at(20, cosine, 51) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("decay_steps", [1, 2, 20])
def test_wsd_stays_at_the_peak_and_the_last_decay_steps_fall(decay_steps):
    cfg = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=5, decay_steps=decay_steps, min_lr_ratio=0.0)
    rates = [lr_at(step, cfg, 50) for step in range(50)]
    assert rates[5 : 50 - decay_steps] == [1.0] * (45 - decay_steps)
    assert rates[-decay_steps:] == pytest.approx([1 - (i + 1) / decay_steps for i in range(decay_steps)])


def test_a_run_of_one_step_has_a_rate():
    for schedule in ("cosine", "linear", "constant"):
        assert lr_at(0, OptimConfig(lr=1.0, schedule=schedule, warmup_steps=0), 1) == 1.0


# ---- clipping


@optimizers
def test_clipping_is_the_same_as_gradients_that_much_smaller(make_optimizer):
    model = small_model()
    twin = copy.deepcopy(model)
    opt, plain = MasterOptimizer(model, make_optimizer), make_optimizer(list(twin.parameters()))
    for _ in range(3):
        give_gradients(model, 10)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        expected = nn.utils.get_total_norm([p.grad for p in twin.parameters()])
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        norm = opt.clip_grad_norm(0.5)
        torch.testing.assert_close(norm, expected)
        assert norm > 0.5 and norm.shape == () and norm.dtype == torch.float32
        opt.step(0.01)
        for group in plain.param_groups:
            group["lr"] = 0.01
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("max_norm, scale", [(0.25, 0.05), (0, 1), (5.0, 1), (1000, 1)])
def test_gradients_are_scaled_down_to_max_norm_and_never_up(max_norm, scale):
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    opt = MasterOptimizer(model, torch.optim.SGD)
    gradient = torch.tensor([[3.0, 4.0]])
    (model.weight * gradient).sum().backward()
    assert opt.clip_grad_norm(max_norm) == 5.0
    opt.step(1.0)
    torch.testing.assert_close(before - model.weight, gradient * scale)


# ---- master weights


def test_a_bf16_model_has_fp32_masters_and_gradients():
    model = small_model(torch.bfloat16)
    opt = MasterOptimizer(model, adamw(OptimConfig()))
    assert {m.dtype for m in opt.masters.values()} == {torch.float32}
    total = {}
    for _ in range(3):  # rows of a step
        for name, p in model.named_parameters():
            g = torch.randn(p.shape).bfloat16()
            total[name] = total.get(name, 0) + g.float()
            (p * g).sum().backward()
        assert all(p.grad is None for p in model.parameters())
    assert all(m.grad.dtype == torch.float32 and m.grad.equal(total[name]) for name, m in opt.masters.items())
    opt.clip_grad_norm(1.0)
    opt.step(0.1)
    assert all(m.grad is None for m in opt.masters.values())
    assert all(p.dtype == torch.bfloat16 and p.equal(opt.masters[n].bfloat16()) for n, p in model.named_parameters())


def test_an_fp32_model_is_its_own_master():
    model = small_model()
    opt = MasterOptimizer(model, adamw(OptimConfig()))
    assert all(opt.masters[name] is p for name, p in model.named_parameters())
    give_gradients(model)
    opt.clip_grad_norm(1.0)
    opt.step(0.1)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_many_rows_are_not_lost_in_bf16():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    opt = MasterOptimizer(model, torch.optim.SGD)
    for _ in range(1000):  # a bf16 sum of ones stops at 256
        model.weight.sum().backward()
    assert opt.masters["weight"].grad == 1000


def test_updates_too_small_for_bf16_add_up_in_the_master():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    opt = MasterOptimizer(model, torch.optim.SGD)
    for _ in range(100):
        model.weight.sum().backward()
        opt.clip_grad_norm(0)
        opt.step(1e-4)
    assert torch.ones(1).bfloat16() - 1e-4 == 1  # lost where the weight itself is bf16
    torch.testing.assert_close(opt.masters["weight"].item(), 1 - 100 * 1e-4, rtol=1e-5, atol=0)
    assert model.weight.equal(opt.masters["weight"].bfloat16())


def test_a_tied_weight_has_one_master_with_the_gradient_of_both_uses():
    model = tiny(Qwen3Config, tie_word_embeddings=True).bfloat16()
    opt = MasterOptimizer(model, adamw(OptimConfig()))
    assert "lm_head.weight" not in opt.masters
    forward_backward(model, rows([[5, 9]]), cross_entropy, 0.1)
    assert all(p.grad is None for p in model.parameters())
    master = opt.masters["embed_tokens.weight"]
    assert (master.grad != 0).any(1).sum() == TINY["vocab_size"]  # the head reaches every row of the table
    opt.clip_grad_norm(1.0)
    opt.step(0.1)
    assert model.lm_head.weight is model.embed_tokens.weight and model.lm_head.weight.equal(master.bfloat16())


# ---- a gradient that is no number


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@dtypes
@optimizers
def test_a_bad_gradient_leaves_the_weights_bitwise_in_this_step_and_all_that_follow(make_optimizer, dtype, bad):
    model = small_model(dtype)
    opt = MasterOptimizer(model, make_optimizer)

    def step(gradient=None):
        give_gradients(model)
        if gradient is not None:
            (model[0].weight * torch.tensor([gradient] + [0.0] * 5).to(dtype)).sum().backward()
        norm = opt.clip_grad_norm(1.0)
        opt.step(0.01)
        return norm

    step()
    good, masters = weights(model), {name: m.detach().clone() for name, m in opt.masters.items()}
    step(gradient=1.0)
    assert not equal(weights(model), good)  # steps do move the weights
    good, masters = weights(model), {name: m.detach().clone() for name, m in opt.masters.items()}
    assert not step(gradient=bad).isfinite()
    assert equal(weights(model), good)
    for _ in range(3):
        assert step().isfinite()
    assert equal(weights(model), good)
    assert equal({name: m.detach() for name, m in opt.masters.items()}, masters)


# ---- a step in several rows

KINDS = {
    "qwen3": (Qwen3Config, {}),
    "tied": (Qwen3Config, {"tie_word_embeddings": True}),
    "llama": (LlamaConfig, {}),
    "moe": (
        Qwen3MoeConfig,
        {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0},
    ),
}
AUX = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}


def tiny(config_class, **options):
    model = build_model(config_class(**{**TINY, "initializer_range": 0.1, **options}), "cpu")
    init_weights(model, 0)
    return model


def rows(lengths):
    """A Batch for each list of document lengths; a third of the targets, unevenly, is not trained on."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for row in lengths:
        batch = Batch.pack([torch.randint(TINY["vocab_size"], (n,), generator=generator) for n in row])
        batch.targets[torch.rand(len(batch.targets), generator=generator) < 1 / 3] = IGNORE
        batch.num_targets = int((batch.targets != IGNORE).sum())
        batches.append(batch)
    return batches


def joined(batches):
    """The same documents and targets as one row."""
    documents = [d for b in batches for d in b.tokens.split(b.cu_seqlens_q.diff().tolist())]
    batch = Batch.pack(documents)
    batch.targets = torch.cat([b.targets for b in batches])
    batch.num_targets = sum(b.num_targets for b in batches)
    return batch


def only_router_losses(hidden, head, batch):
    return 0 * head(hidden).sum(), {}


def gradients(model, batches, loss_fn=cross_entropy, scale=None):
    scale = scale or 1 / sum(b.num_targets for b in batches)
    model.zero_grad()
    loss, _ = forward_backward(model, batches, loss_fn, scale)
    return loss, {name: p.grad for name, p in model.named_parameters()}


def assert_gradients_close(actual, expected):
    for name, gradient in expected.items():
        error, largest = (actual[name] - gradient).abs().max(), gradient.abs().max()
        assert error <= 1e-5 * largest, f"{name}: gradients up to {largest:.2e} differ by {error:.2e}"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_unequal_trained_tokens_give_the_gradients_of_one_long_row(kind):
    config_class, options = KINDS[kind]
    model, batches = tiny(config_class, **options), rows([[20, 3], [1, 2], [40], [7, 0, 9]])
    assert len({b.num_targets for b in batches}) == 4
    loss, by_row = gradients(model, batches)
    expected_loss, at_once = gradients(model, [joined(batches)])
    torch.testing.assert_close(loss, expected_loss)
    assert_gradients_close(by_row, at_once)


def test_a_row_without_trained_tokens_adds_nothing():
    model, batches = tiny(Qwen3Config), rows([[20, 3], [5, 6]])
    batches[1].targets.fill_(IGNORE)
    batches[1].num_targets = 0
    loss, with_row = gradients(model, batches)
    expected_loss, without = gradients(model, batches[:1])
    assert loss.equal(expected_loss) and equal(with_row, without)


def test_router_losses_of_a_step_are_the_mean_over_its_rows():
    config_class, options = KINDS["moe"]
    plain, routed = (tiny(config_class, **{**options, **more}) for more in ({}, AUX))
    batches = rows([[20, 3], [1, 2], [40], [7, 9]])
    _, actual = gradients(routed, batches)
    _, expected = gradients(plain, batches)
    with pytest.raises(AssertionError, match="differ by"):
        assert_gradients_close(actual, expected)
    for batch in batches:
        _, of_row = gradients(routed, [batch], only_router_losses, scale=1.0)
        expected = {name: g + of_row[name] / len(batches) for name, g in expected.items()}
    assert_gradients_close(actual, expected)


def test_the_same_row_four_times_is_the_row_once_with_router_losses_too():
    model = tiny(KINDS["moe"][0], **{**KINDS["moe"][1], **AUX})
    [batch] = rows([[20, 3]])
    _, once = gradients(model, [batch])
    _, four_times = gradients(model, [batch] * 4)
    assert_gradients_close(four_times, once)


def test_counts_of_steps_are_put_where_the_optimizer_keeps_them():
    """torch's AdamW would else wait for the device in each step, for each of them."""
    p, device = nn.Parameter(torch.zeros(2, 2)), torch.device("meta")
    others = torch.optim.AdamW, torch.optim.NAdam
    assert all(scalars_on(make([p]), p, device).type == "cpu" for make in others)
    kept = functools.partial(torch.optim.AdamW, fused=True), adamw(OptimConfig()), muon(OptimConfig(), 7)
    assert all(scalars_on(make([p]), p, device) == device for make in kept)


def test_a_run_that_is_resumed_may_freeze_parameters(corpus, tmp_path):
    cfg = tiny_run(corpus, tmp_path, train={"steps": 2})
    train(cfg)
    cfg.train.steps = 4
    model = build_model(cfg.model)
    model.layers["0"].requires_grad_(False)
    train(cfg, model=model)
    assert len(read_metrics(tmp_path)) == 4


def test_extras_are_scaled_and_summed_as_the_loss_is():
    def with_extras(hidden, head, batch):
        loss, _ = cross_entropy(hidden, head, batch)
        return loss, {"twice": 2 * loss}

    model, batches = tiny(Qwen3Config), rows([[20, 3], [5, 6]])
    loss, extras = forward_backward(model, batches, with_extras, 0.01)
    torch.testing.assert_close(extras["twice"], 2 * loss)
    assert not loss.requires_grad and not extras["twice"].requires_grad


# ---- on the GPU


@pytest.mark.gpu
def test_clipping_and_the_step_never_wait_for_the_gpu():
    model = small_model(torch.bfloat16, "cuda")
    opt = MasterOptimizer(model, adamw(OptimConfig()))
    for mode in ("default", "error"):  # the first step makes the state
        give_gradients(model)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            opt.clip_grad_norm(1.0)
            opt.step(0.01)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@optimizers
def test_on_the_gpu_a_bad_gradient_leaves_the_weights_bitwise_as_they_were(make_optimizer):
    model = small_model(torch.bfloat16, "cuda")
    opt = MasterOptimizer(model, make_optimizer)
    for factor in (1.0, torch.nan, 1.0):
        before = weights(model)
        give_gradients(model, factor)
        opt.clip_grad_norm(1.0)
        opt.step(0.1)
        assert equal(weights(model), before) == bool(opt.broken)
    assert opt.broken


@pytest.mark.gpu
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_makes_the_steps_of_torchs_adamw(grad_dtype):
    """More tensors than one launch takes, of sizes around its vectors and chunks; every other one is rounded, too.
    Masters in two halves are stepped to the same bits."""
    sizes = [(1,), (3,), (4,), (4095,), (4096,), (4097,), (77, 129), (3, 4096), (1 << 21,), *[(64,)] * 900]
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(size, device="cuda")) for size in sizes]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    gap = 64  # elements between the rounded ones, which stay as they are
    flat = torch.full((sum(p.numel() + gap for p in params) + 64 * len(params),), 7.0, device="cuda").bfloat16()
    start = 0
    for p in params[::2]:
        p.rounded = flat[start:][: p.numel()].view(p.shape)
        start = (start + p.numel() + gap + 63) // 64 * 64
    halves = [nn.Parameter(p.detach().clone()) for p in params]
    for p, half in zip(params, halves, strict=True):
        half.rounded = torch.empty_like(p, dtype=torch.bfloat16)
    cfg = OptimConfig(lr=0.01, weight_decay=0.1)
    ours, torchs, of_halves = (adamw(cfg)(of) for of in (params, twins, halves))
    assert ours.rounds and of_halves.rounds
    split(halves)
    for optimizer in (ours, torchs, of_halves):
        optimizer.grad_scale = torch.tensor(3.0, device="cuda")
        optimizer.found_inf = torch.zeros((), device="cuda")
    for step in range(5):
        for p, twin, half in zip(params, twins, halves, strict=True):
            p.grad_dtype = half.grad_dtype = None
            p.grad = half.grad = (torch.randn_like(p) * 10.0 ** (step - 3)).to(grad_dtype)
            twin.grad = p.grad.float()
        ours.step()
        of_halves.step()
        torch.optim.AdamW.step(torchs)
        for p, half in zip(params, halves, strict=True):
            assert value_of(half).equal(p)
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=2e-6, atol=2e-7)
            for name, atol in (("exp_avg", 1e-7), ("exp_avg_sq", 0), ("step", 0)):
                torch.testing.assert_close(ours.state[p][name], torchs.state[twin][name], rtol=1e-5, atol=atol)
    written = torch.zeros_like(flat, dtype=torch.bool)
    for p in params[::2]:
        assert p.rounded.equal(p.bfloat16())
        written[p.rounded.storage_offset() :][: p.numel()] = True
    assert (flat[~written] == 7).all()


@pytest.mark.gpu
def test_bf16_moments_are_right_in_the_mean():
    """Of a million equal elements each is one of the two nearest values, and their mean is the fp32 one."""
    n, exact = 1 << 20, []
    for dtype in ("float32", "bfloat16"):
        p = nn.Parameter(torch.zeros(n + 3, device="cuda"))
        optimizer = adamw(OptimConfig(lr=0.1, beta1=0.9, beta2=0.95, moments=dtype))([p])
        for grad in (1.0, 0.37, 0.011):
            p.grad = torch.full_like(p, grad)
            optimizer.step()
        means = [optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")]
        assert all(m.dtype == getattr(torch, dtype) for m in means)
        exact.append([m.double() for m in means] + [p.detach().double()])
    for wide, narrow in zip(*exact, strict=True):
        spread = (narrow - wide).abs().max()
        assert 0 < spread < 2**-6 * wide.abs().max()
        assert (narrow.mean() - wide[0]).abs() < 5 * spread / n**0.5
        assert abs(torch.corrcoef(torch.stack([narrow[:-1], narrow[1:]]))[0, 1]) < 5 / n**0.5  # each for itself


@pytest.mark.gpu
def test_a_run_may_go_on_with_moments_of_another_dtype():
    p = nn.Parameter(torch.ones(1000, device="cuda"))
    optimizers = [adamw(OptimConfig(moments=dtype))([p]) for dtype in ("float32", "bfloat16", "float32")]
    for before, optimizer in zip([None, *optimizers], optimizers, strict=False):
        if before:
            optimizer.state[p].update(before.state[p])
            optimizer.use_loaded()
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizers[-1].state[p]["exp_avg"].dtype == torch.float32 and optimizers[-1].state[p]["step"] == 3


def test_bf16_moments_without_the_kernel_are_refused_before_the_run_begins(corpus, tmp_path):
    cfg = tiny_run(corpus, tmp_path / "run", optim={"moments": "bfloat16"})
    with pytest.raises(UserError, match="moments=bfloat16: needs bf16 weights on a GPU, and the CUDA extension"):
        train(cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "master, rounded, device, fits",
    [
        (torch.float32, torch.bfloat16, "cuda", True),
        (torch.float32, torch.bfloat16, "cpu", False),
        (torch.float32, torch.float32, "cuda", False),
        (torch.float64, torch.bfloat16, "cuda", False),
    ],
)
def test_bf16_moments_of_offloaded_masters_need_what_others_need(monkeypatch, master, rounded, device, fits):
    """They are in host memory when the optimizer is made."""
    monkeypatch.setattr(multi_tensor, "runs_on", lambda device_type, index: device_type == "cuda")
    p = nn.Parameter(torch.ones(3, dtype=master))
    p.rounded = SimpleNamespace(dtype=rounded, device=torch.device(device), is_contiguous=lambda: True)
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="moments=bfloat16"):
        adamw(OptimConfig(moments="bfloat16"))([p])


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [[1], [7, 8, 9, 16383, 16384, 16385], [3, 5] * 2000, [1 << 22]], ids=len)
def test_the_global_norm_on_the_gpu_is_exact_and_the_same_bits_every_time(sizes):
    for dtypes in ([torch.float32], [torch.bfloat16], [torch.bfloat16, torch.float32]):
        tensors = [torch.randn(n, device="cuda").to(dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]
        norm = global_norm(tensors)
        exact = torch.cat([x.double() for x in tensors]).norm()
        torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
        assert norm.equal(global_norm(tensors))
    tensors[-1][-1] = torch.nan
    assert global_norm(tensors).isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 7, 8, 8191, 8192, 8193, 1 << 20])
def test_bf16_gradients_are_added_up_in_fp32_on_the_gpu(size):
    first, second = torch.randn(2, size, device="cuda").bfloat16()
    total = torch.full_like(first, torch.nan, dtype=torch.float32)
    add_(total, first[None], is_first=True)
    assert total.equal(first.float())
    add_(total, second[None], is_first=False)
    assert total.equal(first.float() + second.float())
    terms = torch.randn(5, size, device="cuda").bfloat16()
    add_(total, terms, is_first=True)
    assert total.equal(sum(terms.float()))


@pytest.mark.gpu
def test_a_step_of_one_row_makes_no_fp32_gradients_and_no_second_pass_over_the_weights():
    model = nn.Linear(4096, 4096, bias=False).to("cuda", torch.bfloat16)
    opt = MasterOptimizer(model, adamw(OptimConfig()))
    for _ in range(2):  # the first makes the state
        give_gradients(model)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        opt.clip_grad_norm(1.0)
        opt.step(0.01)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
    assert is_split(opt.masters["weight"])
    torch.testing.assert_close(model.weight.float(), value_of(opt.masters["weight"]), rtol=2**-8, atol=0)
