"""A checkpoint under other layouts: the same bits, the same export, and no more bytes than needed."""

import dataclasses
import itertools
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import RoundingSGD, read_metrics, spawn, tiny_run
from test_convert import contents, convert
from test_storage import LiveBytes
from test_zero import OPTIMIZERS, SIZES, make_rows, plain_loss

from minitrain import OptimConfig, muon, save_pretrained, train
from minitrain.boxes import part_of, take
from minitrain.checkpoint import Checkpointer
from minitrain.config import CheckpointConfig, Config, ParallelConfig, TrainConfig, UserError
from minitrain.masters import value_of
from minitrain.models import build_model, init_weights
from minitrain.models.qwen3 import Qwen3Config
from minitrain.models.qwen3_moe import Qwen3MoeConfig
from minitrain.parallel import parallelize
from minitrain.parallel.gather import whole
from minitrain.parallel.layout import objections
from minitrain.parallel.mesh import ALONE, init_mesh
from minitrain.parallel.zero import shard_optimizer
from minitrain.pieces import Saved
from minitrain.train import forward_backward

TIED = Qwen3Config(**SIZES | {"intermediate_size": 47}, tie_word_embeddings=True)
MOE = Qwen3MoeConfig(**SIZES, moe_intermediate_size=15, num_experts=8, num_experts_per_tok=2)
THREE_KEY_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}
FROZEN = {  # of MOE; some are cut, of key heads there are copies
    "embed_tokens.weight",
    "layers.0.self_attn.k_proj.weight",
    "layers.0.self_attn.q_norm.weight",
    "layers.1.mlp.experts.up_proj",
}
LAYOUTS = [  # of one checkpoint after the other
    (2, ParallelConfig(3)),
    (3, ParallelConfig(1)),
    (2, ParallelConfig(0)),
    (4, ParallelConfig(2, shard_within=2)),
    (2, ParallelConfig(1, offload="optimizer")),
    (3, ParallelConfig(3, offload="optimizer", offload_share=0.5)),
    (4, ParallelConfig(3, pp=2)),
    (2, ParallelConfig(pp=2)),
    (2, ParallelConfig(tp=2)),
    (4, ParallelConfig(3, tp=2, ep=2)),
]
CUTS = [  # which cut matrices and experts, each alone and in company
    (2, {"tp": 2}),
    (3, {"tp": 3}),
    (4, {"tp": 4}),
    (2, {"ep": 2}),
    (4, {"tp": 2, "ep": 2}),
    (4, {"tp": 2, "cp": 2}),
    (4, {"tp": 2, "pp": 2}),
    (4, {"ep": 2, "shard_within": 2}),
]
ALL_CUTS = [
    (ranks, ParallelConfig(zero, **sizes))
    for ranks, sizes in CUTS
    for zero in (0, 3)
    if zero or "shard_within" not in sizes
]


def hold(case, run_dir, parallel, mesh, seed):
    """case: (model's config, name of an optimizer). -> a model with values of its own and a frozen part, its optimizer
    and Checkpointer."""
    model_config, optimizer = case
    model = build_model(model_config, "cpu")
    init_weights(model, seed)
    for name, p in model.to(torch.bfloat16).named_parameters():
        p.requires_grad_(model_config.type != "qwen3_moe" or name not in FROZEN)
    parallelize(model, mesh, TrainConfig())
    opt = shard_optimizer(model, RoundingSGD if optimizer == "rounding" else OPTIMIZERS[optimizer], mesh, parallel)
    cfg = Config(model_config, parallel=parallel, checkpoint=CheckpointConfig(keep=100), run_dir=folder(case, run_dir))
    cfg.data.max_seqlen = 8
    return model, opt, Checkpointer(cfg, opt, itertools.repeat(None), mesh)


def folder(case, run_dir):
    return str(run_dir / f"{case[0].type}-{case[1]}")


