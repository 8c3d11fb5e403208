"""Llama 2 and 3 (arXiv:2307.09288, 2407.21783), and Qwen2 / 2.5 (arXiv:2412.15115), which add a bias to q, k and v.

Beside Qwen3: no normalisation of q and k. Llama 3.1 and later stretch RoPE (rope_scaling).
"""

from dataclasses import dataclass

from minitrain.models.layers import Attention, Block, CausalLM, DecoderConfig, SwiGLU


@dataclass
class LlamaConfig(DecoderConfig):
    """Defaults: Llama 2 7B."""

    type: str = "llama"
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    """Give q, k, v and o projections a bias."""


@dataclass
class Qwen2Config(DecoderConfig):
    """Defaults: Qwen2.5 7B."""

    type: str = "qwen2"
    vocab_size: int = 152_064
    hidden_size: int = 3584
    intermediate_size: int = 18_944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    max_position_embeddings: int = 131_072


class LlamaForCausalLM(CausalLM):
    config_class = LlamaConfig

    @staticmethod
    def block(cfg: LlamaConfig) -> Block:
        attn = Attention(cfg, qkv_bias=cfg.attention_bias, o_bias=cfg.attention_bias)
        return Block(cfg, attn, SwiGLU(cfg.hidden_size, cfg.intermediate_size))


class Qwen2ForCausalLM(CausalLM):
    config_class = Qwen2Config

    @staticmethod
    def block(cfg: Qwen2Config) -> Block:
        return Block(cfg, Attention(cfg, qkv_bias=True), SwiGLU(cfg.hidden_size, cfg.intermediate_size))
