"""How a plain model is wrapped to run: in place, in this visible order, names untouched."""

import functools

import torch
from torch import nn

from minitrain.config import TrainConfig, UserError
from minitrain.parallel.cp import apply_cp
from minitrain.parallel.ep import apply_ep
from minitrain.parallel.mesh import Mesh
from minitrain.parallel.pp import apply_pp
from minitrain.parallel.recompute import KEEPS, recomputed
from minitrain.parallel.tp import apply_tp

# Of a compiled block whose ranks communicate inside: as early as it can be begun, and waited for as late, so that
# products run beside. By the graph alone, not by estimated times, which could order it otherwise on another rank.
_BESIDE = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
}


def parallelize(model: nn.Module, mesh: Mesh, cfg: TrainConfig) -> nn.Module:
    """Choose the attention backend; cut layers (pp), matrices (tp), experts (ep), rows (cp); compile blocks, recompute.

    Before the model gets its weights if it is on meta, so that no rank ever has all of them. What an earlier call put
    on the model gives way, but for cuts of parameters: UserError.
    """
    if hasattr(model, "link") or any(hasattr(p, "cut_on") for p in model.parameters()):
        raise UserError("the weights of this model are cut by an earlier run with parallel.pp, tp or ep")
    _use_attention(model, mesh, cfg)
    if mesh.group("pp").size > 1:
        apply_pp(model, mesh)
    if mesh.group("tp").size > 1:
        apply_tp(model, mesh)
    if mesh.group("ep").size > 1:
        apply_ep(model, mesh)
    apply_cp(model, mesh)
    for block in model.layers.values():
        plain = forward = getattr(block.forward, "plain", block.forward)
        if cfg.recompute in KEEPS:  # inside of what is compiled, so that it is one graph
            forward = recomputed(forward, KEEPS[cfg.recompute])
        if cfg.compile == "on" or (cfg.compile == "auto" and mesh.device.type == "cuda"):
            options = _BESIDE if mesh.group("tp").size * mesh.group("cp").size > 1 else None
            forward = torch.compile(forward, dynamic=False, options=options)
        if cfg.recompute == "full":
            forward = recomputed(forward)
        if forward is not plain:
            forward.plain = plain
        block.forward = forward
    return model


def compute_dtype(mesh: Mesh, cfg: TrainConfig) -> torch.dtype:
    """Of weights and activations."""
    if cfg.dtype == "auto":
        return torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    return getattr(torch, cfg.dtype)


def _use_attention(model, mesh, cfg):
    """On every module that calls minitrain's own attention; a user's function stays."""
    from minitrain.attention import attention, choose  # on call only, as in models/layers.py

    def is_ours(function) -> bool:
        """minitrain's attention, or what an earlier parallelize made of it."""
        function = getattr(function, "plain", function)
        if isinstance(function, functools.partial):
            return function.func is attention and function.keywords.keys() == {"backend"}
        return function is attention

    ours = [m for m in model.modules() if is_ours(getattr(m, "attention", None))]
    if cfg.attention != "auto":  # what cannot work is said now, not in the first step
        if not ours:
            raise UserError(f"train.attention={cfg.attention!r}: no module of the model calls minitrain's attention")
        try:
            choose(cfg.attention, mesh.device.type, compute_dtype(mesh, cfg), model.config.head_dim)
        except ValueError as error:
            raise UserError(f"train.attention: {error}") from None
    is_default = cfg.attention in ("auto", "native")  # which takes our kernels if they can run
    for module in ours:
        module.attention = attention if is_default else functools.partial(attention, backend=cfg.attention)
