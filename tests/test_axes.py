"""The axes that cut a model, each alone and together, against one process: loss, norm, every gradient, the weights."""

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from conftest import read_metrics, spawn, tiny_run
from safetensors.torch import load_file
from test_hacks import Lion, SideBySide, z_loss
from test_zero import SIZES, adamw, difference, make_rows
from torch import nn

import minitrain as mt
from minitrain import save_pretrained
from minitrain.attention import attention
from minitrain.batch import IGNORE, Batch
from minitrain.config import ParallelConfig, TrainConfig, UserError
from minitrain.hf import load_weights
from minitrain.loss import cross_entropy
from minitrain.models import build_model, init_weights, materialize
from minitrain.models.llama import LlamaConfig
from minitrain.models.qwen3 import Qwen3Config
from minitrain.models.qwen3_moe import Qwen3MoeConfig
from minitrain.parallel import parallelize
from minitrain.parallel.cp import assign
from minitrain.parallel.gather import whole
from minitrain.parallel.layout import objections
from minitrain.parallel.mesh import ALONE, init_mesh
from minitrain.parallel.zero import shard_optimizer
from minitrain.storage import read_json, write_json, write_safetensors
from minitrain.train import forward_backward

STEPS, TOLERANCE = 3, 1e-11
MODELS = {  # of uneven vocabulary, inner width, heads; fewer key and value heads than ranks
    "tied": Qwen3Config(**SIZES | {"num_key_value_heads": 1}, tie_word_embeddings=True),
    "moe": Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=15, num_experts=12, num_experts_per_tok=2, router_z_loss_coef=0.01
    ),
    "llama": LlamaConfig(
        **SIZES | {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 47}, attention_bias=True
    ),
}
MODELS["starved"] = MODELS["moe"]


def loss_fn(hidden_TD, head, batch):
    """The built-in loss, and what users may add: something of all logits, something of the hidden states."""
    loss, _ = cross_entropy(hidden_TD, head, batch)
    z = (head(hidden_TD).logsumexp(-1).square() * (batch.targets != IGNORE)).sum()
    return loss + 0.1 * z + 0.01 * hidden_TD.square().sum(), {"z": z}


def run(name, parallel=None, mesh=ALONE, steps=STEPS, spoil=lambda model: None, long=False, num_rows=4, train=None):
    """-> what all steps gave, the first one's gradients, the weights after the last; these as gradients() has them."""
    parallel = parallel or ParallelConfig()
    model = build_model(MODELS[name], "cpu").double()
    model = parallelize(model, mesh, train or TrainConfig())
    init_weights(model, 0)
    if name == "starved":  # all tokens choose the same experts
        for block in model.layers.values():
            nn.init.zeros_(block.mlp.gate.weight).requires_grad_(False)
    spoil(model)
    opt = shard_optimizer(model, adamw, mesh, parallel)
    losses, norms, grads = [], [], None
    for step in range(steps):
        rows = make_long_rows(step, num_rows) if parallel.cp > 1 or long else make_rows(step, num_rows)
        mine = rows[mesh.dp_rank :: mesh.dp_size]
        tokens = mesh.sum_rows(sum(b.num_targets for b in mine))
        assert tokens == sum(b.num_targets for b in rows)
        loss, extras = forward_backward(model, mine, loss_fn, 1 / tokens, mesh, opt.backward)
        losses.append(torch.stack([loss, extras["z"]]))
        norms.append(opt.clip_grad_norm(0.5, loss))
        grads = grads or gradients(opt)
        opt.step(0.01)
    if name == "starved":
        assert all(block.mlp.load.count_nonzero() == 2 for block in model.layers.values())
    with whole(model):
        weights = {name: (p, 0, p.detach().clone().flatten()) for name, p in model.named_parameters()}
    return {"losses": torch.stack(losses), "norms": torch.stack(norms)}, grads, weights


def gradients(opt):
    """{name: (parameter, first element that this rank has of it, these elements)}."""
    if not hasattr(opt, "units"):
        trained = {name: master for name, master in opt.masters.items() if master.requires_grad}
        return {name: (opt.params[name], 0, master.grad.flatten().clone()) for name, master in trained.items()}
    found = {}
    for key, unit in opt.units.items():
        for name, p in unit.params.items():
            piece = unit.piece(opt.gradients.sums[key], name, unit.shard.rank).clone()
            found[name] = p, unit.span(name, unit.shard.rank)[0], piece
    return found


