"""The plan of the attention kernels and their masks: attention_plan.cu and attention.cuh, compiled for the host.

No GPU is needed; one test asks the GPU for the same plans. What the kernels do with them: test_fused_attention.py.
"""

import ctypes
import re
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import compile_for_the_host

from minitrain.fused_attention import make_plan

ROOT = Path(__file__).resolve().parent.parent

HEADS = (4, 2)  # of queries, of keys; groups of 2 queries are whole, or in two parts of 1
HARNESS = r"""
#include "plan.inc"
using namespace minitrain;
namespace {
AttentionShape shape_of(int T, int S, int N) {
    AttentionShape shape{};
    shape.num_queries = T, shape.num_keys = S, shape.num_documents = N, shape.heads = 4, shape.kv_heads = 2;
    return shape;
}
}  // namespace
extern "C" {
int unbounded() { return kUnbounded; }
int64_t plan_ints(int T, int S, int N, int queries, int keys, int group) {
    return attention_plan_ints(shape_of(T, S, N), {queries, keys, group});
}
void plan(int T, int S, int N, int queries, int keys, int group, const int* cu_q, const int* cu_k, int* out) {
    attention_plan(shape_of(T, S, N), {queries, keys, group}, cu_q, cu_k, out, 0, nullptr);
}
// Where its lists begin.
void plan_offsets(int T, int S, int N, int queries, int keys, int group, int* plan, int* out) {
    const Plan p(plan, shape_of(T, S, N), {queries, keys, group});
    const void* lists[] = {p.documents, p.query_items, p.key_items};
    for (int i = 0; i < 3; ++i) out[i] = static_cast<const int*>(lists[i]) - plan;
}
void blocks(int back, int ahead, int first, int last, int keys, int block, int* out) {
    const Band band{back, ahead};
    const auto seen = band.blocks_seen(first, last, keys, block), whole = band.blocks_whole(first, last, keys, block);
    out[0] = seen.begin, out[1] = seen.end, out[2] = whole.begin, out[3] = whole.end;
}
void keys_of(int back, int ahead, int place, int keys, int* out) {
    const auto range = Band{back, ahead}.keys(place, keys);
    out[0] = range.begin, out[1] = range.begin + range.size();
}
int64_t padded_rows(int T, int N, int head_dim) {
    AttentionShape shape = shape_of(T, 0, N);
    shape.head_dim = head_dim;
    return attention_padded_rows(shape);
}
int block_of(int head_dim) { return query_block(head_dim); }
int padded_begin_of(int q_begin, int index, int head_dim) {
    return padded_begin(Document{q_begin, 0, 0, 0}, index, head_dim);
}
}
"""


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """attention.cuh and attention_plan.cu, compiled for the host."""
    source = (ROOT / "kernels/attention_plan.cu").read_text()
    source, launches = re.subn(r"(\w+)<<<([^>]*)>>>\(", r"Launch{\2}(\1, ", source)
    assert launches == 1
    tiles = "constexpr minitrain::AttentionTiles attention_tiles_sm80(int) { return {}; }"
    sources = {"plan.inc": source, "harness.cpp": HARNESS, "sm80.cuh": tiles}
    library = compile_for_the_host(tmp_path_factory.mktemp("host"), sources)
    library.plan_ints.restype = library.padded_rows.restype = ctypes.c_int64
    return library


def ints(values):
    return (ctypes.c_int * len(values))(*values)


def plan_on_the_host(host, cu_q, cu_k, T, S, tiles):
    """-> the plan, a list; fails if anything was written around it."""
    sizes = (T, S, len(cu_q) - 1, *tiles)
    size, guard = host.plan_ints(*sizes), 4096
    memory = ints([-7] * (size + 2 * guard))
    plan = ctypes.byref(memory, 4 * guard)
    host.plan(*sizes, ints(cu_q), ints(cu_k), plan)
    memory = list(memory)
    assert set(memory[:guard] + memory[-guard:]) == {-7}, "written outside of the plan"
    return memory[guard:-guard]


def listed_heads(tiles):
    """How many heads the two lists have: in that of keys, one for each part of each head."""
    return HEADS[0], HEADS[1] * (2 if tiles[2] == 1 else 1)


