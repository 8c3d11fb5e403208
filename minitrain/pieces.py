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
    tensors         {name: {"dtype", "shape", "pieces": [{"file", "first", "end", "sha256"}, ...]}}
    sha256          the seal: of all bytes of manifest.json that stand before it

A piece is elements first .. end - 1 of a tensor laid flat (row by row), and pieces of a tensor leave no hole: whoever
reads takes the elements that it needs, and need not know how many ranks wrote. Names are "model.NAME" (the weight that
the optimizer steps, fp32), "optimizer.NAME.KEY" (its state for it) and "rng.RANK.cpu" or ".cuda" (random generators).
"""

import hashlib
import json
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitrain.config import UserError
from minitrain.storage import DTYPES, MAX_HEADER_BYTES, open_safetensors, read_json, write_safetensors, write_text

FORMAT = 2
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_SEAL = ',\n  "sha256": '
_CHUNK = 4 << 20  # bytes that are read at a time to be checked


class Damaged(UserError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a tensor, from the first one on, in any shape."""

    values: Tensor
    first: int
    shape: torch.Size  # of the whole tensor


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
        about = {"dtype": _CODES[piece.values.dtype], "shape": list(piece.shape)}
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

    def verify(self, file: str) -> None:
        """Every byte of a file, or Damaged with the file and the tensor."""
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
        with open(path, "rb") as stream:
            header = stream.read(about["header_bytes"])
            if hashlib.sha256(header).hexdigest() != about["header_sha256"]:
                raise Damaged(f"{path}: damaged: its header, which tells where {some} are")
            entries = _entries(path, header)
            for begin, end, name, dtype, shape in entries:
                if (dtype, shape, _sha256_of_next(stream, end - begin)) != expected.get(name):
                    raise Damaged(f"{path}: damaged: {name} is not what was written")
            if len(entries) != len(expected) or stream.read(1):
                raise Damaged(f"{path}: damaged: holds more or less than the manifest says")
        open_safetensors(path)

    def read(self, name: str, first: int = 0, end: int | None = None) -> Tensor:
        """Elements first .. end - 1 of a tensor, 1-D; no other bytes are read. None: to its last."""
        dtype, shape = self.tensors[name]
        end = shape.numel() if end is None else end
        parts = [torch.empty(0, dtype=dtype)]
        for piece in self.manifest["tensors"][name]["pieces"]:
            begin, stop = max(first, piece["first"]), min(end, piece["end"])
            if begin < stop:
                part = self._reader(piece["file"]).get_slice(name)
                parts.append(part[begin - piece["first"] : stop - piece["first"]])
        return parts[1] if len(parts) == 2 else torch.cat(parts)

    def _reader(self, file):
        if file not in self.readers:
            self.readers[file] = open_safetensors(self.folder / file)
        return self.readers[file]


def _entries(path: Path, header: bytes) -> list[tuple]:
    """-> begin, end, name, dtype and shape of what a file's header names, in the order of its bytes."""
    entries = []
    try:
        for name, entry in json.loads(header[8:]).items():
            if name != "__metadata__":
                begin, end = map(operator.index, entry["data_offsets"])
                entries.append((begin, end, name, entry["dtype"], entry["shape"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: damaged: its header is none of safetensors: {error!r}") from None
    return sorted(entries, key=lambda entry: entry[:3])


def _sha256_of_next(stream, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (chunk := stream.read(min(size, _CHUNK))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
    except UserError as error:
        raise Damaged(str(error)) from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: of checkpoint format {manifest.get('format')}, this version reads {FORMAT}")
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
        end = 0
        for piece in tensor["pieces"]:
            if piece["file"] not in manifest["files"]:
                raise ValueError(f"{name} has a piece in {piece['file']!r}, which is none of its files")
            if type(piece["sha256"]) is not str:
                raise ValueError(f"{name} has the sha256 {piece['sha256']!r}")
            if not type(piece["first"]) is type(piece["end"]) is int or not piece["first"] == end <= piece["end"]:
                raise ValueError(f"pieces of {name} overlap or leave a hole at element {end}")
            end = piece["end"]
        if end != math.prod(tensor["shape"]):
            raise ValueError(f"pieces of {name} end at element {end}, the tensor has {math.prod(tensor['shape'])}")
