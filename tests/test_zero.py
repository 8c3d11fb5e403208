"""Several ranks against one process: the same loss, gradients, norm and weights, whatever is sharded."""

import dataclasses
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import TINY, read_metrics, spawn, tiny_run
from safetensors.torch import load_file
from torch import nn

from minitrain import generate, save_pretrained, train
from minitrain.batch import IGNORE, Batch
from minitrain.config import OptimConfig, ParallelConfig, TrainConfig, UserError
from minitrain.hf import load_weights
from minitrain.models import build_model, init_weights, materialize
from minitrain.models.llama import LlamaConfig
from minitrain.models.qwen3 import Qwen3Config
from minitrain.models.qwen3_moe import Qwen3MoeConfig
from minitrain.optim import adamw as fused_adamw
from minitrain.optim import muon
from minitrain.parallel import comm, parallelize
from minitrain.parallel.gather import read_whole, whole
from minitrain.parallel.mesh import ALONE, Mesh, init_mesh
from minitrain.parallel.offload import HostState
from minitrain.parallel.zero import shard_optimizer
from minitrain.prove import difference, plain_adamw
from minitrain.storage import write_safetensors
from minitrain.train import forward_backward

STEPS = 5
SIZES = TINY | {"hidden_size": 24, "vocab_size": 53, "initializer_range": 0.1}
MODELS = {
    "tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "moe": Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2),
    "llama": LlamaConfig(**SIZES),
}


class Lion(torch.optim.Optimizer):
    """Elementwise, knows nothing of ranks: Chen et al. 2023, arXiv:2302.06675."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    p.sub_(group["lr"] * (0.9 * m + 0.1 * p.grad).sign())
                    m.lerp_(p.grad, 0.01)


def sgd(params):
    return torch.optim.SGD(params, momentum=0.9)


OPTIMIZERS = {"adamw": plain_adamw, "sgd": sgd, "lion": Lion, "muon": muon(OptimConfig(), SIZES["vocab_size"])}


@dataclasses.dataclass(frozen=True)
class Case:
    model: str = "tied"
    rows: int = 2  # of all ranks
    optimizer: str = "adamw"
    dtype: str = "float64"
    odd: bool = False  # with parameters that are frozen, that some rows use, and that none uses
    train: tuple = ()  # settings for parallelize


def make_model(case):
    model = build_model(MODELS[case.model], "cpu")
    if case.odd:
        model.sometimes, model.never = nn.Linear(SIZES["hidden_size"], 3), nn.Linear(5, 7)
        model.embed_tokens.requires_grad_(False)
        model.layers["0"].mlp.gate_proj.requires_grad_(False)
    init_weights(model, 0)
    return model.to(getattr(torch, case.dtype))


def make_rows(step, n):
    """n rows with unequal numbers of targets; in every second step, the second row has none."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for i in range(n):
        lengths = 2 + i % 3, 7 - i % 3
        batch = Batch.pack(
            [torch.randint(SIZES["vocab_size"], (k,), generator=generator) for k in lengths], max_seqlen=8
        )
        batch.targets[torch.rand(len(batch.targets), generator=generator) < 0.3] = IGNORE
        if i == 1 and step % 2 == 0:
            batch.targets.fill_(IGNORE)
        batch.num_targets = int((batch.targets != IGNORE).sum())
        rows.append(batch)
    return rows


def plain_loss(hidden_TD, head, batch):
    """cross_entropy as torch has it: minitrain's sums in float32."""
    loss = F.cross_entropy(F.linear(hidden_TD, head.weight), batch.targets, ignore_index=IGNORE, reduction="sum")
    return loss, {"twice": 2 * loss}


def run(case, parallel, mesh=ALONE):
    """-> losses and norms of STEPS steps, gradients of the first, the weights after the last."""
    model = make_model(case).to(mesh.device)
    if case.train:
        model = parallelize(model, mesh, TrainConfig(**dict(case.train)))

    def loss_fn(hidden_TD, head, batch):
        loss, named = plain_loss(hidden_TD, head, batch)
        uses = case.odd and batch.cu_seqlens_q[1] % 2 == 0  # of two rows the first
        return loss + model.sometimes(hidden_TD).square().sum() if uses else loss, named

    opt = shard_optimizer(model, OPTIMIZERS[case.optimizer], mesh, parallel)
    losses, norms, grads = [], [], None
    for step in range(STEPS):
        rows = [row.to(mesh.device) for row in make_rows(step, case.rows)]
        tokens = sum(b.num_targets for b in rows)
        mine = rows[mesh.dp_rank :: mesh.dp_size]
        assert mesh.sum(sum(b.num_targets for b in mine)) == tokens
        loss, extras = forward_backward(model, mine, loss_fn, 1 / tokens, mesh, opt.backward)
        assert case.odd or extras["twice"].equal(2 * loss)
        losses.append(loss)
        norms.append(opt.clip_grad_norm(0.5, loss))
        grads = grads or gradients(opt)
        opt.step(0.01)
    with whole(model):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), **weights}, grads


