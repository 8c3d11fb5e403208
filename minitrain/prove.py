"""python -m minitrain --config X.toml --prove: whether the config's layout trains the network that one process trains.

    twin         the configured model with its heads' ratio, ties, biases and router, made narrow and of few layers, of
                 sizes that the layout's cuts do not divide; float64 on a CPU, float32 on GPUs
    follow()     some steps of train()'s own pieces: in one process, then in the layout, on the same rows
    differences  of loss, norm, each gradient of the first step and each weight after the last, over all ranks
    controls     the layout again without one of its sums over ranks, which must be seen

tests/ compare every axis by the same functions.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitrain.batch import IGNORE, Batch
from minitrain.boxes import part_of, take
from minitrain.config import Config, ParallelConfig, UserError
from minitrain.models import build_model, load_object
from minitrain.parallel import parallelize
from minitrain.parallel.ddp import DENSE
from minitrain.parallel.gather import whole
from minitrain.parallel.mesh import Mesh, init_mesh
from minitrain.parallel.zero import MasterOptimizer, shard_optimizer
from minitrain.pieces import Piece
from minitrain.train import forward_backward, set_weights

_STEPS = 3
_SHOWN = 10  # tensors
# Adam divides by gradients: of small ones the rounding of float32 grows.
_TOLERANCE = {"float64": 1e-11, "float32": 1e-3}


def follow(
    model: nn.Module,
    cfg: Config,
    mesh: Mesh,
    steps: list[list[Batch]],
    loss_fn: Callable,
    spoil: Callable[[nn.Module], None] = lambda model: None,
) -> dict[str, Piece]:
    """Train on these rows of all ranks, a list a step. -> "loss", extras and "norm" of each step, "gradient NAME" of
    the first step and "weight NAME" after the last.

    spoil: called with the model before it is trained.
    """
    model = parallelize(model, mesh, cfg.train)
    fill = set_weights(model, cfg, mesh)
    spoil(model)
    with contextlib.closing(shard_optimizer(model, plain_adamw, mesh, cfg.parallel, fill)) as opt:
        results, gradients = [], {}
        for rows in steps:
            mine = [row.to(mesh.device) for row in rows[mesh.dp_rank :: mesh.dp_size]]
            tokens = mesh.sum_rows(sum(row.num_targets for row in mine))
            loss, extras = forward_backward(model, mine, loss_fn, 1 / tokens, mesh, opt.backward)
            results.append({"loss": loss, **extras, "norm": opt.clip_grad_norm(0.5, loss)})
            gradients = gradients or _gradients(opt)
            opt.step(0.01)
        with whole(model):
            weights = {
                f"weight {name}": Piece(p.detach().flatten().clone(), *part_of(p)) for name, p in opt.params.items()
            }
    columns = {name: torch.stack([of_step[name] for of_step in results]) for name in results[0]}
    return {name: Piece(values, *part_of(values)) for name, values in columns.items()} | gradients | weights


def plain_adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Not torch's fused one, which has no float64; with the rule that only matrices decay.

    A large eps: a gradient that is all rounding then makes a small step, not one of the full size in any direction.
    """
    matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], eps=1e-4)


def _gradients(opt: MasterOptimizer) -> dict[str, Piece]:
    """After clip_grad_norm."""
    if not hasattr(opt, "units"):
        masters = {name: master for name, master in opt.masters.items() if master.requires_grad}
        grads = {name: master.grad.flatten().clone() for name, master in masters.items()}
        return {f"gradient {name}": Piece(grad, *part_of(opt.params[name])) for name, grad in grads.items()}
    found = {}
    for key, unit in opt.units.items():
        for name, grad in opt.gradients.of(key).items():
            part = part_of(unit.params[name])
            found[f"gradient {name}"] = Piece(grad.clone(), *part, unit.span(name, unit.shard.rank)[0])
    return found


def of_one(parts: dict[str, Piece]) -> dict[str, Tensor]:
    """What one process has: all of each tensor, on the host."""
    return {key: part.values.view(part.shape).cpu() for key, part in parts.items()}