def items_of(plan, N, rows, tiles):
    """The two lists of {document, tile, head}."""
    offset = 16 + 4 * (N + 1)
    for which in (0, 1):
        yield [tuple(plan[offset + 3 * i : offset + 3 * i + 3]) for i in range(plan[which])]
        offset += 3 * listed_heads(tiles)[which] * (rows[which] // tiles[which] + N + 1)
    assert offset == len(plan)


def assert_waves(items, counts, which, processors):
    """Waves of whole (document, head)s with enough work for all processors; the most work first in each; a part of a
    group only after the one that it waits for."""
    work = [counts[i] - t if which else t + 1 for i, t, _ in items]  # blocks, under a causal mask
    ends = [k for k in range(1, len(work)) if work[k] > work[k - 1]]
    waves = [(items[a:b], sum(work[a:b])) for a, b in zip([0, *ends], [*ends, len(items)], strict=True)]
    seen = set()
    for wave, _ in waves:
        heads = {(i, head) for i, _, head in wave}
        assert not heads & seen, "a document's head in two waves"
        seen |= heads
    parts = [[head // HEADS[1] for _, _, head in wave] for wave, _ in waves if which]
    assert all(max(a) <= min(b) for a, b in pairwise(parts)), "a part of a group beside the one it waits for"
    places = {item: place for place, item in enumerate(items)}
    before = ((place, places.get((i, t, head - HEADS[1]), -1)) for (i, t, head), place in places.items() if which)
    assert all(a > b for a, b in before), "a part of a group waits for one that nobody may ever begin"
    longest = max(work, default=0)
    enough_for = sum(work) // max(1, processors * longest)
    num_parts = 1 + max((head // HEADS[1] for _, _, head in items if which), default=0)
    if len(waves) > 1 and enough_for >= num_parts:
        # As even as whole heads allow; where one wave begins is not seen if it goes on with less work.
        assert all(amount >= processors * longest - longest * (longest + 1) // 2 for _, amount in waves)
    assert len(waves) <= max(num_parts, enough_for)
    assert len(waves) > 1 or enough_for < 2 or longest == 1  # with one block each, no wave is seen to end


def assert_plan_is_right(plan, cu_q, cu_k, T, S, tiles, processors=132):
    """Every tile of every document and head once, in waves, and as documents the rows of cu_seqlens."""
    N = len(cu_q) - 1
    documents = [tuple(plan[16 + 4 * i : 20 + 4 * i]) for i in range(N + 1)]
    ends = zip([*cu_q, T], [*cu_k, S], strict=True)
    begin_q, begin_k = next(ends)
    for i, (end_q, end_k) in enumerate(ends):
        assert documents[i] == (begin_q, end_q - begin_q, begin_k, end_k - begin_k)
        begin_q, begin_k = end_q, end_k
    for which, items in enumerate(items_of(plan, N, (T, S), tiles)):
        counts = [(document[1 + 2 * which] + tiles[which] - 1) // tiles[which] for document in documents]
        heads = range(listed_heads(tiles)[which])
        every = [(i, t, head) for i, n in enumerate(counts) for t in range(n) for head in heads]
        assert sorted(items) == every
        assert_waves(items, counts, which, processors)
    assert plan[2:4] == [0, 0]  # the counters


PLANS = {  # lengths of queries, of keys (None: the same), rows unused
    "one document": ([1000], None, 0),
    "around tiles": ([0, 1, 63, 64, 65, 127, 128, 129, 175, 176, 177, 191, 192, 193, 0], None, 0),
    "more and fewer keys": ([1, 300, 0, 129, 200], [300, 1, 7, 0, 256], 0),
    "rows unused": ([100, 0, 200], None, 500),
    "all empty": ([0, 0, 0], None, 70),
    "no documents": ([], None, 70),
    "nothing at all": ([], None, 0),
    "1,500 documents of three": ([3] * 1500, None, 5),
    "padded by repeats": ([500, 20, *[0] * 2000], None, 0),
    "one very long": ([20, 40_000, 3], None, 0),
}
PLANS["one long, many short"] = ([4000] + [100] * 40, None, 0)
PLANS["several waves"] = ([4000, 3000, 100, 4000] * 20, None, 0)
plans = pytest.mark.parametrize("lengths, keys, unused", PLANS.values(), ids=PLANS)


def plan_inputs(lengths, keys, unused):
    cu_q, cu_k = ([*accumulate(x, initial=0)] for x in (lengths, lengths if keys is None else keys))
    return cu_q, cu_k, cu_q[-1] + unused, cu_k[-1] + unused


@pytest.mark.parametrize("group", [1, 2])
@plans
def test_the_plan_lists_every_tile_once_in_waves(host, lengths, keys, unused, group):
    cu_q, cu_k, T, S = plan_inputs(lengths, keys, unused)
    tiles = (64, 192, group)
    plan = plan_on_the_host(host, cu_q, cu_k, T, S, tiles)
    assert_plan_is_right(plan, cu_q, cu_k, T, S, tiles)
    offsets, N = ints([0] * 3), len(lengths)
    host.plan_offsets(T, S, N, *tiles, ints(plan), offsets)
    begin = 16 + 4 * (N + 1)
    assert list(offsets) == [16, begin, begin + 3 * HEADS[0] * (T // tiles[0] + N + 1)]  # where items_of reads


def test_the_longest_row_is_what_the_readme_says():
    kernels = pytest.importorskip("minitrain.kernels", reason="the CUDA extension is not built")
    assert "constexpr int kMaxTiles = 8192;" in (ROOT / "kernels" / "attention_plan.cu").read_text()
    cases = [(64, True), (128, True), *((C, False) for C in (64, 96, 128, 192, 256))]
    longest = [8192 * min(kernels.attention_tiles(*case)[:2]) for case in cases]
    assert longest == [1_048_576] * 2 + [524_288] * 4 + [262_144]
    assert {f"{n:,}" for n in longest} <= set(re.findall(r"\d+,\d+(?:,\d+)?", (ROOT / "README.md").read_text()))


@pytest.mark.gpu
@plans
def test_the_plan_of_the_gpu_lists_every_tile_once_in_waves(lengths, keys, unused):
    kernels = pytest.importorskip("minitrain.kernels", reason="the CUDA extension is not built")
    cu_q, cu_k, T, S = plan_inputs(lengths, keys, unused)
    for tiles in [(128, 128, 1), (64, 192, 2)]:
        on_device = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (cu_q, cu_k))
        shape = kernels.AttentionShape(
            num_queries=T, num_keys=S, num_documents=len(lengths), heads=HEADS[0], kv_heads=HEADS[1], head_dim=64,
            look_back=0, look_ahead=0, scale=1.0,
        )  # fmt: skip
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        assert_plan_is_right(make_plan(*on_device, shape, tiles).tolist(), cu_q, cu_k, T, S, tiles, processors)


@pytest.mark.parametrize(
    "cu_q",
    [[0, 1000] * 20, [1000, 0] * 20, [0, 500, 2000, 2**31 - 1], [-5, -3, 10], [-(2**31), 2**31 - 1, 7], [0, 20, 19]],
)
def test_nonsense_is_no_documents(host, cu_q):
    """cu_seqlens that decrease or exceed the rows are not refused, which needs a wait: all rows are outside then."""
    T, N = 1000, len(cu_q) - 1
    sense = list(range(N + 1))
    for both in [(cu_q, cu_q), (cu_q, sense), (sense, cu_q)]:
        plan = plan_on_the_host(host, *both, T, T, (64, 64, 2))
        documents = [plan[16 + 4 * i : 20 + 4 * i] for i in range(N + 1)]
        assert documents == [[0, 0, 0, 0]] * N + [[0, T, 0, T]]
        for heads, items in zip(HEADS, items_of(plan, N, (T, T), (64, 64, 2)), strict=True):
            assert sorted(items) == [(N, t, head) for t in range(16) for head in range(heads)]


def bands(host):
    everything = host.unbounded()
    return {
        "causal": (everything, 0),
        "full": (everything, everything),
        **{f"window {w}": (w, 0) for w in (0, 1, 64, 100, 1024)},
    }


def assert_blocks_are_right(host, band, seen, tile, block):
    """Of each tile of rows: the blocks of columns that hold something that is seen, and those that are seen whole."""
    n, m = seen.shape
    covered = torch.zeros_like(seen, dtype=torch.int32)
    out = ints([0] * 4)
    for begin in range(0, n, tile):
        end = min(begin + tile, n)
        host.blocks(*band, begin + m - n, end - 1 + m - n, m, block, out)
        rows = seen[begin:end]
        some = F.pad(rows.any(0), (0, -m % block)).view(-1, block).any(1).nonzero().flatten().tolist()
        whole = rows.all(0)[: m // block * block].view(-1, block).all(1).nonzero().flatten().tolist()
        assert list(range(out[0], out[1])) == some, f"rows {begin}:{end} of {n}, {m} columns"
        assert list(range(out[2], out[3])) == whole, f"rows {begin}:{end} of {n}, {m} columns"
        covered[begin:end, out[0] * block : out[1] * block] += 1
    assert (covered[seen] == 1).all() and (covered <= 1).all()


@pytest.mark.parametrize("tile, block", [(64, 64), (64, 128), (128, 64), (128, 128), (128, 192), (192, 80), (128, 112)])
def test_tiles_and_blocks_cover_what_is_seen_once_and_nothing_else(host, tile, block):
    """Forward: tiles of queries, blocks of keys. Backward: tiles of keys, blocks of queries, the band turned round."""
    square = [(n, n) for n in (1, 63, 64, 65, 128, 129, 177, 500)]
    for n, m in [*square, (1, 300), (300, 1), (64, 200), (200, 64), (129, 400), (400, 129), (5, 0), (0, 5)]:
        for name, (back, ahead) in bands(host).items():
            distance = torch.arange(n)[:, None] + m - n - torch.arange(m)
            seen = (distance <= back) & (-distance <= ahead)
            if name == "causal":
                assert seen.equal(torch.ones(n, m, dtype=torch.bool).tril(m - n))
            assert_blocks_are_right(host, (back, ahead), seen, tile, block)
            assert_blocks_are_right(host, (ahead, back), seen.T, tile, block)
            out = ints([0, 0])
            for i in range(0, n, 7):
                host.keys_of(back, ahead, i + m - n, m, out)
                assert list(range(*out)) == seen[i].nonzero().flatten().tolist()


@pytest.mark.parametrize("head_dim", [64, 128])
@plans
def test_rows_of_the_workspaces_belong_to_one_document(host, lengths, keys, unused, head_dim):
    cu, _, T, _ = plan_inputs(lengths, keys, unused)
    block, end = host.block_of(head_dim), 0
    for i, (begin, after) in enumerate(zip(cu, [*cu[1:], T], strict=True)):
        first = host.padded_begin_of(begin, i, head_dim)
        assert first % block == 0 and first >= end
        end = first + (after - begin + block - 1) // block * block
    assert end <= host.padded_rows(T, len(lengths), head_dim)


# ---- which thread holds what: the layouts that the kernels rely on, from the PTX manual


def accumulator(thread, register):
    """Row and column of a register of wgmma's m64 accumulator; of mma's m16n8 with 32 threads."""
    return 16 * (
        thread // 32
    ) + thread % 32 // 4 + register // 2 % 2 * 8, register // 4 * 8 + thread % 4 * 2 + register % 2


def test_accumulators_hold_each_element_once_and_are_the_next_products_operand():
    for N in (64, 128, 192):
        held = {accumulator(t, r) for t in range(128) for r in range(N // 2)}
        assert held == {(row, col) for row in range(64) for col in range(N)}
    for t in range(128):
        row, col = 16 * (t // 32) + t % 32 // 4, t % 4 * 2
        for k in range(0, 64, 16):  # A of m64k16: pairs at (g, k), (g + 8, k), (g, k + 8), (g + 8, k + 8)
            operand = [(row + 8 * (i % 2), k + col + 8 * (i // 2) + e) for i in range(4) for e in (0, 1)]
            assert operand == [accumulator(t, k // 2 + r) for r in range(8)]


def test_the_fragment_order_of_dq_holds_each_element_once():
    """float4 j of thread t of warpgroup w lies at (w * 8 + j) * 128 + t: what one thread writes as it holds it. Of 128
    channels a warpgroup has half for 64 queries, of 64 all for half of 128 queries."""
    for C in (64, 128):
        places = {}
        for w in range(2):
            for j in range(8):
                for t in range(128):
                    for e in range(4):
                        row, col = accumulator(t, 4 * j + e)
                        place = (row, 64 * w + col) if C == 128 else (64 * w + row, col)
                        places[place] = 4 * ((w * 8 + j) * 128 + t) + e
        assert sorted(places) == [(row, col) for row in range(8192 // C) for col in range(C)]
        assert sorted(places.values()) == list(range(8192))
