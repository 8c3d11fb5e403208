"""The stream of rows. The corpora here count through: token t of the corpus has the id t, so that a row tells by
itself which documents it was cut from, and what every target has to be."""

import json
import os
import shutil
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from minitrain.batch import IGNORE, Batch
from minitrain.config import DataConfig, SourceConfig, UserError
from minitrain.data import PackedData, Stream, show
from minitrain.parallel.mesh import Mesh
from minitrain.storage import open_safetensors, sha256, write_json, write_safetensors

CPU = Mesh(torch.device("cpu"))
LENGTHS = [7, 1, 12, 3, 30, 5, 16, 1, 2, 40, 9, 8]  # 134 tokens; with max_seqlen 16 three documents are split


def counting(folder, lengths, shards=1):
    """Documents of these lengths, in which token t of the whole corpus is t."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    documents = [list(range(end - n, end)) for end, n in zip(ends, lengths, strict=True)]
    return write_corpus(folder, documents, vocab_size=max(2, sum(lengths)), shards=shards)


def packed(path, vocab_size=100_000, **settings):
    return PackedData(DataConfig(str(path), **settings), CPU, vocab_size)


def take(data, rows):
    """The next rows of a stream with one row a step."""
    return [next(data)[0] for _ in range(rows)]


def row_tokens(data, rows):
    return torch.cat([row.tokens for row in take(data, rows)])


def same(a, b):
    """Equal batches, but for the room in cu_seqlens."""
    exact = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "targets", "positions"))
    return exact and torch.equal(borders(a), borders(b)) and a.num_targets == b.num_targets


def borders(row):
    return row.cu_seqlens_q.unique()


def check_row(row, lengths, T, max_seqlen):
    """All that a row promises, seen from the corpus."""
    ends = torch.tensor(lengths).cumsum(0)
    document = torch.searchsorted(ends, row.tokens, right=True)  # of each token
    place = row.tokens - (ends - torch.tensor(lengths))[document]  # in its document
    is_last = row.tokens + 1 == ends[document]
    assert torch.equal(row.targets, torch.where(is_last, IGNORE, row.tokens + 1))  # also where a cut follows
    assert row.num_targets == int((~is_last).sum())

    cu = row.cu_seqlens_q
    assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == T and torch.equal(cu, row.cu_seqlens_k)
    assert torch.equal(cu, torch.cat([borders(row), cu.new_full((len(cu) - len(borders(row)),), T)]))  # padded by T
    for begin, end in borders(row).unfold(0, 2, 1).tolist():
        n = end - begin
        assert n <= max_seqlen == row.max_seqlen
        assert torch.equal(row.positions[begin:end], torch.arange(n))
        assert torch.equal(row.tokens[begin:end], row.tokens[begin] + torch.arange(n))  # in document order
        assert len(document[begin:end].unique()) == 1
        assert begin == 0 or place[begin] % max_seqlen == 0  # else the row before had the beginning
        assert end == T or is_last[end - 1] or (place[end - 1] + 1) % max_seqlen == 0
    assert row.num_pairs == int(borders(row).diff().long().square().sum())


# ---- what is in a row


@pytest.mark.parametrize("shards", [1, 3])
def test_every_token_of_an_epoch_comes_exactly_once(tmp_path, shards):
    data = packed(counting(tmp_path, LENGTHS, shards), tokens_per_row=20, max_seqlen=16)
    stream = row_tokens(data, 34)
    for epoch in stream.split(134)[:5]:  # borders of epochs lie within rows: the partial row goes on into the next one
        assert sorted(epoch.tolist()) == list(range(134))


def test_targets_positions_and_borders_are_those_of_the_documents(tmp_path):
    data = packed(counting(tmp_path, LENGTHS), tokens_per_row=20, max_seqlen=16)
    for row in take(data, 40):
        check_row(row, LENGTHS, 20, 16)


def test_a_document_cut_by_the_end_of_a_row_trains_its_last_token(tmp_path):
    data = packed(counting(tmp_path, [30]), tokens_per_row=8, max_seqlen=8)
    (row,) = next(data)
    assert row.targets.tolist() == (row.tokens + 1).tolist() and row.num_targets == 8


def test_a_corpus_smaller_than_a_row_repeats_within_it(tmp_path):
    data = packed(counting(tmp_path, [3, 2]), tokens_per_row=23, max_seqlen=4)
    rows = take(data, 5)
    for row in rows:
        check_row(row, [3, 2], 23, 4)
    for epoch in torch.cat([row.tokens for row in rows]).split(5):
        assert sorted(epoch.tolist()) == [0, 1, 2, 3, 4]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 0),
    T=st.integers(2, 40),
    max_seqlen=st.integers(2, 40),
    seed=st.integers(0, 3),
)
def test_any_documents_pack_without_loss(lengths, T, max_seqlen, seed):
    max_seqlen, total = min(T, max_seqlen), sum(lengths)
    with tempfile.TemporaryDirectory() as folder:
        data = packed(counting(Path(folder), lengths), tokens_per_row=T, max_seqlen=max_seqlen, seed=seed)
        rows = take(data, 2 * total // T + 1)
        for row in rows:
            check_row(row, lengths, T, max_seqlen)
        for epoch in torch.cat([row.tokens for row in rows]).split(total)[: len(rows) * T // total]:
            assert torch.equal(epoch.sort().values, torch.arange(total))


def test_cu_seqlens_keep_one_length_over_many_epochs(corpus):
    data = packed(corpus, tokens_per_row=256, max_seqlen=64)
    tokens = int(data.sources[0].trained.length.sum())
    assert len({len(row.cu_seqlens_q) for row in take(data, 20 * tokens // 256)}) == 1


def test_room_for_documents_never_shrinks_when_two_threads_make_it(corpus):
    """Rows are made ahead in a thread, while the main one makes those of a validation."""
    data = packed(corpus, tokens_per_row=4096, max_seqlen=32)
    sources, asked_for_more, begun = data.sources, threading.Event(), threading.Event()

    class Slow(list):
        def __iter__(self):
            begun.set()
            asked_for_more.wait(0.3)
            return super().__iter__()

    data.sources, data.num_documents = Slow(sources), 1
    slow = threading.Thread(target=data._make_room, args=(20,))
    slow.start()
    assert begun.wait(10)
    data.sources = sources
    data._make_room(200)
    asked_for_more.set()
    slow.join()
    assert data.num_documents >= 200


def test_documents_of_equal_length_fill_cu_seqlens_exactly(tmp_path):
    data = packed(counting(tmp_path, [64] * 9), tokens_per_row=64, max_seqlen=16)
    for row in take(data, 30):
        assert row.cu_seqlens_q.tolist() == [0, 16, 32, 48, 64]  # T / max_seqlen documents, no padding


# ---- in which order


def test_one_step_of_four_rows_is_four_steps_of_one(corpus):
    together, apart = (packed(corpus, tokens_per_row=128, max_seqlen=64, rows_per_step=n) for n in (4, 1))
    for _ in range(10):
        for row in next(together):
            assert same(row, next(apart)[0])


def test_seeds_and_epochs_have_orders_of_their_own(corpus):
    orders = []
    for seed in (0, 1):
        stream = packed(corpus, tokens_per_row=128, max_seqlen=64, seed=seed).stream
        orders += [tuple(stream._draw().start for _ in range(300)) for _ in range(4)]
    assert len(set(orders)) == 8  # seed 1 is not seed 0 an epoch later, either
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


@pytest.mark.parametrize("packing, look_ahead", [("concat", 20), ("best_fit", 20), ("best_fit", 400)])
def test_the_stream_goes_on_from_its_state(corpus, packing, look_ahead):
    settings = {"tokens_per_row": 128, "max_seqlen": 64, "rows_per_step": 2, "packing": packing}
    settings["look_ahead"] = look_ahead
    data = packed(corpus, **settings)
    for _ in range(70):  # of two epochs and more
        next(data)
    state = json.loads(json.dumps(data.state()))
    expected = [*next(data), *next(data)]
    for resumed in (packed(corpus, **settings), data):
        resumed.load_state(state)
        assert all(same(a, b) for a, b in zip([*next(resumed), *next(resumed)], expected, strict=True))


def test_the_state_of_another_corpus_is_refused(tmp_path):
    state = packed(counting(tmp_path / "a", LENGTHS), tokens_per_row=20, max_seqlen=16).state()
    for lengths, max_seqlen in ((LENGTHS[1:], 16), (LENGTHS, 8)):
        data = packed(counting(tmp_path / f"{max_seqlen}", lengths), tokens_per_row=20, max_seqlen=max_seqlen)
        with pytest.raises(UserError, match="not the corpus"):
            data.load_state(state)


def test_a_setting_that_the_checkpoint_has_not_or_that_changes_nothing_is_not_compared(corpus):
    state = packed(corpus, packing="best_fit").state()
    del state["look_ahead"]
    packed(corpus, packing="best_fit").load_state(state)
    with pytest.raises(UserError, match="look_ahead was 256, is 99"):
        packed(corpus, packing="best_fit", look_ahead=99).load_state(state)
    packed(corpus, look_ahead=99).load_state(packed(corpus).state() | {"look_ahead": 256})  # as saved before


def test_a_place_of_a_version_without_mixtures_is_refused(corpus):
    data = packed(corpus)
    state = data.state()
    del state["place"]
    with pytest.raises(UserError, match="version without mixtures"):
        data.load_state(state)


# ---- several sources, several ranks


def mixture(tmp_path, weights=(0.7, 0.2, 0.1), **settings):
    """Three sources of 60 documents of 1 to 9, 19 and 29 tokens: ids 0 .. 999, 1000 .. 1999 and 2000 .. 2999."""
    sources = []
    for i, (weight, most) in enumerate(zip(weights, (9, 19, 29), strict=True)):
        documents = [[1000 * i + 16 * d + n % 16 for n in range(1 + (7 * d + i) % most)] for d in range(60)]
        if not (tmp_path / str(i)).exists():
            write_corpus(tmp_path / str(i), documents, vocab_size=3000)
        sources.append(SourceConfig(str(tmp_path / str(i)), weight))
    return DataConfig(sources=sources, **{"tokens_per_row": 64, "max_seqlen": 32} | settings)


def ranks(cfg, n):
    """The data of all ranks of a run, each as its own process would make it."""
    return [PackedData(cfg, SimpleNamespace(device=torch.device("cpu"), dp_rank=i, dp_size=n), 3000) for i in range(n)]


def global_steps(datas, steps):
    """-> [rows of a step, of all ranks]"""
    return [[row for data in datas for row in next(data)] for _ in range(steps)]


def test_each_source_gets_its_share_of_tokens_at_any_time(tmp_path):
    data = PackedData(mixture(tmp_path), CPU, 3000)
    tokens = row_tokens(data, 300)
    for end in (640, 6400, 64 * 300):
        counts = (tokens[:end] // 1000).bincount(minlength=3).tolist()
        assert counts == pytest.approx([0.7 * end, 0.2 * end, 0.1 * end], abs=2 * 29)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_any_number_of_ranks_makes_the_same_stream_also_across_resumes(tmp_path, packing, n):
    cfg = mixture(tmp_path, rows_per_step=24, packing=packing, look_ahead=50)
    expected = [row for rows in global_steps(ranks(cfg, 1), 12) for row in rows]
    datas = ranks(cfg, n)
    rows = [row for rows in global_steps(datas, 5) for row in rows]
    states = [json.loads(json.dumps(data.state())) for data in datas]
    assert all(state == states[0] for state in states)  # any rank may write the checkpoint
    assert any(part % 60 for part in states[0]["place"]["pieces"])  # in the middle of an epoch
    for m, steps in ((4, 3), (n, 4)):  # goes on with other numbers of ranks
        datas = ranks(cfg, m)
        for data in datas:
            data.load_state(states[0])
        rows += [row for rows in global_steps(datas, steps) for row in rows]
        states = [data.state() for data in datas]
    assert all(same(a, b) for a, b in zip(rows, expected, strict=True))


def test_rows_that_cannot_be_dealt_evenly_are_refused(tmp_path):
    with pytest.raises(UserError, match="rows_per_step=4 is not divisible by the 3 ranks"):
        ranks(mixture(tmp_path, rows_per_step=4), 3)


def test_an_epoch_that_ends_in_one_source_does_not_move_another(tmp_path):
    mixed = PackedData(mixture(tmp_path, (3.0, 0.0, 1.0)), CPU, 3000).stream  # the second is of weight 0
    other = PackedData(mixture(tmp_path, (0.1, 0.0, 1.0)), CPU, 3000).stream
    orders = []
    for stream in (mixed, other):
        parts = [stream._draw() for _ in range(1800)]
        orders.append([part.start for part in parts if part.source == 1])
    n = min(map(len, orders))
    assert n > 2 * 60 and orders[0][:n] == orders[1][:n]  # beside many epochs of the other, or less than one


def test_a_source_that_runs_out_begins_again_and_the_log_says_so_once(tmp_path, caplog):
    caplog.set_level("INFO")
    data = PackedData(mixture(tmp_path, (0.9, 0.1, 0.0)), CPU, 3000)
    row_tokens(data, 60)
    said = [record.getMessage() for record in caplog.records if "read to its end" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(str(tmp_path / "0"))


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            lambda s: s[1].__setattr__("path", s[0].path),
            r"data\.sources\.1\.path=.*: the same folder as another",
        ),
        (lambda s: s[2].__setattr__("path", "/none"), r"data\.sources\.2\.path=/none: no such folder"),
        (lambda s: s[0].__setattr__("path", ""), r"data\.path is not set"),
    ],
)
def test_an_unfit_source_is_named(tmp_path, change, complaint):
    cfg = mixture(tmp_path)
    change(cfg.sources)
    with pytest.raises(UserError, match=complaint):
        PackedData(cfg, CPU, 3000)


def test_sources_of_two_tokenizers_are_refused(tmp_path):
    cfg = mixture(tmp_path)
    write_corpus(tmp_path / "2", [[1, 2]], vocab_size=50)
    with pytest.raises(UserError, match=r"data\.sources\.2\.path=.*: made with another tokenizer than .*/0"):
        PackedData(cfg, CPU, 3000)


# ---- best fit


def padding(rows):
    return sum(row.num_padding for row in rows) / sum(len(row.tokens) for row in rows)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=15),
    T=st.integers(2, 40),
    max_seqlen=st.integers(2, 40),
    look_ahead=st.integers(1, 20),
)
def test_best_fit_cuts_no_document_and_loses_none(lengths, T, max_seqlen, look_ahead):
    max_seqlen = min(T, max_seqlen)
    with tempfile.TemporaryDirectory() as folder:
        data = packed(
            counting(Path(folder), lengths), tokens_per_row=T, max_seqlen=max_seqlen, packing="best_fit",
            look_ahead=look_ahead,
        )  # fmt: skip
        stream, rows = Stream(data.cfg, [data.sources[0].trained], [1.0], epochs=1), []
        while parts := stream.next_row():
            rows.append(data.make_row(parts, stream.pieces))
    seen = []
    for row in rows:
        end = T - row.num_padding
        assert row.is_real.tolist() == [True] * end + [False] * row.num_padding
        assert (row.targets[end:] == IGNORE).all() and borders(row).diff().max() <= max_seqlen
        assert end in borders(row)
        check_row(_without_padding(row), lengths, end, max_seqlen)
        seen += [(int(row.tokens[a]), b - a) for a, b in borders(row).unfold(0, 2, 1).tolist() if b <= end]
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    pieces = {
        (int(start) + k, min(max_seqlen, n - k))
        for start, n in zip(starts, lengths, strict=True)
        for k in range(0, n, max_seqlen)
    }  # fmt: skip
    assert sorted(seen) == sorted(pieces)


def _without_padding(row):
    end = len(row.tokens) - row.num_padding
    cu = borders(row)[borders(row) <= end]
    return Batch(row.tokens[:end], row.targets[:end], row.positions[:end], cu, cu, row.max_seqlen)


def test_a_longer_look_ahead_leaves_less_padding(corpus):
    shares = [
        padding(take(packed(corpus, tokens_per_row=128, max_seqlen=64, packing="best_fit", look_ahead=n), 300))
        for n in (1, 10, 100)
    ]
    assert shares[0] > 0.1 > 0.03 > shares[1] > shares[2] and shares[2] < 0.002
    assert padding(take(packed(corpus, tokens_per_row=128, max_seqlen=64), 10)) == 0


def test_no_document_comes_again_before_all_of_its_source_have_come(tmp_path):
    data = PackedData(mixture(tmp_path, (0.7, 0.3, 0.0), packing="best_fit"), CPU, 3000)  # 60 each, 256 may wait
    used, padding = [dict.fromkeys(source.trained.start.tolist(), 0) for source in data.trained], 0
    for _ in range(300):
        row = data.stream.next_row()
        for part in row:
            counts = used[part.source]
            assert counts[part.start] == min(counts.values())
            counts[part.start] += 1
        padding += 64 - sum(part.length for part in row)
    assert all(min(counts.values()) > 5 for counts in used) and padding < 0.02 * 300 * 64


def test_of_equally_long_documents_the_oldest_goes_first(tmp_path):
    stream = packed(counting(tmp_path, [8] * 40), tokens_per_row=32, max_seqlen=8, packing="best_fit").stream
    numbers = [part.number for _ in range(30) for part in stream.next_row()]
    assert numbers == list(range(120))


def test_no_document_waits_for_more_rows_than_the_window_is_long(corpus):
    stream = packed(corpus, tokens_per_row=128, max_seqlen=64, packing="best_fit", look_ahead=8).stream
    drawn_at, waits = [], []
    for row in range(300):
        parts = stream.next_row()
        drawn_at += [row] * (sum(stream.drawn) - len(drawn_at))
        waits += [row - drawn_at[part.number] for part in parts]
    assert 1 < max(waits) <= 8


# ---- documents that are too long, and what is trained on


def test_a_document_that_is_too_long_is_split_cut_or_dropped_and_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    counting(tmp_path, LENGTHS)
    kept = {"split": 134, "cut": 134 - 14 - 24, "drop": 134 - 30 - 40}
    for how, tokens in kept.items():
        data = packed(tmp_path, tokens_per_row=20, max_seqlen=16, long_documents=how)
        assert int(data.sources[0].trained.length.sum()) == tokens
        stream = row_tokens(data, 40)
        assert len(stream[:tokens].unique()) == tokens
        message = f"2 of 12 documents are longer than data.max_seqlen=16: {how}"
        assert sum(message in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(UserError, match="holds no documents to train on: 12 in all"):
        packed(counting(tmp_path / "long", [9] * 12), tokens_per_row=8, max_seqlen=8, long_documents="drop")


def test_only_marked_tokens_are_trained_on_also_behind_a_cut(tmp_path):
    documents = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12, 13, 14]]
    learnt = {3, 4, 5, 8, 11, 13}
    write_corpus(tmp_path, documents, trained=learnt)
    data = packed(tmp_path, tokens_per_row=4, max_seqlen=4)
    pairs = {(x, y) for row in take(data, 14) for x, y in zip(row.tokens.tolist(), row.targets.tolist(), strict=True)}
    assert pairs == {
        (1, -100), (2, 3), (3, 4), (4, 5), (5, -100), (6, -100), (7, 8), (8, -100), (9, -100), (10, 11), (11, -100),
        (12, 13), (13, -100), (14, -100),
    }  # fmt: skip


def test_a_run_shows_what_it_learns(tmp_path, caplog):
    documents = [[1, 2, 3, 4, 5], [1, 2, 8], list(range(20, 60))]
    write_corpus(tmp_path, documents, trained={3, 5, *range(21, 60)})
    caplog.set_level("INFO")
    data = packed(tmp_path, vocab_size=101, tokens_per_row=48, max_seqlen=48)
    expected, lines = next(packed(tmp_path, tokens_per_row=48, max_seqlen=48))[0], caplog.messages[0].splitlines()
    assert lines[0] == "step 1 begins with these documents; what is learnt is in >> <<"
    texts = {"1 2>>3<<4>>5<<", "1 2 8", "20>>" + " ".join(map(str, range(21, 60))) + "<<"}
    assert {line.strip() for line in lines[1:]} == texts
    assert same(next(data)[0], expected)  # to look changes nothing
    assert show(expected, Tokenizer.from_file(str(tmp_path / "tokenizer.json")), documents=1, tokens=2)[0].endswith(
        "more tokens"
    )


def test_a_shown_line_is_one_line():
    class Words:
        def decode(self, ids, skip_special_tokens):
            assert not skip_special_tokens
            return "".join({1: "a\n", 2: "\\n\t", 3: "<|end|>"}[i] for i in ids)

    assert show(Batch.pack([torch.tensor([1, 2, 3])]), Words()) == [r"a\n>>\\n\t<|end|><<"]


# ---- validation


def validated(cfg, n):
    """{source: rows of all ranks}"""
    named = [data.held_out_rows() for data in ranks(cfg, n)]
    return {
        name: [row for block in zip(*(rows[name] for rows in named), strict=True) for row in block] for name in named[0]
    }


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_held_out_documents_are_validated_on_once_and_never_trained_on(tmp_path, packing):
    cfg = mixture(tmp_path, (1.0, 2.0, 0.0), held_out=7, packing=packing, look_ahead=10, rows_per_step=3)
    data = PackedData(cfg, CPU, 3000)
    trained = {t for _ in range(60) for row in next(data) for t in row.tokens[: 64 - row.num_padding].tolist()}
    rows = validated(cfg, 1)
    assert list(rows) == [str(tmp_path / str(i)) for i in range(3)]
    held = [[t for row in of for t in row.tokens[: 64 - row.num_padding].tolist()] for of in rows.values()]
    firsts = [sorted(t for t in tokens if t % 1000 % 16 == 0) for tokens in held]
    spread = [16 * (i * 60 // 7) for i in range(7)]  # the ids that the documents begin with
    assert set(firsts[0]) == set(spread) and set(firsts[1]) == {1000 + t for t in spread}
    assert not trained & {t for tokens in held for t in tokens}
    assert len(held[2]) == sum(1 + (7 * d + 2) % 29 for d in range(60)) and len(set(firsts[2])) == 60  # all of it, once


def test_validation_rows_are_the_same_for_any_number_of_ranks(tmp_path):
    cfg = mixture(tmp_path, held_out=20, rows_per_step=24)
    expected = validated(cfg, 1)
    for n in (2, 3, 8):
        for name, rows in validated(cfg, n).items():
            assert len(rows) % n == 0
            extra = rows[len(expected[name]) :]
            assert all(row.num_targets == 0 and row.num_padding == 64 for row in extra)
            assert all(same(a, b) for a, b in zip(rows, expected[name], strict=False))


def test_holding_out_everything_is_refused(corpus):
    with pytest.raises(UserError, match="holds no documents to train on: 300 in all"):
        packed(corpus, held_out=300)


def test_held_out_documents_that_are_all_dropped_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no documents to validate on: 3 in all, data\.held_out=1, 1 longer than"):
        packed(counting(tmp_path, [9, 2, 3]), held_out=1, tokens_per_row=8, max_seqlen=4, long_documents="drop")


# ---- files


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_large_shard_is_mapped_not_read(corpus):
    tokens = torch.ones(1 << 25, dtype=torch.uint16)  # 64 MiB
    size, metadata = tokens.nbytes, _metadata(corpus)
    offsets = torch.arange(0, len(tokens) + 1, 4096)
    write_safetensors(corpus / "shard-00000.safetensors", {"tokens": tokens, "document_offsets": offsets}, metadata)
    write_json(corpus / "report.json", {"shards": 1, "tokens": len(tokens)})
    del tokens
    before = resident_bytes()
    data = packed(corpus, tokens_per_row=4096, max_seqlen=4096)
    for _ in range(3):
        next(data)
    assert resident_bytes() - before < size / 3


def _metadata(corpus):
    return open_safetensors(corpus / "shard-00000.safetensors").metadata()


def rewrite_shard(corpus, tokens, offsets, is_first=None, **metadata):
    metadata = {**_metadata(corpus), **metadata}
    tensors = {"tokens": torch.tensor(tokens), "document_offsets": torch.tensor(offsets)}
    if is_first is not None:
        tensors["is_first"] = torch.tensor(is_first)
    write_safetensors(corpus / "shard-00000.safetensors", tensors, metadata)
    write_json(corpus / "report.json", {"shards": 1, "tokens": len(tokens)})


def truncate_shard(corpus):
    path = corpus / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_shards(corpus):
    for path in corpus.glob("*.safetensors"):
        path.unlink()


DAMAGE = {
    "has no report.json, so its preparation did not finish": lambda c: (c / "report.json").unlink(),
    "has no tokenizer.json": lambda c: (c / "tokenizer.json").unlink(),
    "made with another tokenizer than": lambda c: write_json(c / "tokenizer.json", {}),
    "vocab_size=101 is smaller than the tokenizer's 102": lambda c: rewrite_shard(c, [1], [0, 1], vocab_size="102"),
    "holds no tokens": remove_shards,
    "data.path=.*holds no tokens": lambda c: rewrite_shard(c, [], [0]),
    "cannot be read as safetensors": truncate_shard,
    "not a token shard": lambda c: write_safetensors(c / "shard-00000.safetensors", {"a": torch.zeros(3)}),
    "document_offsets do not rise from 0 to its 3 tokens": lambda c: rewrite_shard(c, [1, 2, 3], [0, 2, 1, 3]),
    "document_offsets do not rise": lambda c: rewrite_shard(c, [1, 2, 3], [0, 4]),
    "is_first is not one truth value": lambda c: rewrite_shard(c, [1, 2], [0, 2], [True, True]),
}  # fmt: skip


@pytest.mark.parametrize("complaint", DAMAGE)
def test_an_unfit_folder_is_refused_in_one_line(corpus, complaint):
    packed(corpus, vocab_size=101)
    DAMAGE[complaint](corpus)
    with pytest.raises(UserError, match=complaint) as error:
        packed(corpus, vocab_size=101)
    assert "\n" not in str(error.value) and str(corpus) in str(error.value)


def test_a_folder_that_lacks_a_shard_or_has_another_folders_is_refused(tmp_path):
    whole, other = (counting(tmp_path / name, LENGTHS, shards=3) for name in ("whole", "other"))
    (other / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"other: holds 2 shards, and 3 by its report\.json; prepare again"):
        packed(other)
    shutil.copy(whole / "shard-00000.safetensors", other / "shard-00001.safetensors")
    with pytest.raises(UserError, match=r"other: holds \d+ tokens, and 134 by its report\.json"):
        packed(other)


def test_a_tokenizer_that_cannot_be_read_is_named(corpus):
    write_json(corpus / "tokenizer.json", {"x": 1})
    rewrite_shard(corpus, [1, 2, 3], [0, 3], tokenizer_sha256=sha256(corpus / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        next(packed(corpus, tokens_per_row=4, max_seqlen=4))


@pytest.mark.parametrize("path, complaint", [("", "data.path is not set"), ("/no/such/folder", "no such folder")])
def test_an_absent_folder_is_refused(path, complaint):
    with pytest.raises(UserError, match=complaint):
        packed(path)


@pytest.mark.parametrize("bad", [101, -1])
def test_a_token_that_the_model_has_not_is_refused_where_it_comes(corpus, bad):
    rewrite_shard(corpus, [1, 2, 3, 4, 5, 6, 7, 8, 9, bad], [0, 10])
    data = packed(corpus, vocab_size=101, tokens_per_row=4, max_seqlen=4)
    with pytest.raises(UserError, match=r"shard-00000.safetensors: token .* is not in 0 \.\. 100"):
        for _ in range(4):  # made ahead in a thread: the error comes out of next()
            next(data)
