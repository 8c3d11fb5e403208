"""Text -> token shards for minitrain/data.py: every document tokenised once, in the order of the inputs.

    .txt .jsonl .jsonl.gz .jsonl.zst .parquet  ->  shard-00000.safetensors  tokens (n,) uint16 or int32
    (or folders of them)                           ...                      document_offsets (documents + 1,) int64
                                                   tokenizer.json           report.json comes last: the set is whole

    python tools/prepare_data.py books/ more.jsonl.gz --out data/books --train-tokenizer 32000

A .txt file is one document, and so is a file of another suffix that --suffixes asks for; .jsonl has one in each line,
.parquet in each row. A document is held whole; of the rest at most one shard is in memory. A shard ends with the
document that fills it, a document with the tokenizer's end-of-text token, if there is one. Text that spells a special
token does not become it. A BOM is dropped, CRLF is kept.

Skipped, counted, the first of each kind named: an empty document or line, invalid UTF-8 (in JSON also half surrogates),
broken JSON, a missing field or one that is no text. One line and exit code 2, nothing written: an input or column that
does not exist, an unknown suffix, no document at all, a folder with another tokenizer or a finished dataset
(--overwrite replaces both). A damaged .gz, .zst or .parquet stops the run; the shards before it stay.

A stopped run goes on after its last whole shard when it is started again alike; with --overwrite it begins anew.
"""

import argparse
import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from minitrain.config import UserError, exit_with
from minitrain.storage import read_json, sha256, write_json, write_safetensors

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # looked for in this order
SAMPLE_BYTES = 20_000_000  # of text to train a tokenizer on
BATCH_BYTES = 1 << 18  # for a worker at a time: small, so that all are busy to the end


@dataclass
class Progress:
    """progress.json: how far the whole shards reach, and what was counted on the way."""

    job: dict  # inputs and options; a run of others cannot go on from here
    shards: int = 0
    file: int = 0  # next is the record of files[file]
    record: int = 0  # behind so many others
    documents_read: int = 0
    documents_kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first_skipped: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    bytes: int = 0  # of UTF-8 that became tokens
    seconds: float = 0.0


def prepare(
    inputs: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    train_tokenizer: int | None = None,
    suffixes: Iterable[str] = SUFFIXES,
    exclude: Iterable[str] = (),
    text_field: str = "text",
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    overwrite: bool = False,
) -> dict:
    """Make or finish the dataset in `out`. -> the content of report.json. UserError as the module says.

    tokenizer: tokenizer.json, its folder or a hub id; or train_tokenizer: the size of a new vocabulary.
    workers: processes, None for one a core; neither they nor stops and restarts change a byte of the shards.
    """
    started, out = time.perf_counter(), Path(out)
    if (tokenizer is None) == (train_tokenizer is None):
        raise UserError("give either a tokenizer or the vocabulary size of one to train")
    workers = os.cpu_count() if workers is None else workers
    if shard_tokens < 1 or workers < 1:
        raise UserError(f"shard_tokens={shard_tokens}, workers={workers}: must be at least 1")
    options = {"tokenizer": tokenizer and str(tokenizer), "train_tokenizer": train_tokenizer, "text_field": text_field}
    options |= {"suffixes": list(suffixes), "exclude": sorted(exclude), "shard_tokens": shard_tokens}
    files, listed = find_files(list(map(Path, inputs)), tuple(options["suffixes"]), set(options["exclude"]))
    names = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    progress = _claim(out, {"inputs": listed, "files_sha256": names} | options, overwrite)

    if tokenizer or progress.shards:
        vocabulary = load_vocabulary(tokenizer or out)
    else:
        vocabulary = train_vocabulary(sample_texts(files, text_field), train_tokenizer)
    old = out / "tokenizer.json"
    if not overwrite and old.exists() and sha256(old) != vocabulary.sha256:
        raise UserError(f"{old}: another tokenizer; choose another folder or --overwrite")
    if vocabulary.eos is None:
        print("the tokenizer has no end-of-text token: documents end without one", file=sys.stderr)

    writer = ShardWriter(out, progress, vocabulary, started - progress.seconds)
    ends = list(accumulate((size for _, size in files), initial=0))
    with tqdm(total=ends[-1], unit="B", unit_scale=True, disable=None) as bar:
        batches = cut_batches(files, progress.file, progress.record, text_field)
        for records, documents in encode_batches(batches, workers, vocabulary, text_field):
            for record, document in zip(records, documents, strict=True):
                writer.add(record, *document)
            bar.update(ends[record.file] + record.position - bar.n)
    return writer.finish()


