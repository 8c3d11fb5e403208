"""What is in host memory, and how it is taken from the system."""

import gc
import mmap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minitrain.config import ParallelConfig, UserError
from minitrain.parallel.offload import HostMemory, HostState, on_host


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.75, 0.99, 1.0])
def test_the_share_is_kept_and_spread_from_the_first_unit_to_the_last(share):
    sizes = torch.randint(1, 100, (200,)).tolist()
    units = {str(i): SimpleNamespace(numel=numel) for i, numel in enumerate(sizes)}
    chosen = on_host(units, ParallelConfig(offload="optimizer", offload_share=share))
    held = total = 0
    for key, unit in units.items():
        total += unit.numel
        held += unit.numel * (key in chosen)
        assert 0 <= share * total - held < max(sizes)
    assert on_host(units, ParallelConfig()) == []


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"offload": "optimizer", "offload_share": 0.0}, r"offload_share=0\.0: must be more than 0 and at most 1"),
        ({"offload": "optimizer", "offload_share": 1.5}, r"offload_share=1\.5: must be more than 0 and at most 1"),
        ({"offload_share": 0.5}, r'offload_share=0\.5: only with parallel\.offload="optimizer"'),
    ],
)
def test_a_share_that_cannot_be_is_refused(settings, complaint):
    with pytest.raises(UserError, match=rf"^parallel\.{complaint}$"):
        ParallelConfig(**settings)


def test_memory_is_registered_in_whole_pages_that_are_its_own_and_let_go_with_it(monkeypatch):
    pages = {}  # that CUDA knows

    def register(address, nbytes, flags):
        assert address % mmap.PAGESIZE == flags == 0
        assert not any(begin < address + nbytes and address < end for begin, end in pages.items())
        pages[address] = address + nbytes

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=pages.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda _: None)
    memory = HostMemory(torch.device("cuda"))
    tensors = [torch.randn(7, 3).bfloat16()] + [torch.randn(n) for n in (1, 33, 5000)]
    copies = [copy for _ in range(5) for copy in memory.copy(tensors)]
    for copy, t in zip(copies, tensors * 5, strict=True):
        assert copy.equal(t) and copy.dtype == t.dtype
        assert any(begin <= copy.data_ptr() and copy.data_ptr() + copy.nbytes <= end for begin, end in pages.items())
    assert len(pages) == 5 and not memory.like([])
    del memory
    gc.collect()
    assert not pages


def test_loaded_state_gets_a_place_in_it_if_its_master_is_there():
    masters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.Adam(masters)
    for master in masters:
        master.grad = torch.ones(3)
    optimizer.step()
    before = [dict(optimizer.state[master]) for master in masters]
    addresses = [master.data_ptr() for master in masters]
    HostState(optimizer, HostMemory(torch.device("cpu")), [masters[:1], []]).place()
    assert addresses == [master.data_ptr() for master in masters]  # which were there before
    for key, value in before[0].items():
        placed = optimizer.state[masters[0]][key]
        assert placed.equal(value) and (placed is value) == (key == "step")
    assert all(optimizer.state[masters[1]][key] is value for key, value in before[1].items())


@pytest.mark.gpu
def test_registered_memory_is_pinned_and_not_rounded_up():
    memory = HostMemory(torch.device("cuda"))
    on_gpu = torch.randn((1 << 20) + 3, device="cuda")
    (copy,) = memory.copy([on_gpu])
    assert copy.is_pinned() and copy.equal(on_gpu.cpu())
    assert copy.to("cuda", non_blocking=True).equal(on_gpu)
    assert sum(block.nbytes for block in memory.blocks) - copy.nbytes < 64
    del memory
    assert not copy.is_pinned()
