"""Text or chats -> token shards for minitrain/data.py: every document tokenised once, in the order of the inputs.

    .txt .jsonl .jsonl.gz .jsonl.zst           ->  shard-00000.safetensors  tokens (n,) uint16 or int32
    .parquet .arrow                                ...                      document_offsets (documents + 1,) int64
    (or folders of them, also what datasets'                                trained (n,) bool, of chats only
    save_to_disk wrote)                            tokenizer.json           is_first (documents,) bool, of chats only
                                                   report.json comes last: the set is whole

    python tools/prepare_data.py books/ more.jsonl.gz --out data/books --train-tokenizer 32000
    python tools/prepare_data.py chats.jsonl --chat --out data/chats --tokenizer Qwen/Qwen3-0.6B

A .txt file is one document, and so is a file of another suffix that --suffixes asks for; .jsonl has one in each line,
.parquet and .arrow in each row. A document is held whole; of the rest at most one shard is in memory, and with --dedup
some 100 bytes for each document. A shard ends with the document that fills it, a document with the tokenizer's
end-of-text token, if there is one, or what --end-with says. Text that spells a special token does not become it. A BOM
is dropped, CRLF is kept.

With --chat a record is {"messages": [...], "tools": [...]} with the roles system, user, assistant and tool, made text
by the tokenizer's chat template, or {"prompt": "...", "completion": "..."}. The turns of assistants, or the completion,
are marked as what is to be learnt (minitrain/chat.py); the template, not --end-with, says what ends a turn. Of several
documents that one conversation becomes, is_first marks the first: training and validation share none.

Skipped, counted, the first of each kind named: an empty document or line, invalid UTF-8 (in JSON also half surrogates),
broken JSON, a missing field or one that is no text, a duplicate (--dedup), a conversation that is no good. One line and
exit code 2, nothing written: an input that does not exist, an unknown suffix, no document at all, a folder with another
tokenizer or a finished dataset (--overwrite replaces both), a chat template that cannot be used. A damaged file, one
without the column, or a full disk stops the run; the shards before it stay.

A stopped run goes on after its last whole shard when it is started again alike; with --overwrite it begins anew.
"""

import argparse
import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread

import torch
from encode_text import Encoded, Encoder, Recipe, load_encoder, train_encoder
from read_text import CHAT_FIELDS, SUFFIXES, Record, Skip, find_files, read_records, row_of, text_of
from tqdm import tqdm

from minitrain.config import UserError, exit_with
from minitrain.storage import open_safetensors, read_json, sha256, write_json, write_safetensors

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
    documents_written: int = 0  # a conversation may become several
    skipped: dict[str, int] = field(default_factory=dict)
    first_skipped: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
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
    chat: bool = False,
    chat_template: str | Path | None = None,
    begin_with: Iterable[str] = (),
    end_with: Iterable[str] | None = None,
    dedup: bool = False,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    overwrite: bool = False,
) -> dict:
    """Make or finish the dataset in `out`. -> the content of report.json. UserError as the module says.

    tokenizer: tokenizer.json, its folder or a hub id; or train_tokenizer: the size of a new vocabulary.
    chat_template: a file, in the place of the tokenizer's. begin_with, end_with: special tokens around each document;
    None: end of text behind it, if the tokenizer has that. dedup: skip what has the same tokens as one before.
    workers: processes, None for one a core; neither they nor stops and restarts change a byte of the shards.
    """
    started, out = time.perf_counter(), Path(out)
    if (tokenizer is None) == (train_tokenizer is None):
        raise UserError("give either a tokenizer or the vocabulary size of one to train")
    workers = os.cpu_count() if workers is None else workers
    if shard_tokens < 1 or workers < 1:
        raise UserError(f"shard_tokens={shard_tokens}, workers={workers}: must be at least 1")
    if chat_template and not chat:
        raise UserError("chat_template is given, but chat is not")
    recipe = Recipe(text_field, chat, tuple(begin_with), None if end_with is None else tuple(end_with))
    options = {"tokenizer": tokenizer and str(tokenizer), "train_tokenizer": train_tokenizer, "dedup": dedup}
    options |= {"chat_template": chat_template and str(chat_template), **json.loads(json.dumps(asdict(recipe)))}
    options |= {"suffixes": list(suffixes), "exclude": sorted(exclude), "shard_tokens": shard_tokens}
    files, listed = find_files(list(map(Path, inputs)), tuple(options["suffixes"]), set(options["exclude"]))
    names = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    progress = _claim(out, {"inputs": listed, "files_sha256": names} | options, overwrite)

    fields = CHAT_FIELDS if chat else (text_field,)
    if tokenizer is None and not progress.shards:
        encoder = train_encoder(sample_texts(files, fields), train_tokenizer, recipe, chat_template)
    else:
        encoder = load_encoder(out if tokenizer is None else tokenizer, recipe, chat_template)
    old = out / "tokenizer.json"
    if not overwrite and old.exists() and sha256(old) != encoder.sha256:
        raise UserError(f"{old}: another tokenizer; choose another folder or --overwrite")
    if not encoder.end and end_with is None and not chat:
        print("the tokenizer has no end-of-text token: documents end without one", file=sys.stderr)

    writer = ShardWriter(out, progress, encoder, started - progress.seconds)
    ends = list(accumulate((size for _, size in files), initial=0))
    with tqdm(total=ends[-1], unit="B", unit_scale=True, disable=None) as bar:
        batches = cut_batches(files, progress.file, progress.record, fields)
        for records, encoded in encode_batches(batches, workers, encoder):
            for record, documents in zip(records, encoded, strict=True):
                writer.add(record, documents)
            bar.update(ends[record.file] + record.position - bar.n)
    return writer.finish()