def gradients(opt):
    """{name: (first element, those that this rank has)}."""
    if not hasattr(opt, "units"):
        return {name: (0, m.grad.flatten().clone()) for name, m in opt.masters.items() if m.grad is not None}
    found = {}
    for key, unit in opt.units.items():
        for name, grad in opt.gradients.of(key).items():
            first, end = unit.span(name, unit.shard.rank)
            found[name] = first, grad.clone()
            assert len(found[name][1]) == end - first
    return found


def compare(case, parallel, mesh, expected, tolerance):
    results, grads = run(case, parallel, mesh)
    norms = [None] * mesh.size
    dist.all_gather_object(norms, results["norms"].tolist())
    assert all(of_rank == norms[0] for of_rank in norms), "the norm differs by a bit"
    errors = {name: difference(value.cpu(), expected[f"{case} {name}"]) for name, value in results.items()}
    for name, (first, piece) in grads.items():
        piece = piece.cpu()
        of_one = expected.get(f"{case} gradient of {name}", piece.new_zeros(1))
        if of_one.any():
            errors[f"gradient of {name}"] = difference(piece, of_one[first:][: len(piece)], of_one)
        else:
            assert not piece.any()
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{case} {parallel}: {worst} differs by {errors[worst]:.1e}"


def check(n, cases, tmp_path, device="cpu"):
    """cases: [(Case, ParallelConfig, tolerance), ...]; n ranks are started once for all of them."""
    write_expected(tmp_path / "one-process", {case for case, *_ in cases}, device)
    spawn(n, compare_all, cases, tmp_path / "one-process", device, device=device)


def write_expected(path, cases, device="cpu"):
    tensors = {}
    for case in cases:
        results, grads = run(case, ParallelConfig(), Mesh(torch.device(device)))
        tensors |= {f"{case} {name}": t for name, t in results.items()}
        tensors |= {f"{case} gradient of {name}": g for name, (_, g) in grads.items()}
    write_safetensors(path, tensors)


def compare_all(cases, path, device="cpu"):
    expected = load_file(path)
    meshes = {}
    for case, parallel, tolerance in cases:
        cut = 1 if parallel.zero == 0 else parallel.shard_within
        meshes[cut] = meshes.get(cut) or init_mesh(device, parallel)
        compare(case, parallel, meshes[cut], expected, tolerance)


ZERO = [ParallelConfig(zero=zero) for zero in (0, 1, 2, 3)]


def product(ranks, models=tuple(MODELS), **options):
    """Every model with 1 and 3 rows on a rank, under every stage."""
    cases = [Case(model, ranks * rows, **options) for model in models for rows in (1, 3)]
    return [(case, parallel, 1e-12) for case in cases for parallel in ZERO]


@pytest.mark.timeout(600)  # eight ranks on two cores
@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4, 8))])
def test_ranks_equal_one_process(ranks, tmp_path):
    check(ranks, product(ranks), tmp_path)


@pytest.mark.slow
def test_ranks_equal_one_process_with_copies_other_optimizers_offload_and_narrow_dtypes(tmp_path):
    """Copies: of 4 ranks, pairs that share and repeat each other. Muon has whole matrices, Lion pieces as AdamW."""
    pairs = [ParallelConfig(zero=zero, shard_within=2) for zero in (1, 2, 3)]
    cases = [(Case("tied", 4), parallel, 1e-12) for parallel in [*ZERO[2:], *pairs]]
    cases += [(Case("moe", 4, optimizer), parallel, 1e-12) for optimizer in ("lion", "muon") for parallel in ZERO[::3]]
    cases += [(Case("llama", 4, "muon"), pairs[1], 1e-12)]
    cases += [(Case("tied", 4), ParallelConfig(3, offload="optimizer"), 1e-12)]
    cases += [(Case("tied", 8, "sgd", "float32"), parallel, 1e-6) for parallel in ZERO[:3:2]]
    cases += [(Case("tied", 8, "sgd", "bfloat16"), parallel, 2e-2) for parallel in ZERO[1::2]]
    cases += [(Case("tied", 4, "sgd"), ParallelConfig(zero, 2, "bfloat16"), 2e-2) for zero in (1, 2)]
    check(4, cases, tmp_path)


