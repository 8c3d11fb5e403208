"""The models against transformers, against themselves under other packings, and against plain loops."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from reference import (
    CASES,
    LLAMA3_ROPE,
    assert_all_close,
    assert_close,
    hub_gradients,
    hub_model,
    transformers_gradients,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from minitrain.batch import Batch
from minitrain.config import TrainConfig
from minitrain.hf import from_pretrained
from minitrain.loss import cross_entropy
from minitrain.models import build_model, init_weights, materialize, model_class, qwen3_moe
from minitrain.models.layers import rope_frequencies
from minitrain.models.qwen3_moe import MoE, Qwen3MoeConfig, load_balancing_loss
from minitrain.parallel import parallelize
from minitrain.parallel.mesh import Mesh

TINY_MOE = {**TINY, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def tiny(type="qwen3", seed=0, **settings):
    """One of our models on the CPU in fp32, every parameter random."""
    sizes = TINY_MOE if type == "qwen3_moe" else TINY
    model = build_model(model_class(type).config_class(**{**sizes, **settings}))
    materialize(model, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(float(name.endswith("norm.weight")), 0.2, generator=generator)
    return model


def documents(*lengths, vocab_size=TINY["vocab_size"]):
    return [torch.randint(0, vocab_size, (n,)) for n in lengths]


def pack(documents):
    """One row of a training step of one row: router losses and counts are on."""
    return dataclasses.replace(Batch.pack(documents), share=1.0)


def rope_of(model, batch):
    angle = batch.positions[:, None] * rope_frequencies(model.config)
    return angle.cos(), angle.sin()


# ---- transformers


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient_match_transformers(case, tmp_path):
    theirs = hub_model(case)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    tokens = torch.randint(0, TINY["vocab_size"], (2, 80))
    wanted = theirs(tokens, labels=tokens)
    wanted.loss.backward()

    assert_close(ours.logits(tokens), wanted.logits, what="logits")
    batch = pack(list(tokens))
    loss, _ = cross_entropy(ours(batch), ours.lm_head, batch)
    loss = loss / batch.num_targets
    loss.backward()
    assert_close(loss, wanted.loss, what="loss")
    gradients = transformers_gradients(theirs)
    assert sum(g.numel() for g in gradients.values()) == sum(p.numel() for p in theirs.parameters())
    assert_all_close(hub_gradients(ours), gradients)


def test_llama3_rope_matters_where_it_is_tested(tmp_path):
    model = hub_model("llama3_rope")
    model.save_pretrained(tmp_path)
    stretched = from_pretrained(tmp_path)
    plain = dataclasses.replace(stretched.config, rope_scaling=None)
    ratio = rope_frequencies(plain) / rope_frequencies(stretched.config)
    assert ratio[0] == 1 and 1 < ratio[1] < 8 and torch.allclose(ratio[3:], torch.tensor(8.0))
    tokens = torch.randint(0, 101, (80,))
    logits = stretched.logits(tokens)
    stretched.config = plain
    assert (stretched.logits(tokens) - logits).abs().max() > 0.1


def test_rope_scaling_of_another_kind_is_refused():
    for scaling in ({"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}, {"rope_type": "llama3"}):
        with pytest.raises(ValueError, match="only rope_type llama3 is known"):
            model_class("llama").config_class(rope_scaling=scaling)
    model_class("llama").config_class(rope_scaling={**LLAMA3_ROPE, "type": "llama3"})


PUBLISHED = [  # name, type, parameters as published with the weights, a tied head counted once; config.json's sizes
    # vocab_size, hidden_size, intermediate_size, layers, heads, kv heads, head_dim
    ("Qwen3-0.6B", "qwen3", 596_049_920, (151_936, 1024, 3072, 28, 16, 8, 128), {"tie_word_embeddings": True}),
    ("Qwen3-1.7B", "qwen3", 1_720_574_976, (151_936, 2048, 6144, 28, 16, 8, 128), {"tie_word_embeddings": True}),
    ("Qwen3-4B", "qwen3", 4_022_468_096, (151_936, 2560, 9728, 36, 32, 8, 128), {"tie_word_embeddings": True}),
    ("Qwen3-8B", "qwen3", 8_190_735_360, (151_936, 4096, 12_288, 36, 32, 8, 128), {}),
    ("Qwen3-14B", "qwen3", 14_768_307_200, (151_936, 5120, 17_408, 40, 40, 8, 128), {}),
    ("Qwen3-32B", "qwen3", 32_762_123_264, (151_936, 5120, 25_600, 64, 64, 8, 128), {}),
    ("Qwen3-30B-A3B", "qwen3_moe", 30_532_122_624, (151_936, 2048, 6144, 48, 32, 4, 128),
     {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}),
    ("Qwen3-235B-A22B", "qwen3_moe", 235_093_634_560, (151_936, 4096, 12_288, 94, 64, 4, 128),
     {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536}),
    ("Llama-2-7B", "llama", 6_738_415_616, (32_000, 4096, 11_008, 32, 32, 32, None), {}),
    ("Llama-3-8B", "llama", 8_030_261_248, (128_256, 4096, 14_336, 32, 32, 8, None), {}),
    ("Llama-3-70B", "llama", 70_553_706_496, (128_256, 8192, 28_672, 80, 64, 8, None), {}),
    ("Qwen2.5-7B", "qwen2", 7_615_616_512, (152_064, 3584, 18_944, 28, 28, 4, None), {}),
]  # fmt: skip


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_published_shapes_have_the_published_number_of_parameters(row):
    _, type, parameters, sizes, others = row
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim")  # fmt: skip
    others = {"tie_word_embeddings": False, **others}
    model = build_model(model_class(type).config_class(**dict(zip(names, sizes, strict=True)), **others))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("type", "parameters"),
    [
        ("qwen3", 596_049_920),
        ("qwen3_moe", 30_532_122_624),
        ("llama", 6_738_415_616),
        ("qwen2", 7_615_616_512),
    ],
)
def test_defaults_are_the_published_model_that_the_docstring_names(type, parameters):
    model = build_model(model_class(type).config_class())
    assert sum(p.numel() for p in model.parameters()) == parameters


# ---- packing


@pytest.mark.parametrize("type", ["qwen3", "qwen3_moe", "qwen2"])
def test_packed_documents_equal_one_call_each(type):
    settings = {"router_aux_loss_coef": 0.0} if type == "qwen3_moe" else {}
    model = tiny(type, **settings)
    docs = documents(7, 1, 23, 0, 12)
    packed = pack(docs)
    ends = packed.cu_seqlens_q
    ends = torch.cat([ends, ends[-1:].expand(3)])  # as the data loader pads it
    packed = dataclasses.replace(packed, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen=64)

    hidden = model(packed)
    cross_entropy(hidden, model.lm_head, packed)[0].backward()
    got = hub_gradients(model)
    model.zero_grad()
    alone = [pack([d]) for d in docs if len(d)]
    hiddens = [model(b) for b in alone]
    sum(cross_entropy(h, model.lm_head, b)[0] for h, b in zip(hiddens, alone, strict=True)).backward()
    assert_close(hidden, torch.cat(hiddens))
    assert_all_close(got, hub_gradients(model))


def test_logits_of_rows_are_those_of_each_row():
    model = tiny()
    rows = torch.stack(documents(9, 9, 9))
    logits = model.logits(rows)
    assert logits.shape == (3, 9, 101)
    for row, row_logits in zip(rows, logits, strict=True):
        assert_close(model.logits(row), row_logits)


# ---- experts


def naive_moe(moe, x_TD):
    """A token at a time, an expert at a time."""
    outputs, sent = [], torch.zeros(moe.cfg.num_experts, dtype=torch.int64)
    for x in x_TD:
        weights, chosen = (moe.gate.weight @ x).softmax(-1).topk(moe.cfg.num_experts_per_tok)
        if moe.cfg.norm_topk_prob:
            weights = weights / weights.sum()
        y = torch.zeros_like(x)
        for w, e in zip(weights, chosen.tolist(), strict=True):
            sent[e] += 1
            gate, up, down = (m[e] for m in (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj))
            y = y + w * (down @ (F.silu(gate @ x) * (up @ x)))
        outputs.append(y)
    return torch.stack(outputs), sent


def run_and_grads(forward, moe, x_TD):
    x_TD = x_TD.clone().requires_grad_()
    moe.zero_grad()
    y_TD = forward(x_TD)
    (y_TD * torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)).sum().backward()
    return {"y": y_TD.detach(), "x": x_TD.grad, **{n: p.grad.clone() for n, p in moe.named_parameters()}}


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize(
    ("per_token", "favour", "sent"),
    [
        (2, [0, 0, 0, 0, 0, 0], None),
        (2, [0, 0, -99, 0, 0, 0], {2: 0}),  # nobody goes to expert 2
        (1, [0, 0, 0, 99, 0, 0], {3: 17, 0: 0, 5: 0}),  # all go to expert 3 alone
        (2, [99, 0, 0, 0, 0, 90], {0: 17, 5: 17, 1: 0}),
        (6, [0, 0, 0, 0, 0, 0], dict.fromkeys(range(6), 17)),  # every expert gets every token
    ],
)
def test_moe_equals_a_loop_over_tokens(per_token, favour, sent, norm_topk_prob):
    cfg = Qwen3MoeConfig(
        **{**TINY_MOE, "num_experts_per_tok": per_token}, norm_topk_prob=norm_topk_prob, router_aux_loss_coef=0.0
    )
    moe = MoE(cfg)
    for p in moe.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    x_TD = torch.randn(17, cfg.hidden_size)
    x_TD[:, 0] = 1
    with torch.no_grad():
        moe.gate.weight[:, 0] += torch.tensor(favour)
    batch = pack(documents(17))

    got = run_and_grads(lambda x: moe(x, batch), moe, x_TD)
    counts = moe.load.clone()
    loads = []
    wanted = run_and_grads(lambda x: loads.append(naive_moe(moe, x)) or loads[0][0], moe, x_TD)
    assert all(t.isfinite().all() for t in got.values())
    for name in wanted:
        if name == "gate.weight" and per_token == 1 and norm_topk_prob:  # the one weight is 1 whatever the router says
            assert got[name].abs().max() < 1e-6
        else:
            # From saturated probabilities hardly any gradient comes back; what does is the difference of larger sums.
            floor = 1e-6 if name == "gate.weight" and any(favour) else 0
            assert (got[name] - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max() + floor, name
    assert torch.equal(counts, loads[0][1]) and counts.sum() == 17 * per_token
    for expert, rows in (sent or {}).items():
        assert counts[expert] == rows
        assert rows or not got["experts.up_proj"][expert].any()


on_cpu_and_gpu = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@on_cpu_and_gpu
@pytest.mark.parametrize("counts", [[5, 3, 8, 1], [0, 9, 0, 8], [17, 0, 0, 0], [0, 0, 0, 17]])
def test_the_grouped_matrix_product_is_that_of_each_experts_rows(counts, device):
    x_RD = torch.randn(17, 32, device=device).bfloat16().requires_grad_()
    w_EFD = torch.randn(4, 24, 32, device=device).bfloat16().requires_grad_()
    counts_E, d_RF = torch.tensor(counts, device=device), torch.randn(17, 24, device=device).bfloat16()
    results = []
    for matmul in (qwen3_moe._grouped_matmul, qwen3_moe._matmul_by_expert):
        y_RF = matmul(x_RD, w_EFD, counts_E)
        results.append([y_RF, *torch.autograd.grad(y_RF, (x_RD, w_EFD), d_RF)])
    for grouped, looped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped, rtol=2**-7, atol=2**-7 * looped.abs().max().item())


def test_routing_reads_no_value_on_the_host(monkeypatch):
    """Under fake tensors, which have no values, whatever needs one raises: as the loop over experts does."""

    def forward_and_backward():
        with torch.device("meta"):
            moe = MoE(Qwen3MoeConfig(**TINY_MOE, router_z_loss_coef=0.1))
        with FakeTensorMode(allow_non_fake_inputs=True):
            materialize(moe, "cpu", torch.bfloat16)
            x_TD = torch.randn(16, TINY["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
            y_TD = moe(x_TD, batch)
            y_TD.backward(torch.randn_like(y_TD))

    batch = pack(documents(16))
    with pytest.raises(DataDependentOutputException):
        forward_and_backward()
    monkeypatch.setattr(qwen3_moe, "_can_group", lambda *_: True)  # what a GPU takes
    forward_and_backward()


def test_experts_whose_rows_are_no_whole_16_bytes_run_one_by_one():
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert qwen3_moe._can_group(on_gpu, torch.empty(4, 16, 24))
    assert not qwen3_moe._can_group(on_gpu, torch.empty(4, 12, 24))
    assert not qwen3_moe._can_group(on_gpu, torch.empty(4, 16, 20))


@pytest.mark.gpu
@pytest.mark.parametrize("favour", [None, 3])
def test_experts_on_the_gpu_never_wait_for_it(favour):
    moe = MoE(Qwen3MoeConfig(**TINY_MOE)).to("cuda", torch.bfloat16)
    x_TD = torch.randn(64, TINY["hidden_size"], device="cuda").bfloat16()
    with torch.no_grad():
        for w in moe.parameters():
            w.normal_(0, 0.2)
        if favour is not None:  # all tokens to two experts, none to the others
            moe.gate.weight.zero_()
            moe.gate.weight[favour : favour + 2] = x_TD.mean(0)
            x_TD += 10 * x_TD.mean(0)
    batch = pack([torch.randint(0, 101, (64,))]).to("cuda")
    moe(x_TD.requires_grad_(), batch).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y_TD = moe(x_TD, batch)
        y_TD.backward(torch.ones_like(y_TD))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x_TD.grad.isfinite().all() and moe.load.sum() == 2 * 2 * 64
    assert favour is None or (moe.load > 0).sum() == 2


def test_load_counts_until_it_is_zeroed_and_is_no_weight():
    model = tiny("qwen3_moe")
    batch = pack(documents(30, 11))
    model(batch)
    once = [layer.mlp.load.clone() for layer in model.layers.values()]
    assert [n.sum().item() for n in once] == [82, 82]
    with torch.no_grad():
        model(batch)
    assert all(torch.equal(layer.mlp.load, 2 * n) for layer, n in zip(model.layers.values(), once, strict=True))
    assert not any("load" in name for name in model.state_dict())


@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_load_balancing_loss_is_that_of_transformers(skew):
    logits_TE = torch.randn(50, 6) + skew * torch.arange(6)
    probs_TE = logits_TE.softmax(-1)
    got = load_balancing_loss(probs_TE, probs_TE.topk(2).indices.flatten().bincount(minlength=6), 50)
    torch.testing.assert_close(got, load_balancing_loss_func((logits_TE,), 6, 2), rtol=1e-6, atol=0)


def test_router_loss_of_one_layer_has_the_gradient_of_transformers(tmp_path):
    settings = {"num_hidden_layers": 1, "router_aux_loss_coef": 0.5}
    theirs = hub_model("qwen3_moe", output_router_logits=True, **settings)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    tokens = torch.randint(0, 101, (1, 40))
    theirs(tokens, labels=tokens).loss.backward()
    batch = pack(list(tokens))
    (cross_entropy(ours(batch), ours.lm_head, batch)[0] / batch.num_targets).backward()
    assert_all_close(hub_gradients(ours), transformers_gradients(theirs))


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize(("aux", "z"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_router_losses_have_the_gradient_of_an_explicit_sum(aux, z, share):
    batch = dataclasses.replace(pack(documents(30, 11)), share=share)
    model = tiny("qwen3_moe", router_aux_loss_coef=aux, router_z_loss_coef=z)
    hidden = model(batch)
    (cross_entropy(hidden, model.lm_head, batch)[0] / 100).backward()

    plain = tiny("qwen3_moe", router_aux_loss_coef=0.0)
    seen = []
    for layer in plain.layers.values():
        layer.mlp.register_forward_pre_hook(lambda moe, args: seen.append((moe, args[0])))
    plain_hidden = plain(batch)
    assert torch.equal(hidden, plain_hidden)  # the router losses change gradients, not values
    total = cross_entropy(plain_hidden, plain.lm_head, batch)[0] / 100
    for moe, x_TD in seen:
        logits_TE = x_TD @ moe.gate.weight.T
        chosen_TA = logits_TE.topk(2).indices
        sent_E = torch.stack([(chosen_TA == e).sum() for e in range(6)]) / len(x_TD)
        balance = 6 * (sent_E * logits_TE.softmax(-1).mean(0)).sum()
        total = total + share * (aux * balance + z * (logits_TE.logsumexp(-1) ** 2).mean()) / 2  # 2 layers
    total.backward()
    assert_all_close(hub_gradients(model), hub_gradients(plain))


def test_router_losses_and_counts_know_no_padding():
    """A row that padding fills up, of one token to all experts' cost, has the gradients of the row without it."""
    real = documents(30, 11)
    padded = dataclasses.replace(pack([*real, torch.zeros(23, dtype=torch.int64)]), is_real=torch.arange(64) < 41)
    grads, loads = [], []
    for batch in (pack(real), padded):
        model = tiny("qwen3_moe", router_aux_loss_coef=0.3, router_z_loss_coef=0.1)
        (0 * model(batch)).sum().backward()
        grads.append(hub_gradients(model))
        loads.append([layer.mlp.load for layer in model.layers.values()])
    assert_all_close(*grads)
    assert all(map(torch.equal, *loads)) and loads[0][0].sum() == 2 * 41