# ---- records, for the tokenizer and for its workers


def sample_texts(files: list[tuple[str, int]], fields: Sequence[str]) -> Iterator[str]:
    """About SAMPLE_BYTES, the first documents of files spread evenly over all bytes. No more than these are read."""
    total = sum(size for _, size in files) or 1
    taken = passed = 0
    for path, size in files:
        passed += size
        records = read_records(path, 0, fields)
        while taken < SAMPLE_BYTES * passed / total and (record := next(records, None)):
            with suppress(Skip):
                text = "\n".join(_strings(row_of(record))) if len(fields) > 1 else text_of(record, fields[0])[0]
                yield text[: SAMPLE_BYTES - taken]
                taken += len(text.encode("utf-8", "replace"))


def _strings(value) -> Iterator[str]:
    """All in a JSON value."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
    elif isinstance(value, str):
        yield value.encode("utf-8", "replace").decode()


def cut_batches(files: list[tuple[str, int]], file: int, done: int, fields: Sequence[str]) -> Iterator[list[Record]]:
    """All records from files[file] on but its first `done`, about BATCH_BYTES at a time."""
    batch, size = [], 0
    for i in range(file, len(files)):
        for record in read_records(files[i][0], i, fields):
            if i == file and record.number <= done:
                continue
            batch.append(record)
            size += len(record.raw or b"") + 100  # so that a million empty ones are no batch
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


# ---- work


def encode_batches(batches: Iterator[list[Record]], workers: int, encoder: Encoder) -> Iterator[tuple[list, list]]:
    """(batch, what Encoder.encode makes of each record), in order; no more than two batches a worker in memory. One
    worker is this process."""
    if workers == 1:
        yield from ((batch, encoder.encode(batch)) for batch in batches)
        return
    context = multiprocessing.get_context("fork")  # a new process would import torch, which takes seconds
    waiting = deque()
    try:
        with _one_thread_each(), ProcessPoolExecutor(workers, context, _start_worker, (encoder,)) as pool:
            for batch in batches:
                waiting.append((batch, pool.submit(_encode, batch)))
                if len(waiting) == 2 * workers:
                    batch, future = waiting.popleft()
                    yield batch, future.result()
            for batch, future in waiting:
                yield batch, future.result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for its memory: use fewer --workers") from None


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Of workers: a tokenizer's threads are not there after a fork, and would be too many."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start_worker(encoder):
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    Thread(target=_die_with_parent, daemon=True).start()
    _encoder = encoder


def _die_with_parent():  # also a killed one: the pool itself would wait forever
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode(batch):
    return _encoder.encode(batch)


# ---- the folder


def _claim(out: Path, job: dict, overwrite: bool) -> Progress:
    """Where to begin: what a stopped run of this job left, or nothing. UserError if the folder is another's."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is not a folder")
    path, shards = out / "progress.json", sorted(out.glob("shard-*.safetensors"))
    if overwrite or not (path.exists() or shards or (out / "report.json").exists()):
        return Progress(job)
    if (out / "report.json").exists() or not path.exists():
        raise UserError(f"{out}: holds a dataset; choose another folder or --overwrite")
    progress = Progress(**read_json(path))
    changed = [key for key in job if job[key] != progress.job.get(key)]
    if changed:
        raise UserError(f"{out}: a run of other {', '.join(changed)} was stopped here; start that again or --overwrite")
    if len(shards) < progress.shards:
        raise UserError(f"{out}: has {len(shards)} of the {progress.shards} shards in progress.json; use --overwrite")
    return progress


