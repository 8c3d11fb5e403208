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
broken JSON, a missing field or one that is no text. One line and exit code 2, nothing written: an input that does not
exist, an unknown suffix, no document at all, a folder with another tokenizer or a finished dataset (--overwrite
replaces both). A damaged .gz, .zst or .parquet, or one without the column, stops the run; the shards before it stay.

A stopped run goes on after its last whole shard when it is started again alike; with --overwrite it begins anew.
"""

import argparse
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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread

import torch
from read_text import SUFFIXES, Record, Skip, find_files, read_records, text_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from minitrain.config import UserError, exit_with
from minitrain.hf import find_folder
from minitrain.storage import read_json, sha256, write_json, write_safetensors

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

    if tokenizer is None and not progress.shards:
        vocabulary = train_vocabulary(sample_texts(files, text_field), train_tokenizer)
    else:
        vocabulary = load_vocabulary(out if tokenizer is None else tokenizer)
    old = out / "tokenizer.json"
    if not overwrite and old.exists() and sha256(old) != vocabulary.sha256:
        raise UserError(f"{old}: another tokenizer; choose another folder or --overwrite")
    if vocabulary.eos_id is None:
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


# ---- records, for the tokenizer and for its workers


def sample_texts(files: list[tuple[str, int]], text_field: str) -> Iterator[str]:
    """About SAMPLE_BYTES, the first documents of files spread evenly over all bytes. No more than these are read."""
    total = sum(size for _, size in files) or 1
    taken = passed = 0
    for path, size in files:
        passed += size
        records = read_records(path, 0, text_field)
        while taken < SAMPLE_BYTES * passed / total and (record := next(records, None)):
            with suppress(Skip):
                text, num_bytes = text_of(record, text_field)
                yield text[: SAMPLE_BYTES - taken]
                taken += num_bytes


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
    """A tokenizer, made of the bytes of its files. NOTE ids may have holes: size is the highest plus one."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.sha256 = hashlib.sha256(files["tokenizer.json"]).hexdigest()
        self.tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        self.tokenizer.encode_special_tokens = True  # as any other text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        ids = self.tokenizer.get_vocab()
        self.size = max(ids.values()) + 1
        self.typecode = "H" if self.size <= 1 << 16 else "i"  # uint16 or int32
        eos = json.loads(files.get("tokenizer_config.json", b"{}")).get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
        if eos and eos not in ids:
            raise UserError(f"tokenizer_config.json: eos_token {eos!r} is not in tokenizer.json")
        self.eos_id = ids.get(eos or next((token for token in END_OF_TEXT if token in ids), None))

    def __reduce__(self):  # the library pickles a tokenizer without its settings
        return Vocabulary, (self.files,)

    def encode(self, record: Record, text_field: str) -> tuple[array | None, int, str]:
        """-> (tokens, bytes of text, ""), or (None, 0, why the record is skipped)."""
        try:
            text, num_bytes = text_of(record, text_field)
            # a batch of one takes 2/3 of the time of encode(), which keeps offsets
            ids = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
            if not ids:
                raise Skip("empty")
        except Skip as reason:
            return None, 0, str(reason)
        return array(self.typecode, ids if self.eos_id is None else [*ids, self.eos_id]), num_bytes, ""


def load_vocabulary(source: str | Path) -> Vocabulary:
    """Of tokenizer.json, its folder or a hub id. UserError if there is none or it is no good."""
    path = Path(source)
    if not path.is_file():
        path = find_folder(source, ["tokenizer.json", "tokenizer_config.json"]) / "tokenizer.json"
    config = path.with_name("tokenizer_config.json")
    if not path.exists():
        raise UserError(f"{path}: no such file")
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
    special = {"special_tokens": [END_OF_TEXT[0]], "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, **special))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT[0]}
    config["clean_up_tokenization_spaces"] = False  # or transformers 4 drops spaces before punctuation
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}
    return Vocabulary({name: content.encode() for name, content in files.items()})


def encode_batches(batches: Iterator[list[Record]], workers: int, *args) -> Iterator[tuple[list, list]]:
    """(batch, what Vocabulary.encode makes of each record), in order; no more than two batches a worker in memory.
    args: the vocabulary and text_field. One worker is this process."""
    if workers == 1:
        vocabulary, text_field = args
        yield from ((batch, [vocabulary.encode(record, text_field) for record in batch]) for batch in batches)
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
    global _vocabulary, _text_field
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or each worker starts a thread a core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    Thread(target=_die_with_parent, daemon=True).start()
    _vocabulary, _text_field = args


def _die_with_parent():  # also a killed one: the pool itself would wait forever
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode(batch):
    return [_vocabulary.encode(record, _text_field) for record in batch]


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
        metadata["eos_token_id"] = "" if vocabulary.eos_id is None else str(vocabulary.eos_id)
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
