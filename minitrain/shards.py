"""A source of documents: a folder of token shards, as tools/prepare_data.py leaves it, memory-mapped.

shard-00000.safetensors   tokens            (n,) uint16 or int32
                          document_offsets  (documents + 1,) int64
                          trained           (n,) bool, only of chats: the tokens that are to be learnt
                          is_first          (documents,) bool, only of chats: of those of one conversation
tokenizer.json            report.json       written last: the set is whole

pieces    documents, and parts of those longer than max_seqlen; a table, for training and for validation each
"""

import ctypes
import logging
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitrain.config import DataConfig, UserError
from minitrain.storage import open_safetensors, read_json, sha256

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None)


@dataclass
class Shard:
    path: Path
    tokens: Tensor  # (n,) uint16 or int32, mapped from the file
    document_offsets: Tensor  # (documents + 1,) int64
    trained: Tensor | None  # (n,) bool, mapped; None: all tokens
    is_first: Tensor  # (documents,) bool: False goes with the document before it, when some are held out

    def __post_init__(self):
        self.token_bytes = _memory(self.tokens)  # slices of it cost a tenth of a tensor's
        self.trained_bytes = None if self.trained is None else _memory(self.trained)

    def will_need(self, start: int, length: int) -> None:
        """Begin to read these tokens from the disk, and do not wait for them."""
        size = self.tokens.element_size()
        address = self.tokens.data_ptr() + size * start
        page = address % mmap.PAGESIZE
        _libc.madvise(ctypes.c_void_p(address - page), ctypes.c_size_t(size * length + page), mmap.MADV_WILLNEED)


@dataclass
class Pieces:
    """One row for each document, or part of one longer than max_seqlen."""

    shards: list[Shard]
    shard: Tensor  # (P,) index of the shard
    start: Tensor  # (P,) first token in the shard
    length: Tensor  # (P,) tokens
    is_last: Tensor  # (P,) bool: the document ends with it

    def select(self, mask_P: Tensor) -> "Pieces":
        columns = self.shard, self.start, self.length, self.is_last
        return Pieces(self.shards, *(column[mask_P] for column in columns))


@dataclass
class Source:
    path: str
    weight: float
    tokenizer: str  # sha256 of its tokenizer.json
    trained: Pieces
    held_out: Pieces  # validated on


def open_sources(cfg: DataConfig, vocab_size: int) -> list[Source]:
    """UserError for folders that are absent, unfinished, empty, not whole, of two tokenizers or more ids than the model
    has."""
    if not cfg.all_sources[0].path:
        raise UserError("data.path is not set: give a folder made by tools/prepare_data.py")
    sources = []
    for i, source in enumerate(cfg.all_sources):
        setting = f"data.sources.{i}.path={source.path}" if cfg.sources else f"data.path={source.path}"
        if Path(source.path) in [Path(other.path) for other in sources]:
            raise UserError(f"{setting}: the same folder as another source's")
        tokenizer, shards = _open_shards(Path(source.path), setting, vocab_size)
        if sources and tokenizer != sources[0].tokenizer:
            raise UserError(f"{setting}: made with another tokenizer than {sources[0].path}")
        trained, held_out = _split(shards, cfg, source.weight == 0, setting)
        sources.append(Source(source.path, source.weight, tokenizer, trained, held_out))
    return sources


def _memory(t: Tensor) -> memoryview:
    """The bytes of a tensor, which has to live as long."""
    return memoryview((ctypes.c_char * t.nbytes).from_address(t.data_ptr())).cast("B") if t.nbytes else memoryview(b"")


