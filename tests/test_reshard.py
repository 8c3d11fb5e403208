"""A checkpoint under other numbers of ranks and other stages of ZeRO: the same bits, and no more bytes than needed."""

import itertools
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import read_metrics, spawn, tiny_run
from test_zero import MODELS, OPTIMIZERS, make_rows, plain_loss

from minitrain import train
from minitrain.checkpoint import Checkpointer
from minitrain.config import CheckpointConfig, Config, ParallelConfig, TrainConfig
from minitrain.models import build_model, init_weights
from minitrain.parallel import parallelize
from minitrain.parallel.gather import whole
from minitrain.parallel.mesh import ALONE, init_mesh
from minitrain.parallel.zero import shard_optimizer
from minitrain.pieces import Saved
from minitrain.train import forward_backward

LAYOUTS = [  # of one checkpoint after the other
    (2, ParallelConfig(3)),
    (3, ParallelConfig(1)),
    (2, ParallelConfig(0)),
    (4, ParallelConfig(2, shard_within=2)),
    (2, ParallelConfig(1, offload="optimizer")),
    (4, ParallelConfig(3, pp=2)),
    (2, ParallelConfig(pp=2)),
]


def hold(name, run_dir, parallel, mesh, seed):
    """-> a model with values of its own and a frozen part, its optimizer and Checkpointer."""
    model = build_model(MODELS["moe"], "cpu")
    init_weights(model, seed)
    model.to(torch.bfloat16).embed_tokens.requires_grad_(False)
    parallelize(model, mesh, TrainConfig())
    opt = shard_optimizer(model, OPTIMIZERS[name], mesh, parallel)
    cfg = Config(MODELS["moe"], parallel=parallel, checkpoint=CheckpointConfig(keep=10), run_dir=str(run_dir / name))
    cfg.data.max_seqlen = 8
    return model, opt, Checkpointer(cfg, opt, itertools.repeat(None), mesh)


def read_and_write_again(run_dir, parallel, step):
    mesh = init_mesh("cpu", parallel)
    for name in OPTIMIZERS:
        asked, read = [], Saved.read

        def count(saved, *args, asked=asked, read=read):
            values = read(saved, *args)
            if not args[0].startswith("rng."):
                asked.append(values.numel() * values.element_size())
            return values

        model, opt, ckpt = hold(name, run_dir, parallel, mesh, seed=step)
        with ckpt:
            with mock.patch.object(Saved, "read", count):
                assert ckpt.resume() == step - 1
            held = [*opt.masters.values(), *(v for state in opt.optimizer.state.values() for v in state.values())]
            held += [p for p in model.parameters() if not p.requires_grad]
            assert sum(asked) == sum(t.numel() * t.element_size() for t in held)
            saved = Saved(ckpt.find()[-1])
            with whole(model):
                for n, p in model.named_parameters():
                    assert p.flatten().equal(saved.read(f"model.{n}").to(p.dtype)), n
            ckpt.save(step)


@pytest.mark.timeout(300)
def test_any_layout_reads_its_own_part_and_writes_the_same_bits(tmp_path):
    for name in OPTIMIZERS:
        model, opt, ckpt = hold(name, tmp_path, ParallelConfig(), ALONE, seed=0)
        with ckpt:
            forward_backward(model, make_rows(0, 2), plain_loss, 0.1, ALONE, opt.backward)
            opt.clip_grad_norm(1.0)
            opt.step(0.01)
            ckpt.save(1)
    for step, (ranks, parallel) in enumerate(LAYOUTS, 2):
        spawn(ranks, read_and_write_again, tmp_path, parallel, step)
    for name in OPTIMIZERS:
        first, *others = (Saved(path) for path in sorted((tmp_path / name / "checkpoints").glob("step-*")))
        names = [n for n in first.tensors if not n.startswith("rng.")]
        assert any(n.startswith("optimizer.") for n in names) and len(others) == len(LAYOUTS)
        for saved, (ranks, parallel) in zip(others, LAYOUTS, strict=True):
            assert [n for n in saved.tensors if not n.startswith("rng.")] == names
            for n in names:
                assert saved.tensors[n] == first.tensors[n] and saved.read(n).equal(first.read(n)), (n, ranks, parallel)
            sizes = [file["bytes"] for file in saved.manifest["files"].values()]
            assert len(sizes) == ranks and max(sizes) < 1.7 * sum(sizes) / ranks  # all ranks share the work


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_8_ranks_then_4_then_6_then_1_see_the_same_tokens_and_losses(corpus, tmp_path):
    """In the middle of an epoch, each under another stage."""

    def config(name, **parallel):
        schedule = {"schedule": "constant", "lr": 1e-2, "warmup_steps": 0}
        return tiny_run(corpus, tmp_path / name, data={"rows_per_step": 24}, optim=schedule, parallel=parallel)

    alone = config("alone")
    alone.train.steps = 8
    train(alone)
    for steps, (ranks, zero) in zip((2, 4, 6, 8), [(8, 2), (4, 0), (6, 3), (1, 0)], strict=True):
        cfg = config("moved", zero=zero)
        cfg.train.steps = steps
        spawn(ranks, train, cfg) if ranks > 1 else train(cfg)
        files = (Path(cfg.run_dir) / "checkpoints" / "latest").glob("rank-*")
        assert len(list(files)) == ranks
    for row, of_one in zip(read_metrics(tmp_path / "moved"), read_metrics(tmp_path / "alone"), strict=True):
        assert row["step"] == of_one["step"] and row["trained_tokens"] == of_one["trained_tokens"]
        assert row["loss"] == pytest.approx(of_one["loss"], rel=1e-5)
