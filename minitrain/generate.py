"""Sampling with a key/value cache, which sits on the attention's seam: no model knows of it."""

import contextlib

import torch
from torch import Tensor, nn

from minitrain.batch import IGNORE, Batch
from minitrain.parallel.pp import last_logits


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    seed: int = 0,
) -> Tensor:
    """Token ids (n,) -> the prompt and up to max_new_tokens more, ending after eos_token_id, or one of several.

    temperature 0: always the likeliest. top_k: only the k likeliest; top_p: only the fewest that have probability p
    together (Holtzman et al. 2019, arXiv:1904.09751). The same seed gives the same tokens on the same device.
    """
    if prompt.ndim != 1 or not len(prompt):
        raise ValueError(f"generate: prompt has shape {tuple(prompt.shape)}; it is one row of at least one token")
    if temperature < 0:
        raise ValueError(f"generate: temperature={temperature}: must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k={top_k}: must be at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p={top_p}: must be above 0 and at most 1, or None for all tokens")
    stops = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
    generator = torch.Generator(prompt.device).manual_seed(seed)
    tokens = prompt.long()
    new, past = tokens, 0
    # Lengths grow with every token: compiling for each would be slower than not.
    with torch.compiler.set_stance("force_eager"), _caches(model):
        for _ in range(max_new_tokens):
            logits_V = last_logits(model, _continuation(new, past))
            past += len(new)
            new = _sample(logits_V.float(), temperature, top_k, top_p, generator)
            tokens = torch.cat([tokens, new])
            if stops and new.item() in stops:
                break
    return tokens


def _continuation(new: Tensor, past: int) -> Batch:
    """A row of tokens that follow `past` others of the same document, whose keys and values are in the caches."""
    n = len(new)
    cu_q, cu_k = (torch.tensor([0, m], dtype=torch.int32, device=new.device) for m in (n, past + n))
    positions = torch.arange(past, past + n, device=new.device)
    return Batch(new, torch.full_like(new, IGNORE), positions, cu_q, cu_k, past + n, num_targets=0, num_pairs=0)


@contextlib.contextmanager
def _caches(model):
    """Every attention function sees, from here on, the keys and values of earlier calls too."""
    # A block may call its attention module "attention" too; the seam is then the function inside that.
    holders = [m for m in model.modules() if hasattr(m, "attention") and not hasattr(m.attention, "attention")]
    own = [vars(m).get("attention") for m in holders]  # None: it is a submodule or a method
    for m in holders:
        vars(m)["attention"] = _Cached(m.attention)  # found before a submodule or a method of that name
    try:
        yield
    finally:
        for m, attention in zip(holders, own, strict=True):
            if attention is None:
                del vars(m)["attention"]
            else:
                vars(m)["attention"] = attention


class _Cached:
    def __init__(self, attention):
        self.attention, self.k, self.v = attention, None, None

    def __call__(self, q_THC, k_TKC, v_TKC, cu_seqlens_q, cu_seqlens_k, max_seqlen):
        self.k = k_TKC if self.k is None else torch.cat([self.k, k_TKC])
        self.v = v_TKC if self.v is None else torch.cat([self.v, v_TKC])
        return self.attention(q_THC, self.k, self.v, cu_seqlens_q, cu_seqlens_k, max_seqlen)


_UNIT = 2**-40  # of probability: on a GPU torch has a deterministic sum along a tensor for whole numbers only


def _sample(logits_V, temperature, top_k, top_p, generator) -> Tensor:
    """One token id, (1,)."""
    if temperature == 0:
        return logits_V.argmax(keepdim=True)
    logits_V = logits_V / temperature
    if top_k is not None:
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(min(top_k, len(logits_V))).values[-1], -torch.inf)
    if top_p is not None:
        probs, order = logits_V.softmax(-1).sort(descending=True)
        units = (probs.double() / _UNIT).round().long()
        before = units.cumsum(0) - units  # the likeliest has 0 before it and always stays
        logits_V = logits_V.index_fill(0, order[before >= top_p / _UNIT], -torch.inf)
    return torch.multinomial(logits_V.softmax(-1), 1, generator=generator)