def compare_on_two_hosts(cases, path):
    with mock.patch("socket.gethostname", lambda: f"host {dist.get_rank() // 2}"):
        compare_all(cases, path)
        assert not init_mesh("cpu", ParallelConfig(3)).group("data").is_on_one_host


@pytest.mark.slow
def test_ranks_of_two_hosts_equal_one_process(tmp_path):
    case = Case("tied", 8)
    write_expected(tmp_path / "one-process", [case])
    layouts = [ParallelConfig(2), ParallelConfig(3), ParallelConfig(3, shard_within=2)]
    spawn(4, compare_on_two_hosts, [(case, layout, 1e-12) for layout in layouts], tmp_path / "one-process")


def test_frozen_parameters_and_those_that_some_or_all_ranks_do_not_use(tmp_path):
    check(2, [(Case("llama", 2, odd=True), parallel, 1e-12) for parallel in ZERO], tmp_path)


@pytest.mark.slow
def test_recomputed_blocks_find_their_weights(tmp_path):
    cases = [Case("moe", 4, train=(("recompute", recompute),)) for recompute in ("cheap", "block", "full")]
    check(2, [(case, ParallelConfig(zero=3), 1e-12) for case in cases], tmp_path)


def count_compilations(path):
    compile, expected, graphs = torch.compile, load_file(path), []
    for parallel in (ParallelConfig(0), ParallelConfig(3)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        eager = mock.patch("torch.compile", lambda f, **options: compile(f, backend="aot_eager", **options))
        with eager, torch._dynamo.config.patch(error_on_recompile=True):  # in five steps
            compare(COMPILED, parallel, init_mesh("cpu", parallel), expected, 1e-12)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


COMPILED = Case("tied", 4, train=(("compile", "on"), ("recompute", "full")))


@pytest.mark.slow
def test_compiled_blocks_are_compiled_once_though_their_weights_come_and_go(tmp_path):
    plain = dataclasses.replace(COMPILED, train=())
    write_expected(tmp_path / "plain", [plain])
    expected = {name.replace(str(plain), str(COMPILED)): t for name, t in load_file(tmp_path / "plain").items()}
    write_safetensors(tmp_path / "expected", expected)
    spawn(2, count_compilations, tmp_path / "expected")


# ---- dropping any part of the communication is noticed


def only_mine(flat, shard, group):
    flat.zero_()
    comm.shard_of(flat, group).copy_(shard)


def only_my_term(flat, group):
    return comm.shard_of(flat, group)[None]


DROPS = [  # of, what, what is there instead, under which stages
    ("parallel.ddp", "all_reduce", lambda flat, group: None, [ParallelConfig(0), ParallelConfig(2, 2)]),
    ("parallel.ddp", "reduce_scatter", comm.shard_of, [ParallelConfig(1)]),
    ("parallel.window", "exchange_shards", only_my_term, [ParallelConfig(2), ParallelConfig(3)]),
    ("parallel.window", "all_gather", lambda *_: None, [ParallelConfig(1), ParallelConfig(2)]),
    ("parallel.window", "all_gather", only_mine, [ParallelConfig(3)]),
    ("parallel.zero", "sum_equal", lambda norm, group: norm, [ParallelConfig(1), ParallelConfig(3)]),
    ("train", "sum_named", lambda losses, group: losses, [ParallelConfig(0)]),
]


def compare_without(path):
    expected, case = load_file(path), Case("tied", 4)
    for module, name, instead, stages in DROPS:
        for parallel in stages:
            mesh = init_mesh("cpu", parallel)
            with mock.patch(f"minitrain.{module}.{name}", instead), pytest.raises(AssertionError, match="differs by"):
                compare(case, parallel, mesh, expected, 1e-3)


def test_each_reduction_is_needed(tmp_path):
    write_expected(tmp_path / "one-process", [Case("tied", 4)])
    spawn(4, compare_without, tmp_path / "one-process")


def apart(homes):
    """As on a GPU, what is stepped is a copy of what is kept. homes: gets the addresses of what was offloaded."""

    def fetch(self, home):
        homes.add(home.data_ptr())
        return home.clone()

    return mock.patch.object(HostState, "_fetch", fetch)


def compare_with_a_device_apart(cases, path):
    with apart(homes := set()):
        compare_all(cases, path)
    assert homes


def test_offloaded_states_are_those_that_were_stepped(tmp_path):
    cases = [(Case("tied", 2, name), ParallelConfig(1, offload="optimizer"), 1e-12) for name in OPTIMIZERS]
    write_expected(tmp_path / "one-process", [case for case, *_ in cases])
    spawn(2, compare_with_a_device_apart, cases, tmp_path / "one-process")


def compare_shares():
    for optimizer in OPTIMIZERS:
        case, counts = Case("llama", 4, optimizer, "float32"), []
        for parallel in [ParallelConfig(3, offload="optimizer", offload_share=share) for share in (0.2, 0.6, 1.0)]:
            mesh = init_mesh("cpu", parallel)
            with apart(homes := set()):
                offloaded, _ = run(case, parallel, mesh)
            plain, _ = run(case, ParallelConfig(3), mesh)
            assert all(value.equal(plain[name]) for name, value in offloaded.items()), parallel
            counts.append(len(homes))
        assert 0 < counts[0] < counts[1] < counts[2]


@pytest.mark.slow
def test_a_step_is_the_same_bit_for_bit_whatever_share_is_offloaded():
    spawn(2, compare_shares)


# ---- what a rank holds


def count_elements():
    for zero in range(4):
        mesh = init_mesh("cpu", ParallelConfig(zero=zero))
        model = make_model(Case())
        opt = shard_optimizer(model, plain_adamw, mesh, ParallelConfig(zero=zero))
        total = sum(unit.numel for unit in opt.units.values())
        masters = sum(m.numel() for m in opt.masters.values())
        assert masters == sum(p.numel() for p in model.parameters()) if zero == 0 else masters <= total / 3
        assert sum(g.numel() for g in opt.gradients.flat.values()) == (total if zero < 2 else total / 3)
        assert sum(f.untyped_storage().nbytes() for f in opt.flats.values()) == (8 * total if zero < 3 else 0)
        assert sum(s.untyped_storage().nbytes() for s in opt.shards.values()) == 8 * (total if zero < 3 else total / 3)
        assert all(master.ndim == opt.params[name].ndim for name, master in opt.masters.items())
        if zero < 3:  # a second run of the same model
            opt.close()
            for p in model.parameters():
                p.grad = torch.ones_like(p)  # which is no step's
            shard_optimizer(model, plain_adamw, mesh, ParallelConfig(zero=zero)).close()
            assert not any(hasattr(p, "unit") or p.grad is not None for p in model.parameters())
    with pytest.raises(UserError, match="shared out by an earlier run"):
        shard_optimizer(model, plain_adamw, mesh, ParallelConfig(zero=3))
    tied = make_model(Case())
    tied.layers["1"].mlp = tied.layers["0"].mlp
    with pytest.raises(UserError, match=r"zero=3: layers\.1\.mlp\.gate_proj\.weight is a parameter of another block"):
        shard_optimizer(tied, plain_adamw, mesh, ParallelConfig(zero=3))
    with pytest.raises(UserError, match=r'Muon needs whole matrices: say so .*make\.shard = "param"'):
        shard_optimizer(make_model(Case()), lambda p: OPTIMIZERS["muon"](p), mesh, ParallelConfig(zero=1))
    with pytest.raises(UserError, match="Adafactor needs whole matrices"):
        shard_optimizer(make_model(Case()), torch.optim.Adafactor, mesh, ParallelConfig(zero=1))


def test_each_stage_shares_out_what_it_says():
    spawn(3, count_elements)


def sum_in_bf16():
    parallel = ParallelConfig(3, reduce_dtype="bfloat16")
    mesh, model = init_mesh("cpu", parallel), make_model(Case(dtype="bfloat16"))
    opt = shard_optimizer(model, sgd, mesh, parallel)

    def sums(rows):
        forward_backward(model, rows, plain_loss, 0.1, mesh, opt.backward)
        opt.clip_grad_norm(1.0)
        found = {key: t.clone() for key, t in opt.gradients.sums.items()}
        opt.gradients.clear()
        return found

    rows = make_rows(mesh.rank, 2)
    of_rows = [sums([row]) for row in rows]
    assert all(t.dtype == torch.bfloat16 for of_row in of_rows for t in of_row.values())
    assert all(of_row["layers.0"].any() for of_row in of_rows)
    first, second = sums(rows), sums(rows)
    for key, total in first.items():
        torch.testing.assert_close(total, sum(of_row[key].float() for of_row in of_rows), rtol=0.02, atol=1e-3)
        assert total.equal(second[key]), key  # a run that is resumed begins with a first step
    assert all(t.dtype == torch.float32 and t.bfloat16().equal(of_rows[0][key]) for key, t in sums(rows[:1]).items())


def test_sums_over_ranks_are_kept_in_bf16_for_one_row_and_in_fp32_for_more():
    spawn(2, sum_in_bf16)


def sum_extras():
    """Each rank has its own extra, and one that both have in another order."""
    mesh, model = init_mesh("cpu", ParallelConfig()), make_model(Case())

    def loss_fn(hidden_TD, head, batch):
        extras = [("both", 1.0), (f"of rank {mesh.rank}", 10.0 + mesh.rank)]
        return plain_loss(hidden_TD, head, batch)[0], dict(reversed(extras) if mesh.rank else extras)

    _, extras = forward_backward(model, make_rows(mesh.rank, 1), loss_fn, 1.0, mesh)
    assert {name: x.item() for name, x in extras.items()} == {"both": 2, "of rank 0": 10, "of rank 1": 11}


def test_extras_of_ranks_are_summed_by_their_names():
    spawn(2, sum_extras)


def take_windows():
    """A parameter as large as the norm behind the blocks, of which one rank alone has gradients."""
    parallel = ParallelConfig(2)
    mesh, model = init_mesh("cpu", parallel), make_model(Case())
    model.value = nn.Linear(SIZES["hidden_size"], 1, bias=False, dtype=torch.float64)
    opt = shard_optimizer(model, sgd, mesh, parallel)
    pools = opt.gradients.pools
    made = {kind: len(pool.free) for kind, pool in pools.items()}

    def loss_fn(hidden_TD, head, batch):
        loss, extras = plain_loss(hidden_TD, head, batch)
        return loss + (model.value(hidden_TD).square().sum() if mesh.rank == 0 else 0), extras

    forward_backward(model, make_rows(mesh.rank, 1), loss_fn, 1.0, mesh, opt.backward)
    assert {kind: len(pool.free) for kind, pool in pools.items()} == made


def test_no_rank_needs_more_windows_than_it_made_at_first():
    spawn(2, take_windows)


def fill_by_unit(folder):
    zero_3 = ParallelConfig(3)
    model = build_model(MODELS["moe"])
    materialize(model, "cpu", torch.float32, with_memory=False)
    model.norm.requires_grad_(False)
    filled = []

    def fill(names):
        in_memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        filled.append(sum(in_memory.values()))
        load_weights(model, folder / "saved", names)

    shard_optimizer(model, plain_adamw, init_mesh("cpu", zero_3), zero_3, fill)
    assert max(filled) < 0.6 * sum(p.nbytes for p in model.parameters())  # a block of two, or the embedding
    save_pretrained(model, folder / "again")
    gate = model.layers["1"].mlp.gate
    with whole(gate):
        assert gate.weight.any() and gate.weight.isfinite().all()
    assert gate.weight.shape == (8, 24) and gate.weight.isnan().all()  # not whatever is in memory


def test_weights_come_in_and_go_out_unit_by_unit(tmp_path):
    model = make_model(Case("moe", dtype="float32"))
    save_pretrained(model, tmp_path / "saved")
    spawn(2, fill_by_unit, tmp_path)
    saved, again = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "again"))
    assert saved.keys() == again.keys() and all(t.equal(again[name]) for name, t in saved.items())


