"""Qwen3-MoE (arXiv:2505.09388): Qwen3 whose feed-forward layers are a mixture of experts, no shared expert.

The router scores E experts for each token in fp32, keeps the best A, and the token's output is their weighted sum.
Experts are stacked, one (E, ...) tensor a matrix. A token's A copies are put in the order of their experts, so that
each expert's rows are adjacent and all experts run as one grouped matrix product; nothing waits for the host.

    x_TD --router--> experts_TA, weights_TA --sort--> x_RD in the order of experts --experts--> y_RD --sum--> (T, D)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitrain.batch import Batch
from minitrain.models.layers import TP_PLAN, Attention, Block, CausalLM, DecoderConfig


@dataclass
class Qwen3MoeConfig(DecoderConfig):
    """Defaults: Qwen3 30B-A3B."""

    type: str = "qwen3_moe"
    vocab_size: int = 151_936
    hidden_size: int = 2048
    intermediate_size: int = 6144  # of dense layers; these models have none, config.json states it all the same
    num_hidden_layers: int = 48
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int | None = 128
    attention_bias: bool = False
    """Give q, k, v and o projections a bias."""
    moe_intermediate_size: int = 768
    """Width inside an expert."""
    num_experts: int = 128
    """Experts in each layer."""
    num_experts_per_tok: int = 8
    """Experts that a token goes through."""
    norm_topk_prob: bool = True
    """Rescale the chosen experts' weights to sum to 1."""
    router_aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss, averaged over layers; 0 turns it off."""
    router_z_loss_coef: float = 0.0
    """Weight of the mean squared log-sum-exp of the router's logits, averaged over layers; 0 turns it off."""

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be between 1 and num_experts={self.num_experts}"
            )
        self._check_finite("router_aux_loss_coef", "router_z_loss_coef")


def to_experts(x_TD: Tensor, place_TA: Tensor, order_R: Tensor) -> Tensor:
    """Copies of tokens in the order of experts (R, D): copy a of token t is row place[t, a]; order is the inverse."""
    from minitrain.routed_rows import can_run, spread_rows  # on use only: who reads the models need not read it

    if can_run(x_TD):
        return spread_rows(x_TD, place_TA)
    return _GatherRows.apply(x_TD, order_R, place_TA.flatten(), place_TA.shape[1])


def from_experts(y_RD: Tensor, place_TA: Tensor, order_R: Tensor, weights_TA: Tensor) -> Tensor:
    """The weighted sum over each token's copies (T, D)."""
    from minitrain.routed_rows import can_run, sum_rows

    if can_run(y_RD):
        return sum_rows(y_RD, place_TA, weights_TA)
    y_TAD = _GatherRows.apply(y_RD, place_TA.flatten(), order_R, 1).view(*place_TA.shape, -1)
    return (y_TAD * weights_TA[..., None].to(y_TAD.dtype)).sum(1)


