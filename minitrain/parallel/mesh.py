"""The ranks of a run and the device of this one. Today a run has one rank; process groups by axis name come here."""

import os
from dataclasses import dataclass

import torch

from minitrain.config import UserError


@dataclass(frozen=True)
class Mesh:
    device: torch.device

    def sum(self, number: int) -> int:
        """Over all ranks."""
        return number


def init_mesh(device: str) -> Mesh:
    """device: auto, cuda or cpu. UserError if CUDA is asked for and absent, or if there are several ranks."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: training on several ranks is not there yet")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError('train.device="cuda": torch sees no CUDA device; use "cpu", or a torch built for your driver')
    return Mesh(torch.device(device, 0) if device == "cuda" else torch.device(device))
