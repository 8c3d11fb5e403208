"""The parts that all models share: RoPE, attention with its projections, SwiGLU, the decoder around a stack of blocks.

Dimension letters, for the whole project: T packed tokens, S keys seen, D hidden, H query heads, K key/value heads,
C channels of a head, F feed-forward, V vocabulary, E experts, A experts per token, R routed rows (T * A).
Local tensors bear them (q_THC); parameters and config fields have Hugging Face's names, which are the contract.
No torch.distributed here: parallel/ wraps these modules by hooks, or replaces a function such as `self.attention`.
Read next: qwen3.py, one architecture in full.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitrain.batch import Batch


@dataclass
class DecoderConfig:
    """What every architecture here has; the names are those of Hugging Face's config.json."""

    type: str
    """Architecture: qwen3, qwen3_moe, llama, qwen2, or a class of your own as "module:Class"."""
    pretrained: str = ""
    """Folder or hub id with Hugging Face weights to start from; its config.json then gives the sizes. Empty: random."""
    vocab_size: int = 32_000
    """Rows of the embedding and of the head; at least the tokenizer's size."""
    hidden_size: int = 1024
    """Width of the residual stream."""
    intermediate_size: int = 3072
    """Width inside a dense feed-forward layer."""
    num_hidden_layers: int = 16
    """Number of blocks."""
    num_attention_heads: int = 16
    """Query heads."""
    num_key_value_heads: int = 8
    """Key and value heads; divides num_attention_heads."""
    head_dim: int | None = None
    """Channels of a head; None: hidden_size / num_attention_heads."""
    max_position_embeddings: int = 40_960
    """Longest context that the model is meant for, in tokens; data.max_seqlen may not exceed it."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary position frequencies."""
    rope_scaling: dict[str, float | str] | None = None
    """Stretching of the rotary frequencies: None, or Llama 3's {rope_type = "llama3", factor, ...}."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    tie_word_embeddings: bool = False
    """Use the embedding matrix as the head."""
    initializer_range: float = 0.02
    """Standard deviation of random weights; those that write to the residual stream get it over sqrt(2 * layers)."""

    def __post_init__(self):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
            if self.head_dim * self.num_attention_heads != self.hidden_size:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not divisible by "
                    f"num_attention_heads={self.num_attention_heads}; set head_dim"
                )
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta={self.rope_theta}: must be more than 0 and finite")
        self._check_finite("rms_norm_eps", "initializer_range")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary embeddings turn channels in pairs, it must be even")
        rope_frequencies(self)  # raises on a scaling that is not known

    def _check_finite(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and finite")


# ---- rotary position embedding: Su et al. 2021, arXiv:2104.09864; channels i and i + C/2 turn together


def rope_frequencies(cfg: DecoderConfig, device: torch.device | None = None) -> Tensor:
    """Radians per token of each pair of channels, (C / 2,) fp32; Llama 3.1's stretching where the config has it."""
    exponent = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device=device) / cfg.head_dim
    frequency = 1.0 / cfg.rope_theta**exponent
    scaling = cfg.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequency
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind != "llama3" or not all(isinstance(scaling.get(key), int | float) for key in needed):
        raise ValueError(
            f"rope_scaling={scaling}: only rope_type llama3 is known, with the numbers {', '.join(needed)}"
        )
    # Turns within the original context: few -> stretch by `factor`, many -> leave, between -> blend.
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / scaling["factor"])


def rotate(x_THC: Tensor, cos_TC2: Tensor, sin_TC2: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + C/2) by its token's angle; computed in fp32, returned in x's dtype."""
    a, b = x_THC.chunk(2, -1)
    cos, sin = cos_TC2[:, None], sin_TC2[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_THC.dtype)


def norm_rotate(x_THC: Tensor, norm: nn.Module, cos_TC2: Tensor, sin_TC2: Tensor) -> Tensor:
    """rotate(norm(x)): as one kernel each way where `norm` is a plain RMSNorm and the kernel can run."""
    from minitrain.norm_rotate import can_run, norm_rotate  # on use only: who reads the models need not read it

    if _is_plain(norm) and norm.eps is not None and can_run(x_THC, norm.weight):
        return norm_rotate(x_THC, norm.weight, cos_TC2, sin_TC2, norm.eps)
    return rotate(norm(x_THC), cos_TC2, sin_TC2)


def add_norm(x_TD: Tensor, delta_TD: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + delta, and its norm, x and its norm if delta is None: as one kernel each way where `norm` is a plain RMSNorm
    and the kernel can run. NOTE: not to be written to in place, for it may be a view of x."""
    from minitrain.add_norm import add_norm, can_run  # on use only

    if _is_plain(norm) and norm.eps is not None and can_run(x_TD, norm.weight, delta_TD):
        return add_norm(x_TD, delta_TD, norm.weight, norm.eps)
    x_TD = x_TD if delta_TD is None else x_TD + delta_TD
    return x_TD, norm(x_TD)