# ---- inputs: files -> records -> text


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
            raise UserError(
                f"suffix {suffix!r}: must be of text, and begin with a dot, or be one of {' '.join(SUFFIXES)}"
            )
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
                f"{path}: no column {text_field!r}; --text-field takes {', '.join(table.schema_arrow.names)}"
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


def sample_texts(files: list[tuple[str, int]], text_field: str) -> Iterator[str]:
    """About SAMPLE_BYTES, the first documents of files spread evenly over all bytes. No more than these are read."""
    total = sum(size for _, size in files) or 1
    taken = passed = 0
    for path, size in files:
        passed += size
        due = SAMPLE_BYTES * passed / total
        if taken >= due:
            continue
        for record in read_records(path, 0, text_field):
            try:
                text, num_bytes = text_of(record, text_field)
            except Skip:
                continue
            yield text
            taken += num_bytes
            if taken >= due:
                break


def cut_batches(files: list[tuple[str, int]], file: int, done: int, text_field: str) -> Iterator[list[Record]]:
    """All records from files[file] on but its first `done`, about BATCH_BYTES at a time."""
    batch, size = [], 0
    for i in range(file, len(files)):
        for record in read_records(files[i][0], i, text_field):
            if i == file and record.number <= done:
                continue
            batch.append(record)
            size += len(record.raw or b"") + 100  # so that a million empty ones are no batch
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


# ---- tokenizer


class Vocabulary:
    """A tokenizer and its two files. NOTE ids may have holes, so size is the highest id plus one, not their count."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.sha256 = hashlib.sha256(files["tokenizer.json"]).hexdigest()
        ids = self.load().get_vocab()
        self.size = max(ids.values()) + 1
        self.typecode = "H" if self.size <= 1 << 16 else "i"  # uint16 or int32
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        named = config.get("eos_token")
        named = named["content"] if isinstance(named, dict) else named
        if named and named not in ids:
            raise UserError(f"tokenizer_config.json: eos_token {named!r} is not in tokenizer.json")
        self.eos = ids.get(named or next((token for token in END_OF_TEXT if token in ids), None))

    def load(self) -> Tokenizer:
        tokenizer = Tokenizer.from_buffer(self.files["tokenizer.json"])
        tokenizer.encode_special_tokens = True  # as text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def load_vocabulary(source: str | Path) -> Vocabulary:
    """Of tokenizer.json, its folder or a hub id. UserError if there is none or it is no good."""
    path = Path(source)
    if not path.exists():
        try:
            path = Path(snapshot_download(str(source), allow_patterns=["tokenizer.json", "tokenizer_config.json"]))
        except Exception as error:  # the library raises its own, httpx's and OSError
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{source}: no such file or folder, and the hub could not be read ({reason})") from None
    path = path / "tokenizer.json" if path.is_dir() else path
    config = path.with_name("tokenizer_config.json")
    try:
        files = {"tokenizer.json": path.read_bytes()}
        if config.exists():
            files["tokenizer_config.json"] = config.read_bytes()
        return Vocabulary(files)
    except Exception as error:  # tokenizers raises a plain Exception
        raise UserError(f"{path}: cannot be read as a tokenizer: {error}".splitlines()[0]) from None


def train_vocabulary(texts: Iterator[str], size: int) -> Vocabulary:
    """Byte-level BPE, so that any text can be encoded, with <|endoftext|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(alphabet) + 1:
        raise UserError(f"train_tokenizer={size}: must be at least {len(alphabet) + 1}, all bytes and {END_OF_TEXT[0]}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT[0]]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT[0]}
    config["clean_up_tokenization_spaces"] = False  # or transformers 4 drops spaces before punctuation
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}
    return Vocabulary({name: content.encode() for name, content in files.items()})