class ShardWriter:
    """Documents in, whole shards out. The folder is not touched before the first of them."""

    def __init__(self, out: Path, progress: Progress, encoder: Encoder, started: float):
        self.out, self.progress, self.encoder, self.started = out, progress, encoder, started
        self.seen: set[bytes] = set()  # hashes of what was kept
        if progress.job["dedup"]:
            for i in range(progress.shards):
                hashes = open_safetensors(out / _shard_name(i)).get_tensor("hashes")
                raw = ctypes.string_at(hashes.data_ptr(), hashes.nbytes)
                self.seen |= {raw[j : j + 16] for j in range(0, len(raw), 16)}
        self._clear()

    def _clear(self):
        self.ids, self.offsets, self.hashes = bytearray(), array("q", [0]), bytearray()
        self.trained, self.is_first = bytearray(), bytearray()

    def add(self, record: Record, encoded: Encoded) -> None:
        """One record: its documents, or the problem for which it is skipped."""
        p = self.progress
        p.file, p.record, p.documents_read = record.file, record.number, p.documents_read + 1
        problem = encoded.problem
        if p.job["dedup"] and not problem:
            if encoded.hash in self.seen:
                problem = "duplicate"
            self.seen.add(encoded.hash)
        if problem:
            if problem not in p.skipped:
                p.first_skipped[problem] = str(record)
                tqdm.write(f"skipped, {problem}: {record} (the first; report.json counts them)", file=sys.stderr)
            p.skipped[problem] = p.skipped.get(problem, 0) + 1
            return
        before = self.offsets[-1]
        for ids in encoded.documents:
            self.ids += ids
            self.offsets.append(len(self.ids) // self.encoder.dtype.itemsize)
        self.trained += b"".join(encoded.trained)
        self.is_first += b"\1" + b"\0" * (len(encoded.documents) - 1)
        self.hashes += encoded.hash if p.job["dedup"] else b""
        num_tokens = self.offsets[-1] - before
        p.documents_kept, p.documents_written = p.documents_kept + 1, p.documents_written + len(encoded.documents)
        p.tokens, p.bytes = p.tokens + num_tokens, p.bytes + encoded.num_bytes
        p.trained_tokens += sum(map(sum, encoded.trained)) if encoded.trained else num_tokens
        if self.offsets[-1] >= p.job["shard_tokens"]:
            self.flush()

    def flush(self) -> None:
        """Write the shard, then that it is there; a run stopped in between writes the same shard again."""
        p, encoder = self.progress, self.encoder
        if not p.shards:
            self._begin()
        offsets = torch.frombuffer(self.offsets, dtype=torch.int64)
        tensors = {"tokens": torch.frombuffer(self.ids, dtype=encoder.dtype), "document_offsets": offsets}
        if self.trained:
            tensors["trained"] = torch.frombuffer(self.trained, dtype=torch.bool)
            tensors["is_first"] = torch.frombuffer(self.is_first, dtype=torch.bool)
        if self.hashes:  # for a run that goes on from here
            tensors["hashes"] = torch.frombuffer(self.hashes, dtype=torch.uint8).view(-1, 16)
        metadata = {"tokenizer_sha256": encoder.sha256, "vocab_size": str(encoder.size)}
        self._publish(_shard_name(p.shards), write_safetensors, tensors, metadata)
        p.shards, p.seconds = p.shards + 1, time.perf_counter() - self.started
        self._publish("progress.json", write_json, asdict(p))
        self._clear()

    def _begin(self):
        self.out.mkdir(parents=True, exist_ok=True)
        stale = ("report.json", "progress.json", "tokenizer_config.json", "chat_template.jinja")
        for name in stale:  # the report first: no more a dataset
            (self.out / name).unlink(missing_ok=True)
        for shard in self.out.glob("shard-*"):
            shard.unlink()
        for name, content in self.encoder.files.items():
            self._publish(name, Path.write_bytes, content)
        self._publish("progress.json", write_json, asdict(Progress(self.progress.job)))

    def _publish(self, name, write, *content):
        tmp = self.out / (name + ".tmp")
        try:
            write(tmp, *content)
            with open(tmp) as file:
                os.fsync(file.fileno())
            tmp.replace(self.out / name)
        except OSError as error:  # a full disk
            tmp.unlink(missing_ok=True)
            raise UserError(
                f"{self.out / name}: {error.strerror}; what is there is whole: the same command goes on from it"
            ) from None

    def finish(self) -> dict:
        """Write what is left and report.json. -> its content. UserError if no document was kept."""
        p = self.progress
        if not p.documents_kept:
            raise UserError(f"no document to keep: {p.documents_read} read, skipped {p.skipped}")
        if len(self.ids):
            self.flush()
        p.seconds = time.perf_counter() - self.started
        report = asdict(p) | {"vocab_size": self.encoder.size, "MB/s": round(p.bytes / 1e6 / p.seconds, 2)}
        report = report.pop("job") | {k: v for k, v in report.items() if k not in ("file", "record")}
        self._publish("report.json", write_json, report)
        (self.out / "progress.json").unlink(missing_ok=True)
        return report


def _shard_name(i: int) -> str:
    return f"shard-{i:05d}.safetensors"


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
    add("--chat", action="store_true", help="records are conversations: messages, or prompt and completion")
    add("--chat-template", metavar="FILE", help="jinja2, in the place of the tokenizer's own")
    add("--begin-with", nargs="*", default=(), metavar="TOKEN", help="special tokens before each document")
    add("--end-with", nargs="*", metavar="TOKEN", help="and behind it (default: end of text, if the tokenizer has it)")
    add("--dedup", action="store_true", help="skip documents that have the same tokens as one before")
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