def test_router_losses_and_counts_are_for_training_only():
    model = tiny("qwen3_moe", router_aux_loss_coef=0.3)
    (0 * model.logits(torch.arange(20))).sum().backward()
    assert not model.layers["0"].mlp.gate.weight.grad.any() and not model.layers["0"].mlp.load.any()


def test_router_losses_of_rows_are_weighted_by_their_share():
    whole, halves = (tiny("qwen3_moe", router_aux_loss_coef=0.3, router_z_loss_coef=0.1) for _ in range(2))
    batch = pack(documents(30, 11))
    half = dataclasses.replace(batch, share=0.5)
    (whole(batch).sum() * 0).backward()
    for _ in range(2):
        (halves(half).sum() * 0).backward()
    got, wanted = hub_gradients(halves), hub_gradients(whole)
    assert wanted["model.layers.1.mlp.gate.weight"].any()
    assert_all_close(got, wanted, 1e-6)


# ---- weights


@pytest.mark.parametrize("type", ["qwen3", "qwen3_moe", "qwen2"])
def test_first_weights_depend_on_seed_and_name_alone(type):
    model, part, other = tiny(type, 1), tiny(type, 2), tiny(type, 3)
    state = torch.get_rng_state()
    init_weights(model, seed=5)
    del part.layers["0"]  # a pipeline's last stage
    part.layers["1"]._modules = dict(reversed(part.layers["1"]._modules.items()))
    init_weights(part, seed=5)
    init_weights(other, seed=6)
    assert torch.equal(torch.get_rng_state(), state)  # the stream of everything else is left alone
    wanted = dict(model.named_parameters(remove_duplicate=False))  # a tied head under both of its names
    shared = dict(part.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in shared.items())
    assert len(shared) > 5
    matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    for name, p in other.named_parameters():
        assert (p != wanted[name]).float().mean() > 0.99 if name in matrices else torch.equal(p, wanted[name])
    assert not torch.equal(wanted["layers.0.self_attn.q_proj.weight"], wanted["layers.1.self_attn.q_proj.weight"])
    if type == "qwen3_moe":
        up = wanted["layers.0.mlp.experts.up_proj"]
        assert not any(torch.equal(up[0], up[e]) for e in range(1, len(up)))


