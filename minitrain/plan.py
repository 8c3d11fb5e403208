"""How much memory a run takes on each rank, from its config alone: nothing is allocated.

Weights, gradients, states and buffers are counted as the trainer allocates them. Activations are what a compiled block
keeps for its backward: the input of every matrix product and of attention, once, or what train.recompute leaves of it.
The CUDA context, NCCL and what the allocator loses are not counted.
"""

import itertools
from dataclasses import dataclass, fields

import torch

from minitrain.config import Config
from minitrain.loss import piece_rows
from minitrain.models import build_model
from minitrain.parallel.comm import Group
from minitrain.parallel.ddp import DENSE, make_units, row_buffers
from minitrain.parallel.mesh import Mesh
from minitrain.parallel.pp import apply_pp, schedule

_WIDE = 4  # bytes of fp32: masters, their gradients, moments


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int  # in the compute dtype, as far as they stay
    gradients: int  # fp32; in the compute dtype where one process has one row a step
    states: int  # master weights and AdamW's two moments
    activations: int  # of one row, or of those that are under way in a pipeline
    loss: int  # logits of a piece, gradients of hidden states and head
    block: int  # what the backward of one block makes for itself, when the loss is done
    buffers: int  # gathered weights, gradients on their way
    gradients_wait: bool  # gradients are there while a row's activations are, too

    @property
    def peak(self) -> int:
        row = self.activations + max(self.loss, self.block)
        row = row + self.gradients if self.gradients_wait else max(row, self.gradients)
        return self.weights + self.states + self.buffers + row

    def table(self) -> str:
        """One line, in GiB."""
        parts = [f.name for f in fields(self) if f.type is int]
        return ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in [*parts, "peak"])


def predict_memory(cfg: Config, ranks: int = 1) -> Memory:
    """Of a run on this many GPUs; of a pipeline's stages, of the one that takes most."""
    stages = [Group(rank, cfg.parallel.pp) for rank in range(cfg.parallel.pp)]
    return max((_of_stage(cfg, ranks // len(stages), stage) for stage in stages), key=lambda memory: memory.peak)


def _of_stage(cfg: Config, ranks: int, stage: Group) -> Memory:
    """ranks: of one stage."""
    parallel, T = cfg.parallel, cfg.data.tokens_per_row
    width = 4 if cfg.train.dtype == "float32" else 2
    is_flat = ranks * stage.size > 1 or bool(parallel.offload)  # zero.ShardedOptimizer, else MasterOptimizer
    shards = 1 if parallel.zero == 0 else parallel.shard_within or ranks
    zero = parallel.zero if shards > 1 else 0
    model = build_model(cfg.model)
    kinds = dict.fromkeys((DENSE, (*DENSE, "ends")), (Group(size=shards), Group()))
    mesh = Mesh(torch.device("meta"), groups={"pp": stage}, shardings=kinds, parts=parallel.pp_parts)
    if stage.size > 1:
        apply_pp(model, mesh)
    rows = max(1, cfg.data.rows_per_step // ranks) if stage.size > 1 else 1
    actions = schedule(parallel.pp_schedule, stage.rank, stage.size, rows, parallel.pp_parts)
    under_way = max(itertools.accumulate(1 if action == "forward" else -1 for action, *_ in actions))
    units = make_units(model, mesh)
    whole = sum(unit.numel for unit in units.values()) if is_flat else sum(p.numel() for p in model.parameters())
    shard = whole // shards
    blocks = [unit.numel for key, unit in units.items() if key.startswith("layers.")]
    gathers = zero == 3
    held = shard
    if parallel.offload:  # a unit that comes, one that is stepped, and one that goes
        sizes = [unit.shard_numel for unit in units.values()]
        held = max(sum(sizes[i : i + 3]) for i in range(len(sizes)))
    moments = 2 * (_WIDE if cfg.optim.moments == "float32" else 2)
    states = held * (moments + (_WIDE if is_flat or width < _WIDE else 0))
    whole_block = T * width * _kept_per_token(model, "none")
    kept = T * width * _kept_per_token(model, cfg.train.recompute)
    one_row = not is_flat and cfg.data.rows_per_step == 1
    buffers = width * (whole - sum(blocks) + 2 * max(blocks)) if gathers else 0
    if zero >= 2:
        reduced = 2 if parallel.reduce_dtype == "bfloat16" else _WIDE
        buffers += reduced * sum(numel * count for numel, count in row_buffers(units).items())
    return Memory(
        weights=width * (shard if gathers else whole),
        gradients=(width if one_row else _WIDE) * (shard if zero >= 2 else whole),
        states=states,
        activations=under_way * len(model.layers) // parallel.pp_parts * kept,
        loss=_loss_bytes(cfg.model, T, width) if model.lm_head is not None else 0,
        block=2 * whole_block - kept,
        buffers=buffers,
        gradients_wait=is_flat or cfg.data.rows_per_step > ranks,
    )


def _kept_per_token(model, recompute: str) -> int:
    """Elements that a block keeps of a token."""
    cfg, has_norms = model.config, any("q_norm" in name for name, _ in model.named_parameters())
    D, C = cfg.hidden_size, cfg.head_dim
    q, kv = cfg.num_attention_heads * C, cfg.num_key_value_heads * C
    experts = getattr(cfg, "num_experts_per_tok", 0)  # each has a copy of the token
    copies, F = experts or 1, cfg.moe_intermediate_size if experts else cfg.intermediate_size
    if recompute == "full":
        return D
    if recompute == "block":
        return D + q
    products = D + (q + 2 * kv) + q + D + copies * 2 * F + experts * D  # a block's input; results of matrix products
    if recompute == "cheap":
        return products + (q + kv if has_norms else 0)  # after norm_rotate
    return products + 2 * D + (q + kv) + copies * F + experts * D  # norms; after RoPE; SwiGLU's; copies of tokens


def _loss_bytes(cfg, T: int, width: int) -> int:
    D, V = cfg.hidden_size, cfg.vocab_size
    return T * D * width + V * D * _WIDE + min(T, piece_rows(V, width)) * V * width
