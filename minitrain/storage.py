"""Files that cannot be half-written and cannot run code: safetensors and JSON, synced before they are named.

    8 bytes: length of the header | header: JSON, {name: {dtype, shape, data_offsets}} | the tensors' bytes

Written here, because the library's writer needs numpy and knows neither checksums nor fsync; read by the library,
behind caps of our own (a header of 87 MB takes it 35 s and 3 GB to parse). Format: github.com/huggingface/safetensors.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from minitrain.config import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 10 << 20
_MAX_TENSORS = 200_000
THREADS = 8  # that hash, and read or write, of a process: one hashes 1 to 2 GB/s, and disks do more
_BLOCK = 16 << 20  # bytes that are written at a time


@dataclass(frozen=True)
class Later:
    """A tensor that is made when its turn comes to be written, such as one whose pieces lie on several ranks."""

    dtype: torch.dtype
    shape: torch.Size
    read: Callable[[], Tensor]


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor | Later], metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write and sync one file. Tensors that are on the host are taken as they lie; others are made one at a time.

    -> sha256 of the bytes of each tensor by its name, and by "" of the header before them, in hex.
    """
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, t in tensors.items():
        size = t.shape.numel() * t.dtype.itemsize
        header[name] = {"dtype": CODES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that 8-byte numbers lie on 8-byte borders when the file is mapped
    sums = {}
    with open(path, "wb") as file, ThreadPoolExecutor(THREADS) as pool:
        blocks = _Blocks(file.fileno(), pool)

        def put(name, content):
            sums[name] = pool.submit(lambda: hashlib.sha256(content).hexdigest())
            blocks.put(content)

        text = len(text).to_bytes(8, "little") + text
        put("", (ctypes.c_char * len(text)).from_buffer_copy(text))
        for name, t in tensors.items():
            is_there = isinstance(t, Tensor) and t.is_cpu and t.is_contiguous()
            t = (t.read() if isinstance(t, Later) else t).detach().cpu().contiguous()
            put(name, (ctypes.c_char * (t.numel() * t.element_size())).from_address(t.data_ptr()))
            if not is_there:
                sums[name].result()  # before its memory goes
        blocks.finish()
        os.fsync(file.fileno())
    return {name: made.result() for name, made in sums.items()}


class _Blocks:
    """A new file, written from its begin to its end in blocks, by a pool's threads.

    They go past the page cache, where the file system lets them: into it one thread at a time copies (2 GB/s), and what
    was there has to leave. Blocks are filled by memmove, which leaves the interpreter's lock to the training.
    """

    def __init__(self, file: int, pool: ThreadPoolExecutor):
        self.file, self.pool, self.offset, self.jobs = file, pool, 0, []
        self.free = SimpleQueue()
        for _ in range(THREADS):
            self.free.put((ctypes.c_char * _BLOCK).from_buffer(mmap.mmap(-1, _BLOCK)))  # on a border of pages
        self.block, self.filled = self.free.get(), 0
        with contextlib.suppress(OSError):  # a file system that cannot
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)

    def put(self, content: ctypes.Array) -> None:
        """Copied when it returns."""
        begin, size = ctypes.addressof(content), len(content)
        while size:
            n = min(size, _BLOCK - self.filled)
            ctypes.memmove(ctypes.addressof(self.block) + self.filled, begin, n)
            begin, size, self.filled = begin + n, size - n, self.filled + n
            if self.filled == _BLOCK:
                self.jobs.append(self.pool.submit(self._write, self.block, _BLOCK, self.offset))
                self.block, self.filled, self.offset = self.free.get(), 0, self.offset + _BLOCK

    def finish(self) -> None:
        """The rest, which is no whole block, through the page cache. OSError if anything was not written."""
        for job in self.jobs:
            job.result()
        fcntl.fcntl(self.file, fcntl.F_SETFL, 0)
        self._write(self.block, self.filled, self.offset)

    def _write(self, block, size, offset):
        try:
            done = 0
            while done < size:
                done += os.pwrite(self.file, memoryview(block)[done:size], offset + done)
        finally:
            self.free.put(block)


def send_pieces(tensors: Mapping[str, Tensor | Later]) -> None:
    """What a rank does while another one writes them."""
    for t in tensors.values():
        if isinstance(t, Later):
            t.read()


def open_safetensors(path: Path) -> safe_open:
    """The library's reader of one file: tensors are mapped, and read when used. UserError if the file is no good."""
    try:
        with open(path, "rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{path}: not a whole safetensors file: its header claims {length} bytes of {size}")
        reader = safe_open(path, framework="pt")
        if len(reader.keys()) > _MAX_TENSORS:
            raise UserError(f"{path}: {len(reader.keys())} tensors, more than {_MAX_TENSORS}")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
    return reader


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value) -> None:
    """Write and sync."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write and sync."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, to: Path) -> None:
    """Copy and sync."""
    shutil.copyfile(source, to)
    with open(to, "rb") as file:
        os.fsync(file.fileno())


def read_json(path: Path) -> dict:
    """A file's JSON object. UserError if it is absent or none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object")
    return value


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """tokenizer.json of a folder. UserError if it is absent or none."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a plain Exception
        raise UserError(f"{path}: cannot be read as a tokenizer: {error}") from None


class NewFolder:
    """`with NewFolder(path) as tmp:` fill tmp; it becomes `path` when the block ends, and vanishes if the block raises.

    A reader so finds a whole folder or none. replace: an older folder of that name gives way to the new one.
    """

    def __init__(self, path: Path, replace: bool = False):
        self.path, self.replace = Path(path).resolve(), replace
        self.tmp = self.path.with_name(self.path.name + ".tmp")

    def __enter__(self) -> Path:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is not a folder")
        if self.path.exists() and not self.replace:
            raise UserError(f"{self.path} exists already; remove it, or allow to overwrite it")
        try:
            shutil.rmtree(self.tmp, ignore_errors=True)
            self.tmp.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        return self.tmp

    def __exit__(self, failed, *_):
        if failed:
            shutil.rmtree(self.tmp, ignore_errors=True)
            return
        sync_folder(self.tmp)
        if self.path.exists():
            old = self.path.with_name(self.path.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            self.path.rename(old)
            self.tmp.rename(self.path)
            shutil.rmtree(old)
        else:
            self.tmp.rename(self.path)
        sync_folder(self.path.parent)


def sync_folder(path: Path) -> None:
    """So that the names in it are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_folder(path: Path) -> int:
    """Make a folder this process's own until it closes the handle returned, or ends in any way. UserError if it is
    another one's."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"run_dir={path}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"run_dir={path}: another run uses it; wait for its end, or choose another run_dir") from None
    return handle
