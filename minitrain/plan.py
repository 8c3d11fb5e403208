"""How much memory a run takes on each rank, from its config alone: nothing is allocated.

Weights, gradients, states and buffers are counted as the trainer allocates them. Activations are what a compiled block
keeps for its backward: the input of every matrix product and of attention, once, or what train.recompute leaves of it;
where minitrain/swiglu.py can run on a Hopper GPU without the third of SwiGLU's, which is less than other GPUs keep.
The CUDA context, NCCL and what the allocator loses are not counted.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from minitrain.config import Config, ParallelConfig, UserError
from minitrain.loss import piece_rows
from minitrain.models import build_model
from minitrain.parallel.comm import Group
from minitrain.parallel.cp import assign, runs_of
from minitrain.parallel.ddp import Unit, is_local, make_units, row_buffers
from minitrain.parallel.ep import apply_ep
from minitrain.parallel.layout import objections
from minitrain.parallel.mesh import GRAD_SUMS, Mesh, grids, sharded_over
from minitrain.parallel.offload import on_host
from minitrain.parallel.pp import apply_pp, messages_at_a_time, schedule
from minitrain.parallel.tp import apply_tp

_WIDE = 4  # bytes of fp32: masters, their gradients, moments


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int  # in the compute dtype, as far as they stay
    gradients: int  # fp32; of one row a step as they come: in reduce_dtype, or of units that no other rank has, in ours
    states: int  # master weights and AdamW's two moments, as far as they stay on the device
    passing: int  # and those that come for the step, when the activations are gone
    activations: int  # of one row, or of those under way in a pipeline, and what waits for gradients of weights
    loss: int  # logits of a piece, gradients of hidden states and head
    block: int  # what the backward of one block makes for itself, when the loss is done
    buffers: int  # gathered weights, gradients on their way
    early: int  # of the gradients: there while a row's activations are, too
    host: int  # states in host memory

    @property
    def peak(self) -> int:
        """On the device."""
        row = self.early + self.activations + max(self.loss, self.block)
        return self.weights + self.buffers + self.states + max(row, self.passing + self.gradients)

    def table(self) -> str:
        """One line, in GiB."""
        parts = [f.name for f in fields(self) if f.name not in ("early", "host")]
        return ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in [*parts, "peak", "host"])


def predict_memory(cfg: Config, ranks: int = 1) -> Memory:
    """Of a run on this many GPUs; of a pipeline's stages, of the one that takes most. UserError if they cannot run it.

    Rows are of documents of max_seqlen, and each expert gets as many tokens as another.
    """
    if reasons := objections(cfg.parallel, ranks, cfg.model):
        raise UserError("; ".join(reasons))
    stages = [Group(rank, cfg.parallel.pp) for rank in range(cfg.parallel.pp)]
    return max((_of_stage(cfg, ranks, stage) for stage in stages), key=lambda memory: memory.peak)


def _of_stage(cfg: Config, ranks: int, stage: Group) -> Memory:
    parallel, model = cfg.parallel, build_model(cfg.model)
    width = 4 if cfg.train.dtype == "float32" else 2
    is_flat = ranks > 1 or bool(parallel.offload)  # zero.ShardedOptimizer, else MasterOptimizer
    mesh = _mesh(cfg, ranks, stage)
    if stage.size > 1:
        apply_pp(model, mesh)
    if parallel.tp > 1:
        apply_tp(model, mesh)
    if parallel.ep > 1:
        apply_ep(model, mesh)
    units = make_units(model, mesh)
    whole = sum(unit.numel for unit in units.values()) if is_flat else sum(p.numel() for p in model.parameters())
    shard = sum(unit.shard_numel for unit in units.values()) if is_flat else whole
    offloaded = on_host(units, parallel)
    away = [unit.shard_numel if key in offloaded else 0 for key, unit in units.items()]
    passing = max(sum(away[i : i + 3]) for i in range(len(away)))  # one comes, one is stepped, and one goes
    is_split = width < _WIDE and not parallel.offload  # masters.py
    master = 2 if is_split else _WIDE if is_flat or width < _WIDE else 0
    state = 2 * (_WIDE if cfg.optim.moments == "float32" else 2) + master
    rows = max(1, cfg.data.rows_per_step // mesh.dp_size)
    actions = schedule(parallel.pp_schedule, stage.rank, stage.size, rows, parallel.pp_parts)
    local = {key for key, unit in units.items() if is_local(unit)}
    of_local = sum(p.numel() for key in local for p in units[key].params.values())
    as_it_comes = 2 if rows == 1 and parallel.reduce_dtype == "bfloat16" else _WIDE
    flat = 0
    for unit in units.values():
        if parallel.zero >= 2 and unit.shard.size > 1:
            flat += as_it_comes * unit.shard_numel
        elif not is_local(unit):
            flat += _WIDE * unit.numel
    gradients = flat + of_local * (_WIDE if rows > 1 else width)
    whole_block, kept = (width * _kept_by_block(cfg, recompute) for recompute in ("none", cfg.train.recompute))
    deferred = width * _deferred_by_block(cfg) if parallel.pp_schedule == "zb-h1" else 0
    changes = {"forward": kept, "backward": deferred - kept, "weights": -deferred}
    of_rows = max(itertools.accumulate(changes[action] for action, *_ in actions))
    sent = min(messages_at_a_time(stage.size), 2 * rows) * parallel.pp_parts if stage.size > 1 else 0
    messages = sent * width * _tokens(cfg) * cfg.model.hidden_size // parallel.tp
    return Memory(
        weights=width * (shard if parallel.zero == 3 else whole),
        gradients=gradients,
        states=state * (shard - sum(away)),
        passing=state * passing,
        activations=of_rows * len(model.layers) // parallel.pp_parts + messages,
        loss=_loss_bytes(model.lm_head.weight, _tokens(cfg), width) if model.lm_head is not None else 0,
        block=2 * whole_block - kept,
        buffers=_buffers(model, units, parallel, width),
        early=gradients if rows > 1 else flat,
        host=state * sum(away),
    )


def _mesh(cfg: Config, ranks: int, stage: Group) -> Mesh:
    """init_mesh's, of groups that cannot communicate; of each the first rank, which has most of what is cut."""
    parallel = cfg.parallel
    axes, fine = grids(ranks, parallel, cfg.model)
    groups = {name: Group(size=size) for name, size in (axes | fine).items()}
    shards = {kind: math.prod(fine[d] for d in sharded_over(dims, parallel.zero)) for kind, dims in GRAD_SUMS.items()}
    ranks_of = {kind: math.prod(fine[d] for d in dims) for kind, dims in GRAD_SUMS.items()}
    return Mesh(
        torch.device("meta"),
        dp_size=axes["dp"],
        groups=groups | {"pp": stage, "ends": Group(size=min(2, stage.size))},
        shardings={kind: (Group(size=size), Group(size=ranks_of[kind] // size)) for kind, size in shards.items()},
        parts=parallel.pp_parts,
    )


def _buffers(model: nn.Module, units: dict[str, Unit], parallel: ParallelConfig, width: int) -> int:
    """Of units that ranks of one host share out: whole weights under ZeRO 3, a row's gradients under ZeRO 2 and 3."""
    if parallel.zero < 2:
        return 0
    shared = {key: unit for key, unit in units.items() if unit.shard.size > 1}
    buffers = row_buffers(model, shared, parallel.pp_schedule == "zb-h1")
    rows = sum(numel * count for (numel, _), count in buffers.items())
    rows = width * (rows + max((unit.numel for unit in shared.values()), default=0))  # and what comes of other ranks
    if parallel.zero == 2:
        return rows
    blocks, others = Counter(), 0
    for key, unit in shared.items():
        if key.startswith("layers."):
            blocks[key.split("/")[0]] += unit.numel
        else:
            others += unit.numel
    return rows + width * (others + 2 * max(blocks.values(), default=0))


def _tokens(cfg: Config) -> int:
    """Of a row, that a rank has; those of tp share them between sublayers only."""
    return cfg.data.tokens_per_row // cfg.parallel.cp


def _keys(cfg: Config) -> int:
    """That attention sees of a row, on the rank of cp that gathers most of them."""
    T, cp = cfg.data.tokens_per_row, cfg.parallel.cp
    ends = [*range(0, T, cfg.data.max_seqlen), T]
    return T if cp == 1 else max(sum(end - begin for begin, _, end in runs_of(of, ends)) for of in assign(ends, cp))


def _widths(cfg: Config) -> tuple[int, int, int, int, int]:
    """Of a token in a block, of this rank: D, queries, keys, the feed-forward's inside, copies for experts."""
    sizes, tp = cfg.model, cfg.parallel.tp
    C, experts = sizes.head_dim, getattr(sizes, "num_experts_per_tok", 0)
    q, kv = sizes.num_attention_heads * C // tp, sizes.num_key_value_heads * C // min(tp, sizes.num_key_value_heads)
    inner = (experts * sizes.moe_intermediate_size if experts else sizes.intermediate_size) // tp
    return sizes.hidden_size, q, kv, inner, experts


def _deferred_by_block(cfg: Config) -> int:
    """Elements of a row between its backward and the gradients of its weights: a Linear's input and output, each."""
    D, q, kv, inner, experts = _widths(cfg)
    return _tokens(cfg) * (2 * D + 2 * q + 2 * kv + (0 if experts else 2 * D + 3 * inner))


def _kept_by_block(cfg: Config, recompute: str) -> int:
    """Elements of a row."""
    D, q, kv, inner, experts = _widths(cfg)
    tp, T = cfg.parallel.tp, _tokens(cfg)
    stream = T * D // tp
    if recompute == "full":
        return stream
    if recompute == "block":
        return stream + T * q
    if recompute == "none":  # the residual stream and its norm, twice; q and k before and after RoPE; SwiGLU's
        products, keys = 2 if _has_swiglu_kernels(cfg) else 3, 1 if _has_qkv_kernels(cfg) else 2
        return 2 * stream + T * (2 * D + 3 * q + kv + products * inner + 2 * experts * D) + keys * _keys(cfg) * kv
    products = T * (2 * q + 2 * kv + D + 2 * inner + experts * D)  # results of matrix products, and of attention
    products += T * D if tp > 1 and not experts else 0  # of the last one, before ranks add theirs up
    products += T * experts * D if cfg.parallel.ep > 1 else 0  # rows that came for the experts
    return stream + products


def _has_swiglu_kernels(cfg: Config) -> bool:
    """They make silu(gate) * up again."""
    D, _, _, inner, experts = _widths(cfg)
    return _has_plain_linears(cfg) and not experts and D % 64 == inner % 64 == 0


def _has_qkv_kernels(cfg: Config) -> bool:
    """They norm and turn keys again."""
    is_ours = cfg.train.attention in ("auto", "native") and cfg.parallel.cp == 1 and cfg.model.head_dim in (64, 128)
    has_norms = cfg.model.type.startswith("qwen3") and not cfg.model.attention_bias  # of heads, and no biases
    return _has_plain_linears(cfg) and is_ours and has_norms


def _has_plain_linears(cfg: Config) -> bool:
    """In bf16, and not those of zb-h1, which put gradients aside."""
    return cfg.train.dtype != "float32" and cfg.parallel.pp_schedule != "zb-h1"


def _loss_bytes(head: Tensor, T: int, width: int) -> int:
    V, D = head.shape
    return T * D * width + V * D * _WIDE + min(T, piece_rows(V, width)) * V * width