def swiglu(x_TD: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """down(silu(gate(x)) * up(x)): with the pointwise work inside of products where those are plain and a kernel can.

    Shazeer 2020, arXiv:2002.05202.
    """
    from minitrain.swiglu import can_run, swiglu  # on use only; of the package itself torch 2.11 compiles no import

    if all(map(_is_plain, (gate, up, down))) and can_run(x_TD, gate.weight, up.weight, down.weight):
        return swiglu(x_TD, gate.weight, up.weight, down.weight)
    return down(F.silu(gate(x_TD)) * up(x_TD))


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a Linear without bias or an RMSNorm, and calling it nothing else: no hook or class of one's own."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    is_known = type(module) in (nn.Linear, nn.RMSNorm) and "forward" not in vars(module) and not any(hooks)
    return is_known and type(module.weight) is nn.Parameter and getattr(module, "bias", None) is None


# How parallel/tp.py cuts these modules over ranks, by name. A model with other modules says so in its own TP_PLAN.
#   vocabulary     rows of a matrix with one for each token
#   sublayer       gets the tokens of all ranks and the batch as its last argument; its result is a sum over ranks
#   columns, rows  of a Linear's outputs, inputs; "of heads": those of a key/value head and its queries stay together
#   partial        every rank has all of it and a term of its gradient: it sees a part of the tokens, heads or experts
TP_PLAN = {
    "embed_tokens": "vocabulary",
    "layers.*.input_layernorm": "partial",
    "layers.*.self_attn": "sublayer",
    "layers.*.self_attn.q_proj": "columns of heads",
    "layers.*.self_attn.k_proj": "columns of kv heads",
    "layers.*.self_attn.v_proj": "columns of kv heads",
    "layers.*.self_attn.q_norm": "partial",
    "layers.*.self_attn.k_norm": "partial",
    "layers.*.self_attn.o_proj": "rows of heads",
    "layers.*.post_attention_layernorm": "partial",
    "layers.*.mlp": "sublayer",
    "layers.*.mlp.gate_proj": "columns",
    "layers.*.mlp.up_proj": "columns",
    "layers.*.mlp.down_proj": "rows",
    "norm": "partial",
    "lm_head": "vocabulary",
}


# ---- the two halves of a block


class Attention(nn.Module):
    """Grouped-query attention over packed documents. `qk_norm` normalises each head of q and k before RoPE (Qwen3)."""

    def __init__(self, cfg: DecoderConfig, *, qkv_bias: bool = False, o_bias: bool = False, qk_norm: bool = False):
        from minitrain.attention import attention  # not before a model is built: with it comes torch's compiler, 2 s

        super().__init__()
        D, C = cfg.hidden_size, cfg.head_dim  # C * H need not be D
        self.head_dim = C
        self.q_proj = nn.Linear(D, cfg.num_attention_heads * C, bias=qkv_bias)
        self.k_proj = nn.Linear(D, cfg.num_key_value_heads * C, bias=qkv_bias)
        self.v_proj = nn.Linear(D, cfg.num_key_value_heads * C, bias=qkv_bias)
        self.o_proj = nn.Linear(cfg.num_attention_heads * C, D, bias=o_bias)
        self.q_norm = nn.RMSNorm(C, cfg.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(C, cfg.rms_norm_eps) if qk_norm else nn.Identity()
        self.norm_rotate = norm_rotate  # the seams: put any function of the same signature here
        self.attention = attention

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        from minitrain.qkv_attention import qkv_attention  # on use only

        documents = batch.cu_seqlens_q, batch.cu_seqlens_k, batch.max_seqlen
        if self._can_fuse(x_TD):
            weights = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
            norms = self.q_norm.weight, self.k_norm.weight
            o_THC = qkv_attention(x_TD, weights, norms, self.q_norm.eps, *rope, *documents[:2])
        else:
            shape = (len(x_TD), -1, self.head_dim)  # -1: the heads that this rank has
            q_THC = self.norm_rotate(self.q_proj(x_TD).view(shape), self.q_norm, *rope)
            k_TKC = self.norm_rotate(self.k_proj(x_TD).view(shape), self.k_norm, *rope)
            v_TKC = self.v_proj(x_TD).view(shape)
            o_THC = self.attention(q_THC, k_TKC, v_TKC, *documents)
        return self.o_proj(o_THC.flatten(1))

    def _can_fuse(self, x_TD: Tensor) -> bool:
        """Whether everything before o_proj is as it was made, and kernels do it in fewer passes over memory."""
        from minitrain.attention import attention
        from minitrain.qkv_attention import can_run

        modules = self.q_proj, self.k_proj, self.v_proj, self.q_norm, self.k_norm
        is_as_made = self.attention is attention and self.norm_rotate is norm_rotate and all(map(_is_plain, modules))
        if not is_as_made or self.q_norm.eps is None or self.q_norm.eps != self.k_norm.eps:
            return False
        return can_run(x_TD, self.head_dim, *(module.weight for module in modules))


class SwiGLU(nn.Module):
    """The dense feed-forward layer."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.swiglu = swiglu  # a seam, as Attention has

    def forward(self, x_TD: Tensor, batch: Batch | None = None) -> Tensor:
        return self.swiglu(x_TD, self.gate_proj, self.up_proj, self.down_proj)


class Block(nn.Module):
    """x + self_attn(norm(x), rope, batch), then x + mlp(norm(x), batch): both halves map (T, D) to (T, D)."""

    def __init__(self, cfg: DecoderConfig, self_attn: nn.Module, mlp: nn.Module):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = mlp
        self.add_norm = add_norm  # a seam, as Attention has

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        x_TD, normed_TD = self.add_norm(x_TD, None, self.input_layernorm)
        x_TD, normed_TD = self.add_norm(x_TD, self.self_attn(normed_TD, rope, batch), self.post_attention_layernorm)
        return x_TD + self.mlp(normed_TD, batch)


# ---- the whole model


class CausalLM(nn.Module):
    """Embedding, blocks, final norm and head. An architecture gives `config_class` and `block(cfg)`.

    forward returns hidden states, not logits: the loss applies the head in pieces, so that (T, V) never exists.
    Parameters are called as on the Hub without the leading "model."; a tied head is one Parameter under two names.
    """

    config_class: type[DecoderConfig] = DecoderConfig
    TP_PLAN = TP_PLAN

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.config = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleDict({str(i): self.block(cfg) for i in range(cfg.num_hidden_layers)})
        self.norm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @staticmethod
    def block(cfg: DecoderConfig) -> nn.Module:
        """One block, (x_TD, rope, batch) -> (T, D)."""
        raise NotImplementedError

    def forward(self, batch: Batch, x_TD: Tensor | None = None) -> Tensor:
        """-> hidden states (T, D). On a stage of a pipeline, x_TD comes from the one before; norm is on the last."""
        if x_TD is None:
            x_TD = self.embed_tokens(batch.tokens)
        angle_TC2 = batch.positions[:, None] * rope_frequencies(self.config, x_TD.device)
        rope = angle_TC2.cos(), angle_TC2.sin()
        for layer in self.layers.values():
            x_TD = layer(x_TD, rope, batch)
        return x_TD if self.norm is None else self.norm(x_TD)

    def logits(self, tokens: Tensor) -> Tensor:
        """Token ids (S,) or (B, S) -> logits (S, V) or (B, S, V), each row a document of its own."""
        rows = tokens.reshape(-1, tokens.shape[-1])
        hidden_TD = self(Batch.pack(list(rows)))
        return self.lm_head(hidden_TD).view(*tokens.shape, -1)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str, **options) -> "CausalLM":
        """Weights from a Hugging Face folder or hub id; see minitrain.hf.from_pretrained."""
        from minitrain import hf  # a higher floor, reached on call only: reading this file does not need it

        return hf.from_pretrained(path_or_hub_id, model_class=cls, **options)