def watch_blocks():
    zero_3, seen, counts = ParallelConfig(3), [], set()
    model = build_model(dataclasses.replace(MODELS["tied"], num_hidden_layers=4), "cpu")
    init_weights(model, 0)
    opt = shard_optimizer(model, sgd, init_mesh("cpu", zero_3), zero_3)
    for i, block in model.layers.items():
        block.register_forward_pre_hook(lambda *_, i=i: seen.append(f"forward {i}"))
        block.register_full_backward_pre_hook(lambda *_, i=i: seen.append(f"backward {i}"))
    all_gather = comm.all_gather

    def gather(flat, shard, group):
        all_gather(flat, shard, group)
        seen.extend(key.removeprefix("layers.") for key in opt.flats if opt.flats[key] is flat)
        counts.add(sum(opt.flats[key].untyped_storage().nbytes() > 0 for (key,) in opt.weights.blocks))

    def exchange_shards(flat, group):
        seen.append("sum " + {unit.numel: key.split(".")[0] for key, unit in opt.units.items()}[flat.numel()])
        return comm.exchange_shards(flat, group)

    replaced = mock.patch("minitrain.parallel.window.exchange_shards", exchange_shards)
    with mock.patch("minitrain.parallel.window.all_gather", gather), replaced:
        forward_backward(model, make_rows(0, 2), plain_loss, 1.0, ALONE, opt.backward)
    row = ["1", "forward 0", "2", "forward 1", "3", "forward 2", "forward 3"]
    row += ["backward 3", "2", "sum norm", "1", "sum layers", "backward 2", "0", "sum layers", "backward 1"]  # 3 stayed
    row += ["sum layers", "backward 0", "sum layers", "sum embed_tokens"]
    assert seen == ["embed_tokens", "0", "norm", *row, "0", *row]
    assert max(counts) == 2
    assert not any(opt.flats[key].untyped_storage().nbytes() for (key,) in opt.weights.blocks)


