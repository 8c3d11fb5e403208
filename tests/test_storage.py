"""Files on disk: the writer against the safetensors library, folders that appear whole, and what is refused."""

import errno
import fcntl
import hashlib
import json
import os
import struct
import time
import weakref

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitrain import storage
from minitrain.config import UserError
from minitrain.storage import (
    DTYPES,
    Later,
    NewFolder,
    lock_folder,
    open_safetensors,
    read_json,
    write_json,
    write_safetensors,
)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that come into being inside the block, and forgets them as they go."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = op(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not t.is_meta:
                s = t.untyped_storage()
                if s._cdata not in given | self._seen:
                    self._seen.add(s._cdata)
                    self.now += s.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(s, self._gone, s._cdata, s.nbytes())
        return out

    def _gone(self, key, nbytes):
        self._seen.discard(key)
        self.now -= nbytes


def random_bits(dtype, *shape):
    """Any bits of that dtype, NaNs and denormals among them."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape, size), dtype=torch.uint8).view(dtype).squeeze(-1)


def same_bits(a, b):
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


# ---- the writer


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_library_reads_the_bits_that_were_written(dtype, tmp_path):
    base = random_bits(dtype, 7, 5)
    tensors = {
        "matrix": base,
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(4, 5),
        "tail": base[3:],
        "0-d": base[2, 3],
        "empty": base[:0],
        "odd": random_bits(dtype, 3),
        "needs grad": base.clone().requires_grad_() if dtype.is_floating_point else base,
        'é "quoted" \n name': base,
    }
    write_safetensors(tmp_path / "a", tensors, {"step": "3"})
    read = safetensors.torch.load_file(tmp_path / "a")
    assert read.keys() == tensors.keys()
    for name, t in tensors.items():
        assert same_bits(read[name], t.detach()), name
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
    reader = open_safetensors(tmp_path / "a")
    assert all(same_bits(reader.get_tensor(name), t.detach()) for name, t in tensors.items())


def test_mixed_dtypes_and_no_tensors_at_all_are_fine(tmp_path):
    tensors = {code: random_bits(dtype, 3) for code, dtype in DTYPES.items()}
    write_safetensors(tmp_path / "mixed", tensors)
    read = safetensors.torch.load_file(tmp_path / "mixed")
    assert all(same_bits(read[code], t) for code, t in tensors.items())
    write_safetensors(tmp_path / "none", {})
    assert safetensors.torch.load_file(tmp_path / "none") == {}


def test_the_data_begins_on_an_8_byte_border(tmp_path):
    for length in range(1, 10):
        write_safetensors(tmp_path / "a", {"x" * length: torch.ones(2)})
        assert struct.unpack("<Q", (tmp_path / "a").read_bytes()[:8])[0] % 8 == 0


def test_every_byte_is_in_a_checksum(tmp_path):
    tensors = {"x": torch.arange(100), "none": torch.ones(0), "y": torch.ones(3, 5).T}
    sums = write_safetensors(tmp_path / "a", tensors)
    content = (tmp_path / "a").read_bytes()
    sizes = {"": len(content) - 800 - 60, "x": 800, "none": 0, "y": 60}
    for name, size in sizes.items():
        assert sums[name] == hashlib.sha256(content[:size]).hexdigest(), name
        content = content[size:]
    assert not content


def odd_tensors():
    """Borders of tensors and of blocks of 4096 bytes fall together nowhere; some are made when they are written."""
    sizes = [5000, 3, 0, 70_001, 1, 9999]
    tensors = {str(i): random_bits(torch.uint8, n) for i, n in enumerate(sizes)}
    views = {f"every other {i}": t[::2] for i, t in tensors.items()}
    later = {f"later {i}": Later(t.dtype, t.shape, t.clone) for i, t in tensors.items()}
    return tensors | views | later


def cannot(handle, command, flags):
    """As a file system that knows no O_DIRECT."""
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize("is_direct", [True, False])
def test_blocks_that_threads_write_make_one_file(is_direct, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_BLOCK", 4096)
    if not is_direct:
        monkeypatch.setattr(fcntl, "fcntl", cannot)
    tensors = odd_tensors()
    sums = write_safetensors(tmp_path / "a", tensors)
    read = safetensors.torch.load_file(tmp_path / "a")
    assert read.keys() == tensors.keys()
    for name, t in tensors.items():
        t = t.read() if isinstance(t, Later) else t
        assert torch.equal(read[name], t), name
        assert sums[name] == hashlib.sha256(bytes(t.tolist())).hexdigest(), name


def test_a_block_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_BLOCK", 8192)
    pwrite = os.pwrite

    def pwrite_some(handle, content, offset):
        if offset == 5 * 8192:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(handle, content[:4096], offset)  # half of it at a time

    monkeypatch.setattr(os, "pwrite", pwrite_some)
    write_safetensors(tmp_path / "a", {"x": torch.arange(4000)})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a")["x"], torch.arange(4000))
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tmp_path / "a", odd_tensors())


def test_writing_holds_one_tensor_in_memory(tmp_path):
    views = {str(i): torch.randn(50, 40).T for i in range(20)}  # each needs a copy to be written
    with LiveBytes() as memory:
        write_safetensors(tmp_path / "a", views)
    assert memory.peak == 50 * 40 * 4


def test_memory_is_counted_where_it_is_used():
    with LiveBytes() as memory:
        kept = [torch.ones(10, 10).T.contiguous() for _ in range(5)]
    assert memory.now == 5 * 400 and 5 * 400 < memory.peak <= 6 * 400 and len(kept) == 5


# ---- reading


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_header_past_the_cap_is_refused_at_once(tmp_path):
    path = raw_file(tmp_path / "big", b'{"x":' + b" " * (11 << 20) + b"}")
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"{path}.*header claims"):
        open_safetensors(path)
    with open(tmp_path / "claims", "wb") as file:  # 4 GB of header, none of it written
        file.write(struct.pack("<Q", 4 << 30))
        file.truncate(5 << 30)
    with pytest.raises(UserError, match="header claims 4294967296 bytes"):
        open_safetensors(tmp_path / "claims")
    assert time.perf_counter() - start < 1


def test_too_many_tensors_are_refused(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "a", {str(i): torch.ones(1) for i in range(5)})
    monkeypatch.setattr(storage, "_MAX_TENSORS", 4)
    with pytest.raises(UserError, match="5 tensors, more than 4"):
        open_safetensors(tmp_path / "a")
    monkeypatch.setattr(storage, "_MAX_TENSORS", 5)
    open_safetensors(tmp_path / "a")


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"x": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "NO", "shape": [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
        {"x": 3},
        {"__metadata__": {"a": 1}},
        [1],
        b"\xff\xfe",
    ],
)
def test_a_header_that_lies_is_refused(header, tmp_path):
    path = raw_file(tmp_path / "a", header, bytes(8))
    with pytest.raises(UserError, match=str(path)):
        open_safetensors(path)


def test_a_file_that_is_not_there_or_is_a_folder_is_named(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            open_safetensors(path)


def test_json_comes_back_and_what_is_none_is_named(tmp_path):
    value = {"a": [1, 2.5, None, "é"], "b": {}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_bytes().endswith(b"\n")
    for text in ("", "{", "\xff", "[1]", "3"):
        (tmp_path / "b.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"b\.json"):
            read_json(tmp_path / "b.json")
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "c.json")


# ---- folders


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "out"
    with NewFolder(path) as tmp:
        (tmp / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert names(path.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_folder_whose_making_fails_never_appears(error, tmp_path):
    with pytest.raises(error), NewFolder(tmp_path / "out") as tmp:
        (tmp / "a").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_an_older_folder_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "out"
    with NewFolder(path) as tmp:
        (tmp / "old").write_text("1")
    with pytest.raises(UserError, match=f"{path} exists already"), NewFolder(path):
        raise AssertionError("not reached")
    with pytest.raises(RuntimeError), NewFolder(path, replace=True) as tmp:
        (tmp / "new").write_text("2")
        raise RuntimeError
    assert names(tmp_path) == ["out"] and names(path) == ["old"]
    with NewFolder(path, replace=True) as tmp:
        (tmp / "new").write_text("2")
        assert names(path) == ["old"]
    assert names(tmp_path) == ["out"] and names(path) == ["new"]


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    for stale in ("out.tmp", "out.old"):
        (tmp_path / stale).mkdir()
        (tmp_path / stale / "stale").write_text("")
    with NewFolder(tmp_path / "out", replace=True) as tmp:
        (tmp / "a").write_text("")
    with NewFolder(tmp_path / "out", replace=True) as tmp:
        (tmp / "b").write_text("")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["b"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out: cannot be written"), NewFolder(tmp_path / "file" / "out"):
        raise AssertionError("not reached")
    with pytest.raises(UserError, match="file is not a folder"), NewFolder(tmp_path / "file", replace=True):
        raise AssertionError("not reached")
    assert names(tmp_path) == ["file"]


def test_everything_is_synced_before_it_is_named(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(handle):
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def record_rename(old, new, **options):
        events.append(("rename", os.path.basename(new)))
        rename(old, new, **options)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    with NewFolder(tmp_path / "out") as tmp:
        write_safetensors(tmp / "a", {"x": torch.ones(2)})
        write_json(tmp / "b", {})
    assert events == [
        ("sync", "a"),
        ("sync", "b"),
        ("sync", "out.tmp"),
        ("rename", "out"),
        ("sync", tmp_path.name),
    ]


def test_a_locked_folder_is_refused_until_it_is_let_go(tmp_path):
    handle = lock_folder(tmp_path / "run")
    with pytest.raises(UserError, match="another run uses it"):
        lock_folder(tmp_path / "run")
    os.close(handle)
    os.close(lock_folder(tmp_path / "run"))
