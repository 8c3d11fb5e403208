"""Linear cross-entropy in pieces: the head and the loss together, so that the (T, V) logits never exist.

A loss is any function (hidden_TD, head, batch) -> (sum over trained tokens, {name: sum}). The step divides by the
number of trained tokens of all rows and ranks, so that cutting a step into more rows changes nothing.
"""

import torch
from torch import Tensor, nn

from minitrain.batch import IGNORE, Batch
from minitrain.extension import address, aligned, kernels, runs_on, runs_on_hopper, stream_of

_PIECE_BYTES = 5 << 28  # 1.25 GiB of logits at a time, enough for full GEMM speed


def cross_entropy(hidden_TD: Tensor, head: nn.Linear, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of -log softmax(head(hidden))[target] over targets that are not IGNORE, fp32 (fp64 for fp64)."""
    if getattr(head, "bias", None) is not None:
        raise ValueError("cross_entropy: the head has a bias, which this loss does not apply")
    vocabulary = getattr(head, "vocabulary", _Whole)
    return _LinearCrossEntropy.apply(hidden_TD, head.weight, batch.targets, vocabulary, torch.is_grad_enabled()), {}


class _Whole:
    """The vocabulary of a head that has all of it; parallel/tp.py puts another on heads of which ranks have ranges."""

    first = 0  # token of the head's first row

    @staticmethod
    def gather(x: Tensor) -> Tensor:
        """Of each rank, (ranks, *x.shape)."""
        return x[None]

    @staticmethod
    def sum(x: Tensor) -> None:
        """Over the ranks, in place."""


def piece_rows(vocab_size: int, element_bytes: int) -> int:
    """How many tokens have their logits at a time: a power of two, of which tiles of the products leave no rest."""
    fit = max(1, _PIECE_BYTES // (vocab_size * element_bytes))
    return 1 << (fit.bit_length() - 1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward, while a piece's logits are there; backward only scales them."""

    @staticmethod
    def forward(ctx, x_TD, w_VD, targets_T, vocabulary, grad_enabled):
        with_d_x, with_d_w = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])  # these ignore no_grad
        d_x = x_TD.new_empty(x_TD.shape) if with_d_x else None
        d_w = torch.empty_like(w_VD, dtype=_wide(w_VD.dtype)) if with_d_w else None
        with_grad = with_d_x or with_d_w
        losses = []
        rows = piece_rows(w_VD.shape[0], x_TD.element_size())
        buffer = x_TD.new_empty(min(rows, len(x_TD)), len(w_VD))  # for all pieces: else two would be there at a time
        for start in range(0, len(x_TD), rows):
            piece = slice(start, start + rows)
            x = x_TD[piece]
            logits_NV = buffer[: len(x)]
            if vocabulary is _Whole:
                partials_NP2 = write_logits(x, w_VD, logits_NV)
                losses.append(softmax_cross_entropy_(logits_NV, targets_T[piece], with_grad, partials_NP2))
            else:
                torch.mm(x, w_VD.T, out=logits_NV)
                losses.append(_cut_softmax_cross_entropy_(logits_NV, targets_T[piece], vocabulary, with_grad))
            if with_d_x:  # logits_NV now holds their gradient
                torch.mm(logits_NV, w_VD, out=d_x[piece])
            if with_d_w:
                _add_product(d_w, logits_NV.T, x, is_first=start == 0)
        if with_d_x:
            vocabulary.sum(d_x)
        ctx.save_for_backward(d_x, d_w)
        ctx.w_dtype = w_VD.dtype
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx, d):
        d_x, d_w = ctx.saved_tensors
        d_x = None if d_x is None else _scaled(d_x, d, d_x.dtype)
        d_w = None if d_w is None else _scaled(d_w, d, ctx.w_dtype)
        return d_x, d_w, None, None, None


def _add_product(out: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """out += a @ b, or if it is the first, out = a @ b, with out in fp32 whatever a and b are."""
    beta = 0 if is_first else 1  # 0: what is there is not read
    if out.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)