@pytest.mark.parametrize("type", ["qwen3", "qwen3_moe", "qwen2"])
def test_first_weights_have_the_stated_scale(type):
    model = tiny(type, hidden_size=256, vocab_size=400, num_hidden_layers=8, initializer_range=0.05)
    init_weights(model, seed=0)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
            std = 0.05 / 4 if residual else 0.05
            tolerance = 6 / p.numel() ** 0.5
            assert abs(p.std() / std - 1) < tolerance and abs(p.mean() / std) < tolerance, name


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("type", ["qwen3", "qwen3_moe", "llama", "qwen2"])
def test_head_is_tied_where_the_config_says_so_on_meta_and_after(type, tie):
    cfg = model_class(type).config_class(**(TINY_MOE if type == "qwen3_moe" else TINY), tie_word_embeddings=tie)
    model = build_model(cfg)
    assert (model.lm_head.weight is model.embed_tokens.weight) is tie
    materialize(model, "cpu", torch.bfloat16)
    assert (model.lm_head.weight is model.embed_tokens.weight) is tie
    assert ("lm_head.weight" in dict(model.named_parameters())) is not tie
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_materialize_keeps_what_has_bytes_already():
    model = build_model(model_class("qwen3").config_class(**TINY))
    kept = model.norm.weight = torch.nn.Parameter(torch.full((TINY["hidden_size"],), 7.0))
    model.embed_tokens.weight.requires_grad_(False)
    materialize(model, "cpu", torch.float32)
    assert model.norm.weight is kept
    assert not model.embed_tokens.weight.requires_grad and model.layers["0"].mlp.up_proj.weight.requires_grad


