"""Linear cross-entropy in pieces: equal to torch's on full logits, in value and gradients, without the full logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitrain import loss
from minitrain.batch import IGNORE, Batch
from minitrain.extension import runs_on, runs_on_hopper
from minitrain.loss import _scaled, cross_entropy, softmax_cross_entropy_, write_logits

T, D, V = 23, 16, 101


def make(T=T, D=D, V=V, dtype=torch.float32, device="cpu"):
    """-> hidden (T, D), head, batch; the first and every fourth target is not trained on."""
    hidden = torch.randn(T, D, device=device).to(dtype).requires_grad_()
    head = nn.Linear(D, V, bias=False, device=device, dtype=dtype)
    batch = Batch.pack([torch.randint(V, (T,), device=device)])
    batch.targets[::4] = IGNORE
    return hidden, head, batch


def set_rows(monkeypatch, rows):
    """Make pieces of this many rows of logits."""
    monkeypatch.setattr(loss, "piece_rows", lambda *_: rows)


def full_logits(hidden, head, batch, dtype=torch.float64):
    """-> the loss of torch on all logits at once, and the gradients of hidden and head, computed in dtype."""
    x, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, head.weight))
    value = F.cross_entropy((x @ w.T).float() if dtype == torch.bfloat16 else x @ w.T, batch.targets, reduction="sum")
    return value.detach(), *torch.autograd.grad(value, (x, w))


def in_pieces(hidden, head, batch, factor=1.0):
    value, extras = cross_entropy(hidden, head, batch)
    assert extras == {} and value.shape == () and value.dtype == torch.float32
    return value.detach(), *torch.autograd.grad(factor * value, (hidden, head.weight))


@pytest.mark.parametrize("rows", [1, 5, 23, 1000])
def test_it_equals_torchs_cross_entropy_on_full_logits(monkeypatch, rows):
    set_rows(monkeypatch, rows)
    inputs = make()
    for actual, expected in zip(in_pieces(*inputs), full_logits(*inputs), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_in_bf16_it_is_no_worse_than_bf16_logits(monkeypatch, rows):
    set_rows(monkeypatch, rows)
    inputs = make(T=200, dtype=torch.bfloat16)
    actual, plain, exact = in_pieces(*inputs), full_logits(*inputs, dtype=torch.bfloat16), full_logits(*inputs)
    for a, p, e in zip(actual, plain, exact, strict=True):
        error, allowed = ((x.double() - e).abs().max() for x in (a, p))
        assert error <= 2 * allowed + 2**-8 * e.abs().max()
    assert actual[1].dtype == actual[2].dtype == torch.bfloat16


def test_the_heads_gradient_is_summed_in_fp32_over_pieces(monkeypatch):
    """4,096 equal rows, one a piece: a sum in bf16 would stop growing at 256 of them."""
    set_rows(monkeypatch, 1)
    head = nn.Linear(4, 8, bias=False, dtype=torch.bfloat16)
    hidden = torch.ones(4096, 4, dtype=torch.bfloat16, requires_grad=True)
    batch = Batch.pack([torch.zeros(4096, dtype=torch.int64)])
    _, _, actual = in_pieces(hidden, head, batch)
    _, _, exact = full_logits(hidden, head, batch)
    torch.testing.assert_close(actual.double(), exact, rtol=2**-7, atol=0)


def test_without_a_trained_target_loss_and_gradients_are_zero(monkeypatch):
    set_rows(monkeypatch, 5)
    hidden, head, batch = make()
    batch.targets.fill_(IGNORE)
    assert all((x == 0).all() for x in in_pieces(hidden, head, batch))


def test_rows_that_are_not_trained_on_get_no_gradient():
    hidden, head, batch = make()
    _, d_hidden, _ = in_pieces(hidden, head, batch)
    assert (d_hidden[batch.targets == IGNORE] == 0).all()
    assert (d_hidden[batch.targets != IGNORE] != 0).any(1).all()


def test_the_gradient_from_above_is_honoured():
    hidden, head, batch = make()
    one, two = in_pieces(hidden, head, batch), in_pieces(hidden, head, batch, factor=2.0)
    assert two[1].equal(2 * one[1]) and two[2].equal(2 * one[2])


def test_two_backwards_through_one_forward_give_the_same_gradients():
    hidden, head, batch = make()
    value, _ = cross_entropy(hidden, head, batch)
    first = torch.autograd.grad(3 * value, (hidden, head.weight), retain_graph=True)
    second = torch.autograd.grad(3 * value, (hidden, head.weight))
    assert first[0].equal(second[0]) and first[1].equal(second[1])


def test_a_tied_head_gets_the_gradient_of_both_uses():
    table = nn.Embedding(V, D)
    head = nn.Linear(D, V, bias=False)
    head.weight = table.weight
    _, _, batch = make()
    cross_entropy(table(batch.tokens).tanh(), head, batch)[0].backward()
    w = table.weight.detach().double().requires_grad_()
    F.cross_entropy(w[batch.tokens].tanh() @ w.T, batch.targets, reduction="sum").backward()
    torch.testing.assert_close(table.weight.grad.double(), w.grad, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_or_frozen_hidden_states_leave_the_others_gradient_as_it_was(monkeypatch):
    hidden, head, batch = make()
    _, d_hidden, d_head = in_pieces(hidden, head, batch)
    [alone] = torch.autograd.grad(cross_entropy(hidden.detach(), head, batch)[0], head.weight)
    assert alone.equal(d_head)
    head.requires_grad_(False)
    monkeypatch.setattr(loss, "_add_product", None)  # the head's own takes V * D numbers
    [alone] = torch.autograd.grad(cross_entropy(hidden, head, batch)[0], hidden)
    assert alone.equal(d_hidden)


# ---- memory


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation made, in elements; views and arguments handed back are not made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, x.numel())
        return out


def test_full_logits_never_exist(monkeypatch):
    T, D, V = 64, 8, 151_936
    set_rows(monkeypatch, 4)
    hidden, head, batch = make(T, D, V)
    with Largest() as largest:
        cross_entropy(hidden, head, batch)[0].backward()
    assert largest.numel == V * D  # the head's gradient; all logits would be 8 times as large
    with Largest() as largest:
        F.cross_entropy(head(hidden), batch.targets)
    assert largest.numel == V * T  # it does see them


def test_without_gradients_only_the_loss_is_made(monkeypatch):
    set_rows(monkeypatch, 5)
    hidden, head, batch = make()
    expected = cross_entropy(hidden, head, batch)[0].detach()
    for no_grad in (torch.no_grad, torch.inference_mode):
        with no_grad(), Largest() as largest:
            value, _ = cross_entropy(hidden, head, batch)
        assert value.equal(expected) and not value.requires_grad
        assert largest.numel == 5 * V  # a piece of logits; the gradient of the head would be larger


def test_pieces_are_powers_of_two_and_the_largest_that_fit():
    for vocab_size, element_bytes in [(151_936, 2), (151_936, 4), (128_256, 2), (32_000, 2), (7, 8)]:
        rows = loss.piece_rows(vocab_size, element_bytes)
        assert rows.bit_count() == 1
        assert rows * vocab_size * element_bytes <= loss._PIECE_BYTES < 2 * rows * vocab_size * element_bytes
    assert loss.piece_rows(1 << 40, 2) == 1


# ---- the operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write_grad", [True, False])
def test_the_operator_keeps_torchs_rules(dtype, write_grad):
    logits, targets = torch.randn(6, 11, dtype=dtype), torch.tensor([0, 10, IGNORE, 3, 3, IGNORE])
    torch.library.opcheck(softmax_cross_entropy_, (logits, targets, write_grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_writes_the_gradient_only_when_asked(dtype):
    logits, targets = torch.randn(6, 11, dtype=dtype), torch.tensor([0, 10, IGNORE, 3, 3, IGNORE])
    before = logits.clone()
    losses = softmax_cross_entropy_(logits, targets, False)
    assert logits.equal(before)
    assert softmax_cross_entropy_(logits, targets, True).equal(losses)
    x = before.double().requires_grad_()
    expected = F.cross_entropy(x, targets, reduction="none")
    [gradient] = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


# ---- on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [50_257, 50_304])
def test_on_the_gpu_it_is_no_worse_than_full_logits(monkeypatch, dtype, V):
    """Through minitrain.kernels where they are built, else through torch."""
    set_rows(monkeypatch, 100)
    inputs = make(T=1000, D=256, V=V, dtype=dtype, device="cuda")
    actual, plain, exact = in_pieces(*inputs), full_logits(*inputs, dtype=dtype), full_logits(*inputs)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for a, p, e in zip(actual, plain, exact, strict=True):
        error, allowed = ((x.double() - e).abs().max() for x in (a, p))
        assert error <= 2 * allowed + rounding * e.abs().max()


@pytest.mark.gpu
def test_on_the_gpu_the_kernel_equals_torchs_operations():
    if not runs_on("cuda", torch.cuda.current_device()):
        pytest.skip("minitrain.kernels is not built")
    logits = torch.randn(64, 151_936, device="cuda").mul_(3).bfloat16()
    targets = torch.randint(151_936, (64,), device="cuda")
    targets[::5] = IGNORE
    by_kernel, by_torch = logits.clone(), logits.cpu()
    losses = softmax_cross_entropy_(by_kernel, targets, True)
    torch.testing.assert_close(
        losses.cpu(), softmax_cross_entropy_(by_torch, targets.cpu(), True), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(by_kernel.cpu(), by_torch, rtol=2**-7, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("N, D, V", [(1, 64, 8), (300, 128, 1000), (129, 192, 192), (1000, 1024, 151_936)])
def test_what_is_found_of_logits_as_they_are_made_is_what_a_second_look_finds(N, D, V):
    if not runs_on_hopper("cuda", 0):
        pytest.skip("needs a Hopper GPU and the CUDA extension")
    x, w, logits = (torch.randn(shape, device="cuda").bfloat16() for shape in ((N, D), (V, D), (N, V)))
    x[N // 2], x[N // 3] = torch.nan, torch.inf
    targets = torch.randint(V, (N,), device="cuda")
    partials = write_logits(x, w, logits.fill_(torch.nan))
    torch.testing.assert_close(logits, x @ w.T, rtol=2**-7, atol=1e-3 * D**0.5, equal_nan=True)
    found = softmax_cross_entropy_(logits.clone(), targets, True, partials)
    expected = softmax_cross_entropy_(logits, targets, True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert found.isnan().sum() == len({N // 2, N // 3})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_gpu_gradients_are_scaled_to_the_bit(dtype):
    factor = torch.tensor(1 / 3, device="cuda")
    for size in (1, 7, 8, 1000, 4099):
        x = torch.randn(size, device="cuda").to(dtype)
        assert _scaled(x, factor, torch.bfloat16).equal((x.float() * factor).bfloat16())


@pytest.mark.gpu
def test_the_loss_of_32768_tokens_takes_less_than_2_and_a_half_gib():
    hidden, head, batch = make(T=32_768, D=1024, V=151_936, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cross_entropy(hidden, head, batch)[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 5 << 29


@pytest.mark.gpu
def test_the_loss_never_waits_for_the_gpu():
    hidden, head, batch = make(dtype=torch.bfloat16, device="cuda")
    cross_entropy(hidden, head, batch)[0].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy(hidden, head, batch)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