def test_the_next_block_is_sent_for_before_one_runs_no_third_is_whole_and_sums_begin_in_backward():
    spawn(2, watch_blocks)


def watch_arrivals():
    zero_1, seen = ParallelConfig(1), []
    model = make_model(Case())
    opt = shard_optimizer(model, sgd, init_mesh("cpu", zero_1), zero_1)
    for module in (model.embed_tokens, *model.layers.values(), model.norm):
        module.register_forward_pre_hook(lambda *_: seen.append([*opt.weights.marks]))
    for _ in range(2):
        forward_backward(model, make_rows(0, 1), plain_loss, 1.0, ALONE, opt.backward)
        opt.clip_grad_norm(1.0)
        opt.step(0.01)
        assert [*opt.weights.marks] == ["embed_tokens", "layers.0", "layers.1", "norm"]
    assert seen[4:] == [["layers.0", "layers.1", "norm"], ["layers.1", "norm"], ["norm"], []]
    assert read_whole(model.norm.weight) is model.norm.weight  # whoever reads weights waits for them
    assert [*opt.weights.marks] == ["embed_tokens", "layers.0", "layers.1"]
    with whole(model.layers):
        assert [*opt.weights.marks] == ["embed_tokens"]
    opt.settle()
    assert not opt.weights.marks