def differences(parts: dict[str, Piece], expected: dict[str, Tensor], mesh: Mesh) -> dict[str, float]:
    """The largest of all ranks, relative to the tensor's largest element; infinite for what is no number or on no rank,
    and for a norm that is not the same on every rank. After fewer steps than expected, without weights."""
    is_short = len(parts["loss"].values) < len(expected["loss"])
    keys = [key for key in expected if not (is_short and key.startswith("weight "))]
    found = {}
    for key in parts.keys() & set(keys):
        values, first = parts[key].values, parts[key].first
        mine = take(expected[key], parts[key].box).flatten()[first : first + len(values)]
        found[key] = difference(values.cpu(), mine, expected[key])
    of_ranks = [None] * mesh.size
    dist.all_gather_object(of_ranks, (parts["norm"].values.tolist(), found))
    worst = {key: max((of_rank[key] for _, of_rank in of_ranks if key in of_rank), default=torch.inf) for key in keys}
    if any(norms != of_ranks[0][0] for norms, _ in of_ranks):
        worst["norm"] = torch.inf
    return worst


def difference(a: Tensor, b: Tensor, scale: Tensor | None = None) -> float:
    """Largest, relative to the largest of the tensor (scale; None: b); infinite for what is no number."""
    if not b.numel():
        return 0.0
    largest = (b if scale is None else scale).abs().max().clamp(min=1e-30)
    return ((a - b).abs().max() / largest).nan_to_num(torch.inf).item()


# ---- the twin and its data


