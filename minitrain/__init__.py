"""minitrain: a small, fast trainer for Qwen3, Qwen3-MoE and Llama. `import minitrain as mt`, then mt.train(cfg).

The names below are loaded when first used, so that importing the package costs nothing.
"""

import importlib
import sys
import types

_HOME = {
    "Batch": "batch",
    "CheckpointConfig": "config",
    "Config": "config",
    "DataConfig": "config",
    "LlamaConfig": "models.llama",
    "LlamaForCausalLM": "models.llama",
    "OptimConfig": "config",
    "PackedData": "data",
    "ParallelConfig": "config",
    "Qwen2Config": "models.llama",
    "Qwen2ForCausalLM": "models.llama",
    "Qwen3Config": "models.qwen3",
    "Qwen3ForCausalLM": "models.qwen3",
    "Qwen3MoeConfig": "models.qwen3_moe",
    "Qwen3MoeForCausalLM": "models.qwen3_moe",
    "TrainConfig": "config",
    "UserError": "config",
    "adamw": "optim",
    "build_model": "models",
    "cross_entropy": "loss",
    "from_pretrained": "hf",
    "generate": "generate",
    "muon": "optim",
    "save_pretrained": "hf",
    "train": "train",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'minitrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"minitrain.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__


class _Package(types.ModuleType):
    """mt.train and mt.generate are the functions, also after somebody imported the modules of these names."""

    def __setattr__(self, name, value):
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
