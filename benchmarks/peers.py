"""A training step without minitrain's kernels and optimizer, for a row beside tools/bench_step.py on the same GPU.

    python benchmarks/peers.py plain --config configs/qwen3_0.6b.toml [--section.key value ...]
    python benchmarks/peers.py transformers --config configs/qwen3_0.6b.toml

plain: what one writes with PyTorch alone. Blocks compiled one by one, cuDNN's attention, cross-entropy in 8 pieces,
    torch's fused AdamW over fp32 masters of bf16 weights.
transformers: its model, compiled, PyTorch's attention, autocast to bf16, the same AdamW over fp32 weights.

Random weights and tokens, documents of data.max_seqlen, one row a step; clipping and optimizer are inside the time.
Prints the median of the later two thirds of train.steps, and the memory's peak.
"""

import argparse
import dataclasses
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import minitrain as mt
from minitrain.config import Config, UserError, exit_with, load_config, take_config
from minitrain.hf import default_config
from minitrain.models import build_model, init_weights
from minitrain.models.layers import rotate

_PIECES = 8  # of a row, for the loss


def plain(cfg: Config):
    """-> step(tokens (B, S) on the host), which returns the loss."""
    model = build_model(cfg.model, "cuda")
    init_weights(model, seed=0)
    model.to(torch.bfloat16)
    for layer in model.layers.values():
        layer.add_norm = _add_norm
        layer.self_attn.attention = _cudnn_attention
        layer.self_attn.norm_rotate = lambda x_THC, norm, *rope: rotate(norm(x_THC), *rope)
        layer.mlp.swiglu = lambda x_TD, gate, up, down: down(F.silu(gate(x_TD)) * up(x_TD))
        layer.compile()
    params = list(model.parameters())
    masters = [nn.Parameter(p.detach().float()) for p in params]
    optimizer = _adamw(cfg, masters)
    piece_loss = torch.compile(lambda x_TD, w_VD, targets_T: F.cross_entropy((x_TD @ w_VD.T).float(), targets_T))

    def step(tokens):
        batch = mt.Batch.pack(list(tokens)).to("cuda")
        hidden_TD = model(batch)
        leaf_TD = hidden_TD.detach().requires_grad_()
        total = 0
        for x_TD, targets_T in zip(leaf_TD.chunk(_PIECES), batch.targets.chunk(_PIECES), strict=True):
            loss = piece_loss(x_TD, model.lm_head.weight, targets_T) / _PIECES
            loss.backward()
            total += loss.detach()
        hidden_TD.backward(leaf_TD.grad)
        for master, p in zip(masters, params, strict=True):
            master.grad = p.grad.float()
            p.grad = None
        nn.utils.clip_grad_norm_(masters, cfg.optim.max_norm)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        return total

    return step


def _add_norm(x_TD, delta_TD, norm):
    x_TD = x_TD if delta_TD is None else x_TD + delta_TD
    return x_TD, norm(x_TD)


def transformers(cfg: Config):
    """-> step(tokens (B, S) on the host), which returns the loss."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dataclasses.asdict(cfg.model)
    config = AutoConfig.for_model(sizes.pop("type"), **sizes, use_cache=False)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.compile()
    optimizer = _adamw(cfg, list(model.parameters()))

    def step(tokens):
        tokens = tokens.to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _adamw(cfg, params):
    options = {"betas": (cfg.optim.beta1, cfg.optim.beta2), "weight_decay": cfg.optim.weight_decay, "fused": True}
    return torch.optim.AdamW(params, lr=cfg.optim.lr, **options)


def _cudnn_attention(q_THC, k_SKC, v_SKC, _cu_seqlens_q, _cu_seqlens_k, max_seqlen):
    q, k, v = (x.unflatten(0, (-1, max_seqlen)).transpose(1, 2) for x in (q_THC, k_SKC, v_SKC))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["plain", "transformers"])
    peer = parser.parse_args(sys.argv[1:2]).peer
    path, flags = take_config(sys.argv[2:])
    cfg = load_config(path, flags, default_config)
    step = {"plain": plain, "transformers": transformers}[peer](cfg)
    generator, seconds = torch.Generator().manual_seed(0), []
    for _ in range(cfg.train.steps):
        tokens = torch.randint(0, cfg.model.vocab_size, (cfg.data.tokens_per_row,), generator=generator)
        begin = time.perf_counter()
        loss = step(tokens.view(-1, cfg.data.max_seqlen)).item()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        print(f"loss {loss:.4f}  {seconds[-1] * 1e3:.1f} ms", file=sys.stderr)
    median = statistics.median(seconds[len(seconds) // 3 :])
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"{peer}: {cfg.data.tokens_per_row / median:,.0f} tokens/s, {median * 1e3:.1f} ms, {peak:.1f} GiB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with(error)
