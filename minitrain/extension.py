"""The CUDA extension, minitrain.kernels: where it runs, and what it is told of tensors: addresses, strides, streams."""

import functools
import importlib.util

import torch
from torch import Tensor

if importlib.util.find_spec("minitrain.kernels"):
    from minitrain import kernels
else:  # built without nvcc
    kernels = None


def runs_on(device_type: str, index: int | None) -> bool:
    """Whether the kernels run on this device."""
    return why_not(device_type, index) is None


def runs_on_hopper(device_type: str, index: int | None) -> bool:
    """Whether this device is one that the kernels for Hopper (sm_90a) were built for and run on."""
    is_hopper = runs_on(device_type, index) and torch.cuda.get_device_capability(index) == (9, 0)
    return is_hopper and "90a" in kernels.archs.split(";")


@functools.cache
def why_not(device_type: str, index: int | None) -> str | None:
    """Why the kernels do not run on this device, or None if they do. index: of a GPU."""
    if kernels is None:
        return "the CUDA extension is not built: it needs nvcc when minitrain is installed"
    if device_type != "cuda" or not torch.cuda.is_available():
        return f"it runs on CUDA devices only, not on {device_type}"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0) or ("80" not in kernels.archs.split(";") and capability != (9, 0)):
        return f"it was built for {kernels.archs}, and this GPU has compute capability {capability[0]}.{capability[1]}"
    return None


def stream_of(device: torch.device) -> int:
    """The current one there."""
    return torch.cuda.current_stream(device).cuda_stream


def address(x: Tensor | None) -> int:
    """0 for None."""
    return 0 if x is None else x.data_ptr()


def aligned(x: Tensor) -> Tensor:
    """x, or a copy where its elements do not lie in a row that begins at a border of 16 bytes."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def addressable(x: Tensor) -> Tensor:
    """x (tokens, heads, channels) if kernels can read it in place, else a copy: channels in a row, 16 bytes aligned.

    They reckon in 32 bits within a tile of rows, and with steps of 0 (an expanded tensor) not at all.
    """
    steps = [stride for stride, size in zip(x.stride()[:2], x.shape[:2], strict=True) if size > 1]
    fits = x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(0 < step < 1 << 24 and step % 8 == 0 for step in steps)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def packed(x: Tensor):
    """kernels.Packed of what addressable gave."""
    rows, heads = (s if size > 1 else x.shape[2] for s, size in zip(x.stride()[:2], x.shape[:2], strict=True))
    return kernels.Packed(x.data_ptr(), rows, heads)