def _open_shards(path: Path, setting: str, vocab_size: int) -> tuple[str, list[Shard]]:
    if not path.is_dir():
        raise UserError(f"{setting}: no such folder; tools/prepare_data.py makes one")
    if not (path / "report.json").exists():
        raise UserError(f"{setting}: has no report.json, so its preparation did not finish")
    if not (path / "tokenizer.json").exists():
        raise UserError(f"{setting}: has no tokenizer.json")
    tokenizer = sha256(path / "tokenizer.json")
    shards = []
    for file in sorted(path.glob("*.safetensors")):
        reader = open_safetensors(file)
        metadata, names = reader.metadata() or {}, set(reader.keys())
        if not {"tokens", "document_offsets"} <= names or "vocab_size" not in metadata:
            raise UserError(f"{file}: not a token shard")
        if metadata.get("tokenizer_sha256") != tokenizer:
            raise UserError(f"{file}: made with another tokenizer than {path / 'tokenizer.json'}")
        if int(metadata["vocab_size"]) > vocab_size:
            raise UserError(
                f"model.vocab_size={vocab_size} is smaller than the tokenizer's {metadata['vocab_size']} in {path}"
            )
        trained = reader.get_tensor("trained") if "trained" in names else None
        offsets = reader.get_tensor("document_offsets")
        is_first = reader.get_tensor("is_first") if "is_first" in names else torch.ones_like(offsets[1:]).bool()
        shard = Shard(file, reader.get_tensor("tokens"), offsets, trained, is_first)
        borders, n = offsets.long(), len(shard.tokens)
        if not len(borders) or borders[0] != 0 or borders[-1] != n or (borders.diff() < 0).any():
            raise UserError(f"{file}: damaged: document_offsets do not rise from 0 to its {n} tokens")
        if shards and shard.tokens.dtype != shards[0].tokens.dtype:
            raise UserError(f"{file}: its tokens are {shard.tokens.dtype}, those of {shards[0].path} are not")
        if trained is not None and (trained.dtype != torch.bool or trained.shape != shard.tokens.shape):
            raise UserError(f"{file}: damaged: trained is not one truth value for each of its {n} tokens")
        if is_first.dtype != torch.bool or is_first.shape != offsets[1:].shape:
            raise UserError(f"{file}: damaged: is_first is not one truth value for each of its documents")
        shards.append(shard)
    found = {"shards": len(shards), "tokens": sum(len(shard.tokens) for shard in shards)}
    if not found["tokens"]:
        raise UserError(f"{setting}: holds no tokens")
    report = read_json(path / "report.json")
    for what, number in found.items():
        if report.get(what, number) != number:
            raise UserError(f"{setting}: holds {number} {what}, and {report[what]} by its report.json; prepare again")
    return tokenizer, shards


def _split(shards: list[Shard], cfg: DataConfig, only_validated: bool, setting: str) -> tuple[Pieces, Pieces]:
    """-> pieces to train on, pieces to validate on."""
    conversation = torch.cat([shard.is_first for shard in shards]).cumsum(0)  # of each document, from 1; text: itself
    documents, conversations = len(conversation), int(conversation[-1])
    is_held_out = torch.full((conversations + 1,), only_validated)
    if not only_validated:  # spread evenly, so that what lies together in the inputs is there
        is_held_out[1 + torch.arange(cfg.held_out) * conversations // max(1, cfg.held_out)] = True
    is_held_out = is_held_out[conversation]
    columns, first, num_long = [], 0, 0
    for i, shard in enumerate(shards):
        lengths = shard.document_offsets.diff()
        parts = (lengths + cfg.max_seqlen - 1) // cfg.max_seqlen  # of each document
        taken = {"split": parts, "cut": parts.clamp(max=1), "drop": parts * (parts == 1)}[cfg.long_documents]
        document = torch.repeat_interleave(taken)
        number = torch.arange(len(document)) - (taken.cumsum(0) - taken)[document]  # within its document
        start = shard.document_offsets[document] + number * cfg.max_seqlen
        length = (shard.document_offsets[document + 1] - start).clamp(max=cfg.max_seqlen)
        is_last = number + 1 == parts[document]
        columns.append((torch.full_like(start, i), start, length, is_last, is_held_out[first + document]))
        first, num_long = first + len(lengths), num_long + int((parts > 1).sum())
    if num_long:
        log.info("%s: %s of %s documents are longer than data.max_seqlen=%s: %s", setting, f"{num_long:,}",
                 f"{documents:,}", cfg.max_seqlen, cfg.long_documents)  # fmt: skip
    *columns, held = (torch.cat(column) for column in zip(*columns, strict=True))
    pieces = Pieces(shards, *columns)
    trained, held_out = pieces.select(~held), pieces.select(held)
    uses = {"train": (trained, not only_validated), "validate": (held_out, only_validated or cfg.held_out > 0)}
    for use, (pieces, is_needed) in uses.items():
        if is_needed and not len(pieces.length):
            raise UserError(
                f"{setting}: holds no documents to {use} on: {documents:,} in all, data.held_out={cfg.held_out}, "
                f"{num_long:,} longer than data.max_seqlen={cfg.max_seqlen}"
            )
    return trained, held_out