class Encoder:
    """A record -> (its tokens, bytes of its text, ""), or (None, 0, why it is skipped)."""

    def __init__(self, vocabulary: Vocabulary, text_field: str):
        self.tokenizer, self.text_field, self.typecode = vocabulary.load(), text_field, vocabulary.typecode
        self.end = [] if vocabulary.eos is None else [vocabulary.eos]

    def __call__(self, record: Record) -> tuple[array | None, int, str]:
        try:
            text, num_bytes = text_of(record, self.text_field)
            # a batch of one takes 2/3 of the time of encode(), which keeps offsets
            ids = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
            if not ids:
                raise Skip("empty")
        except Skip as reason:
            return None, 0, str(reason)
        return array(self.typecode, ids + self.end), num_bytes, ""


def encode_batches(batches: Iterator[list[Record]], workers: int, *args) -> Iterator[tuple[list, list]]:
    """Each batch, in order, with what Encoder(*args) makes of its records. In memory: no more than two a worker."""
    if workers == 1:
        encoder = Encoder(*args)
        yield from ((batch, [encoder(record) for record in batch]) for batch in batches)
        return
    context = multiprocessing.get_context("forkserver")  # the threads of a tokenizer do not survive a plain fork
    context.set_forkserver_preload([__name__])  # imports torch once, not once a worker
    waiting = deque()
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, args) as pool:
            for batch in batches:
                waiting.append((batch, pool.submit(_encode, batch)))
                if len(waiting) == 2 * workers:
                    batch, future = waiting.popleft()
                    yield batch, future.result()
            for batch, future in waiting:
                yield batch, future.result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for its memory: use fewer --workers") from None


def _start_worker(*args):
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or each worker starts a thread a core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    _encoder = Encoder(*args)


def _encode(batch):
    return [_encoder(record) for record in batch]


# ---- the folder


