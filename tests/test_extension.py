"""On which GPUs our kernels run, asked without one."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minitrain import add_norm, extension, fused_attention, multi_tensor, norm_rotate, routed_rows, swiglu


@pytest.fixture
def gpu(monkeypatch):
    """gpu(archs, capability): from here on there is a GPU of this capability, and a build for these architectures."""

    def put(archs, capability):
        extension.why_not.cache_clear()
        monkeypatch.setattr(extension, "kernels", archs and SimpleNamespace(archs=archs))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield put
    extension.why_not.cache_clear()


@pytest.mark.parametrize(
    "archs, capability, reason",  # None: they run, but for those that need Hopper
    [
        ("80;90a", (8, 0), None),
        ("80;90a", (10, 0), None),
        ("80;90a", (7, 5), "built for 80;90a, and this GPU has compute capability 7.5"),
        ("90a", (9, 0), None),
        ("80", (9, 0), None),
        ("90a", (8, 0), "built for 90a, and this GPU has compute capability 8.0"),
        (None, (9, 0), "not built"),
    ],
)
def test_every_kernel_runs_on_the_gpus_it_was_built_for(gpu, archs, capability, reason):
    gpu(archs, capability)
    with FakeTensorMode():
        x, p = torch.empty(4, 2, 64, device="cuda", dtype=torch.bfloat16), torch.empty(4, device="cuda")
        weight = torch.empty(64, device="cuda", dtype=torch.bfloat16)
        x_TD, weight_FD = (torch.empty(n, 128, device="cuda", dtype=torch.bfloat16) for n in (7, 64))
        weight_D = torch.empty(128, device="cuda", dtype=torch.bfloat16)
    found = [norm_rotate.can_run(x, weight), routed_rows.can_run(x), multi_tensor.can_step([p])]
    found.append(add_norm.can_run(x_TD, weight_D, x_TD))
    assert found == [reason is None] * 4
    assert swiglu.can_run(x_TD, weight_FD) == (reason is None and "90a" in archs and capability == (9, 0))
    for why_not in (extension.why_not("cuda", 0), fused_attention.why_not("cuda", torch.bfloat16, 64)):
        assert (why_not is None) if reason is None else (reason in why_not)


def test_adamw_takes_no_parameter_of_other_strides_than_its_gradient(gpu):
    gpu("80;90a", (8, 0))
    with FakeTensorMode():
        p, rounded = torch.empty(4, 3, device="cuda"), torch.empty(4, 3, device="cuda", dtype=torch.bfloat16)
        p.rounded = rounded
        assert multi_tensor.can_step([p])
        p.rounded = torch.empty(3, 4, device="cuda", dtype=torch.bfloat16).T
        assert not multi_tensor.can_step([p])
        assert not multi_tensor.can_step([torch.empty(3, 4, device="cuda").T])


def test_what_modules_for_any_gpu_call_is_bound_without_the_kernels_for_hopper():
    root = Path(__file__).parents[1]
    bound = re.sub(r"#if MINITRAIN_SM90.*?#endif", "", (root / "kernels/bindings.cpp").read_text(), flags=re.DOTALL)
    for module in (add_norm, fused_attention, multi_tensor, norm_rotate, routed_rows):
        called = re.findall(r"\bkernels\.(\w+)", inspect.getsource(module))
        assert called and not [name for name in called if f'"{name}"' not in bound], module.__name__
