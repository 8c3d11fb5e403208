"""What is done with gradients: AdamW's step and the norm, one kernel for a list of tensors, and sums of them."""

import torch
from torch import Tensor

from minitrain.extension import address, aligned, kernels, runs_on, stream_of
from minitrain.masters import is_split


def can_step(params: list[Tensor]) -> bool:
    """Whether adamw_ takes these: fp32 on a GPU that the extension is built for, their `rounded` bf16, all contiguous.
    It takes them split as well, which they are once the optimizer has been made.

    Known before the first step too, when offloaded masters are in host memory: by where their `rounded` are. Gradients
    are read row by row, with which a parameter of other strides would be paired wrongly.
    """
    pairs = [(p, getattr(p, "rounded", p)) for p in params]
    return all(
        p.dtype == torch.float32
        and (x is p or x.dtype == torch.bfloat16)
        and runs_on(x.device.type, x.device.index)
        and p.is_contiguous()
        and x.is_contiguous()
        for p, x in pairs
    )


def adamw_(
    params: list[Tensor],
    states: list[dict[str, Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor,
    broken: Tensor,
) -> None:
    """One step of AdamW in place, the host does not wait; their `rounded`, where they have one, gets the new values.

    states: exp_avg and exp_avg_sq, all of fp32 or all of bf16, which is rounded up or down at random, so that small
    changes are not lost; step, 0-d fp32: of this step, from 1 on. Gradients are bf16 or fp32, and are divided by
    grad_scale. broken not 0: nothing is done. Both 0-d fp32. Sums in fp32.
    """
    grads = [aligned(p.grad) for p in params]
    device = params[0].device
    kernels.adamw(
        [_addresses(*of) for of in zip(params, grads, states, strict=True)],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale.data_ptr(),
        broken=broken.data_ptr(),
        moments_are_bf16=states[0]["exp_avg"].dtype == torch.bfloat16,
        device=device.index,
        stream=stream_of(device),
    )


def _addresses(p, grad, state):
    tensors = p, state["exp_avg"], state["exp_avg_sq"], grad, getattr(p, "rounded", None), state["step"]
    return *map(address, tensors), p.numel(), grad.dtype == torch.bfloat16, is_split(p)


def add_(total: Tensor, terms: Tensor, is_first: bool) -> None:
    """total += each of terms (n, *total.shape) in their order; is_first: total begins at zero, whatever it holds.

    total is contiguous, and as wide as terms or wider.
    """
    device, numel = total.device, total.numel()
    can_run = (total.dtype, terms.dtype) == (torch.float32, torch.bfloat16) and runs_on(device.type, device.index)
    if can_run and (len(terms) == 1 or numel % 8 == 0):  # else a term does not begin at a border of 16 bytes
        terms = aligned(terms)
        places = total.data_ptr(), terms.data_ptr()
        kernels.add(*places, len(terms), numel, is_first, device.index, stream_of(device))
        return
    if is_first:
        total.copy_(terms[0])
    for term in terms[1:] if is_first else terms:
        total.add_(term)


@torch.profiler.record_function("minitrain::global_norm")
def global_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all elements, 0-d in fp32 (fp64 for fp64), the same bits every time. There must be a tensor."""
    first, dtypes = tensors[0], (torch.float32, torch.bfloat16)
    if not all(runs_on(x.device.type, x.device.index) and x.dtype in dtypes for x in tensors):
        norms = torch._foreach_norm(tensors, 2, torch.promote_types(first.dtype, torch.float32))
        return torch.linalg.vector_norm(torch.stack(norms))
    tensors = [aligned(x) for x in tensors]
    gradients = [kernels.Gradient(x.data_ptr(), x.numel(), x.dtype == torch.bfloat16) for x in tensors]
    parts = torch.empty(kernels.num_square_parts(gradients), device=first.device)
    kernels.squares(gradients, parts.data_ptr(), first.device.index, stream_of(first.device))
    return parts.sum().sqrt()
