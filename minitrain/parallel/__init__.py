"""How a plain model is wrapped to run: in place, in this visible order, names untouched."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minitrain.attention import attention, choose
from minitrain.config import TrainConfig, UserError
from minitrain.parallel.mesh import Mesh


def parallelize(model: nn.Module, mesh: Mesh, cfg: TrainConfig) -> nn.Module:
    """Choose the attention backend, compile each block's forward, then recompute it in backward where asked for."""
    if cfg.attention != "auto":
        _use_attention(model, mesh, cfg)
    for block in model.layers.values():
        if cfg.compile == "on" or (cfg.compile == "auto" and mesh.device.type == "cuda"):
            block.forward = torch.compile(block.forward, dynamic=False)
        if cfg.recompute == "full":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


def compute_dtype(mesh: Mesh, cfg: TrainConfig) -> torch.dtype:
    """Of weights and activations."""
    if cfg.dtype == "auto":
        return torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    return getattr(torch, cfg.dtype)


def _use_attention(model, mesh, cfg):
    try:
        choose(cfg.attention, mesh.device.type, compute_dtype(mesh, cfg), model.config.head_dim)
    except ValueError as error:
        raise UserError(f"train.attention: {error}") from None
    for module in model.modules():
        if getattr(module, "attention", None) is attention:  # a user's own function stays
            module.attention = functools.partial(attention, backend=cfg.attention)
