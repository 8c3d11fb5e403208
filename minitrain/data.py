"""Token shards -> documents -> packed rows, in an order that is a pure function of (seed, step).

    shards      tokens + document offsets, memory-mapped           (tools/prepare_data.py writes them)
    pieces      documents, split where longer than max_seqlen      (start, length, in which shard)
    an epoch    the pieces in a random order of their own, end to end
    the stream  epoch 0, epoch 1, ... end to end; row r is its tokens r * T .. (r + 1) * T

A row may cut a piece; the rest begins the next row, also across epochs, so no token is dropped or padded. The target of
a cut document's last token is known and is trained on. Where a run stands in the stream is its step, nothing else.
"""

import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitrain.batch import IGNORE, Batch
from minitrain.config import DataConfig, UserError
from minitrain.parallel.mesh import Mesh
from minitrain.storage import open_safetensors, sha256


class PackedData:
    """An iterator: each next() is one step's rows for this rank, as Batches on the device.

    Rows are made one step ahead, in a thread. state() and load_state() are its place in the stream.
    UserError for a folder that is absent, unfinished, empty, of mixed tokenizers, or of more ids than the model has.
    """

    def __init__(self, cfg: DataConfig, mesh: Mesh, vocab_size: int):
        self.cfg, self.mesh, self.vocab_size = cfg, mesh, vocab_size
        if cfg.rows_per_step % mesh.dp_size:
            raise UserError(
                f"data.rows_per_step={cfg.rows_per_step} is not divisible by the {mesh.dp_size} ranks that share them"
            )
        self.shards = _open_shards(cfg.path, vocab_size)
        self.pieces = _split(self.shards, cfg.max_seqlen)
        self.epoch_tokens = int(self.pieces.length.sum())
        self.epochs: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_documents = 0  # room in cu_seqlens
        self.step = 0
        self.thread, self.ahead = ThreadPoolExecutor(1), None

    def __iter__(self):
        return self

    def __next__(self) -> list[Batch]:
        rows = self.ahead.result() if self.ahead else self.make_step(self.step)
        self.step += 1
        self.ahead = self.thread.submit(self.make_step, self.step)
        return [row.to(self.mesh.device) for row in rows]

    def state(self) -> dict:
        return {
            "step": self.step,
            "tokenizer": self.shards[0].tokenizer,
            "tokens": self.epoch_tokens,
            "pieces": len(self.pieces.length),
            **{name: getattr(self.cfg, name) for name in ("tokens_per_row", "max_seqlen", "rows_per_step", "seed")},
        }

    def load_state(self, state: dict) -> None:
        now = self.state() | {"step": state.get("step")}
        if changed := [f"{name} was {state.get(name)}, is {now[name]}" for name in now if state.get(name) != now[name]]:
            raise UserError(f"data: not the corpus and order that this run began with: {', '.join(changed)}")
        if self.ahead:
            self.ahead.result()  # the thread and this object share the epochs' orders
        self.step, self.ahead = state["step"], None

    def make_step(self, step: int) -> list[Batch]:
        """The rows of a step in host memory, pinned where the device is a GPU."""
        n, mesh = self.cfg.rows_per_step, self.mesh
        rows = [self.make_row(r) for r in range(step * n + mesh.dp_rank, (step + 1) * n, mesh.dp_size)]
        return [row.pin_memory() for row in rows] if self.mesh.device.type == "cuda" else rows

    def make_row(self, r: int) -> Batch:
        """Row r of the stream."""
        T = self.cfg.tokens_per_row
        tokens, targets = torch.empty(T, dtype=torch.int64), torch.empty(T, dtype=torch.int64)
        starts, at = [], 0
        while at < T:
            epoch, place = divmod(r * T + at, self.epoch_tokens)
            order, ends = self.epoch(epoch)
            for i in range(int(torch.searchsorted(ends, place, right=True)), len(order)):
                piece = int(order[i])
                skip = max(0, place - int(ends[i]) + int(self.pieces.length[piece]))  # what an earlier row has had
                starts.append(at)
                at += self._copy(piece, skip, tokens[at:], targets[at:])
                if at == T:
                    break
        self._make_room(len(starts))
        cu_seqlens = torch.full((self.num_documents + 1,), T, dtype=torch.int32)
        cu_seqlens[: len(starts)] = torch.tensor(starts)
        start_of = torch.zeros(T, dtype=torch.int64)
        start_of[starts] = torch.tensor(starts)
        positions = torch.arange(T) - start_of.cummax(0).values
        return Batch(tokens, targets, positions, cu_seqlens, cu_seqlens, self.cfg.max_seqlen)

    def _copy(self, piece: int, skip: int, tokens: Tensor, targets: Tensor) -> int:
        """As many tokens of a piece, from `skip` on, as there is room for, and their successors. -> how many."""
        shard = self.shards[int(self.pieces.shard[piece])]
        start, left = int(self.pieces.start[piece]) + skip, int(self.pieces.length[piece]) - skip
        n = min(left, len(tokens))
        at_end = n == left and bool(self.pieces.is_last[piece])  # the document's last token has no successor
        ids = shard.tokens[start : start + n + (not at_end)].long()
        if int(ids.max()) >= self.vocab_size or int(ids.min()) < 0:
            raise UserError(f"{shard.path}: token {start} or one soon after it is not in 0 .. {self.vocab_size - 1}")
        tokens[:n] = ids[:n]
        targets[: len(ids) - 1] = ids[1:]
        if at_end:
            targets[n - 1] = IGNORE
        return n

    def epoch(self, e: int) -> tuple[Tensor, Tensor]:
        """The pieces in epoch e's order, and where each ends, in tokens since the epoch began."""
        if e not in self.epochs:
            seed = zlib.crc32(f"{self.cfg.seed}.{e}".encode())  # seed + e would make seed 1 a late start of seed 0
            order = torch.randperm(len(self.pieces.length), generator=torch.Generator().manual_seed(seed))
            ends = self.pieces.length[order].cumsum(0)
            T, last = self.cfg.tokens_per_row, self.epoch_tokens - 1
            starts = torch.arange(-(e * self.epoch_tokens % T), self.epoch_tokens, T)  # of the rows, in this epoch
            first_piece = torch.searchsorted(ends, starts.clamp(min=0), right=True)
            last_piece = torch.searchsorted(ends, (starts + T - 1).clamp(max=last), right=True)
            self._make_room(int((last_piece - first_piece).max()) + 1)
            self.epochs = {k: v for k, v in self.epochs.items() if k == e - 1} | {e: (order, ends)}
        return self.epochs[e]

    def _make_room(self, documents: int) -> None:
        """For so many in a row, and some to spare: compiled code is compiled again when cu_seqlens changes its shape.

        All borders, of documents and of rows, are multiples of one number: a row cannot hold more pieces than of these.
        """
        if documents > self.num_documents:
            T = self.cfg.tokens_per_row
            unit = math.gcd(T, *self.pieces.length.bincount().nonzero()[:, 0].tolist())
            self.num_documents = min(documents + documents // 4 + 8, T // unit)


# ---- shards and pieces


@dataclass
class Shard:
    path: Path
    tokens: Tensor  # (n,) uint16 or int32, mapped from the file
    document_offsets: Tensor  # (documents + 1,) int64
    tokenizer: str  # sha256 of its tokenizer.json


@dataclass
class Pieces:
    """A table of the corpus, one row for each document, or part of one longer than max_seqlen."""

    shard: Tensor  # (P,) index of the shard
    start: Tensor  # (P,) first token in the shard
    length: Tensor  # (P,) tokens
    is_last: Tensor  # (P,) bool: the document ends with it


def _open_shards(folder: str, vocab_size: int) -> list[Shard]:
    if not folder:
        raise UserError("data.path is not set: give a folder made by tools/prepare_data.py")
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"data.path={folder}: no such folder; tools/prepare_data.py makes one")
    if not (path / "report.json").exists():
        raise UserError(f"data.path={folder}: has no report.json, so its preparation did not finish")
    if not (path / "tokenizer.json").exists():
        raise UserError(f"data.path={folder}: has no tokenizer.json")
    tokenizer = sha256(path / "tokenizer.json")
    shards = []
    for file in sorted(path.glob("*.safetensors")):
        reader = open_safetensors(file)
        metadata = reader.metadata() or {}
        if set(reader.keys()) != {"tokens", "document_offsets"} or "vocab_size" not in metadata:
            raise UserError(f"{file}: not a token shard")
        if metadata.get("tokenizer_sha256") != tokenizer:
            raise UserError(f"{file}: made with another tokenizer than {path / 'tokenizer.json'}")
        if int(metadata["vocab_size"]) > vocab_size:
            raise UserError(
                f"model.vocab_size={vocab_size} is smaller than the tokenizer's {metadata['vocab_size']} in {path}"
            )
        shard = Shard(file, reader.get_tensor("tokens"), reader.get_tensor("document_offsets"), tokenizer)
        borders = shard.document_offsets.long()
        if not len(borders) or borders[0] != 0 or borders[-1] != len(shard.tokens) or (borders.diff() < 0).any():
            raise UserError(f"{file}: damaged: document_offsets do not rise from 0 to its {len(shard.tokens)} tokens")
        shards.append(shard)
    if not any(len(s.tokens) for s in shards):
        raise UserError(f"data.path={folder}: holds no tokens")
    return shards


def _split(shards: list[Shard], max_seqlen: int) -> Pieces:
    columns = []
    for i, shard in enumerate(shards):
        lengths = shard.document_offsets.diff()
        count = (lengths + max_seqlen - 1) // max_seqlen  # pieces of each document
        document = torch.repeat_interleave(count)
        number = torch.arange(len(document)) - (count.cumsum(0) - count)[document]  # within its document
        start = shard.document_offsets[document] + number * max_seqlen
        length = (shard.document_offsets[document + 1] - start).clamp(max=max_seqlen)
        columns.append((torch.full_like(start, i), start, length, number + 1 == count[document]))
    return Pieces(*(torch.cat(column) for column in zip(*columns, strict=True)))
