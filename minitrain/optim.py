"""AdamW, Muon, and the learning rate of a step.

An optimizer for train() is a function of a list of parameters that returns a torch.optim.Optimizer, of torch or your
own. It is handed fp32 master weights (parallel/zero.py), not the model's own parameters; where ranks share out the
optimizer, the pieces of them that this rank has, or whole ones if the function or class says shard = "param".
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minitrain.config import OptimConfig, UserError
from minitrain.multi_tensor import adamw_, can_step


def adamw(cfg: OptimConfig) -> Callable[[list[nn.Parameter]], "AdamW"]:
    """AdamW with decoupled decay (Loshchilov & Hutter 2017, arXiv:1711.05101).

    Matrices and embeddings decay, norms and biases (one dimension) do not.
    """

    def make(params):
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": cfg.weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        moments = getattr(torch, cfg.moments)
        return AdamW(groups, moments, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)

    return make


class AdamW(torch.optim.AdamW):
    """torch's; on a GPU the extension's kernel, which does in one pass over memory what a step has to do.

    There it takes gradients in bf16 or fp32, writes `rounded`, a bf16 tensor, of the parameters that have one, which
    may be split (masters.py), and may keep its moments in bf16, rounded at random, which elsewhere is a UserError.

    rounds: whether it does that.
    """

    def __init__(self, params, moments: torch.dtype = torch.float32, **options):
        super().__init__(params, **options)
        self.moments = moments
        self.rounds = can_step([p for group in self.param_groups for p in group["params"]])
        if moments != torch.float32 and not self.rounds:
            name = str(moments).removeprefix("torch.")
            raise UserError(f"optim.moments={name}: needs bf16 weights on a GPU, and the CUDA extension")

    def use_loaded(self) -> None:
        """State was loaded: moments may be of another run's choice."""
        for state in self.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key] = state[key].to(self.moments)

    @torch.no_grad()
    def step(self) -> None:
        if not self.rounds:
            super().step()
            return
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group, params):
        """grad_scale, found_inf: 0-d fp32 on the device, as torch's fused optimizers take them."""
        device = params[0].device
        for p in params:
            if not self.state[p]:
                zeros = torch.zeros_like(p, dtype=self.moments)
                self.state[p].update(step=torch.zeros((), device=device), exp_avg=zeros, exp_avg_sq=zeros.clone())
        scale, broken = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale = torch.ones((), device=device) if scale is None else scale
        broken = torch.zeros((), device=device) if broken is None else broken
        states = [self.state[p] for p in params]
        options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        steps = [1 - broken] * len(params)  # one tensor for all would be read on the host
        torch._foreach_add_([state["step"] for state in states], steps)
        adamw_(params, states, grad_scale=scale, broken=broken, **options)


def muon(cfg: OptimConfig, vocab_size: int) -> Callable[[list[nn.Parameter]], "Muon"]:
    """Muon for the matrices of the blocks, AdamW for embedding and head (those of vocab_size rows) and for vectors."""

    def make(params):
        hidden = [p for p in params if p.ndim > 1 and len(p) != vocab_size]
        ends = [p for p in params if p.ndim > 1 and len(p) == vocab_size]
        vectors = [p for p in params if p.ndim <= 1]
        groups = [
            {"params": hidden, "is_hidden": True, "weight_decay": cfg.weight_decay},
            {"params": ends, "is_hidden": False, "weight_decay": cfg.weight_decay},
            {"params": vectors, "is_hidden": False, "weight_decay": 0.0},
        ]
        return Muon([g for g in groups if g["params"]], cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)

    make.shard = Muon.shard
    return make


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal: Jordan 2024, kellerjordan.github.io/posts/muon.

    Stacks of matrices (E, rows, columns) are taken one by one. Updates are scaled by 0.2 * sqrt(longer side), the size
    of AdamW's, so that both parts share a learning rate and decay (Liu et al. 2025, arXiv:2502.16982).
    Groups of parameters with is_hidden False are stepped by AdamW.
    """

    shard = "param"  # an orthogonal matrix is made of a whole one

    def __init__(self, params, lr, momentum=0.95, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "is_hidden": True})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    update = self._muon(p, group) if group["is_hidden"] else self._adam(p, group)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _muon(self, p, group) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
        ahead = p.grad.lerp(momentum, group["momentum"])  # Nesterov's
        return orthogonalize(ahead).mul_(0.2 * max(p.shape[-2:]) ** 0.5)

    def _adam(self, p, group) -> Tensor:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state.update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p))
            state["exp_avg_sq"] = torch.zeros_like(p)
        step = state["step"].add_(1)
        mean = state["exp_avg"].lerp_(p.grad, 1 - beta1) / (1 - beta1**step)
        square = state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2) / (1 - beta2**step)
        return mean / (square.sqrt() + group["eps"])


def orthogonalize(g: Tensor) -> Tensor:
    """(..., rows, columns) -> U V^T of its singular value decomposition, singular values in about 0.7 .. 1.2.

    Five Newton-Schulz steps with the coefficients of Jordan 2024, in bf16 on a GPU.
    """
    x = g.bfloat16() if g.is_cuda else g
    x = x.mT if g.shape[-2] > g.shape[-1] else x  # the Gram matrix of the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if g.shape[-2] > g.shape[-1] else x).to(g.dtype)


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