def twin(model, parallel: ParallelConfig):
    """A small config of the same structure; sizes that ranks cut are prime, or one more than the ranks."""
    pp, tp, ep = parallel.pp, parallel.tp, parallel.ep
    ratio = model.num_attention_heads // model.num_key_value_heads
    are_whole = model.num_key_value_heads == 1 or model.num_key_value_heads < tp  # key heads, on some or all ranks
    kv_heads = model.num_key_value_heads if are_whole else tp + 1
    heads, channels = ratio * kv_heads, 4
    is_square = model.head_dim * model.num_attention_heads == model.hidden_size
    sizes = {
        "pretrained": "",
        "vocab_size": 101,
        "hidden_size": heads * channels if is_square else 22,
        "intermediate_size": 67,
        "num_hidden_layers": pp * parallel.pp_parts + 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": channels,
        "initializer_range": 0.1,
        "moe_intermediate_size": 67,
        "num_experts": ep * max(3, 6 // ep),
        "num_experts_per_tok": min(2, getattr(model, "num_experts_per_tok", 1)),
    }
    return dataclasses.replace(model, **{name: size for name, size in sizes.items() if hasattr(model, name)})


def make_rows(step: int, num_rows: int, tokens: int, vocab_size: int) -> list[Batch]:
    """Rows of two documents and padding of random lengths; the first is one document, the second may have no target."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for i in range(num_rows):
        cuts = torch.randint(tokens + 1, (2,), generator=generator).sort()[0].tolist() if i else [tokens, tokens]
        ids = torch.randint(vocab_size, (tokens,), generator=generator)
        row = Batch.pack(list(ids.tensor_split(cuts)), max_seqlen=tokens)
        row.targets[torch.rand(tokens, generator=generator) < 0.3] = IGNORE
        row.is_real = torch.arange(tokens) < max(1, cuts[1])
        row.targets[~row.is_real] = IGNORE
        if i == 1 and step % 2 == 0:
            row.targets.fill_(IGNORE)
        row.num_targets = int((row.targets != IGNORE).sum())
        rows.append(row)
    return rows


def tokens_of_a_row(parallel: ParallelConfig) -> int:
    """Of a rank an odd number, where tp cuts it further; else one that cp can cut in several pieces."""
    return parallel.cp * (13 if parallel.tp > 1 else 16)


# ---- the proof


def prove(cfg: Config) -> bool:
    """Rank 0 prints what was compared, and the verdict. UserError where there is nothing to prove."""
    mesh = init_mesh(cfg.train.device, cfg.parallel, cfg.model)
    if mesh.size == 1:
        raise UserError("--prove compares a layout with one process; start its ranks: torchrun --nproc-per-node N ...")
    dtype = "float64" if mesh.device.type == "cpu" else "float32"
    train = dataclasses.replace(cfg.train, dtype=dtype, attention="sdpa")  # which takes any dtype and head
    parallel = dataclasses.replace(cfg.parallel, reduce_dtype="float32")
    small = dataclasses.replace(cfg, model=twin(cfg.model, parallel), train=train, parallel=parallel)
    tokens, num_rows = tokens_of_a_row(parallel), (parallel.pp + 1) * mesh.dp_size
    steps = [make_rows(step, num_rows, tokens, small.model.vocab_size) for step in range(_STEPS)]
    loss_fn = load_object(cfg.train.loss)

    def run(mesh: Mesh, steps: list[list[Batch]]) -> dict[str, Piece]:
        return follow(build_model(small.model), small, mesh, steps, loss_fn)

    say = print if mesh.rank == 0 else lambda *_: None
    say(_describe(small, mesh, num_rows, tokens))
    expected = [of_one(run(Mesh(mesh.device), steps)) if mesh.rank == 0 else None]
    dist.broadcast_object_list(expected, src=0, device=torch.device("cpu"))
    found = differences(run(mesh, steps), expected[0], mesh)
    say(_table(found))

    say("\nleft out on purpose")
    caught = []
    for name, without in _controls(small, mesh).items():
        of_control = differences(run(without, steps[:1]), expected[0], mesh)
        worst = max(of_control, key=of_control.get)
        caught.append(of_control[worst] > _TOLERANCE[dtype])
        much = f"differs by {of_control[worst]:.1e}"
        text = f"{worst} {much if of_control[worst] < torch.inf else 'is missing, no number or not alike on all ranks'}"
        say(f"  {name:<50}  {'caught' if caught[-1] else 'NOT CAUGHT'}: {text}")
    worst = max(found.values())
    is_proven = worst <= _TOLERANCE[dtype] and all(caught)
    text = f"the largest difference is {worst:.1e}, {_TOLERANCE[dtype]:.0e} is allowed; {sum(caught)} of {len(caught)}"
    say(f"\n{'PROVEN' if is_proven else 'NOT PROVEN'}: {text} controls were caught")
    return is_proven


def _controls(cfg: Config, mesh: Mesh) -> dict[str, Mesh]:
    """The layout without one of its sums over ranks, of those that the model has parameters for."""
    model = parallelize(build_model(cfg.model), mesh, cfg.train)
    kinds = [None] * mesh.size
    dist.all_gather_object(kinds, {getattr(p, "grad_sum_on", DENSE) for p in model.parameters()})
    found = {}
    for kind in sorted(set.union(*kinds)):
        if any(group.size > 1 for group in mesh.sharding(kind)):
            others = {other: groups for other, groups in mesh.shardings.items() if other != kind}
            found[f"sum of gradients over {' x '.join(kind)}"] = dataclasses.replace(mesh, shardings=others)
    sums = {"world": "sum of the norm over all ranks"}
    if any("ends" in kind for kind in set.union(*kinds)):
        sums["ends"] = "sum of the tied matrix over both ends"
    for name, text in sums.items():
        others = {other: group for other, group in mesh.groups.items() if other != name}
        found[text] = dataclasses.replace(mesh, groups=others)
    return found


def _describe(cfg: Config, mesh: Mesh, num_rows: int, tokens: int) -> str:
    m, p = cfg.model, cfg.parallel
    experts = f", {m.num_experts} experts" if hasattr(m, "num_experts") else ""
    layout = f"pp {p.pp}, dp {mesh.dp_size}, cp {p.cp}, tp {p.tp}, ep {p.ep}, zero {p.zero}"
    return (
        f"{mesh.size} ranks: {layout}; {mesh.device.type}, {cfg.train.dtype}\n"
        f"twin of {m.type}: {m.num_hidden_layers} layers of width {m.hidden_size}, {m.num_attention_heads} query and "
        f"{m.num_key_value_heads} key heads of {m.head_dim} channels{experts}, vocabulary {m.vocab_size}"
        f"{', tied' if m.tie_word_embeddings else ''}; {_STEPS} steps of {num_rows} rows of {tokens} tokens"
    )


def _table(found: dict[str, float]) -> str:
    """Tensors by their differences, the worst first."""
    rows, of_steps = {}, []
    for key, value in found.items():
        kind, _, name = key.partition(" ")
        if name:
            rows.setdefault(name, [0.0, 0.0])[kind == "weight"] = value
        else:
            of_steps.append(f"{key} {value:.1e}")
    ranked = sorted(rows, key=lambda name: (-max(rows[name]), name))
    lines = ["", "largest difference from one process, of all ranks, relative to the tensor's largest element"]
    lines += ["  " + ", ".join(of_steps)]
    lines += [f"  {'':<50}  gradient    weight"]
    lines += [f"  {name:<50}  {rows[name][0]:>8.1e}  {rows[name][1]:>8.1e}" for name in ranked[:_SHOWN]]
    if rest := ranked[_SHOWN:]:
        most = [max(rows[name][i] for name in rest) for i in range(2)]
        lines += [f"  {f'{len(rest)} others, at most':<50}  {most[0]:>8.1e}  {most[1]:>8.1e}"]
    return "\n".join(lines)
