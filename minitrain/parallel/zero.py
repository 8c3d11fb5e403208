"""The optimizer's side of data parallelism: fp32 master weights, fp32 gradients, one global norm.

    model parameter (bf16)  --gradient of each row, added in fp32-->  master.grad
    master (fp32, what the optimizer sees)  --after its step, rounded-->  model parameter

Where the model is fp32, its parameters are their own masters. Today all of it stays on one rank; this is where the
shards of ZeRO will be cut.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ShardedOptimizer:
    """Any torch.optim.Optimizer over the master weights of a model: make(list of fp32 Parameters) -> the optimizer.

    masters: {parameter's name: its master}. Nothing here waits for the device, if the optimizer knows torch's
    grad_scale and found_inf (the fused ones do): a loss or norm that is no number then skips this step and all that
    follow, so that the weights stay as they were until the host reads it and stops. For other optimizers the host
    looks before each step.
    """

    def __init__(self, model: nn.Module, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
        self.params = dict(model.named_parameters())
        self.masters = {name: _master(p) for name, p in self.params.items()}  # a frozen parameter is its own
        self.optimizer = make([master for master in self.masters.values() if master.requires_grad])
        self.grad_scale = self.broken = None  # 0-d fp32: divides the gradients; 1 once something was no number
        self.hooks = [
            p.register_post_accumulate_grad_hook(_grad_mover(self.masters[name]))
            for name, p in self.params.items()
            if self.masters[name] is not p
        ]

    def close(self) -> None:
        """Let go of the model: its gradients stay its own again."""
        for hook in self.hooks:
            hook.remove()

    def clip_grad_norm(self, max_norm: float, loss: Tensor | float = 0.0) -> Tensor:
        """Norm of the whole gradient, fp32 scalar on the device. The step will scale it down to max_norm (0: never).

        loss: what else must be a number for the step to be taken.
        """
        norms = torch._foreach_norm(self._grads())
        norm = torch.linalg.vector_norm(torch.stack(norms))
        self.grad_scale = (norm / max_norm).clamp(min=1) if max_norm else torch.ones_like(norm)
        broken = (~(norm + loss).isfinite()).float()
        self.broken = broken if self.broken is None else torch.maximum(self.broken, broken)
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """After clip_grad_norm: one step at this learning rate, new weights to the model, gradients gone."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.grad_scale, self.optimizer.found_inf = self.grad_scale, self.broken
            self.optimizer.step()
        elif not self.broken.item():
            torch._foreach_div_(self._grads(), self.grad_scale)
            self.optimizer.step()
        self.write_weights()
        for master in self.masters.values():
            master.grad = None

    def _grads(self) -> list[Tensor]:
        return [m.grad for m in self.masters.values() if m.grad is not None]

    @torch.no_grad()
    def write_weights(self) -> None:
        """Round the masters into the model's parameters."""
        pairs = [(p, self.masters[name]) for name, p in self.params.items() if self.masters[name] is not p]
        if pairs:
            torch._foreach_copy_(*zip(*pairs, strict=True))

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by "name.key", such as "norm.weight.exp_avg". ValueError if it keeps others."""
        names = {master: name for name, master in self.masters.items()}
        tensors = {}
        for master, state in self.optimizer.state.items():
            for key, value in state.items():
                if not torch.is_tensor(value):
                    raise ValueError(
                        f"{type(self.optimizer).__name__} keeps {key}={value!r}; make it a tensor, to be saved"
                    )
                tensors[f"{names[master]}.{key}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of state(). ValueError for a tensor whose parameter does not exist."""
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition(".")
            if name not in self.masters:
                raise ValueError(f"optimizer state for {name}, which the model has not")
            master = self.masters[name]
            on = value.device if value.ndim == 0 and not master.is_cuda else master.device
            self.optimizer.state[master][key] = value.to(on, copy=True)


def _master(p: nn.Parameter) -> nn.Parameter:
    return p if p.dtype == torch.float32 or not p.requires_grad else nn.Parameter(p.detach().float())


def _grad_mover(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Called with a parameter whose gradient is complete for this row: adds it to the master's, in fp32."""

    def move(p):
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad.add_(p.grad)
        p.grad = None

    return move
