"""Files -> records -> text: what tools/prepare_data.py reads, and what it counts as no document.

A .txt file is one record, as is a file of any other plain-text suffix; .jsonl has one in each line, .parquet in each
row. A record is the bytes as they lie in the file; text_of() makes a document of it, or says why it is none.
"""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minitrain.config import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


class Record(NamedTuple):
    """One document as it lies in its file."""

    path: str
    file: int  # index of the file
    number: int  # line or row, from 1
    position: int  # bytes of the file that reading it took so far
    raw: bytes | None  # None: null in a table

    @property
    def is_json(self):
        return self.path.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst"))

    def __str__(self):
        return f"{self.path}:{self.number}" if self.is_json or self.path.endswith(".parquet") else self.path


class Skip(Exception):
    """A document is not used; the text is why."""


def find_files(inputs: list[Path], suffixes: tuple, exclude: set) -> tuple[list[tuple[str, int]], list[dict]]:
    """-> [(path, bytes)] in reading order, and what each input has."""
    for suffix in suffixes:
        if not suffix.startswith(".") or (suffix.endswith((".gz", ".zst", ".bz2", ".xz")) and suffix not in SUFFIXES):
            raise UserError(f"suffix {suffix!r}: must be one of {' '.join(SUFFIXES)} or a text file's, like .md")
    files, listed = [], []
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if path.is_file() and not path.name.endswith(suffixes):
            raise UserError(f"{path}: unknown suffix; --suffixes takes it for text (now: {' '.join(suffixes)})")
        found = [str(path)] if path.is_file() else []
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(set(folders) - exclude)
            found += [os.path.join(folder, n) for n in sorted(set(names) - exclude) if n.endswith(suffixes)]
        sizes = [(name, os.path.getsize(name)) for name in found if os.path.isfile(name)]
        listed.append({"path": str(path), "files": len(sizes), "bytes": sum(size for _, size in sizes)})
        files += sizes
    if not files:
        raise UserError(f"{' '.join(map(str, inputs))}: no file with a suffix of {' '.join(suffixes)}")
    return files, listed


def read_records(path: str, file: int, text_field: str) -> Iterator[Record]:
    """All of a file. UserError if it cannot be read or is damaged."""
    try:
        with open(path, "rb") as handle:
            if path.endswith(".parquet"):
                pieces = _parquet_rows(path, text_field)
            elif path.endswith(".jsonl.zst"):
                pieces = _zst_lines(handle)
            elif path.endswith(".jsonl.gz"):
                pieces = gzip.GzipFile(fileobj=handle)
            else:
                pieces = handle if path.endswith(".jsonl") else [handle.read()]
            for number, raw in enumerate(pieces, 1):
                yield Record(path, file, number, handle.tell(), raw)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{path}: needs a package: pip install {error.name}, or minitrain[data]") from None
    except Exception as error:  # OSError, EOFError and what zlib, zstandard and pyarrow call their own
        raise UserError(f"{path}: cannot be read: {error}".splitlines()[0]) from None


def _zst_lines(handle) -> Iterator[bytes]:
    """Of one or more frames. NOTE the library's own reader takes a file that was cut for a shorter one."""
    import zstandard  # optional, as pyarrow is

    frame, tail = None, b""
    while chunk := handle.read(1 << 17):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            *lines, tail = (tail + frame.decompress(chunk)).split(b"\n")
            yield from lines
            chunk, frame = frame.unused_data, None if frame.eof else frame
    if frame:
        raise EOFError("it ends inside a frame")
    if tail:
        yield tail


def _parquet_rows(path, text_field) -> Iterator[bytes | None]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        if text_field not in table.schema_arrow.names:
            raise UserError(
                f"{path}: no column {text_field!r} but {', '.join(table.schema_arrow.names)}; see --text-field"
            )
        for rows in table.iter_batches(1024, columns=[text_field]):
            # as bytes: the library does not check UTF-8 before it makes a str
            yield from (value.as_py() for value in rows.column(0).cast("large_binary"))


def text_of(record: Record, text_field: str) -> tuple[str, int]:
    """Its document, and how many bytes that is in UTF-8. Raises Skip."""
    if record.raw is None:
        raise Skip("missing field")
    try:
        text = record.raw.decode().removeprefix("\ufeff")
        if record.is_json:
            row = json.loads(text) if text.strip() else {text_field: ""}
            text = row.get(text_field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise Skip("missing field")
            text = text.removeprefix("\ufeff")
        size = len(text.encode())
    except UnicodeError:
        raise Skip("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise Skip("broken JSON") from None
    if not text:
        raise Skip("empty")
    return text, size
