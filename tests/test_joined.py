"""Several Linears as one product: where weights are one matrix, and that it is theirs."""

import pytest
import torch
from torch import nn

from minitrain import Qwen3Config
from minitrain.joined import joined, joined_linear, joined_linear_dx
from minitrain.models import build_model, init_weights, materialize
from minitrain.parallel.comm import Group
from minitrain.parallel.ddp import Unit
from minitrain.parallel.recompute import KEEPS
from minitrain.parallel.zero import _fill_flat


@pytest.fixture
def block():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = build_model(Qwen3Config(vocab_size=7, num_hidden_layers=1, **sizes))
    materialize(model, "cpu", torch.bfloat16)
    init_weights(model, seed=0)
    return model.layers["0"]


def projections(block):
    attn, mlp = block.self_attn, block.mlp
    return [m.weight for m in (attn.q_proj, attn.k_proj, attn.v_proj)], [mlp.gate_proj.weight, mlp.up_proj.weight]


def assert_one_matrix(weights):
    one = joined(weights)
    assert one.data_ptr() == weights[0].data_ptr() and torch.equal(one, torch.cat(weights))


def test_weights_of_a_materialized_model_and_of_a_flat_unit_are_one_matrix(block):
    for weights in projections(block):
        assert_one_matrix(weights)
    unit = Unit(dict(block.named_parameters()), Group(), Group(), Group())
    _fill_flat(torch.empty(unit.numel, dtype=torch.bfloat16), unit, None)
    for weights in projections(block):
        assert_one_matrix(weights)


def test_others_are_copied_together(block):
    (q, k, v), _ = projections(block)
    far = torch.randn(3, 64).bfloat16()
    wide = torch.randn(8, 128).bfloat16()
    for weights in ([q, q, v], [k, q, v], [q, k, far], [far, wide[:, :64]], [wide[:4, :64], wide[4:, :64]]):
        made = joined(weights)
        assert torch.equal(made, torch.cat(weights)) and made.data_ptr() not in [w.data_ptr() for w in weights]


def test_parameters_that_share_a_storage_count_their_writes_apart(block):
    (q, k, v), _ = projections(block)
    with torch.no_grad():
        k.add_(1)
    assert (q._version, k._version, v._version) == (q._version, q._version + 1, q._version)
    norm = block.input_layernorm.weight
    assert norm.untyped_storage().nbytes() < q.nbytes  # a norm does not keep matrices alive


def test_the_product_and_its_gradient_are_those_of_linears(block):
    (q, k, v), _ = projections(block)
    x, d = torch.randn(5, 64).bfloat16(), torch.randn(5, len(q) + 2 * len(k)).bfloat16()
    for weights in ([q, k, v], [v, q, k]):
        linears = torch.cat([nn.functional.linear(x, weight) for weight in weights], 1)
        torch.testing.assert_close(joined_linear(x, weights), linears)
        torch.testing.assert_close(joined_linear_dx(d, weights), d @ torch.cat(weights))
    torch.library.opcheck(joined_linear, (x, [q.detach(), k.detach()]))
    torch.library.opcheck(joined_linear_dx, (d[:, : len(q)], [q.detach()]))


def test_cheap_recomputation_keeps_the_product():
    assert KEEPS["cheap"](torch.ops.minitrain.joined_linear.default)
