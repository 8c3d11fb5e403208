"""AdamW, and the learning rate of a step.

An optimizer for train() is a function of a list of parameters that returns a torch.optim.Optimizer, of torch or your
own. It is handed fp32 master weights (parallel/zero.py), not the model's own parameters.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from minitrain.config import OptimConfig


def adamw(cfg: OptimConfig) -> Callable[[list[nn.Parameter]], torch.optim.AdamW]:
    """AdamW with decoupled decay (Loshchilov & Hutter 2017, arXiv:1711.05101), torch's fused kernel.

    Matrices and embeddings decay, norms and biases (one dimension) do not.
    """

    def make(params):
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": cfg.weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)

    return make


def lr_at(step: int, cfg: OptimConfig, steps: int) -> float:
    """Of step 0 .. steps - 1: cfg.lr is reached at step warmup_steps, the minimum at the last."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / (cfg.warmup_steps + 1)
    start = steps - 1 - cfg.decay_steps if cfg.schedule == "wsd" else cfg.warmup_steps  # the last step at the peak
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    fall = {
        "constant": 1.0,
        "wsd": 1 - progress,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[cfg.schedule]
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * fall)
