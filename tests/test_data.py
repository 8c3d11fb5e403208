"""The stream of rows. The corpora here count through: token t of the corpus has the id t, so that a row tells by
itself which documents it was cut from, and what every target has to be."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from minitrain.batch import IGNORE
from minitrain.config import DataConfig, UserError
from minitrain.data import PackedData
from minitrain.parallel.mesh import Mesh
from minitrain.storage import open_safetensors, write_json, write_safetensors

CPU = Mesh(torch.device("cpu"))
LENGTHS = [7, 1, 12, 3, 30, 5, 16, 1, 2, 40, 9, 8]  # 134 tokens; with max_seqlen 16 three documents are split


def counting(folder, lengths, shards=1):
    """Documents of these lengths, in which token t of the whole corpus is t."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    documents = [list(range(end - n, end)) for end, n in zip(ends, lengths, strict=True)]
    return write_corpus(folder, documents, vocab_size=max(2, sum(lengths)), shards=shards)


def packed(path, vocab_size=100_000, **settings):
    return PackedData(DataConfig(str(path), **settings), CPU, vocab_size)


def row_tokens(data, rows):
    return torch.cat([data.make_row(r).tokens for r in range(rows)])


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
    for r in range(40):
        check_row(data.make_row(r), LENGTHS, 20, 16)


def test_a_document_cut_by_the_end_of_a_row_trains_its_last_token(tmp_path):
    data = packed(counting(tmp_path, [30]), tokens_per_row=8, max_seqlen=8)
    row = data.make_row(0)
    assert row.targets.tolist() == (row.tokens + 1).tolist() and row.num_targets == 8


def test_a_corpus_smaller_than_a_row_repeats_within_it(tmp_path):
    data = packed(counting(tmp_path, [3, 2]), tokens_per_row=23, max_seqlen=4)
    for r in range(5):
        check_row(data.make_row(r), [3, 2], 23, 4)
    for epoch in row_tokens(data, 5).split(5):
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
        rows = [data.make_row(r) for r in range(2 * total // T + 1)]
        for row in rows:
            check_row(row, lengths, T, max_seqlen)
        for epoch in torch.cat([row.tokens for row in rows]).split(total)[: len(rows) * T // total]:
            assert torch.equal(epoch.sort().values, torch.arange(total))


def test_cu_seqlens_keep_one_length_over_many_epochs(corpus):
    data = packed(corpus, tokens_per_row=256, max_seqlen=64)
    shapes = {len(data.make_row(r).cu_seqlens_q) for r in range(20 * data.epoch_tokens // 256)}
    assert len(shapes) == 1


def test_documents_of_equal_length_fill_cu_seqlens_exactly(tmp_path):
    data = packed(counting(tmp_path, [64] * 9), tokens_per_row=64, max_seqlen=16)
    for r in range(30):
        assert data.make_row(r).cu_seqlens_q.tolist() == [0, 16, 32, 48, 64]  # T / max_seqlen documents, no padding


# ---- in which order


def test_a_row_depends_on_seed_and_number_alone(corpus):
    data = packed(corpus, tokens_per_row=128, max_seqlen=64)
    rows = [next(data)[0] for _ in range(200)]
    for r in (199, 77, 0, 150):  # of three epochs
        assert same(packed(corpus, tokens_per_row=128, max_seqlen=64).make_row(r), rows[r])


def test_one_step_of_four_rows_is_four_steps_of_one(corpus):
    together, apart = (packed(corpus, tokens_per_row=128, max_seqlen=64, rows_per_step=n) for n in (4, 1))
    for _ in range(10):
        for row in next(together):
            assert same(row, next(apart)[0])


def test_seeds_and_epochs_have_orders_of_their_own(corpus):
    data = packed(corpus, tokens_per_row=128, max_seqlen=64)
    other = packed(corpus, tokens_per_row=128, max_seqlen=64, seed=1)
    orders = [tuple(d.epoch(e)[0].tolist()) for d in (data, other) for e in range(4)]
    assert len(set(orders)) == 8  # seed 1 is not seed 0 an epoch later, either


def test_the_stream_goes_on_from_its_state(corpus):
    data = packed(corpus, tokens_per_row=128, max_seqlen=64, rows_per_step=2)
    for _ in range(70):
        next(data)
    state = json.loads(json.dumps(data.state()))
    next(data)
    for resumed in (packed(corpus, tokens_per_row=128, max_seqlen=64, rows_per_step=2), data):
        expected = [data.make_row(r) for r in (140, 141, 142, 143)]
        resumed.load_state(state)
        assert all(same(a, b) for a, b in zip([*next(resumed), *next(resumed)], expected, strict=True))


def test_the_state_of_another_corpus_is_refused(tmp_path):
    state = packed(counting(tmp_path / "a", LENGTHS), tokens_per_row=20, max_seqlen=16).state()
    for lengths, max_seqlen in ((LENGTHS[1:], 16), (LENGTHS, 8)):
        data = packed(counting(tmp_path / f"{max_seqlen}", lengths), tokens_per_row=20, max_seqlen=max_seqlen)
        with pytest.raises(UserError, match="not the corpus"):
            data.load_state(state)


# ---- files


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_large_shard_is_mapped_not_read(corpus):
    tokens = torch.ones(1 << 25, dtype=torch.uint16)  # 64 MiB
    size, metadata = tokens.nbytes, _metadata(corpus)
    offsets = torch.arange(0, len(tokens) + 1, 4096)
    write_safetensors(corpus / "shard-00000.safetensors", {"tokens": tokens, "document_offsets": offsets}, metadata)
    del tokens
    before = resident_bytes()
    data = packed(corpus, tokens_per_row=4096, max_seqlen=4096)
    for _ in range(3):
        next(data)
    assert resident_bytes() - before < size / 3


def _metadata(corpus):
    return open_safetensors(corpus / "shard-00000.safetensors").metadata()


def rewrite_shard(corpus, tokens, offsets, **metadata):
    metadata = {**_metadata(corpus), **metadata}
    tensors = {"tokens": torch.tensor(tokens), "document_offsets": torch.tensor(offsets)}
    write_safetensors(corpus / "shard-00000.safetensors", tensors, metadata)


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
}  # fmt: skip


@pytest.mark.parametrize("complaint", DAMAGE)
def test_an_unfit_folder_is_refused_in_one_line(corpus, complaint):
    packed(corpus, vocab_size=101)
    DAMAGE[complaint](corpus)
    with pytest.raises(UserError, match=complaint) as error:
        packed(corpus, vocab_size=101)
    assert "\n" not in str(error.value) and str(corpus) in str(error.value)


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
