"""The axes that cut a model, each alone and together, against one process: loss, norm, every gradient, the weights."""

import dataclasses
import functools
import itertools
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import read_metrics, spawn, tiny_run
from safetensors.torch import load_file
from test_hacks import Lion, SideBySide, SideBySideBlock, z_loss
from test_zero import SIZES
from torch import nn
from torch._inductor.utils import run_and_get_code

import minitrain as mt
from minitrain import fused_attention, save_pretrained
from minitrain.attention import BACKENDS, attention, reference
from minitrain.batch import IGNORE, Batch
from minitrain.boxes import part_of, take
from minitrain.config import Config, DataConfig, ParallelConfig, TrainConfig, UserError
from minitrain.hf import load_weights
from minitrain.loss import cross_entropy
from minitrain.models import build_model, init_weights, materialize, qwen3_moe
from minitrain.models.layers import Attention
from minitrain.models.llama import LlamaConfig
from minitrain.models.qwen3 import Qwen3Config
from minitrain.models.qwen3_moe import MoE, Qwen3MoeConfig
from minitrain.parallel import ep, parallelize
from minitrain.parallel.comm import Group
from minitrain.parallel.cp import assign, share_tokens
from minitrain.parallel.layout import objections
from minitrain.parallel.mesh import ALONE, init_mesh
from minitrain.parallel.zero import shard_optimizer
from minitrain.prove import differences, follow, make_rows, of_one, tokens_of_a_row
from minitrain.storage import read_json, write_json, write_safetensors

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


def model_of(name, parallel):
    """Of one layer more than stages, which is uneven."""
    return dataclasses.replace(MODELS[name], num_hidden_layers=parallel.pp * parallel.pp_parts + 1)


def loss_fn(hidden_TD, head, batch):
    """The built-in loss, and what users may add: something of all logits, something of the hidden states."""
    loss, _ = cross_entropy(hidden_TD, head, batch)
    z = (head(hidden_TD).logsumexp(-1).square() * (batch.targets != IGNORE)).sum()
    return loss + 0.1 * z + 0.01 * hidden_TD.square().sum(), {"z": z}


def run(name, parallel, mesh=ALONE, steps=STEPS, spoil=lambda model: None, num_rows=4, train=None):
    """With rows as the layout can cut them, in the layout or by one process."""
    model = build_model(model_of(name, parallel))
    if name == "starved":  # all tokens choose the same experts
        model = build_model(model_of(name, parallel), "cpu")
        init_weights(model, 0)
        for block in model.layers.values():
            nn.init.zeros_(block.mlp.gate.weight).requires_grad_(False)
    tokens = tokens_of_a_row(parallel)
    data = DataConfig(tokens_per_row=tokens, max_seqlen=tokens)
    train = dataclasses.replace(train or TrainConfig(), dtype="float64")
    cfg = Config(model.config, data, train=train, parallel=parallel)
    rows = [make_rows(step, num_rows, tokens, SIZES["vocab_size"]) for step in range(steps)]
    parts = follow(model, cfg, mesh, rows, loss_fn, spoil)
    if name == "starved":
        assert all(block.mlp.load.count_nonzero() == 2 for block in model.layers.values())
    return parts


def write_expected(folder, cases, **options):
    """A file for each model, number of layers and length of rows."""
    folder.mkdir()
    for path, case in {file_of(folder, *case): case for case in cases}.items():
        write_safetensors(path, of_one(run(*case, **options)))


def file_of(folder, name, parallel):
    return folder / f"{name}-{parallel.pp * parallel.pp_parts}-{tokens_of_a_row(parallel)}"


def errors(name, parallel, folder, spoil_mesh=lambda mesh: mesh, **options):
    """{what: relative error}, largest of all ranks."""
    mesh = spoil_mesh(init_mesh("cpu", parallel, model_of(name, parallel)))
    return differences(run(name, parallel, mesh, **options), load_file(file_of(folder, name, parallel)), mesh)


