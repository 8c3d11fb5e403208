"""Master weights in two halves: their values, and steps from them."""

import copy

import pytest
import torch
from conftest import RoundingSGD
from torch import nn

from minitrain.masters import is_split, set_value, split, to_save, value_of
from minitrain.parallel.zero import MasterOptimizer


class WholeSGD(RoundingSGD):
    """The same from masters in fp32, which are rounded for it."""

    rounds = False


def made_of(value):
    master = nn.Parameter(value.clone())
    master.rounded = torch.full_like(value, torch.nan, dtype=torch.bfloat16)
    split([master])
    return master


def some_floats():
    """Of every size, with ends of the range and what lies between two values of bf16."""
    bits = torch.randint(-(1 << 31), 1 << 31, (100_000,), dtype=torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8, 2**-149, 3.4028e38])
    return torch.cat([bits.view(torch.float32)[bits.view(torch.float32).isfinite()], special])


def test_two_halves_have_every_bit_of_the_value():
    value = some_floats()
    master = made_of(value)
    assert is_split(master) and master.nbytes == 2 * len(value)
    assert value_of(master).view(torch.int32).equal(value.view(torch.int32))
    set_value(master, value.flip(0))
    assert value_of(master).view(torch.int32).equal(value.flip(0).view(torch.int32))
    saved = to_save(master)
    assert (saved.dtype, saved.shape) == (torch.float32, value.shape) and saved.read().equal(value_of(master))


def test_the_upper_half_is_the_nearest_value_and_of_two_as_near_the_one_away_from_0():
    value = some_floats()
    rounded = made_of(value).rounded
    even, is_tie = value.bfloat16(), value.view(torch.int32) & 0xFFFF == 0x8000
    assert is_tie.sum() >= 3 and rounded[~is_tie].equal(even[~is_tie])
    assert (rounded[is_tie].double().abs() > value[is_tie].double().abs()).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_from_two_halves_are_those_from_fp32(rows):
    model = nn.Sequential(nn.Linear(60, 40), nn.RMSNorm(40)).bfloat16()
    twin = copy.deepcopy(model)
    halves, whole = MasterOptimizer(model, RoundingSGD), MasterOptimizer(twin, WholeSGD)
    assert all(map(is_split, halves.masters.values())) and not any(map(is_split, whole.masters.values()))
    for _ in range(20):
        for p, q in [*zip(model.parameters(), twin.parameters(), strict=True)] * rows:
            grad = torch.randn(p.shape).bfloat16()
            (p * grad).sum().backward()
            (q * grad).sum().backward()
        norms = [opt.clip_grad_norm(0) for opt in (halves, whole)]
        assert norms[0].equal(norms[1])
        halves.step(0.1), whole.step(0.1)
        for name, master in halves.masters.items():
            assert value_of(master).equal(whole.masters[name]), name
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p == q).float().mean() > 0.999 and p.grad is None


def test_what_is_frozen_or_of_fp32_is_not_split():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).bfloat16()
    model[0].weight.requires_grad_(False)
    masters = MasterOptimizer(model, RoundingSGD).masters
    assert masters["0.weight"] is model[0].weight and value_of(masters["0.weight"]).equal(model[0].weight)
    assert [is_split(master) for master in masters.values()] == [False, True, True, True]
    wide = nn.Linear(6, 4)
    assert MasterOptimizer(wide, RoundingSGD).masters["weight"] is wide.weight
