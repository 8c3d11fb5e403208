"""Architectures by name, building one, and its first weights."""

import importlib
import itertools
import math
import zlib
from collections.abc import Callable, Collection

import torch
from torch import nn

from minitrain.boxes import part_of, take
from minitrain.config import UserError

MODELS = {  # Hugging Face's model_type -> the class
    "qwen3": "minitrain.models.qwen3:Qwen3ForCausalLM",
    "qwen3_moe": "minitrain.models.qwen3_moe:Qwen3MoeForCausalLM",
    "llama": "minitrain.models.llama:LlamaForCausalLM",
    "qwen2": "minitrain.models.llama:Qwen2ForCausalLM",
}


def model_class(type: str) -> type[nn.Module]:
    """The class for a name in MODELS, or for "module:Class" of your own. UserError if there is none."""
    if type not in MODELS and ":" not in type:
        raise UserError(f'model.type={type!r} is unknown; there are {", ".join(MODELS)}, or "module:Class"')
    found = load_object(MODELS.get(type, type))
    if not hasattr(found, "config_class"):
        raise UserError(f"model.type={type!r}: has no config_class, as minitrain.models.layers.CausalLM has it")
    return found


def load_object(path: str) -> Callable:
    """The class or function that "package.module:name" names. UserError if it is not there or something else."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty name
        raise UserError(f"{path!r} cannot be imported: {error}") from None
    if not callable(found):
        raise UserError(f"{path!r} is a {type(found).__name__}, which cannot be called")
    return found


def build_model(cfg, device: torch.device | str = "meta") -> nn.Module:
    """The model of a config. On "meta": names and shapes, no memory; materialize gives it weights."""
    with torch.device(device):
        return model_class(cfg.type)(cfg)


def materialize(model: nn.Module, device: torch.device | str, dtype: torch.dtype, with_memory: bool = True) -> None:
    """Replace what is on meta by uninitialised parameters on `device`, counters by zeros; ties stay ties.

    Parameters of siblings, such as q_proj, k_proj and v_proj, lie end to end in one storage (joined.py).
    with_memory False: the parameters have their shapes, and storages of no bytes (for ZeRO 3, which cuts them first).
    UserError for any other buffer on meta, whose values nobody knows.
    """
    of_meta = [(name, p) for name, p in model.named_parameters() if p.is_meta]
    made = {}
    for _, siblings in itertools.groupby(of_meta, key=lambda of: of[0].rsplit(".", 2)[0]):
        params = [p for _, p in siblings]
        for p, memory in zip(params, _side_by_side(params, device, dtype, with_memory), strict=True):
            made[p] = nn.Parameter(memory.data, p.requires_grad)  # .data: each counts its own writes
            made[p].__dict__.update(vars(p))  # what parallelize wrote on it
    for module in model.modules():
        for name, p in module._parameters.items():
            if p in made:
                module._parameters[name] = made[p]
        for name, b in module._buffers.items():
            if b is not None and b.is_meta:
                if name not in getattr(module, "counters", ()):
                    raise UserError(f"buffer {name} of {type(module).__name__} has no values on meta; {_OWN_VALUES}")
                module._buffers[name] = torch.zeros_like(b, device=device)


def _side_by_side(params, device, dtype, with_memory) -> list[torch.Tensor]:
    """Memory for each in one tensor, one after the other: without gaps where numels are multiples of _ALIGN."""
    if not with_memory:
        memory = [torch.empty_like(p, device=device, dtype=dtype) for p in params]
        for x in memory:
            x.untyped_storage().resize_(0)
        return memory
    sizes = [-(-p.numel() // _ALIGN) * _ALIGN for p in params]
    flat = torch.empty(sum(sizes), device=device, dtype=dtype)
    return [x[: p.numel()].view(p.shape) for p, x in zip(params, flat.split(sizes), strict=True)]


_ALIGN = 64  # elements, as in parallel/ddp.py
_OWN_VALUES = "build the model on a device, give it its first weights yourself, and pass it to train()"


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, names: Collection[str] | None = None) -> None:
    """Random weights that depend on (seed, parameter name) alone: the same network under every layout.

    Norm weights 1, biases 0, all else normal: initializer_range, divided by sqrt(2 * layers) where the result is
    added to the residual stream (o_proj, down_proj), so that its variance does not grow with depth (GPT-2).
    Stacked experts draw one seed each. Drawn in fp32 on the parameter's device, so CPU and GPU differ.
    names: of these parameters only.
    """
    std = model.config.initializer_range
    owners = dict(model.named_modules())
    for name, p in model.named_parameters():
        if names is not None and name not in names:
            continue
        owner, _, attribute = name.rpartition(".")
        if attribute == "bias":
            p.zero_()
        elif isinstance(owners[owner], nn.RMSNorm | nn.LayerNorm):
            p.fill_(1)
        elif p.ndim < 2:
            raise UserError(f"there is no rule for the first values of {name}; {_OWN_VALUES}")
        else:
            residual = "o_proj" in name or "down_proj" in name
            scale = std / math.sqrt(2 * model.config.num_hidden_layers) if residual else std
            shape, box = part_of(p)
            pieces = [(name, p)]
            if p.ndim == 3:
                pieces = [(f"{name}.{e}", expert) for e, expert in zip(box[0], p, strict=True)]
            for piece_name, piece in pieces:
                generator = torch.Generator(p.device).manual_seed(seed + zlib.crc32(piece_name.encode()))
                whole = torch.empty(shape[p.ndim - piece.ndim :], device=p.device)
                piece.copy_(take(whole.normal_(0, scale, generator=generator), box[p.ndim - piece.ndim :]))