def fits(case, ranks, parallel):
    return not objections(parallel, ranks, case[0]) and (case[1] != "muon" or parallel.tp == 1)


def read_and_write_again(cases, run_dir, parallel, step):
    for case in cases:
        mesh = init_mesh("cpu", parallel, case[0])
        asked, read = [], Saved.read

        def count(saved, *args, asked=asked, read=read):
            values = read(saved, *args)
            if not args[0].startswith("rng."):
                asked.append(values.numel() * values.element_size())
            return values

        model, opt, ckpt = hold(case, run_dir, parallel, mesh, seed=step)
        with ckpt:
            newest = ckpt.find()[-1]
            with mock.patch.object(Saved, "read", count):
                assert ckpt.resume() == int(newest.name[5:])
            states = [(master, t) for master, state in opt.optimizer.state.items() for t in state.values()]
            assert all(t.shape == master.shape for master, t in states if t.ndim)
            held = [*map(value_of, opt.masters.values()), *(t for _, t in states)]
            held += [p for p in model.parameters() if not p.requires_grad]
            assert sum(asked) == sum(t.numel() * t.element_size() for t in held)
            saved = Saved(newest)
            with whole(model):
                for name, p in model.named_parameters():
                    shape, box = part_of(p)
                    assert p.equal(take(saved.read(f"model.{name}").view(shape), box).to(p.dtype)), name
            ckpt.save(step)
        if case[1] == "adamw":
            save_pretrained(model, f"{folder(case, run_dir)}/export-{step}")


def check(cases, layouts, tmp_path):
    """Each layout reads what the one before it wrote, and writes the bits that one process wrote at first."""
    for case in cases:
        model, opt, ckpt = hold(case, tmp_path, ParallelConfig(), ALONE, seed=0)
        with ckpt:
            forward_backward(model, make_rows(0, 2), plain_loss, 0.1, ALONE, opt.backward)
            opt.clip_grad_norm(1.0)
            opt.step(0.01)
            ckpt.save(1)
        save_pretrained(model, f"{folder(case, tmp_path)}/export-1")
    for step, (ranks, parallel) in enumerate(layouts, 2):
        spawn(ranks, read_and_write_again, [c for c in cases if fits(c, ranks, parallel)], tmp_path, parallel, step)
    for case in cases:
        path = Path(folder(case, tmp_path))
        first = Saved(path / "checkpoints" / "step-00000001")
        names = [n for n in first.tensors if not n.startswith("rng.")]
        assert any(n.startswith("optimizer.") for n in names)
        for step, (ranks, parallel) in enumerate(layouts, 2):
            if not fits(case, ranks, parallel):
                continue
            saved = Saved(path / "checkpoints" / f"step-{step:08}")
            assert [n for n in saved.tensors if not n.startswith("rng.")] == names
            for n in names:
                assert saved.tensors[n] == first.tensors[n] and saved.read(n).equal(first.read(n)), (n, ranks, parallel)
            sizes = [file["bytes"] for file in saved.manifest["files"].values()]
            assert len(sizes) == ranks and max(sizes) < 1.7 * sum(sizes) / ranks  # all ranks share the work
            if case[1] != "adamw":  # one will do
                continue
            with LiveBytes() as memory:
                convert.main([str(saved.folder), "--out", str(path / f"converted-{step}")])
            assert memory.peak <= 2 * 4 * max(shape.numel() for _, shape in first.tensors.values())  # fp32, and rounded
            for made in ("export", "converted"):
                assert contents(path / f"{made}-{step}") == contents(path / "export-1"), (made, ranks, parallel)