def test_each_block_waits_for_its_new_weights_alone():
    spawn(2, watch_arrivals)


def meet_a_nan():
    """On rank 1, in the second step."""
    for parallel in ZERO:
        mesh = init_mesh("cpu", parallel)
        model = make_model(Case(dtype="float32"))
        opt = shard_optimizer(model, fused_adamw(OptimConfig()), mesh, parallel)
        kept = []
        for step in range(4):
            bad = torch.nan if mesh.rank == 1 and step == 1 else 1.0
            rows = make_rows(step, 2)[mesh.rank :: 2]
            loss, _ = forward_backward(
                model, rows, lambda *args, bad=bad: (plain_loss(*args)[0] * bad, {}), 0.1, mesh, opt.backward
            )
            opt.clip_grad_norm(1.0, loss)
            opt.step(0.01)
            assert loss.isfinite() == (step != 1)
            with whole(model):
                kept.append(torch.cat([p.flatten() for p in model.parameters()]))
        assert all(weights.equal(kept[0]) for weights in kept[1:])
        assert not kept[0].equal(torch.cat([p.flatten() for p in make_model(Case(dtype="float32")).parameters()]))


def test_a_nan_on_one_rank_stops_the_steps_of_all():
    spawn(2, meet_a_nan)


def run_a_block_twice():
    model = make_model(Case())
    model.layers["1"] = model.layers["0"]
    opt = shard_optimizer(model, plain_adamw, init_mesh("cpu"), ParallelConfig())
    with pytest.raises(RuntimeError, match=r"^layers\.0\..* got a gradient after .* its block runs twice"):
        forward_backward(model, make_rows(0, 1), plain_loss, 1.0, ALONE, opt.backward)


