"""Tiny models made by transformers, to compare with; their weights hide nothing: no bias is 0, no norm weight is 1."""

import copy

import torch
from conftest import TINY
from transformers import AutoConfig, AutoModelForCausalLM

from minitrain.hf import hub_parts

# Of 32 tokens, and head_dim 16: one frequency is kept, one blended, the rest stretched.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.0}
CASES = {
    "qwen3": {"model_type": "qwen3"},
    "qwen3_tied": {"model_type": "qwen3", "tie_word_embeddings": True, "attention_bias": True},
    "qwen3_moe": {"model_type": "qwen3_moe", **_MOE, "norm_topk_prob": True},
    "qwen3_moe_raw_weights": {"model_type": "qwen3_moe", **_MOE, "norm_topk_prob": False, "attention_bias": True},
    "llama": {"model_type": "llama", "num_key_value_heads": 4, "head_dim": 8},
    "llama_gqa_bias": {"model_type": "llama", "attention_bias": True, "rms_norm_eps": 1e-3},
    "llama3_rope": {"model_type": "llama", "rope_theta": 5e3, "rope_scaling": LLAMA3_ROPE},
    "qwen2": {"model_type": "qwen2", "head_dim": None},
    "qwen2_tied": {"model_type": "qwen2", "head_dim": None, "tie_word_embeddings": True},
}


def hub_model(case: str, **changes):
    """transformers' model of a case, fp32, plain attention, the same random weights every time."""
    settings = {**TINY, **CASES[case], **changes}
    settings = copy.deepcopy({k: v for k, v in settings.items() if v is not None})  # transformers writes into them
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.normal_(1, 0.3, generator=generator)
            elif p.ndim == 1:
                p.normal_(0, 0.5, generator=generator)
            else:
                p.normal_(0, p.shape[-1] ** -0.5, generator=generator)
    return model


def hub_gradients(model) -> dict[str, torch.Tensor]:
    """Gradients of one of our models under the Hub's names."""
    twin = copy.deepcopy(model)
    for p, original in zip(twin.parameters(), model.parameters(), strict=True):
        p.data = torch.zeros_like(original) if original.grad is None else original.grad
    return {hub: p.detach() if e is None else p.detach()[e] for hub, (_, p, e) in hub_parts(twin).items()}


def transformers_gradients(model) -> dict[str, torch.Tensor]:
    """Gradients of one of transformers' models under the Hub's names: it fuses experts' gate and up in memory."""
    found = {}
    for name, p in model.named_parameters():
        prefix, _, matrix = name.rpartition(".")
        if p.ndim == 2 or p.ndim == 1:
            found[name] = p.grad
            continue
        for e, grad in enumerate(p.grad):
            pieces = grad.chunk(2) if matrix == "gate_up_proj" else [grad]
            names = ["gate_proj", "up_proj"] if matrix == "gate_up_proj" else [matrix]
            found |= {f"{prefix}.{e}.{n}.weight": piece for n, piece in zip(names, pieces, strict=True)}
    return found


def assert_close(got, wanted, tolerance=1e-5, what=""):
    """max |got - wanted| <= tolerance * max |wanted|, finite, of one shape."""
    assert got.shape == wanted.shape, what
    error, scale = (got - wanted).abs().max().item(), wanted.abs().max().item()
    assert scale > 0, f"{what}: all zero, which proves nothing"
    assert error <= tolerance * scale, f"{what}: off by {error:.3g} of {scale:.3g}"


def assert_all_close(got, wanted, tolerance=1e-5):
    """The same names, each close."""
    assert got.keys() == wanted.keys()
    for name in wanted:
        if wanted[name].any() or got[name].any():  # an expert without tokens has none
            assert_close(got[name], wanted[name], tolerance, name)