def test_split_masters_are_saved_and_read_as_what_they_are_worth(tmp_path):
    layouts = [(2, ParallelConfig(3)), (2, ParallelConfig(1)), (2, ParallelConfig(2, ep=2))]
    check([(MOE, "rounding")], layouts, tmp_path)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_any_layout_reads_its_own_part_and_writes_the_same_bits(tmp_path):
    check([(MOE, name) for name in (*OPTIMIZERS, "rounding")], LAYOUTS, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("heads", [{}, THREE_KEY_HEADS], ids=["2 key heads", "3 key heads"])
def test_any_cut_of_matrices_and_experts_does_too(heads, tmp_path):
    models = [dataclasses.replace(model, **heads) for model in (TIED, MOE)]
    check([(model, name) for model in models for name in ("adamw", "muon")], ALL_CUTS, tmp_path)


def keep_a_number_an_expert():
    parallel = ParallelConfig(ep=2)
    _, opt, _ = hold((MOE, "muon"), Path(), parallel, init_mesh("cpu", parallel, MOE), seed=0)
    for master in opt.masters.values():
        opt.optimizer.state[master]["scale"] = torch.ones(len(master))
    name = "layers.0.mlp.experts.gate_proj"
    with pytest.raises(UserError, match=rf"keeps {name}\.scale of shape \(4,\) for a piece of shape \(4, 15, 24\)"):
        opt.pieces()
    with pytest.raises(UserError, match=rf"{name}\.scale has shape \(8,\): it cannot be cut as {name} is"):
        opt.load({f"optimizer.{name}.scale": (torch.float32, torch.Size([8]))}, None)


def test_state_that_cannot_be_cut_as_its_parameter_is_refused():
    spawn(2, keep_a_number_an_expert)


def runs(corpus, tmp_path, rows, model=None):
    """-> a function that makes the config of a run up to some step."""

    def config(name, steps, **parallel):
        return tiny_run(
            corpus, tmp_path / name, model, train={"steps": steps}, data={"rows_per_step": rows}, parallel=parallel,
            optim={"schedule": "constant", "lr": 1e-2, "warmup_steps": 0},
        )  # fmt: skip

    return config


def same_losses(tmp_path):
    for row, of_one in zip(read_metrics(tmp_path / "moved"), read_metrics(tmp_path / "alone"), strict=True):
        assert row["step"] == of_one["step"] and row["trained_tokens"] == of_one["trained_tokens"]
        assert row["loss"] == pytest.approx(of_one["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_8_ranks_then_4_then_6_then_1_see_the_same_tokens_and_losses(corpus, tmp_path):
    """In the middle of an epoch, each under another stage."""
    config = runs(corpus, tmp_path, 24)
    train(config("alone", 8))
    for steps, (ranks, zero) in zip((2, 4, 6, 8), [(8, 2), (4, 0), (6, 3), (1, 0)], strict=True):
        cfg = config("moved", steps, zero=zero)
        spawn(ranks, train, cfg) if ranks > 1 else train(cfg)
        files = (Path(cfg.run_dir) / "checkpoints" / "latest").glob("rank-*")
        assert len(list(files)) == ranks
    same_losses(tmp_path)


def train_with_muon(cfg):
    train(cfg, optimizer=muon(OptimConfig(), SIZES["vocab_size"]))


@pytest.mark.parametrize(
    "run, layouts",
    [
        (train, [{"tp": 2, "zero": 3}, {"ep": 2}, {}]),
        pytest.param(train_with_muon, [{"ep": 2, "zero": 1}, {}, {"ep": 2}], marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_other_cuts_and_sees_the_same_tokens_and_losses(corpus, tmp_path, run, layouts):
    config = runs(corpus, tmp_path, 2, dataclasses.replace(MOE, vocab_size=101))
    run(config("alone", 6))
    for steps, parallel in zip((2, 4, 6), layouts, strict=True):
        cfg = config("moved", steps, **parallel)
        spawn(2, run, cfg) if parallel else run(cfg)
        latest = Path(cfg.run_dir) / "checkpoints" / "latest"
        convert.main([str(latest), "--out", str(tmp_path / f"converted-{steps}")])
        assert contents(tmp_path / f"converted-{steps}") == contents(Path(cfg.run_dir) / "export")
    same_losses(tmp_path)
