"""Qwen3, the dense models (arXiv:2505.09388).

Pre-norm decoder with grouped-query attention, SwiGLU and half-split RoPE. Beside Llama: each head of q and k is
normalised before RoPE, head_dim is its own number (128 at hidden size 1024), and the small models tie the head.
"""

from dataclasses import dataclass

from minitrain.models.layers import Attention, Block, CausalLM, DecoderConfig, SwiGLU


@dataclass
class Qwen3Config(DecoderConfig):
    """Defaults: Qwen3 0.6B."""

    type: str = "qwen3"
    vocab_size: int = 151_936
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int | None = 128
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    """Give q, k, v and o projections a bias."""


class Qwen3ForCausalLM(CausalLM):
    config_class = Qwen3Config

    @staticmethod
    def block(cfg: Qwen3Config) -> Block:
        attn = Attention(cfg, qkv_bias=cfg.attention_bias, o_bias=cfg.attention_bias, qk_norm=True)
        return Block(cfg, attn, SwiGLU(cfg.hidden_size, cfg.intermediate_size))
