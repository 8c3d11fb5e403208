"""The format of checkpoints: pieces of tensors, in one file a rank, and a manifest. No pickle.

    step-00001000/
        rank-00000.safetensors    the pieces that rank 0 had to save: flat, by the tensor's name
        rank-00001.safetensors
        manifest.json             written last, and sealed: what is in it, and a checksum of every byte beside it

    format, step    2; how many steps are done
    config          the run's settings        dtype      of the model's parameters
    data            the place in the data     optimizer  the name of its class        versions
    best            {"step", "loss"} of the checkpoint of the lowest validation loss up to this one, or null
    files           {file: {"bytes": its size, "header_bytes", "header_sha256"}}
    tensors         {name: {"dtype", "shape", "pieces": [{"file", "box", "first", "end", "sha256"}, ...]}}
    sha256          the seal: of all bytes of manifest.json that stand before it

A piece is elements first .. end - 1 of a box of a tensor laid flat (row by row). "box" has the [start, stop] of each
dimension, and is absent where it is the whole tensor. Boxes of a tensor are the cells of a grid, and pieces of a box
leave no hole: whoever reads takes the elements that it needs, and need not know how who wrote had cut it. Names are
"model.NAME" (the weight that the optimizer steps, fp32), "optimizer.NAME.KEY" (its state for it) and "rng.RANK.cpu" or
".cuda" (random generators).
"""

import contextlib
import functools
import hashlib
import json
import operator
import os
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitrain.boxes import Box, common, numel, rows_of_run, run_as_boxes, take, whole_box
from minitrain.config import UserError
from minitrain.storage import (
    CODES,
    DTYPES,
    MAX_HEADER_BYTES,
    THREADS,
    Later,
    open_safetensors,
    read_json,
    write_safetensors,
    write_text,
)

FORMAT = 2
_SEAL = ',\n  "sha256": '
_CHUNK = 1 << 20  # bytes that a thread reads at a time to check them: they stay in its core's cache