def test_a_gradient_that_comes_after_its_sum_is_an_error():
    spawn(2, run_a_block_twice)


# ---- whole runs


def go_on(runs, steps):
    for cfg in runs:
        cfg.train.steps = steps
        tokens = generate(train(cfg), torch.tensor([3, 4, 5]), 5, temperature=0)
        assert tokens.equal(load_file(f"{cfg.run_dir}/../tokens-{steps}")["tokens"])


@pytest.mark.slow
def test_a_run_goes_on_under_any_stage_on_any_number_of_ranks(corpus, tmp_path):
    """3 steps on some ranks, 3 more on others: losses, export and what it generates are those of one process."""

    def config(name, **parallel):
        schedule = {"schedule": "constant", "lr": 1e-2, "warmup_steps": 0}
        return tiny_run(corpus, tmp_path / name, data={"rows_per_step": 6}, optim=schedule, parallel=parallel)

    one = config("one")
    for steps in (3, 6):
        one.train.steps = steps
        tokens = generate(train(one), torch.tensor([3, 4, 5]), 5, temperature=0)
        write_safetensors(tmp_path / f"tokens-{steps}", {"tokens": tokens})
    runs = [config(f"zero-{zero}", zero=zero) for zero in range(4)]
    runs.append(config("offload", zero=1, offload="optimizer"))
    spawn(2, go_on, runs, 3)
    first, *others = runs
    for cfg in others:
        cfg.parallel.zero = 4 - cfg.parallel.zero  # what was saved under 1 goes on under 3
    spawn(3, go_on, others, 6)
    go_on([first], 6)
    expected = load_file(tmp_path / "one" / "export" / "model.safetensors")
    for cfg in runs:
        exported = load_file(f"{cfg.run_dir}/export/model.safetensors")
        assert exported.keys() == expected.keys()
        assert max(difference(t, expected[name]) for name, t in exported.items()) < 1e-3
        for row, of_one in zip(read_metrics(cfg.run_dir), read_metrics(one.run_dir), strict=True):
            assert row["step"] == of_one["step"] and row["trained_tokens"] == of_one["trained_tokens"]
            assert row["loss"] == pytest.approx(of_one["loss"], rel=1e-5)


# ---- on GPUs, over NCCL


def train_with_owners(cfg):
    train(cfg, optimizer=muon(cfg.optim, cfg.model.vocab_size))


@pytest.mark.gpu
def test_owners_on_gpus_go_on_with_what_is_in_host_memory(corpus, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    layout = {"zero": 1, "offload": "optimizer"}
    for name, ends in {"at once": [4], "in two": [2, 4]}.items():
        for steps in ends:
            cfg = tiny_run(corpus, tmp_path / name, train={"steps": 4, "device": "auto"}, parallel=layout)
            cfg.data.rows_per_step, cfg.optim.schedule, cfg.train.steps = 2, "constant", steps
            spawn(2, train_with_owners, cfg, device="cuda")
    losses, again = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("at once", "in two"))
    assert losses == pytest.approx(again, rel=1e-3)


@pytest.mark.gpu
def test_split_masters_of_gpus_go_on_on_fewer(corpus, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    for name, runs in {"alone": [(4, 1, 0)], "moved": [(1, 2, 3), (2, 2, 1), (3, 2, 0), (4, 1, 0)]}.items():
        for steps, ranks, zero in runs:
            cfg = tiny_run(corpus, tmp_path / name, train={"steps": steps, "device": "auto"}, parallel={"zero": zero})
            cfg.data.rows_per_step, cfg.optim.schedule = 2, "constant"
            spawn(ranks, train, cfg, device="cuda") if ranks > 1 else train(cfg)
    losses, again = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("alone", "moved"))
    assert losses[0] > losses[-1] and losses == pytest.approx(again, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("train", [(), (("compile", "on"), ("recompute", "full"))], ids=["plain", "compiled"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_gpus_equal_one(ranks, tmp_path, train):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    layouts = [*ZERO, *(ParallelConfig(3, offload="optimizer", offload_share=share) for share in (0.5, 1.0))]
    cases = [(Case(model, 4, dtype="float64"), parallel, 1e-10) for model in MODELS for parallel in layouts]
    if train:
        cases = [(Case(model, 4, "sgd", "bfloat16", train=train), p, 2e-2) for model in MODELS for p in layouts]
    check(ranks, cases, tmp_path, "cuda")