def compare_all(cases, folder, **options):
    for name, parallel in cases:
        found = errors(name, parallel, folder, **options)
        worst = max(found, key=found.get)
        assert found[worst] <= TOLERANCE, f"{name} {parallel}: {worst} differs by {found[worst]:.1e}"


def check(ranks, layouts, tmp_path, train=None, num_rows=None):
    """Under ZeRO 0 and 3 if the layout names no stage, every model that it can cut."""
    stages = [(layout, (layout.zero,) if layout.zero else (0, 3)) for layout in layouts]
    layouts = [dataclasses.replace(layout, zero=zero) for layout, zeros in stages for zero in zeros]
    cases = [(name, of) for of in layouts for name in MODELS if not objections(of, ranks, model_of(name, of))]
    cases = [(name, of) for name, of in cases if name != "starved" or of.ep > 1]
    num_rows = num_rows or (3 if ranks == 3 else 4)
    write_expected(tmp_path / "one", cases, num_rows=num_rows)
    spawn(ranks, functools.partial(compare_all, num_rows=num_rows, train=train), cases, tmp_path / "one")


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
    ("moe", ParallelConfig(cp=2), see_own_tokens_only, "counts_of_row", "layers.0.mlp.gate.weight"),
]


def compare_with_mistakes(folder):
    for name, parallel, spoil, which, wrong in CONTROLS:
        found = errors(name, parallel, folder, steps=1, spoil=functools.partial(spoil, name=which))
        assert found[f"gradient {wrong}"] > 1e-5, (name, parallel, spoil.__name__, which)


def test_each_sum_over_ranks_is_needed(tmp_path):
    write_expected(tmp_path / "one", [(name, parallel) for name, parallel, *_ in CONTROLS])
    spawn(2, compare_with_mistakes, tmp_path / "one")


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
            shape, box = part_of(p)
            of_hub = "model." * (not name.startswith("lm_head")) + name
            if p.ndim == 3:
                prefix, _, matrix = of_hub.rpartition(".")
                tensor = torch.stack([one[f"{prefix}.{e}.{matrix}.weight"] for e in range(shape[0])])
            else:
                tensor = one[of_hub]
            assert p.equal(take(tensor, box)), name


def test_pretrained_weights_are_cut_as_they_are_read_and_a_rank_has_its_share(tmp_path):
    model = build_model(MODELS["moe"], "cpu")
    init_weights(model, 0)
    save_pretrained(model, tmp_path / "saved")
    spawn(2, load_parts, tmp_path / "saved")


# ---- whole runs, with the hacks of test_hacks.py


class ExpertsBeside(mt.Qwen3MoeForCausalLM):
    """SideBySide, with experts."""

    @staticmethod
    def block(cfg):
        return SideBySideBlock(cfg, Attention(cfg, qk_norm=True), MoE(cfg))


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
            return (ExpertsBeside if model_config.type == "qwen3_moe" else SideBySide)(model_config)

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


@pytest.mark.slow
@pytest.mark.parametrize("axes", [("tp", "cp", "pp"), ("ep",)])
def test_the_five_hacks_give_the_same_runs_in_every_layout(axes, corpus, tmp_path):
    checkpoint = {"every": 0, "export": False}
    cfg = tiny_run(corpus, "", train={"steps": 4}, data={"rows_per_step": 2}, checkpoint=checkpoint)
    if axes == ("ep",):
        cfg.model = dataclasses.replace(MODELS["moe"], vocab_size=101)
    layouts = {axis: ParallelConfig(**{axis: 2}) for axis in axes}
    train_with_hacks(cfg, tmp_path / "one")
    spawn(2, train_layouts, cfg, layouts, tmp_path)
    for layout, hack in itertools.product(layouts, ("attention", "optimizer", "block", "loss", "look")):
        one, two = (read_metrics(tmp_path / name / hack) for name in ("one", layout))
        for row, other in zip(one, two, strict=True):
            for key in ("loss", "grad_norm", "trained_tokens", *(("z",) if hack == "loss" else ())):
                assert other[key] == pytest.approx(row[key], rel=1e-4), (layout, hack, row["step"], key)
    tokens = [read_json(tmp_path / name / "seen.json") for name in ("one", *layouts)]
    assert tokens == tokens[:1] * len(tokens)