def write_logits(x_ND: Tensor, w_VD: Tensor, out_NV: Tensor) -> Tensor | None:
    """out = x @ w.T; -> if a kernel for Hopper can, what the softmax needs of P parts of each row, (N, P, 2) fp32."""
    (N, D), V = x_ND.shape, len(w_VD)
    is_bf16 = x_ND.dtype == w_VD.dtype == torch.bfloat16
    if not is_bf16 or D % 64 or V % 8 or N == 0 or not runs_on_hopper(x_ND.device.type, x_ND.device.index):
        torch.mm(x_ND, w_VD.T, out=out_NV)
        return None
    x_ND, w_VD = aligned(x_ND), aligned(w_VD)
    partials_NP2 = x_ND.new_empty(N, kernels.num_partials(V), 2, dtype=torch.float32)
    kernels.logits_with_partials(
        x=x_ND.data_ptr(),
        weight=w_VD.data_ptr(),
        rows=N,
        depth=D,
        vocab=V,
        logits=out_NV.data_ptr(),
        partials=partials_NP2.data_ptr(),
        device=x_ND.device.index,
        stream=stream_of(x_ND.device),
    )
    return partials_NP2


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor, rounded to dtype on the way. x is contiguous, factor 0-d."""
    out = torch.empty_like(x, dtype=dtype)
    if dtype != torch.bfloat16 or factor.dtype != torch.float32 or not runs_on(x.device.type, x.device.index):
        return torch.mul(x, factor, out=out)
    kernels.scale(
        x=x.data_ptr(),
        is_bf16=x.dtype == dtype,
        factor=factor.data_ptr(),
        out=out.data_ptr(),
        numel=x.numel(),
        device=x.device.index,
        stream=stream_of(x.device),
    )
    return out


@torch.library.custom_op("minitrain::softmax_cross_entropy_", mutates_args={"logits_NV"})
def softmax_cross_entropy_(
    logits_NV: Tensor, targets_N: Tensor, write_grad: bool, partials_NP2: Tensor | None = None
) -> Tensor:
    """-> losses (N,) fp32, 0 where the target is IGNORE. write_grad: logits become softmax - onehot, in place.

    logits (N, V) contiguous, bf16 or fp32 (on the CPU also fp64, whose losses are fp64); targets (N,) int64. partials:
    what was found of the logits when they were made, which are then read once less.
    """
    return _in_torch(logits_NV, targets_N, write_grad)


def _in_torch(logits_NV, targets_N, write_grad):
    rows = zip(logits_NV.split(256), targets_N.split(256), strict=True)  # what is made in fp32 on the way stays small
    return torch.cat([_rows_in_torch(*r, write_grad) for r in rows])


def _rows_in_torch(logits_NV, targets_N, write_grad):
    wide = logits_NV.to(_wide(logits_NV.dtype))  # the tensor itself where it is fp32
    trained_N = targets_N != IGNORE
    picked_N1 = targets_N.clamp(min=0)[:, None]
    lse_N = wide.logsumexp(-1)
    losses_N = (lse_N - wide.gather(1, picked_N1)[:, 0]).where(trained_N, 0)
    if write_grad:
        probs = wide.sub_(lse_N[:, None]).exp_()
        probs.scatter_add_(1, picked_N1, -torch.ones_like(picked_N1, dtype=probs.dtype))
        logits_NV.copy_(probs.mul_(trained_N[:, None]))
    return losses_N


@softmax_cross_entropy_.register_fake
def _(logits_NV, _targets_N, _write_grad, _partials_NP2=None):
    return logits_NV.new_empty(len(logits_NV), dtype=_wide(logits_NV.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cut_softmax_cross_entropy_(logits_NV: Tensor, targets_N: Tensor, vocabulary, write_grad: bool) -> Tensor:
    """The same where each rank has the logits of a range of tokens: log-sum-exps and targets' logits are exchanged."""
    wide = _wide(logits_NV.dtype)
    local_N1 = (targets_N - vocabulary.first)[:, None]
    here_N1 = (local_N1 >= 0) & (local_N1 < logits_NV.shape[1])
    local_N1 = local_N1.where(here_N1, 0)
    picked_N = logits_NV.gather(1, local_N1).to(wide).where(here_N1, 0)[:, 0]
    lse_N = torch.cat([piece.to(wide).logsumexp(-1) for piece in logits_NV.split(256)])
    lse_RN, picked_RN = vocabulary.gather(torch.stack([lse_N, picked_N])).unbind(1)
    lse_N, trained_N = lse_RN.logsumexp(0), targets_N != IGNORE
    if write_grad:
        rows = zip(*(t.split(256) for t in (logits_NV, lse_N, local_N1, here_N1, trained_N)), strict=True)
        for logits, lse, local, here, trained in rows:
            probs = (logits.to(wide) - lse[:, None]).exp_()
            probs.scatter_add_(1, local, -here.to(wide))
            logits.copy_(probs.mul_(trained[:, None]))
    return (lse_N - picked_RN.sum(0)).where(trained_N, 0)


if kernels is not None:

    @softmax_cross_entropy_.register_kernel("cuda")
    def _(logits_NV, targets_N, write_grad, partials_NP2=None):
        if not runs_on(logits_NV.device.type, logits_NV.device.index):
            return _in_torch(logits_NV, targets_N, write_grad)
        N, V = logits_NV.shape
        if not logits_NV.is_contiguous() or not targets_N.is_contiguous():
            raise ValueError("softmax_cross_entropy_: logits and targets must be contiguous")
        losses_N = logits_NV.new_empty(N, dtype=torch.float32)
        kernels.softmax_cross_entropy_(
            logits=logits_NV.data_ptr(),
            dtype=str(logits_NV.dtype).removeprefix("torch."),
            targets=targets_N.data_ptr(),
            loss=losses_N.data_ptr(),
            rows=N,
            vocab=V,
            write_grad=write_grad,
            device=logits_NV.device.index,
            stream=stream_of(logits_NV.device),
            partials=address(partials_NP2),
            num_partials=0 if partials_NP2 is None else partials_NP2.shape[1],
        )
        return losses_N
