"""train.deterministic: the same bits in two runs on the same GPUs."""

import functools
import os
from collections.abc import Callable

import torch
from torch import nn

from minitrain.config import Config


def deterministic_if_asked(train: Callable) -> Callable:
    """Inside of it torch raises RuntimeError for an operation that has no deterministic algorithm."""

    @functools.wraps(train)
    def wrapped(cfg: Config, **parts) -> nn.Module:
        if not cfg.train.deterministic:
            return train(cfg, **parts)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins; else products may differ
        flags = torch.utils.deterministic
        before = torch.are_deterministic_algorithms_enabled(), flags.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        flags.fill_uninitialized_memory = False  # it finds bugs, and costs a pass over every tensor
        try:
            return train(cfg, **parts)
        finally:
            torch.use_deterministic_algorithms(before[0])
            flags.fill_uninitialized_memory = before[1]

    return wrapped