class Damaged(UserError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Piece:
    """Of a tensor's box, laid flat, consecutive elements from the first one on, in any shape."""

    values: Tensor | Later
    shape: torch.Size  # of the whole tensor
    box: Box
    first: int = 0


# ---- writing


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> dict:
    """One rank's file, synced. -> what the manifest has to say of it."""
    pieces = dict(sorted(pieces.items()))
    sums = write_safetensors(path, {name: piece.values.flatten() for name, piece in pieces.items()})
    size = path.stat().st_size
    held = sum(piece.values.numel() * piece.values.element_size() for piece in pieces.values())
    tensors = {}
    for name, piece in pieces.items():
        place = {"file": path.name, "first": piece.first, "end": piece.first + piece.values.numel()}
        if piece.box != whole_box(piece.shape):
            place["box"] = [[side.start, side.stop] for side in piece.box]
        about = {"dtype": CODES[piece.values.dtype], "shape": list(piece.shape)}
        tensors[name] = {**about, "pieces": [{**place, "sha256": sums[name]}]}
    file = {"bytes": size, "header_bytes": size - held, "header_sha256": sums[""]}
    return {"files": {path.name: file}, "tensors": tensors}


def write_manifest(folder: Path, about: dict, parts: list[dict]) -> None:
    """about: what is not in the parts, of which each rank's write_pieces made one. Synced."""
    files, tensors = {}, {}
    for part in parts:
        files |= part["files"]
        for name, tensor in part["tensors"].items():
            tensors.setdefault(name, {**tensor, "pieces": []})["pieces"] += tensor["pieces"]
    for tensor in tensors.values():
        tensor["pieces"].sort(key=lambda piece: piece["first"])
    manifest = {"format": FORMAT, **about, "files": files, "tensors": dict(sorted(tensors.items()))}
    body = json.dumps(manifest, indent=2).removesuffix("\n}")
    write_text(folder / "manifest.json", f'{body}{_SEAL}"{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n')


# ---- reading


class Saved:
    """A checkpoint's folder. Damaged if its manifest is not what was written, UserError if its format is another.

    tensors: {name: (dtype, shape)}.
    """

    def __init__(self, folder: Path):
        self.folder, self.readers = folder, {}
        self.manifest = _read_manifest(folder)
        self.tensors = {
            name: (DTYPES[t["dtype"]], torch.Size(t["shape"])) for name, t in self.manifest["tensors"].items()
        }

    @property
    def files(self) -> list[str]:
        return sorted(self.manifest["files"])

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Every byte of the files that are this rank's to read. Damaged names each file that is, and a tensor in it."""
        damages = []
        for file in self.files[rank::ranks]:
            try:
                self._verify_file(file)
            except Damaged as error:
                damages.append(str(error))
        if damages:
            raise Damaged("; ".join(damages))

    def _verify_file(self, file: str) -> None:
        path, about = self.folder / file, self.manifest["files"][file]
        expected = {
            name: (tensor["dtype"], [piece["end"] - piece["first"]], piece["sha256"])
            for name, tensor in self.manifest["tensors"].items()
            for piece in tensor["pieces"]
            if piece["file"] == file
        }
        some = f"{next(iter(expected), 'no tensor')} and {max(0, len(expected) - 1)} more"
        if not path.is_file():
            raise Damaged(f"{path}: no such file; it holds {some}")
        with _read_errors(path), open(path, "rb") as stream, ThreadPoolExecutor(THREADS) as pool:
            header = stream.read(about["header_bytes"])
            if hashlib.sha256(header).hexdigest() != about["header_sha256"]:
                raise Damaged(f"{path}: damaged: its header, which tells where {some} are")
            entries = _entries(path, header)
            begins, ends = ([len(header) + entry[i] for entry in entries] for i in (0, 1))
            sums = pool.map(functools.partial(_sha256_of_part, stream.fileno()), begins, ends)
            for (_, _, name, dtype, shape), checksum in zip(entries, sums, strict=True):
                if (dtype, shape, checksum) != expected.get(name):
                    raise Damaged(f"{path}: damaged: {name} is not what was written")
            size = os.fstat(stream.fileno()).st_size
            if len(entries) != len(expected) or size != max(ends, default=len(header)):
                raise Damaged(f"{path}: damaged: holds more or less than the manifest says")
        open_safetensors(path)

    def read(self, name: str, box: Box | None = None, first: int = 0, end: int | None = None) -> Tensor:
        """Elements first .. end - 1 of a box of a tensor, 1-D, not to be written to; None: all of it, to its last.

        Files are mapped, and no other elements touched. What lies in one piece is returned as it lies there, without
        memory of its own.
        """
        dtype, shape = self.tensors[name]
        box = box or whole_box(shape)
        end = numel(box) if end is None else end
        values = torch.empty(end - first, dtype=dtype)
        wanted, rows = list(_in_boxes(values, box, first, end)), rows_of_run(box, first, end)
        for piece in self.manifest["tensors"][name]["pieces"]:
            run = _box_of(piece, shape), piece["first"], piece["end"]
            if common(rows_of_run(*run), rows) is None:
                continue
            stored = self._reader(piece["file"]).get_tensor(name)
            for there, theirs in _in_boxes(stored, *run):
                for here, ours in wanted:
                    if (both := common(here, there)) is not None:
                        found = take(theirs, both, there)
                        if found.numel() == len(values) and found.is_contiguous():
                            return found.flatten()
                        take(ours, both, here).copy_(found)
        return values

    def _reader(self, file):
        if file not in self.readers:
            self.readers[file] = open_safetensors(self.folder / file)
        return self.readers[file]


def _box_of(piece: dict, shape: torch.Size) -> Box:
    return tuple(range(start, stop) for start, stop in piece["box"]) if "box" in piece else whole_box(shape)


def _in_boxes(run: Tensor, box: Box, first: int, end: int) -> Iterator[tuple[Box, Tensor]]:
    """A run of a box, as boxes and views of it in their shapes."""
    offset = 0
    for inner in run_as_boxes(box, first, end):
        yield inner, run[offset : offset + numel(inner)].view(list(map(len, inner)))
        offset += numel(inner)


def _entries(path: Path, header: bytes) -> list[tuple]:
    """-> begin, end, name, dtype and shape of what a file's header names, in the order of its bytes."""
    entries = []
    try:
        for name, entry in json.loads(header[8:]).items():
            if name != "__metadata__":
                begin, end = map(operator.index, entry["data_offsets"])
                if not 0 <= begin <= end < 1 << 62:
                    raise ValueError(f"{name} lies at {begin}:{end}")
                entries.append((begin, end, name, entry["dtype"], entry["shape"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: damaged: its header is none of safetensors: {error!r}") from None
    return sorted(entries, key=lambda entry: entry[:3])


@contextlib.contextmanager
def _read_errors(path: Path):
    """Of a disk that fails: as other damage."""
    try:
        yield
    except OSError as error:
        raise Damaged(f"{path}: cannot be read: {error.strerror}") from None


def _sha256_of_part(file: int, begin: int, end: int) -> str:
    digest, chunk = hashlib.sha256(), memoryview(bytearray(min(end - begin, _CHUNK)))
    while begin < end and (n := os.preadv(file, [chunk[: end - begin]], begin)):
        digest.update(chunk[:n])
        begin += n
    return digest.hexdigest()


def _read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
    except UserError as error:
        raise Damaged(str(error)) from None
    if type(number := manifest.get("format")) is not int:
        raise Damaged(f"{path}: damaged: has no format")
    if number != FORMAT:
        raise UserError(f"{path}: of checkpoint format {number}, this version reads {FORMAT}")
    body, _, seal = path.read_bytes().rpartition(_SEAL.encode())
    if seal != f'"{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode():
        raise Damaged(f"{path}: damaged: its text and its sha256 do not belong together")
    try:
        _check(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise Damaged(f"{path}: not a manifest of a checkpoint: {reason}") from None
    return manifest


def _check(manifest: dict) -> None:
    """ValueError and its kin for what write_manifest does not write, sealed or not."""
    for key, kind in {"step": int, "config": dict, "dtype": str, "optimizer": str, "versions": dict}.items():
        if type(manifest[key]) is not kind:
            raise ValueError(f"{key} is {manifest[key]!r}")
    for section in ("model", "data", "optim", "train"):
        if type(manifest["config"].get(section, {})) is not dict:
            raise ValueError(f"config.{section} is {manifest['config'][section]!r}")
    if not isinstance(manifest["data"], dict | None):
        raise ValueError(f"data is {manifest['data']!r}")
    best = manifest.get("best") or {"step": 0, "loss": 0.0}
    if not (type(best["step"]) is int and 0 <= best["step"] <= manifest["step"] and type(best["loss"]) is float):
        raise ValueError(f"best is {best!r}")
    for file, about in manifest["files"].items():
        if not re.fullmatch(r"rank-\d{5,}\.safetensors", file):
            raise ValueError(f"{file!r} is no name of a file of it")
        if type(about["header_bytes"]) is not int or not 8 <= about["header_bytes"] <= 8 + MAX_HEADER_BYTES:
            raise ValueError(f"{file} has a header of {about['header_bytes']!r} bytes")
        if type(about["bytes"]) is not int or type(about["header_sha256"]) is not str:
            raise ValueError(f"{file} is {about!r}")
    for name, tensor in manifest["tensors"].items():
        if tensor["dtype"] not in DTYPES or not all(type(n) is int and 0 <= n < 1 << 62 for n in tensor["shape"]):
            raise ValueError(f"{name} is {tensor['dtype']!r} of shape {tensor['shape']!r}")
        ends: dict[Box, int] = {}
        for piece in tensor["pieces"]:
            if piece["file"] not in manifest["files"]:
                raise ValueError(f"{name} has a piece in {piece['file']!r}, which is none of its files")
            if type(piece["sha256"]) is not str:
                raise ValueError(f"{name} has the sha256 {piece['sha256']!r}")
            box = _box_of(piece, tensor["shape"])
            end = ends.get(box, 0)
            if not type(piece["first"]) is type(piece["end"]) is int or not piece["first"] == end <= piece["end"]:
                raise ValueError(f"pieces of {name} overlap or leave a hole at element {end}")
            ends[box] = piece["end"]
        _check_grid(name, tensor["shape"], ends.keys())
        for box, end in ends.items():
            if end != numel(box):
                raise ValueError(f"pieces of {name} end at element {end} of {numel(box)}")


def _check_grid(name: str, shape: list[int], boxes: Collection[Box]) -> None:
    """ValueError unless the boxes are all cells of a grid over the tensor, and so have each element once."""
    if any(len(box) != len(shape) for box in boxes):
        raise ValueError(f"boxes of {name} have other dimensions than its shape {shape}")
    num_cells = 1
    for dim, n in enumerate(shape):
        sides = sorted({(box[dim].start, box[dim].stop) for box in boxes})
        borders = [0, *(stop for _, stop in sides)]
        if borders != [*(start for start, _ in sides), n] or borders != sorted(borders):
            raise ValueError(f"boxes of {name} overlap or leave a hole in dimension {dim}")
        num_cells *= len(sides)
    if len(boxes) != num_cells:
        raise ValueError(f"boxes of {name} are {len(boxes)} of the {num_cells} cells of its grid")