# ---- blocks


@pytest.mark.parametrize("type", ["qwen3", "qwen3_moe"])
def test_block_forward_is_pure(type):
    model = tiny(type)
    batch = pack(documents(20, 13))
    x_TD, rope = torch.randn(33, TINY["hidden_size"]), rope_of(model, batch)
    tensors = [x_TD, *rope, batch.tokens, batch.targets, batch.positions, batch.cu_seqlens_q, batch.cu_seqlens_k]
    tensors += list(model.parameters())
    before, fields = [t.clone() for t in tensors], dataclasses.replace(batch)
    block = model.layers["1"]
    first, second = block(x_TD, rope, batch), block(x_TD, rope, batch)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert all(getattr(batch, f.name) is getattr(fields, f.name) for f in dataclasses.fields(batch))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_block_equals_eager_without_a_graph_break(backend):
    torch._dynamo.reset()  # what tests before compiled for other sizes
    model = tiny()
    batch = pack(documents(24, 24))
    rope = rope_of(model, batch)
    block = model.layers["0"]
    results = []
    for forward in (block, torch.compile(block, fullgraph=True, backend=backend)):
        torch.manual_seed(0)
        block.zero_grad()
        x_TD = torch.randn(48, TINY["hidden_size"], requires_grad=True)
        y_TD = forward(x_TD, rope, batch)
        y_TD.sum().backward()
        results.append({"y": y_TD.detach(), "x": x_TD.grad, **{n: p.grad.clone() for n, p in block.named_parameters()}})
    assert_all_close(results[1], results[0])


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "cheap", "block", "full"])
@pytest.mark.parametrize("type", ["qwen3", "qwen3_moe"])
def test_on_the_gpu_a_block_is_one_graph_compiled_once_whatever_it_recomputes(type, recompute, monkeypatch):
    """Dense and MoE in bf16, packed documents of other lengths every step; gradients as of the plain model."""
    torch._dynamo.reset()
    whole = functools.partial(torch.compile, fullgraph=True, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", whole)
    model = (
        tiny(type, head_dim=64, hidden_size=64, moe_intermediate_size=64) if type == "qwen3_moe" else tiny(head_dim=64)
    )
    model.to("cuda", torch.bfloat16)
    steps = []
    for lengths in ([40, 20, 4], [30, 30, 4], [1, 60, 3]):
        steps.append(dataclasses.replace(pack([d.cuda() for d in documents(*lengths)]), max_seqlen=64))

    def gradients():
        grads = []
        for batch in steps:
            model.zero_grad()
            model(batch).float().square().mean().backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return grads

    plain = gradients()
    parallelize(model, Mesh(torch.device("cuda")), TrainConfig(recompute=recompute))
    torch._dynamo.utils.counters.clear()
    for ours, theirs in zip(gradients(), plain, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0.1, atol=0.02, msg=lambda m, n=name: f"{n}: {m}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # of which all blocks make use