class _GatherRows(torch.autograd.Function):
    """x[index // copies], whose backward is a gather and a short sum: no atomics, and the same bits every time."""

    @staticmethod
    def forward(ctx, x_TD, index_R, inverse_R, copies):
        ctx.save_for_backward(inverse_R)
        ctx.copies = copies
        return x_TD[index_R // copies]

    @staticmethod
    def backward(ctx, d_RD):
        (inverse_R,) = ctx.saved_tensors
        return d_RD[inverse_R].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def _wide_matmul(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """x @ w.T in fp32 (fp64 for fp64)."""
    if x_TD.is_cuda and x_TD.dtype == torch.bfloat16:
        return _WideMatmul.apply(x_TD, w_ED)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return F.linear(x_TD.to(wide), w_ED.to(wide))


class _WideMatmul(torch.autograd.Function):
    """Of bf16 on tensor cores: products of bf16 are exact in fp32, in which they are summed. Gradients are bf16."""

    @staticmethod
    def forward(ctx, x_TD, w_ED):
        ctx.save_for_backward(x_TD, w_ED)
        return torch.mm(x_TD, w_ED.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, d_TE):
        x_TD, w_ED = ctx.saved_tensors
        d_TE = d_TE.to(x_TD.dtype)
        return d_TE @ w_ED, d_TE.T @ x_TD


class _AddLoss(torch.autograd.Function):
    """x unchanged; in backward `loss` (a scalar) gets the gradient 1, as if it were added to the objective.

    A loss made deep in the model so needs no way out through the blocks, and pipeline stages need not send it on.
    """

    @staticmethod
    def forward(ctx, x, loss):
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        (loss,) = ctx.saved_tensors
        return d, torch.ones_like(loss)


def load_balancing_loss(probs_TE: Tensor, counts_E: Tensor, num_tokens: Tensor | int) -> Tensor:
    """E * sum over experts of (copies sent to it / tokens) * (its mean probability): A when balanced, at most E.

    Fedus et al. 2021, arXiv:2101.03961, eq. 4, in the scale of Hugging Face's router_aux_loss_coef.
    """
    return probs_TE.shape[1] * ((counts_E / num_tokens) * (probs_TE.sum(0) / num_tokens)).sum()


def counts_of_row(counts_E: Tensor) -> Tensor:
    """Copies that each expert got of all tokens of a row, from those of the tokens here."""
    return counts_E


class Experts(nn.Module):
    """E SwiGLU layers as three stacked matrices; takes rows in the order of experts."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """x (R, D), the first counts[0] rows for expert 0 and so on; counts (E,) int64 -> (R, D)."""
        weights = self.gate_proj, self.up_proj, self.down_proj
        if _can_group(x_RD, self.gate_proj):
            return _swiglu(_grouped_matmul, x_RD, counts_E, *weights)
        from minitrain.routed_rows import uncompiled  # on use only: with it comes torch's compiler

        return uncompiled(_swiglu, _matmul_by_expert, x_RD, counts_E, *weights)


def _swiglu(matmul: Callable, x_RD: Tensor, counts_E: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden_RF = F.silu(matmul(x_RD, gate, counts_E)) * matmul(x_RD, up, counts_E)
    return matmul(hidden_RF, down, counts_E)


def _can_group(x_RD: Tensor, w_EFD: Tensor) -> bool:
    """_grouped_mm takes rows of whole 16 bytes."""
    return x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and w_EFD.shape[1] % 8 == w_EFD.shape[2] % 8 == 0


def _matmul_by_expert(x_RD: Tensor, w_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """The definition: x @ w[e].T for each expert's rows. Reads the counts on the host."""
    return torch.cat([F.linear(x, w) for x, w in zip(x_RD.split(counts_E.tolist()), w_EFD, strict=True)])


def _grouped_matmul(x_RD: Tensor, w_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """The same as one kernel, bfloat16 on the GPU, without a host sync."""
    return torch._grouped_mm(x_RD, w_EFD.transpose(1, 2), offs=counts_E.cumsum(0).to(torch.int32))


class MoE(nn.Module):
    """Router and experts. In training, `load` counts the rows that each expert got until somebody zeroes it.

    Twice, where the forward runs again in backward. Padding is routed as all tokens are; it counts in no loss or load.
    """

    counters = ("load",)  # buffers that begin at zero

    def __init__(self, cfg: Qwen3MoeConfig):
        super().__init__()
        self.cfg = cfg
        self.gate = nn.Linear(cfg.hidden_size, cfg.num_experts, bias=False)
        self.experts = Experts(cfg.num_experts, cfg.hidden_size, cfg.moe_intermediate_size)
        self.counts_of_row = counts_of_row  # a seam: parallel/cp.py adds up over ranks
        self.register_buffer("load", torch.zeros(cfg.num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        A, E = self.cfg.num_experts_per_tok, self.cfg.num_experts
        logits_TE = _wide_matmul(x_TD, self.gate.weight)
        probs_TE = logits_TE.softmax(-1)
        weights_TA, experts_TA = probs_TE.topk(A, -1)
        if self.cfg.norm_topk_prob:
            weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)

        sorted_R, order_R = experts_TA.flatten().sort(stable=True)
        rows_R = torch.arange(len(order_R), device=x_TD.device)
        place_TA = torch.empty_like(order_R).scatter_(0, order_R, rows_R).view(-1, A)  # where each copy went
        ends_E = torch.searchsorted(sorted_R, torch.arange(E, device=x_TD.device), right=True)
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        y_RD = self.experts(to_experts(x_TD, place_TA, order_R), counts_E)
        y_TD = from_experts(y_RD, place_TA, order_R, weights_TA)
        if not batch.share:
            return y_TD
        if batch.is_real is not None:
            real_R = batch.is_real[order_R // A].cumsum(0)
            counts_E = F.pad(real_R, (1, 0))[ends_E].diff(prepend=real_R.new_zeros(1))
        self.load.add_(counts_E)
        return self._add_router_losses(y_TD, logits_TE, probs_TE, counts_E, batch)

    def _add_router_losses(self, y_TD, logits_TE, probs_TE, counts_E, batch):
        if not self.cfg.router_aux_loss_coef and not self.cfg.router_z_loss_coef:
            return y_TD
        loss, counts_E = 0.0, self.counts_of_row(counts_E)
        num_tokens = counts_E.sum() / self.cfg.num_experts_per_tok
        real_T1 = 1 if batch.is_real is None else batch.is_real[:, None]
        if self.cfg.router_aux_loss_coef:
            loss = loss + self.cfg.router_aux_loss_coef * load_balancing_loss(probs_TE * real_T1, counts_E, num_tokens)
        if self.cfg.router_z_loss_coef:
            squares_T1 = logits_TE.logsumexp(-1, keepdim=True).square() * real_T1
            loss = loss + self.cfg.router_z_loss_coef * squares_T1.sum() / num_tokens
        return _AddLoss.apply(y_TD, loss * (batch.share / self.cfg.num_hidden_layers))


class Qwen3MoeForCausalLM(CausalLM):
    config_class = Qwen3MoeConfig
    TP_PLAN = TP_PLAN | {"layers.*.mlp.gate": "partial", "layers.*.mlp.experts": "experts"}

    @staticmethod
    def block(cfg: Qwen3MoeConfig) -> Block:
        attn = Attention(cfg, qkv_bias=cfg.attention_bias, o_bias=cfg.attention_bias, qk_norm=True)
        return Block(cfg, attn, MoE(cfg))