# ---- what cannot work is said at once


def test_a_layout_that_cannot_work_is_refused_with_every_reason(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 6, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError) as error:
        init_mesh("cpu", ParallelConfig(tp=4, ep=5, zero=3, shard_within=3), MODELS["moe"])
    reasons = str(error.value).split("; ")
    assert "\n" not in str(error.value)
    for begin in (
        "parallel.pp * tp * cp = 4 does not divide WORLD_SIZE=6",
        "parallel.ep=5 does not divide the 1 ranks",
        "parallel.shard_within=3 is not a multiple of ep=5",
        "parallel.ep=5 does not divide num_experts=12",
    ):
        assert any(reason.startswith(begin) for reason in reasons), begin
    assert objections(ParallelConfig(tp=4), 4, MODELS["llama"])[0].startswith(
        "parallel.tp=4 is more than num_key_value"
    )
    assert objections(ParallelConfig(tp=2), 4, MODELS["llama"]) == []


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
    shares = [
        torch.tensor([*itertools.chain(*pieces)]) for pieces in assign([0, *itertools.accumulate(lengths)], ranks)
    ]
    assert torch.cat(shares).sort()[0].equal(torch.arange(4096))
    assert {len(share) for share in shares} == {4096 // ranks}
    loads = [work[share].sum().item() for share in shares]
    assert max(loads) <= 1.1 * sum(loads) / ranks


def test_ranks_share_a_row_whose_numbers_stay():
    row = Batch.pack([torch.arange(n) for n in (5, 1, 18)])
    row.num_targets = 7  # not what would be counted, for which a device waits
    shares = [share_tokens(row, Group(rank, 2)) for rank in range(2)]
    assert torch.cat([share.tokens for share in shares]).sort()[0].equal(row.tokens.sort()[0])
    assert {(share.num_targets, share.num_pairs) for share in shares} == {(7, row.num_pairs)}


def attention_in_one_op(q_THC, k_SKC, v_SKC, cu_q, cu_k, *_):
    """What is compiled of our kernels on a GPU: an operation, of which only the shapes are known."""
    return torch.ops.minitrain.attention_fwd(q_THC, k_SKC, v_SKC, cu_q, cu_k, 1 << 30, 0, 0.25, False, False)[0]


def attention_on_the_cpu(q_THC, k_SKC, v_SKC, cu_q, cu_k, *_):
    out = reference(q_THC, k_SKC, v_SKC, cu_q, cu_k, 0, None)
    return out, out.new_zeros(out.shape[1], len(out), dtype=torch.float32)


def gradients_on_the_cpu(d_out_THC, _d_lse, q_THC, k_SKC, v_SKC, _out, _lse, cu_q, cu_k, *_):
    forward = functools.partial(reference, cu_q=cu_q, cu_k=cu_k, max_seqlen=0, window=None)
    return torch.func.vjp(forward, q_THC, k_SKC, v_SKC)[1](d_out_THC)


def in_one_op():
    """Makes it a backend that runs on the CPU."""
    BACKENDS["in one op"] = attention_in_one_op
    fused_attention.attention_fwd.register_kernel("cpu", attention_on_the_cpu)
    fused_attention.attention_bwd.register_kernel("cpu", gradients_on_the_cpu)


def compile_with(mesh, cfg, train, **options):
    """A model whose blocks are compiled with these options, if they are compiled."""
    model, compile = build_model(cfg, "cpu"), torch.compile
    init_weights(model, 0)
    torch._dynamo.reset()
    if options.get("backend", "inductor") != "inductor":
        options["options"] = None  # which are inductor's
    with mock.patch("torch.compile", lambda f, **fixed: compile(f, **fixed | options)):
        parallelize(model, mesh, train)
    return model.to(mesh.device)


def gradients(model, row):
    """Of a sum with weights of all signs: of squares, which the last norm made alike, they would be rounding errors."""
    model.zero_grad()
    hidden_TD = model(row)
    (hidden_TD * torch.arange(hidden_TD.numel(), device=hidden_TD.device).sin().view_as(hidden_TD)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(ours, plain, tolerance, what):
    assert ours.keys() == plain.keys()
    for name, grad in plain.items():
        close = {"rtol": tolerance, "atol": tolerance * grad.abs().max().item()}
        torch.testing.assert_close(ours[name], grad, **close, msg=lambda m, n=name: f"{what} {n}: {m}")


def count_compilations(recompute):
    in_one_op()
    cfg, graphs, grads = MODELS["tied"], torch._dynamo.utils.counters["stats"], {}
    mesh = init_mesh("cpu", ParallelConfig(cp=2), cfg)
    for compiled in ("off", "on"):
        train = TrainConfig(compile=compiled, recompute=recompute, attention="in one op")
        model = compile_with(mesh, cfg, train, backend="aot_eager")
        grads[compiled] = []
        for lengths in (
            [32, 32, 0],
            [64, 0, 0],
            [40, 24, 0],
            [1, 60, 3],
            [30, 30, 4],
        ):  # the first: as many keys as queries
            row = Batch.pack([torch.arange(n) % 7 for n in lengths], 64)
            grads[compiled].append(gradients(model, share_tokens(row, mesh.group("cp"))))
        assert graphs["unique_graphs"] == (compiled == "on"), lengths  # of which all blocks make use
    for on, off in zip(grads["on"], grads["off"], strict=True):
        assert_alike(on, off, 1e-5, recompute)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_blocks_are_compiled_once_whatever_keys_a_rank_needs(recompute):
    spawn(2, count_compilations, recompute)


def test_rows_that_cannot_be_shared_out_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"a row of 9 tokens is not divisible by parallel\.cp=2"):
        assign([0, 9], 2)
    with pytest.raises(UserError, match=r"data\.tokens_per_row=64 is not divisible by parallel\.cp=3"):
        tiny_run(corpus, tmp_path, parallel={"cp": 3})


def compare_compiled(recompute, device, backend, tolerance):
    cfg = MODELS["tied"]
    for parallel in (ParallelConfig(tp=2), ParallelConfig(cp=2)):
        mesh, grads = init_mesh(device, parallel, cfg), {}
        row = Batch.pack([torch.arange(40) % 7, torch.arange(24) % 7], 64).to(mesh.device)
        for compiled in ("off", "on"):
            model = compile_with(mesh, cfg, TrainConfig(compile=compiled, recompute=recompute), backend=backend)
            grads[compiled] = gradients(model, share_tokens(row, mesh.group("cp")))
        assert_alike(grads["on"], grads["off"], tolerance, parallel)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_compiled_blocks_that_ranks_share_have_the_same_gradients(recompute):
    spawn(2, compare_compiled, recompute, "cpu", "aot_eager", 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_compiled_blocks_that_gpus_share_have_the_same_gradients(recompute):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    spawn(2, compare_compiled, recompute, "cuda", "inductor", 1e-3, device="cuda")


def find_products_beside_collectives():
    in_one_op()
    cfg = dataclasses.replace(MODELS["llama"], num_hidden_layers=1)
    for parallel, collectives in (
        (ParallelConfig(tp=2), ["reduce_scatter_tensor"]),
        (ParallelConfig(cp=2), ["all_gather_into_tensor", "reduce_scatter_tensor"]),
    ):
        mesh = init_mesh("cpu", parallel, cfg)
        model = compile_with(mesh, cfg, TrainConfig(compile="on", attention="in one op"))
        row = share_tokens(Batch.pack([torch.arange(40) % 7, torch.arange(24) % 7], 64), mesh.group("cp"))
        _, codes = run_and_get_code(gradients, model, row)
        for collective in collectives:
            _, found, after = "".join(codes).rpartition(f"{collective}.default(")
            meanwhile, _, _ = after.partition("wait_tensor.default(")
            assert found and re.search(r"extern_kernels\.(add)?mm\(", meanwhile), (parallel, collective)


@pytest.mark.slow
def test_products_of_compiled_blocks_run_beside_their_collectives():
    spawn(2, find_products_beside_collectives)


# ---- experts on several ranks in one graph

EXCHANGES = {"none": 5, "cheap": 5, "block": 7, "full": 8}  # of a layer: counts, rows, rows; their gradients; again


def grouped_matmul(x_RD, w_EFD, counts_E, grouped=qwen3_moe._grouped_matmul):
    """As on a GPU, where the compiler does not know how many rows there are."""
    return grouped(x_RD.bfloat16(), w_EFD.bfloat16(), counts_E).float()


def exchange_in_one_graph(recompute):
    in_one_op()
    cfg = dataclasses.replace(MODELS["moe"], moe_intermediate_size=16)
    mesh, grads = init_mesh("cpu", ParallelConfig(ep=2), cfg), {}
    exchanges = mock.Mock(wraps=ep.all_to_all_rows)
    with (
        mock.patch.object(qwen3_moe, "_can_group", lambda *_: True),
        mock.patch.object(qwen3_moe, "_grouped_matmul", grouped_matmul),
        mock.patch.object(ep, "all_to_all_rows", exchanges),
    ):
        for compiled in ("off", "on"):
            train = TrainConfig(compile=compiled, recompute=recompute, attention="in one op")
            model = compile_with(mesh, cfg, train, backend="aot_eager_decomp_partition", fullgraph=True)
            grads[compiled] = []
            for seed in (0, 1, None, 2):
                for block in model.layers.values():
                    gate = block.mlp.gate.weight.data
                    gate.zero_() if seed is None else gate.normal_(generator=torch.Generator().manual_seed(seed))
                exchanges.reset_mock()
                row = Batch.pack([torch.arange(40) % 7 + mesh.rank, torch.arange(24) % 5], 64)
                grads[compiled].append(gradients(model, row))
                assert exchanges.call_count == EXCHANGES[recompute] * len(model.layers)
                got = len(exchanges.call_args_list[2].args[0])  # what goes back
                assert got in (0, 256) if seed is None else 0 < got != 128
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for on, off in zip(grads["on"], grads["off"], strict=True):
        assert_alike(on, off, 1e-2, recompute)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", EXCHANGES)
def test_blocks_are_one_graph_whatever_rows_experts_get(recompute):
    spawn(2, exchange_in_one_graph, recompute)


def exchange_on_gpus():
    cfg = dataclasses.replace(MODELS["moe"], moe_intermediate_size=16)
    model = build_model(cfg, "cpu")
    init_weights(model, 0)
    parallelize(model, init_mesh("cuda", ParallelConfig(ep=2), cfg), TrainConfig())
    moe, grads = model.layers["0"].mlp.to("cuda", torch.bfloat16), []
    for rows_are in ("shared out", "all for one rank"):
        if rows_are == "all for one rank":
            moe.gate.weight.data.zero_()
        x_TD = torch.randn(64, cfg.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for forward in (moe, torch.compile(moe, fullgraph=True, dynamic=False)):
            moe.zero_grad()
            x_TD.grad = None
            y_TD = forward(x_TD, Batch.pack([torch.arange(64)]).to("cuda"))
            (y_TD * torch.arange(y_TD.numel(), device="cuda").sin().view_as(y_TD)).sum().backward()
            grads.append({"x": x_TD.grad} | {name: p.grad for name, p in moe.named_parameters()})
        assert_alike(grads.pop(), grads.pop(), 2e-2, rows_are)


@pytest.mark.gpu
def test_gpus_exchange_rows_in_one_graph():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    spawn(2, exchange_on_gpus, device="cuda")
