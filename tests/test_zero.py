"""Several ranks against one process: the same loss, gradients, norm and weights, whatever is sharded."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, spawn
from safetensors.torch import load_file

from minitrain.batch import IGNORE, Batch
from minitrain.config import OptimConfig, ParallelConfig
from minitrain.models import build_model, init_weights
from minitrain.models.llama import LlamaConfig
from minitrain.models.qwen3 import Qwen3Config
from minitrain.models.qwen3_moe import Qwen3MoeConfig
from minitrain.optim import muon
from minitrain.parallel.gather import whole
from minitrain.parallel.mesh import ALONE, init_mesh
from minitrain.parallel.zero import shard_optimizer
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


def adamw(params):
    """Not torch's fused one, which has no float64; with the rule that only matrices decay."""
    matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], eps=1e-6)


OPTIMIZERS = {"adamw": adamw, "lion": Lion, "muon": muon(OptimConfig(), SIZES["vocab_size"])}


@dataclasses.dataclass(frozen=True)
class Case:
    model: str = "tied"
    rows: int = 2  # of all ranks
    optimizer: str = "adamw"
    dtype: str = "float64"


def make_model(case):
    model = build_model(MODELS[case.model], "cpu")
    init_weights(model, 0)
    return model.to(getattr(torch, case.dtype))


def make_rows(step, n):
    """n rows with unequal numbers of targets; in every second step, the second row has none."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for i in range(n):
        batch = Batch.pack([torch.randint(SIZES["vocab_size"], (k,), generator=generator) for k in (2 + i % 3, 5)])
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
    model = make_model(case)
    opt = shard_optimizer(model, OPTIMIZERS[case.optimizer], mesh, parallel)
    losses, norms, grads = [], [], None
    for step in range(STEPS):
        rows = make_rows(step, case.rows)
        tokens = sum(b.num_targets for b in rows)
        mine = rows[mesh.dp_rank :: mesh.dp_size]
        assert mesh.sum(sum(b.num_targets for b in mine)) == tokens
        loss, extras = forward_backward(model, mine, plain_loss, 1 / tokens, mesh, opt.backward)
        assert extras["twice"].equal(2 * loss)
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
        return {name: (0, m.grad.flatten().clone()) for name, m in opt.masters.items()}
    found = {}
    for key, unit in opt.units.items():
        for name in unit.params:
            first, end = unit.span(name, opt.group.rank)
            found[name] = first, unit.piece(opt.gradients.sums[key], name, opt.group.rank).clone()
            assert len(found[name][1]) == end - first
    return found


def difference(a, b, scale=None):
    """Largest, relative to the largest of the tensor."""
    return ((a - b).abs().max() / (b if scale is None else scale).abs().max()).item() if b.numel() else 0.0


def compare(case, parallel, mesh, expected, tolerance):
    results, grads = run(case, parallel, mesh)
    errors = {name: difference(value, expected[f"{case} {name}"]) for name, value in results.items()}
    for name, (first, piece) in grads.items():
        of_one = expected[f"{case} gradient of {name}"]
        errors[f"gradient of {name}"] = difference(piece, of_one[first:][: len(piece)], of_one)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{case} {parallel}: {worst} differs by {errors[worst]:.1e}"


def check(n, cases, tmp_path):
    """cases: [(Case, ParallelConfig, tolerance), ...]; n ranks are started once for all of them."""
    tensors = {}
    for case in {case for case, *_ in cases}:
        results, grads = run(case, ParallelConfig())
        tensors |= {f"{case} {name}": t for name, t in results.items()}
        tensors |= {f"{case} gradient of {name}": g for name, (_, g) in grads.items()}
    write_safetensors(tmp_path / "one-process", tensors)
    spawn(n, compare_all, cases, tmp_path / "one-process")


def compare_all(cases, path):
    expected = load_file(path)
    meshes = {}
    for case, parallel, tolerance in cases:
        cut = 1 if parallel.zero == 0 else parallel.shard_within
        meshes[cut] = meshes.get(cut) or init_mesh("cpu", parallel)
        compare(case, parallel, meshes[cut], expected, tolerance)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_equal_one_process(ranks, tmp_path):
    cases = [
        (Case(model, ranks * accumulation), ParallelConfig(zero=zero), 1e-12)
        for model in MODELS
        for accumulation in (1, 3)
        for zero in (0, 1, 2, 3)
    ]
    check(ranks, cases, tmp_path)