def _claim(out: Path, job: dict, overwrite: bool) -> Progress:
    """Where to begin: what a stopped run of this job left, or nothing. UserError if the folder is another's."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is not a folder")
    if overwrite or not out.exists():
        return Progress(job)
    path, shards = out / "progress.json", sorted(out.glob("shard-*.safetensors"))
    if (out / "report.json").exists() or (shards and not path.exists()):
        raise UserError(f"{out}: holds a dataset; choose another folder or --overwrite")
    if not path.exists():
        return Progress(job)
    progress = Progress(**read_json(path))
    changed = [key for key in job if job[key] != progress.job.get(key)]
    if changed:
        raise UserError(f"{out}: a run of other {', '.join(changed)} was stopped here; start that again or --overwrite")
    if len(shards) < progress.shards:
        raise UserError(
            f"{out}: has {len(shards)} of {progress.shards} shards in progress.json; --overwrite begins anew"
        )
    return progress


class ShardWriter:
    """Documents in, whole shards out. The folder is not touched before the first of them."""

    def __init__(self, out: Path, progress: Progress, vocabulary: Vocabulary, started: float):
        self.out, self.progress, self.vocabulary, self.started = out, progress, vocabulary, started
        self.ids, self.offsets = array(vocabulary.typecode), array("q", [0])

    def add(self, record: Record, ids: array | None, num_bytes: int, problem: str) -> None:
        """One record: its tokens, or the problem for which it is skipped."""
        p = self.progress
        p.file, p.record, p.documents_read = record.file, record.number, p.documents_read + 1
        if problem:
            if problem not in p.skipped:
                p.first_skipped[problem] = str(record)
                tqdm.write(f"skipped, {problem}: {record} (the first; report.json counts them)", file=sys.stderr)
            p.skipped[problem] = p.skipped.get(problem, 0) + 1
            return
        p.documents_kept, p.tokens, p.bytes = p.documents_kept + 1, p.tokens + len(ids), p.bytes + num_bytes
        self.ids.extend(ids)
        self.offsets.append(len(self.ids))
        if len(self.ids) >= p.job["shard_tokens"]:
            self.flush()

    def flush(self) -> None:
        """Write the shard, then that it is there; a run stopped in between writes the same shard again."""
        p, vocabulary = self.progress, self.vocabulary
        if not p.shards:
            self._begin()
        tokens = torch.frombuffer(self.ids, dtype=torch.uint16 if self.ids.typecode == "H" else torch.int32)
        tensors = {"tokens": tokens, "document_offsets": torch.frombuffer(self.offsets, dtype=torch.int64)}
        metadata = {"tokenizer_sha256": vocabulary.sha256, "vocab_size": str(vocabulary.size)}
        metadata["eos_token_id"] = "" if vocabulary.eos is None else str(vocabulary.eos)
        self._publish(f"shard-{p.shards:05d}.safetensors", write_safetensors, tensors, metadata)
        p.shards, p.seconds = p.shards + 1, time.perf_counter() - self.started
        self._publish("progress.json", write_json, asdict(p))
        self.ids, self.offsets = array(self.ids.typecode), array("q", [0])

    def _begin(self):
        self.out.mkdir(parents=True, exist_ok=True)
        for name in ("report.json", "progress.json", "tokenizer_config.json"):  # the report first: no more a dataset
            (self.out / name).unlink(missing_ok=True)
        for shard in self.out.glob("shard-*"):
            shard.unlink()
        for name, content in self.vocabulary.files.items():
            self._publish(name, Path.write_bytes, content)
        self._publish("progress.json", write_json, asdict(Progress(self.progress.job)))

    def _publish(self, name, write, *content):
        tmp = self.out / (name + ".tmp")
        write(tmp, *content)
        with open(tmp) as file:
            os.fsync(file.fileno())
        tmp.replace(self.out / name)

    def finish(self) -> dict:
        """Write what is left and report.json. -> its content. UserError if no document was kept."""
        p = self.progress
        if not p.documents_kept:
            raise UserError(f"no document to keep: {p.documents_read} read, skipped {p.skipped}")
        if len(self.ids):
            self.flush()
        p.seconds = time.perf_counter() - self.started
        report = asdict(p) | {"vocab_size": self.vocabulary.size, "MB/s": round(p.bytes / 1e6 / p.seconds, 2)}
        report = report.pop("job") | {k: v for k, v in report.items() if k not in ("file", "record")}
        self._publish("report.json", write_json, report)
        (self.out / "progress.json").unlink(missing_ok=True)
        return report


def main(args: list[str] | None = None) -> None:
    """The command line; prepare() has the meaning of the flags."""
    parser = argparse.ArgumentParser(description="Text -> token shards; the head of this file tells the details.")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, or folder of files")
    add("--out", required=True, metavar="FOLDER")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, a folder that has one, or a hub id")
    which.add_argument("--train-tokenizer", type=int, metavar="SIZE", help="train a byte-level BPE of so many tokens")
    add("--suffixes", nargs="+", default=SUFFIXES, help="files to take from folders (default: %(default)s)")
    add("--exclude", nargs="+", default=(), metavar="NAME", help="folders and files to leave out")
    add("--text-field", default="text", help="field of .jsonl, column of .parquet (default: %(default)s)")
    add("--shard-tokens", type=int, default=100_000_000, help="a shard ends here (default: %(default)s)")
    add("--workers", type=int, help="processes (default: one a core)")
    add("--overwrite", action="store_true", help="replace what is in FOLDER")
    try:
        report = prepare(**vars(parser.parse_args(args)))
    except (UserError, OSError) as error:
        exit_with(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on after the last whole shard", file=sys.stderr)
        sys.exit(130)
    print("{documents_kept} documents, {tokens} tokens, {shards} shards, {seconds:.1f} s, {MB/s} MB/s".format(**report))


if __name__ == "__main__":
    main()