def make_long_rows(step, n):
    """Rows of 24 tokens, for context parallel: documents across its cuts and inside them, one as long as a row."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for lengths in ((24,), (1, 15, 8), (5, 4, 3, 12), (11, 1, 1, 11))[:n]:
        rows.append(Batch.pack([torch.randint(SIZES["vocab_size"], (n,), generator=generator) for n in lengths]))
        rows[-1].targets[torch.rand(24, generator=generator) < 0.3] = IGNORE
        rows[-1].num_targets = int((rows[-1].targets != IGNORE).sum())
    return rows


def write_expected(path, names, **options):
    tensors = {}
    for name in names:
        results, grads, weights = run(name, **options)
        tensors |= {f"{name} {key}": value for key, value in results.items()}
        for kind, of in (("gradient", grads), ("weight", weights)):
            tensors |= {f"{name} {kind} {key}": flat.view(p.shape) for key, (p, _, flat) in of.items()}
    write_safetensors(path, tensors)


def errors(name, parallel, mesh, expected, steps=STEPS, **options):
    """{what: relative error}, largest of all ranks; weights after all steps only."""
    results, grads, weights = run(name, parallel, mesh, steps, **options)
    found = {key: difference(value, expected[f"{name} {key}"][:steps]) for key, value in results.items()}
    weights = weights if steps == STEPS else {}
    for kind, of in (("gradient", grads), ("weight", weights)):
        for key, (p, first, piece) in of.items():
            one = expected[f"{name} {kind} {key}"]
            shape, place = getattr(p, "part", (p.shape, ()))
            assert one.shape == shape
            mine = one[place].flatten()[first:][: len(piece)]
            found[f"{kind} {key}"] = difference(piece, mine, one)
    of_ranks = [None] * mesh.size
    dist.all_gather_object(of_ranks, (results["norms"].tolist(), found))
    assert all(norms == of_ranks[0][0] for norms, _ in of_ranks), "the norm differs by a bit"
    return {key: max(of_rank[key] for _, of_rank in of_ranks) for key in found}


def compare_all(cases, path, **options):
    short, long = load_file(path / "short"), load_file(path / "long")
    for name, parallel in cases:
        expected = long if parallel.cp > 1 else short
        found = errors(name, parallel, init_mesh("cpu", parallel, MODELS[name]), expected, **options)
        worst = max(found, key=found.get)
        assert found[worst] <= TOLERANCE, f"{name} {parallel}: {worst} differs by {found[worst]:.1e}"


def check(ranks, layouts, tmp_path, train=None):
    """Under ZeRO 0 and 3 if the layout names no stage, every model that it can cut."""
    stages = [(layout, (layout.zero,) if layout.zero else (0, 3)) for layout in layouts]
    layouts = [dataclasses.replace(layout, zero=zero) for layout, zeros in stages for zero in zeros]
    cases = [(name, of) for of in layouts for name in MODELS if not objections(of, ranks, MODELS[name])]
    cases = [(name, of) for name, of in cases if name != "starved" or of.ep > 1]
    num_rows = 3 if ranks == 3 else 4
    for path, some in (("short", [c for c in cases if c[1].cp == 1]), ("long", [c for c in cases if c[1].cp > 1])):
        write_expected(tmp_path / path, {name for name, _ in some}, long=path == "long", num_rows=num_rows)
    compare = functools.partial(compare_all, num_rows=num_rows, train=train)
    spawn(ranks, compare, cases, tmp_path)


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_each_axis_equals_one_process(ranks, tmp_path):
    check(ranks, [ParallelConfig(tp=ranks), ParallelConfig(ep=ranks), ParallelConfig(cp=ranks)], tmp_path)


@pytest.mark.slow
def test_axes_together_equal_one_process(tmp_path):
    layouts = [{"tp": 2}, {"ep": 2}, {"cp": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "cp": 2}, {"cp": 2, "ep": 2}]
    check(4, [ParallelConfig(**sizes) for sizes in [*layouts, {"cp": 2, "ep": 4}]], tmp_path)


@pytest.mark.slow
def test_axes_and_copies_of_shards_under_every_stage_equal_one_process(tmp_path):
    layouts = [{"ep": 2, "zero": zero, "shard_within": 2} for zero in (1, 2, 3)]
    layouts += [{"tp": 2, "zero": 2}, {"cp": 2, "zero": 1}, {"tp": 2, "ep": 2, "zero": 2}]
    check(4, [ParallelConfig(**sizes) for sizes in layouts], tmp_path)


@pytest.mark.slow
def test_three_axes_together_equal_one_process(tmp_path):
    layouts = [{"tp": 2, "ep": 2}, {"tp": 2, "cp": 2}, {"tp": 2, "cp": 2, "ep": 4}, {"tp": 2, "cp": 2, "ep": 2}]
    check(8, [ParallelConfig(**sizes) for sizes in layouts], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["cheap", "block", "full"])
def test_recomputed_blocks_repeat_their_collectives(tmp_path, recompute):
    layouts = [ParallelConfig(tp=2), ParallelConfig(ep=2), ParallelConfig(cp=2)]
    check(2, layouts, tmp_path, TrainConfig(recompute=recompute))


# ---- each part of it is needed


def say_nothing(model, name):
    """As if nobody knew that these gradients are summed over other ranks."""
    for p in (p for key, p in model.named_parameters() if name in key):
        p.grad_sum_on = ("dp", "cp")


def untie(model, name):
    weight = model.lm_head.weight.detach().clone()
    del model.lm_head.weight
    model.lm_head.weight = weight  # no parameter


def leave_out(model, name):
    model.lm_head.vocabulary.sum = lambda d_x_TD: None


def see_own_tokens_only(model, name):
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, getattr(module, name).plain)


CONTROLS = [  # model, layout, what is done to it, to which parameters, a gradient that is then wrong
    ("tied", ParallelConfig(tp=2), say_nothing, "q_norm", "layers.0.self_attn.q_norm.weight"),
    ("tied", ParallelConfig(tp=2), say_nothing, "k_norm", "layers.0.self_attn.k_norm.weight"),
    ("tied", ParallelConfig(tp=2), say_nothing, "k_proj", "layers.0.self_attn.k_proj.weight"),  # one head, two ranks
    ("tied", ParallelConfig(tp=2), say_nothing, "layernorm", "layers.1.input_layernorm.weight"),
    ("tied", ParallelConfig(tp=2), untie, "", "embed_tokens.weight"),
    ("tied", ParallelConfig(tp=2), leave_out, "", "layers.0.mlp.down_proj.weight"),
    ("moe", ParallelConfig(tp=2), say_nothing, "mlp.gate.", "layers.0.mlp.gate.weight"),
    ("moe", ParallelConfig(ep=2), say_nothing, "experts", "layers.0.mlp.experts.up_proj"),
    ("moe", ParallelConfig(cp=2), see_own_tokens_only, "load_balancing_loss", "layers.0.mlp.gate.weight"),
]


def compare_with_mistakes(path):
    short, long = load_file(path / "short"), load_file(path / "long")
    for name, parallel, spoil, which, wrong in CONTROLS:
        mesh, expected = init_mesh("cpu", parallel, MODELS[name]), long if parallel.cp > 1 else short
        found = errors(name, parallel, mesh, expected, 1, spoil=functools.partial(spoil, name=which))
        assert found[f"gradient {wrong}"] > 1e-5, (name, parallel, spoil.__name__, which)


def test_each_sum_over_ranks_is_needed(tmp_path):
    write_expected(tmp_path / "short", ("tied", "moe"))
    write_expected(tmp_path / "long", ["moe"], long=True)
    spawn(2, compare_with_mistakes, tmp_path)


# ---- weights from files


def load_parts(folder):
    one = load_file(folder / "model.safetensors")
    for parallel in (ParallelConfig(tp=2), ParallelConfig(ep=2)):
        model = build_model(MODELS["moe"])
        whole_size = sum(p.numel() for p in model.parameters())
        parallelize(model, init_mesh("cpu", parallel, MODELS["moe"]), TrainConfig())
        assert sum(p.numel() for p in model.parameters()) < (0.6 if parallel.tp > 1 else 0.85) * whole_size
        materialize(model, "cpu", torch.float32)
        load_weights(model, folder)
        for name, p in model.named_parameters():
            shape, place = getattr(p, "part", (p.shape, ()))
            of_hub = "model." * (not name.startswith("lm_head")) + name
            if p.ndim == 3:
                prefix, _, matrix = of_hub.rpartition(".")
                tensor = torch.stack([one[f"{prefix}.{e}.{matrix}.weight"] for e in range(shape[0])])
            else:
                tensor = one[of_hub]
            assert p.equal(tensor[place]), name


def test_pretrained_weights_are_cut_as_they_are_read_and_a_rank_has_its_share(tmp_path):
    model = build_model(MODELS["moe"], "cpu")
    init_weights(model, 0)
    save_pretrained(model, tmp_path / "saved")
    spawn(2, load_parts, tmp_path / "saved")


# ---- whole runs, with the hacks of test_hacks.py


def train_with_hacks(cfg, folder):
    def one(name, model=None, **parts):
        run = dataclasses.replace(cfg, run_dir=f"{folder}/{name}")
        mt.train(run, model=model and model(run.model), **parts)

    def sliding(model_config):
        model = mt.build_model(model_config)
        model.layers["0"].self_attn.attention = functools.partial(attention, window=3)
        return model

    def side_by_side(model_config):
        with torch.device("meta"):
            return SideBySide(model_config)

    def look(step, model, extras):
        seen.append(mt.generate(model, torch.tensor([3, 4, 5]), 3, temperature=0).tolist())

    seen = []
    one("attention", sliding)
    one("optimizer", optimizer=Lion)
    one("block", side_by_side)
    one("loss", loss_fn=z_loss)
    one("look", on_step=look)
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_json(folder / "seen.json", {"tokens": seen})


def train_layouts(cfg, layouts, folder):
    for name, parallel in layouts.items():
        train_with_hacks(dataclasses.replace(cfg, parallel=parallel), folder / name)


def test_the_five_hacks_give_the_same_runs_in_every_layout(corpus, tmp_path):
    checkpoint = {"every": 0, "export": False}
    cfg = tiny_run(corpus, "", train={"steps": 4}, data={"rows_per_step": 2}, checkpoint=checkpoint)
    layouts = {"tp": ParallelConfig(tp=2), "cp": ParallelConfig(cp=2)}
    train_with_hacks(cfg, tmp_path / "one")
    spawn(2, train_layouts, cfg, layouts, tmp_path)
    for layout, hack in itertools.product(layouts, ("attention", "optimizer", "block", "loss", "look")):
        one, two = (read_metrics(tmp_path / name / hack) for name in ("one", layout))
        for row, other in zip(one, two, strict=True):
            for key in ("loss", "grad_norm", "trained_tokens", *(("z",) if hack == "loss" else ())):
                assert other[key] == pytest.approx(row[key], rel=1e-4), (layout, hack, row["step"], key)
    tokens = [read_json(tmp_path / name / "seen.json") for name in ("one", *layouts)]
    assert tokens == tokens[:1] * 3


# ---- what cannot work is said at once


def test_a_layout_that_cannot_work_is_refused_with_every_reason(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 6, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError) as error:
        init_mesh("cpu", ParallelConfig(tp=4, ep=5, zero=3, shard_within=3), MODELS["moe"])
    reasons = str(error.value).split("; ")
    assert "\n" not in str(error.value)
    for begin in (
        "parallel.tp * cp = 4 does not divide WORLD_SIZE=6",
        "parallel.ep=5 does not divide the 1 ranks",
        "parallel.shard_within=3 is not a multiple of ep=5",
        "parallel.ep=5 does not divide num_experts=12",
    ):
        assert any(reason.startswith(begin) for reason in reasons), begin
    assert objections(ParallelConfig(tp=4), 4, MODELS["llama"])[0].startswith(
        "parallel.tp=4 is more than num_key_value"
    )
    assert objections(ParallelConfig(tp=2), 4, MODELS["llama"]) == []


def test_cut_models_are_not_saved_yet(corpus, tmp_path):
    with pytest.raises(UserError, match=r"cannot be saved yet; set checkpoint\.every = 0"):
        tiny_run(corpus, tmp_path, parallel={"tp": 2})


def cut_an_unknown_model():
    model = build_model(MODELS["tied"], "cpu")
    model.layers["0"].extra = nn.Linear(3, 3)
    mesh = init_mesh("cpu", ParallelConfig(tp=2), MODELS["tied"])
    with pytest.raises(
        UserError, match=r"no row of Qwen3ForCausalLM\.TP_PLAN says how to cut layers\.0\.extra\.weight"
    ):
        parallelize(model, mesh, TrainConfig())
    with pytest.raises(UserError, match="cut by an earlier run"):
        parallelize(model, mesh, TrainConfig())
    model = parallelize(build_model(MODELS["tied"], "cpu"), mesh, TrainConfig())
    with pytest.raises(UserError, match=r"needs whole matrices.* parallel\.tp must be 1"):
        shard_optimizer(model, mt.muon(mt.OptimConfig(), SIZES["vocab_size"]), mesh, ParallelConfig(tp=2))
    model = build_model(MODELS["tied"])
    with pytest.raises(UserError, match="init_mesh was not given the config of this model"):
        parallelize(model, init_mesh("cpu", ParallelConfig(tp=2)), TrainConfig())


def test_a_parameter_that_the_plan_does_not_name_is_refused():
    spawn(2, cut_an_unknown_model)


# ---- the tokens of a row under context parallel


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    "lengths", [[4096], [1, 4095], [64] * 64, [2048, 1024, 512, 256, 128, 64, 64], [7, 3000, 1089]]
)
def test_the_work_of_ranks_is_balanced(lengths, ranks):
    work = torch.cat([torch.arange(1, n + 1) for n in lengths])
    shares = assign(work, ranks)
    assert torch.cat(shares).sort()[0].equal(torch.arange(4096))
    assert {len(share) for share in shares} == {4096 // ranks}
    loads = [work[share].sum().item() for share in shares]
    assert max(loads) <= 1.1 * sum(loads) / ranks


def test_rows_that_cannot_be_shared_out_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"a row of 9 tokens is not divisible by parallel\.cp=2"):
        assign(torch.arange(9), 2)
    with pytest.raises(UserError, match=r"data\.tokens_per_row=64 is not divisible by parallel\.cp=3"):
        tiny_run(corpus, tmp_path, parallel={"cp": 3})
