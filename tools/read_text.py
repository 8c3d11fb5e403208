"""Files -> records -> text: what tools/prepare_data.py reads, and what it counts as no document.

A .txt file is one record, as is a file of any other plain-text suffix; .jsonl has one in each line, .parquet and .arrow
in each row. A record is the bytes as they lie in the file; text_of() or row_of() makes a text or a JSON object of it,
or says why it is none. A folder that datasets' save_to_disk wrote has the .arrow files that its state.json lists.
"""

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from minitrain.config import UserError
from minitrain.storage import read_json

TABLES = (".parquet", ".arrow")
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", *TABLES)
CHAT_FIELDS = ("messages", "tools", "prompt", "completion")


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
        return f"{self.path}:{self.number}" if self.is_json or self.path.endswith(TABLES) else self.path


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
            if "dataset_dict.json" in names:
                raise UserError(f"{folder}: holds several splits; give one of them: {', '.join(folders)}")
            if "state.json" in names and any(name.endswith(".arrow") for name in names):
                names = [entry["filename"] for entry in read_json(Path(folder) / "state.json")["_data_files"]]
            found += [os.path.join(folder, n) for n in sorted(set(names) - exclude) if n.endswith(suffixes)]
        sizes = [(name, os.path.getsize(name)) for name in found if os.path.isfile(name)]
        listed.append({"path": str(path), "files": len(sizes), "bytes": sum(size for _, size in sizes)})
        files += sizes
    if not files:
        raise UserError(f"{' '.join(map(str, inputs))}: no file with a suffix of {' '.join(suffixes)}")
    return files, listed


def read_records(path: str, file: int, fields: Sequence[str]) -> Iterator[Record]:
    """All of a file. Of a table one field is text as it is; several are a JSON object of those that there are.
    UserError if it cannot be read or is damaged."""
    try:
        with open(path, "rb") as handle:
            if path.endswith(TABLES):
                pieces = _table_rows(path, handle, fields)
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


def _table_rows(path, handle, fields) -> Iterator[bytes | None]:
    import pyarrow
    from pyarrow import parquet

    if path.endswith(".parquet"):
        table = parquet.ParquetFile(path)
        schema, batches = table.schema_arrow, lambda names: table.iter_batches(1024, columns=names)
    else:
        table = pyarrow.ipc.open_stream(handle)
        schema, batches = table.schema, lambda names: (batch.select(names) for batch in table)
    names = [name for name in fields if name in schema.names]
    if not names:
        raise UserError(
            f"{path}: no column {' or '.join(map(repr, fields))} but {', '.join(schema.names)}; see --text-field"
        )
    for rows in batches(names):
        if len(fields) > 1:
            yield from (json.dumps(row).encode() for row in rows.to_pylist())
        else:  # as bytes: the library does not check UTF-8 before it makes a str
            yield from (value.as_py() for value in rows.column(0).cast("large_binary"))


def row_of(record: Record) -> dict:
    """Its JSON object. Raises Skip."""
    if not record.raw.strip():
        raise Skip("empty")
    try:
        row = json.loads(record.raw.decode().removeprefix("\ufeff"))
    except UnicodeError:
        raise Skip("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise Skip("broken JSON") from None
    if not isinstance(row, dict):
        raise Skip("missing field")
    return row


def text_of(record: Record, text_field: str) -> tuple[str, int]:
    """Its text, and how many bytes that is in UTF-8. Raises Skip."""
    if record.is_json:
        text = row_of(record).get(text_field)
        if not isinstance(text, str):
            raise Skip("missing field")
    elif record.raw is None:
        raise Skip("missing field")
    else:
        try:
            text = record.raw.decode()
        except UnicodeError:
            raise Skip("invalid UTF-8") from None
    text = text.removeprefix("\ufeff")
    size = utf8_bytes(text)
    if not text:
        raise Skip("empty")
    return text, size


def utf8_bytes(text: str) -> int:
    """Raises Skip for half of a surrogate pair, which JSON can spell."""
    try:
        return len(text.encode())
    except UnicodeError:
        raise Skip("invalid UTF-8") from None
