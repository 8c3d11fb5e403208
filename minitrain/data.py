"""Sources of token shards -> packed rows, in an order that is a pure function of (seed, step).

    a source    its pieces (shards.py), epoch after epoch, each epoch in a random order of its own
    the stream  the next piece comes from the source that is furthest behind its weight, counted in tokens
    a row       concat: the stream cut every T tokens; the piece that is cut goes on in the next row
                best_fit: the piece that has waited longest, then always the longest that fits; the rest is padding.
                Of a source pieces of one epoch wait, never of two: short ones come as often as long ones
    a step      rows_per_step rows, of which each rank has a block

Every rank plans the whole stream, for which it needs the lengths of the pieces, and reads the tokens of its own rows.
So the stream is the same for any number of ranks. In concat the target of a cut piece's last token is known and is
trained on.
"""

import itertools
import logging
import math
import threading
import zlib
from bisect import bisect_left, insort
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from minitrain.batch import IGNORE, Batch
from minitrain.config import DataConfig, UserError
from minitrain.parallel.mesh import Mesh
from minitrain.shards import Pieces, open_sources
from minitrain.storage import load_tokenizer

log = logging.getLogger(__name__)


class PackedData:
    """An iterator: each next() is one step's rows for this rank, as Batches on the device.

    Rows are made one step ahead, in a thread. state() and load_state() are its place in the stream.
    UserError for folders that are no good (open_sources) and for rows that cannot be dealt to the ranks.
    """

    def __init__(self, cfg: DataConfig, mesh: Mesh, vocab_size: int):
        self.cfg, self.mesh, self.vocab_size = cfg, mesh, vocab_size
        if cfg.rows_per_step % mesh.dp_size:
            raise UserError(
                f"data.rows_per_step={cfg.rows_per_step} is not divisible by the {mesh.dp_size} ranks that share them"
            )
        self.sources = open_sources(cfg, vocab_size)
        self.trained = [source for source in self.sources if source.weight]
        self.stream = self._new_stream()
        self.num_documents, self.lock = 0, threading.Lock()  # room in cu_seqlens, made in two threads
        trial = self._new_stream()
        self._make_room(max(len(trial.next_row()) for _ in range(256)))
        self.step, self.place = 0, self.stream.state()
        self.thread, self.ahead = ThreadPoolExecutor(1), None

    def _new_stream(self, place: dict | None = None) -> "Stream":
        stream = Stream(self.cfg, [s.trained for s in self.trained], [s.weight for s in self.trained])
        if place is not None:
            stream.load_state(place)
        return stream

    def __iter__(self):
        return self

    def __next__(self) -> list[Batch]:
        if self.ahead is None and self.mesh.dp_rank == 0:
            self._show_next()
        rows, self.place = self.ahead.result() if self.ahead else self.make_step()
        self.step += 1
        self.ahead = self.thread.submit(self.make_step)
        return [row.to(self.mesh.device) for row in rows]

    def state(self) -> dict:
        free = {"path", "sources", *(["look_ahead"] if self.cfg.packing == "concat" else [])}  # folders may be moved
        return {
            "step": self.step,
            "tokenizer": self.sources[0].tokenizer,
            **{k: v for k, v in vars(self.cfg).items() if k not in free},
            "sources": [
                {"pieces": len(s.trained.length), "tokens": int(s.trained.length.sum()), "weight": s.weight}
                for s in self.trained
            ],
            "place": self.place,
        }

    def load_state(self, state: dict) -> None:
        if "place" not in state:
            raise UserError(
                "data: the checkpoint is of a version without mixtures, which had another order of documents"
            )
        state = vars(DataConfig()) | state  # of a version that has not had a setting yet
        now = self.state() | {name: state.get(name) for name in ("step", "place")}
        if changed := [name for name in now if state.get(name) != now[name]]:
            texts = ", ".join(f"{name} was {state.get(name)!r}, is {now[name]!r}" for name in changed)
            raise UserError(f"data: not the corpus and order that this run began with: {texts}")
        if type(state.get("step")) is not int or not self.stream.has(state["place"]):
            raise UserError("data: what the checkpoint holds is no place in the data")
        if self.ahead:
            self.ahead.result()  # the thread and this object share the stream
        self.step, self.place, self.ahead = state["step"], state["place"], None
        self.stream.load_state(self.place)

    def _show_next(self) -> None:
        """So that a person sees what is trained on."""
        row = self.make_row(self._new_stream(self.place).next_row(), self.stream.pieces)
        tokenizer = load_tokenizer(self.sources[0].path)
        log.info("step %s begins with these documents; what is learnt is in >> <<\n%s", self.step + 1,
                 "\n".join(f"    {line}" for line in show(row, tokenizer)))  # fmt: skip

    def make_step(self) -> tuple[list[Batch], dict]:
        """This rank's rows of the next step, in host memory, pinned for a GPU, and the place behind them."""
        before = self.stream.drawn.copy()
        parts = [self.stream.next_row() for _ in range(self.cfg.rows_per_step)]
        for source, was, now in zip(self.trained, before, self.stream.drawn, strict=True):
            if was <= len(source.trained.length) < now:
                log.info("%s has been read to its end and is read again, in another order", source.path)
        n, rank = len(parts) // self.mesh.dp_size, self.mesh.dp_rank
        parts = parts[rank * n : (rank + 1) * n]
        for part in itertools.chain.from_iterable(parts):  # all at once: one after the other a cold disk is slow
            self.stream.pieces[part.source].shards[part.shard].will_need(part.start, part.length)
        rows = [self.make_row(p, self.stream.pieces) for p in parts]
        return [row.pin_memory() for row in rows] if self.mesh.device.type == "cuda" else rows, self.stream.state()

    def held_out_rows(self) -> dict[str, Iterator[Batch]]:
        """{source: this rank's rows of all that is validated on}; every rank has equally many, some perhaps empty."""
        return {s.path: self._held_out_rows(s.held_out) for s in self.sources if len(s.held_out.length)}

    def _held_out_rows(self, pieces: Pieces) -> Iterator[Batch]:
        stream = Stream(self.cfg, [pieces], [1.0], epochs=1)
        while (block := [stream.next_row() for _ in range(self.mesh.dp_size)])[0]:
            yield self.make_row(block[self.mesh.dp_rank], stream.pieces).to(self.mesh.device)

    def make_row(self, parts: list["Part"], tables: list[Pieces]) -> Batch:
        """The row of these parts; what they leave is padding, in documents of its own that train nothing."""
        T, max_seqlen = self.cfg.tokens_per_row, self.cfg.max_seqlen
        ids, trained, ends, successors = bytearray(), bytearray(), [0], []
        for part in parts:
            shard = tables[part.source].shards[part.shard]
            size, end = shard.tokens.element_size(), part.start + part.length
            ids += shard.token_bytes[size * part.start : size * end]
            trained += shard.trained_bytes[part.start : end] if shard.trained_bytes else b"\1" * part.length
            is_trained = not part.is_last and (shard.trained is None or shard.trained[end])
            successors.append(int(shard.tokens[end]) if is_trained else IGNORE)
            ends.append(ends[-1] + part.length)
        at = ends[-1]
        tokens, targets = torch.zeros(T, dtype=torch.int64), torch.full((T,), IGNORE)
        if at:
            tokens[:at] = torch.frombuffer(ids, dtype=shard.tokens.dtype)
            self._check(tokens, successors, parts, tables)
            targets[: at - 1] = tokens[1:at].where(torch.frombuffer(trained, dtype=torch.bool)[1:], IGNORE)
            targets[torch.tensor(ends[1:]) - 1] = torch.tensor(successors)
        starts = ends[:-1] + list(range(at, T, max_seqlen))
        self._make_room(len(starts))
        cu_seqlens = torch.full((self.num_documents + 1,), T, dtype=torch.int32)
        cu_seqlens[: len(starts)] = torch.tensor(starts)
        start_of = torch.zeros(T, dtype=torch.int64)
        start_of[starts] = torch.tensor(starts)
        positions = torch.arange(T) - start_of.cummax(0).values
        is_real = torch.arange(T) < at if self.cfg.packing == "best_fit" else None  # in all rows or none
        ends = cu_seqlens, cu_seqlens, max_seqlen
        pairs = sum(part.length**2 for part in parts)
        return Batch(tokens, targets, positions, *ends, num_pairs=pairs, num_padding=T - at, is_real=is_real)

    def _check(self, tokens: Tensor, successors: list[int], parts: list["Part"], tables: list[Pieces]) -> None:
        least, most = torch.aminmax(tokens)
        if least >= 0 and max(int(most), *successors) < self.vocab_size:
            return
        for part in parts:
            shard = tables[part.source].shards[part.shard]
            ids = shard.tokens[part.start : part.start + part.length + (not part.is_last)].long()
            if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
                raise UserError(
                    f"{shard.path}: token {part.start} or one soon after it is not in 0 .. {self.vocab_size - 1}"
                )

    def _make_room(self, documents: int) -> None:
        """For so many in a row, and some to spare: compiled code is compiled again when cu_seqlens changes its shape.

        All borders, of documents and of rows, are multiples of one number: a row cannot hold more pieces than of these.
        """
        with self.lock:
            if documents > self.num_documents:
                T = self.cfg.tokens_per_row
                pieces = [pieces for source in self.sources for pieces in (source.trained, source.held_out)]
                units = [length for p in pieces for length in p.length.bincount().nonzero()[:, 0].tolist()]
                self.num_documents = min(documents + documents // 4 + 8, T // math.gcd(T, *units))


def show(row: Batch, tokenizer: Tokenizer, documents: int = 3, tokens: int = 100) -> list[str]:
    """The first of a row's documents as text, special tokens too, with >> << around what is learnt."""
    lines = []
    learnt = torch.cat([torch.tensor([False]), row.targets[:-1] != IGNORE])  # by the token before
    for begin, end in row.cu_seqlens_q.unique()[: documents + 1].unfold(0, 2, 1).tolist():
        ids, is_learnt = row.tokens[begin:end][:tokens].tolist(), learnt[begin:end][:tokens].tolist()
        is_learnt[0] = False
        line = ""
        for marked, run in itertools.groupby(zip(is_learnt, ids, strict=True), lambda pair: pair[0]):
            text = tokenizer.decode([token for _, token in run], skip_special_tokens=False)
            line += f">>{text}<<" if marked else text
        line += f" ... {end - begin - tokens:,} more tokens" if end - begin > tokens else ""
        lines.append(line.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t"))
    return lines


class Part(NamedTuple):
    """A piece, or as much of it as a row has; sorted by length, then by age."""

    length: int  # tokens
    number: int  # of the piece in the stream
    source: int
    shard: int  # of the source
    start: int  # first token in the shard
    is_last: bool  # the document ends with it: its last token has no successor


class Stream:
    """Rows without their tokens. It ends when a source has been read so many epochs; None: never."""

    def __init__(self, cfg: DataConfig, pieces: list[Pieces], weights: list[float], epochs: int | None = None):
        self.cfg, self.pieces, self.weights, self.epochs = cfg, pieces, weights, epochs
        self.load_state({"pieces": [0] * len(weights), "tokens": [0] * len(weights), "waiting": []})

    def state(self) -> dict:
        return {"pieces": self.drawn.copy(), "tokens": self.tokens.copy(), "waiting": list(map(list, self.waiting))}

    def has(self, state) -> bool:
        """Whether a value of JSON is a state of this stream."""
        try:
            counts, waiting = [*state["pieces"], *state["tokens"]], [Part(*part) for part in state["waiting"]]
            ends = [len(self.pieces[p.source].shards[p.shard].tokens) for p in waiting]
        except (KeyError, IndexError, TypeError):
            return False
        numbers = counts + [number for *part, _ in waiting for number in part]
        return (
            len(state["pieces"]) == len(state["tokens"]) == len(self.weights)
            and all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
            and all(type(p.is_last) is bool and 0 < p.length <= self.cfg.max_seqlen for p in waiting)
            and all(p.start + p.length <= end for p, end in zip(waiting, ends, strict=True))
        )

    def load_state(self, state: dict) -> None:
        self.drawn, self.tokens = list(state["pieces"]), list(state["tokens"])  # taken from each source so far
        self.waiting = [Part(*part) for part in state["waiting"]]
        self.readers = [self._read(i) for i in range(len(self.pieces))]

    def next_row(self) -> list[Part]:
        """Parts of no more than T tokens together; none when everything has been read."""
        parts, room = [], self.cfg.tokens_per_row
        while room and (part := self._next_part(room, is_first=not parts)):
            parts.append(part)
            room -= part.length
        return parts

    def _next_part(self, room: int, is_first: bool) -> Part | None:
        best_fit = self.cfg.packing == "best_fit"
        while len(self.waiting) < (self.cfg.look_ahead if best_fit else 1) and (part := self._draw()):
            insort(self.waiting, part)
        if not self.waiting:
            return None
        if best_fit:
            if is_first:
                return self.waiting.pop(min(range(len(self.waiting)), key=lambda i: self.waiting[i].number))
            longest = bisect_left(self.waiting, (room + 1,)) - 1
            if longest < 0:
                return None
            return self.waiting.pop(bisect_left(self.waiting, self.waiting[longest][:1]))  # the oldest that is so long
        part = self.waiting.pop()
        if part.length > room:
            self.waiting.append(part._replace(length=part.length - room, start=part.start + room))
            part = part._replace(length=room, is_last=False)
        return part

    def _draw(self) -> Part | None:
        """The next piece of the source that is furthest behind its weight; None while one of its last epoch waits."""
        i = min(range(len(self.weights)), key=lambda i: self.tokens[i] / self.weights[i])
        if self.drawn[i] % len(self.pieces[i].length) == 0 and any(part.source == i for part in self.waiting):
            return None
        if piece := next(self.readers[i], None):
            length, *where = piece
            part = Part(length, sum(self.drawn), i, *where)
            self.drawn[i] += 1
            self.tokens[i] += length
            return part

    def _read(self, i: int) -> Iterator[tuple[int, int, int, bool]]:
        """(length, shard, start, is_last) of a source's pieces, from its place on."""
        p = self.pieces[i]
        columns = p.length, p.shard, p.start, p.is_last
        while True:
            epoch, place = divmod(self.drawn[i], len(p.length))
            if epoch == self.epochs:
                return
            seed = zlib.crc32(f"{self.cfg.seed}.{i}.{epoch}".encode())  # a sum would make seed 1 a late start of seed 0
            order = torch.randperm(len(p.length), generator=torch.Generator().manual_seed(seed))
            for chunk in order[place:].split(4096):
                yield from zip(*(column[chunk].tolist() for column in columns), strict=True)
