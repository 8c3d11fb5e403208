"""Rows to the order of experts and back on the GPU, against plain indexing in float64."""

import pytest
import torch

from minitrain.routed_rows import can_run, spread_rows, sum_rows

pytestmark = pytest.mark.gpu
SIZES = [(1, 1, 8), (7, 2, 24), (33, 8, 2048), (64, 3, 4104), (5, 11, 256)]  # T, A, D


def make(T, A, D):
    torch.manual_seed(0)
    place_TA = torch.randperm(T * A, device="cuda").view(T, A)
    x_TD, d_RD = (torch.randn(n, D, device="cuda").bfloat16() for n in (T, T * A))
    return x_TD, d_RD, place_TA, torch.rand(T, A, device="cuda")


def close(ours, exact, dtype=torch.bfloat16):
    """Within one rounding of the exact result, and of its sums in fp32."""
    torch.testing.assert_close(ours, exact.to(dtype), rtol=2**-7, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_spreading_copies_rows_and_its_gradient_sums_them(sizes):
    x_TD, d_RD, place_TA, _ = make(*sizes)
    x_TD.requires_grad_()
    out_RD = spread_rows(x_TD, place_TA)
    token_R = torch.empty_like(place_TA.flatten())
    token_R[place_TA.flatten()] = torch.arange(place_TA.numel(), device="cuda") // place_TA.shape[1]
    assert out_RD.equal(x_TD[token_R])
    out_RD.backward(d_RD)
    close(x_TD.grad, d_RD.double()[place_TA].sum(1))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_weighted_sum_and_its_gradients_are_exact_up_to_rounding(sizes):
    d_TD, y_RD, place_TA, weights_TA = make(*sizes)
    for x in (y_RD, weights_TA):
        x.requires_grad_()
    out_TD = sum_rows(y_RD, place_TA, weights_TA)
    out_TD.backward(d_TD)
    y, w = y_RD.detach().double().requires_grad_(), weights_TA.detach().double().requires_grad_()
    exact_TD = (y[place_TA] * w[..., None]).sum(1)
    exact_TD.backward(d_TD.double())
    close(out_TD, exact_TD)
    close(y_RD.grad, y.grad)
    close(weights_TA.grad, w.grad, torch.float32)


def test_other_layouts_are_read_as_what_they_are():
    d_TD, y_RD, place_TA, weights_TA = make(12, 4, 64)
    wide_RD, across_AT = torch.randn(48, 128, device="cuda").bfloat16(), place_TA.T.contiguous()
    wide_RD[:, ::2] = y_RD
    expected = sum_rows(y_RD, place_TA, weights_TA)
    assert sum_rows(wide_RD[:, ::2], across_AT.T, weights_TA.T.contiguous().T).equal(expected)
    assert spread_rows(d_TD[:1].expand(12, 64), across_AT.T).equal(spread_rows(d_TD[:1].repeat(12, 1), place_TA))


def test_torch_can_trace_and_compile_them():
    d_TD, y_RD, place_TA, weights_TA = make(12, 4, 64)
    for x in (y_RD, weights_TA, d_TD):
        x.requires_grad_()
    torch.library.opcheck(sum_rows, (y_RD, place_TA, weights_TA))
    torch.library.opcheck(spread_rows, (d_TD, place_TA))


def test_what_they_do_not_take_is_left_to_torch():
    assert can_run(torch.zeros(2, 8, device="cuda", dtype=torch.bfloat16))
    assert not can_run(torch.zeros(2, 8, device="cuda"))
    assert not can_run(torch.zeros(2, 12, device="cuda", dtype=torch.bfloat16))
    assert not can_run(torch.zeros(2, 8, dtype=torch.bfloat16))
