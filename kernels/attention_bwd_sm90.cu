// Attention backward on Hopper: one persistent CTA of three warpgroups per SM, working on 128 keys at a time.
//
//   warpgroup 0, warp 0          puts dQ of a block to its sum in global memory
//                warp 1          takes the next tile of keys, loads K and V
//                warps 2 and 3   load Q and dO of each block of queries that sees it, of one or two query heads
//   warpgroups 1 and 2           64 keys each: S^T = K Q^T, dP^T = V dO^T, P^T and dS^T in registers,
//                                dV += P^T dO, dK += dS^T Q; dS goes to shared memory, and dQ = dS K, half of it
//                                each: half the channels of 64 queries, or with 64 channels half of 128 queries
//
// dK and dV stay in registers over all queries and these heads. A group of more heads is in parts, tiles of their own,
// which add to sums in global memory, one after the other: the same bits in every run; the last one rounds them. dQ is
// summed over key tiles in fp32 in global memory, by the copy engine. All these sums are in the order of the
// accumulators' registers; attention_finish_sm90.cu puts dQ into rows. They are what L2 is told to keep, everything else
// is read once or soon again. Before all this attention_prepare makes D and scales lse. Equations: Dao et al. 2022,
// arXiv:2205.14135.

#include "attention.cuh"
#include "sm90.cuh"

namespace minitrain {
namespace {

using namespace sm90;

constexpr int kKeys = 128;            // of a tile, 64 a warpgroup
constexpr int kStages = 2;            // blocks of Q and dO in shared memory
constexpr int kDqOfWarpgroup = 4096;  // floats of a block: 64 queries x 64 channels
constexpr int kThreads = 384;
constexpr int kDsWritten = 1, kTogether = 2, kDqWritten = 4, kDqRead = 6;  // named barriers; all but the first are two

struct Tile {
    Document doc;
    int document, first_key, kv_head;  // kv_head: -1 behind the last tile
    int part, first_head, num_heads;   // of the query heads of its group
    Band::Range seeing, whole;         // blocks of queries that see it, and of these the ones that need no mask
};

template <int C>
struct alignas(1024) Shared {
    static constexpr int kQueries = query_block(C);  // of a block
    __nv_bfloat16 k[kKeys * C], v[kKeys * C], q[kStages][kQueries * C], d_out[kStages][kQueries * C],
        ds[kStages][kKeys * kQueries];
    float dq[2][kDqOfWarpgroup], lse[kStages][kQueries], delta[kStages][kQueries];
    Tile tile[2];
    Mbarrier tile_full[2], tile_empty[2], kv_full, kv_empty, q_full[kStages], q_empty[kStages], d_out_full[kStages],
        d_out_empty[kStages];
};

struct Arguments {
    AttentionShape shape;
    int* plan;
    int padded_rows;
    const float* rows;
    float* dq_sum;
    int* turns;
    bool deterministic;
    Packed dk, dv;
    float* dkv_sum;
    int* dkv_turns;
    int padded_keys;
};

// Where a block of queries lies in the workspaces.
template <int C>
__device__ int padded_row(const Tile& tile, int block, int head, const Arguments& args) {
    return head * args.padded_rows + padded_begin(tile.doc, tile.document, C) + block * query_block(C);
}

// One thread: tells the CTA which tile is next, one ahead of the work, and loads its keys.
template <int C>
__device__ void load_keys(Shared<C>& shared, const Arguments& args, const CUtensorMap* k_map,
                          const CUtensorMap* v_map) {
    constexpr int kQueries = query_block(C);
    const AttentionShape& shape = args.shape;
    const Plan plan(args.plan, shape, hopper_tiles(C));
    const int num_items = plan.num_key_items();
    Ring<1> kv;
    for (Ring<2> tiles;; tiles.next()) {
        const int number = next_item(plan.backward_counter(), num_items);
        Tile& tile = shared.tile[tiles.stage()];
        shared.tile_empty[tiles.stage()].wait(tiles.parity() ^ 1);
        if (number >= num_items) {
            tile.kv_head = -1;
            shared.tile_full[tiles.stage()].arrive();
            return;
        }
        const Item item = plan.key_items[number];
        const Document doc = plan.documents[item.document];
        const int first_key = item.tile * kKeys, shift = doc.k_len - doc.q_len;  // a query's place less its row
        const int first = first_key - shift, last = min(first_key + kKeys, doc.k_len) - 1 - shift;
        const bool is_seen = item.document < shape.num_documents;  // nothing sees the rows outside of all documents
        const int queries = is_seen ? doc.q_len : 0;
        const Band band{shape.look_ahead, shape.look_back};  // a query's band, as the key sees it
        tile.doc = doc;
        tile.document = item.document;
        tile.first_key = first_key;
        const int group = shape.heads / shape.kv_heads;
        tile.part = item.head / shape.kv_heads;
        tile.kv_head = item.head % shape.kv_heads;
        tile.first_head = tile.kv_head * group + tile.part * hopper_tiles(C).group;
        tile.num_heads = min(group - tile.part * hopper_tiles(C).group, hopper_tiles(C).group);
        tile.seeing = band.blocks_seen(first, last, queries, kQueries);
        tile.whole = band.blocks_whole(first, last, queries, kQueries);
        if (first_key + kKeys > doc.k_len) tile.whole.end = 0;
        shared.tile_full[tiles.stage()].arrive();
        if (tile.seeing.size() == 0) continue;
        shared.kv_empty.wait(kv.parity() ^ 1);
        kv.next();
        shared.kv_full.arrive_and_expect(sizeof shared.k + sizeof shared.v);
        load_tile(shared_address(shared.k), k_map, shared.kv_full, tile.doc.k_begin + tile.first_key, tile.kv_head,
                  evict_first());
        load_tile(shared_address(shared.v), v_map, shared.kv_full, tile.doc.k_begin + tile.first_key, tile.kv_head,
                  evict_first());
    }
}

// Blocks of queries come from the first to the last: tiles that start together then add to different blocks. Where they
// take turns at each block they must start at the same one, the last, which all of them see under a causal mask.
__device__ int first_block(const Tile& tile, const Arguments& args) {
    return args.deterministic ? tile.seeing.end - 1 : tile.seeing.begin;
}
__device__ int next_block(int block, const Arguments& args) { return args.deterministic ? block - 1 : block + 1; }

// One thread: loads blocks of Q with lse, or of dO with D.
template <int C>
__device__ void load_queries(Shared<C>& shared, const Arguments& args, const CUtensorMap* map, const float* vector,
                             __nv_bfloat16 (&block_of)[kStages][query_block(C) * C],
                             float (&vector_of)[kStages][query_block(C)], Mbarrier (&full)[kStages],
                             Mbarrier (&empty)[kStages]) {
    Ring<kStages> ring;
    for (Ring<2> tiles;; tiles.next()) {
        shared.tile_full[tiles.stage()].wait(tiles.parity());
        const Tile& tile = shared.tile[tiles.stage()];
        if (tile.kv_head < 0) break;
#pragma unroll 1
        for (int block = first_block(tile, args); tile.seeing.contains(block); block = next_block(block, args)) {
#pragma unroll 1
            for (int head = tile.first_head; head < tile.first_head + tile.num_heads; ++head, ring.next()) {
                const int s = ring.stage();
                empty[s].wait(ring.parity() ^ 1);
                full[s].arrive_and_expect(sizeof block_of[s] + sizeof vector_of[s]);
                load_tile(shared_address(block_of[s]), map, full[s], tile.doc.q_begin + block * query_block(C), head,
                          evict_first());
                load_bytes(vector_of[s], vector + padded_row<C>(tile, block, head, args), sizeof vector_of[s], full[s]);
            }
        }
        shared.tile_empty[tiles.stage()].arrive();
    }
}

// dQ of a block of queries is summed by whoever has a part of it. The first part is stored, the others are added, so
// that nobody has to clear the sum. A number in global memory, 0 before the launch, says how far a block is:
//   deterministic   how many tiles of keys have added; each waits for those with earlier keys, which were taken earlier
//   otherwise       kClaimed: somebody is about to store; kStored: others may add
constexpr int kClaimed = 1, kStored = 2;

__device__ int read_turn(const int* turn) {
    int now;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
    return now;
}
__device__ void end_turn(int* turn) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turn) : "memory"); }

// Waits until this part may go to the sum. -> whether it is the first.
// seen: what the turn was at an earlier look, or 0.
//
// NOTE: what follows is an asynchronous copy, for which no proxy fence stands here: both sides' copies were awaited or
// are issued later, and meet in L2, where the sums are made. A fence in every step would cost more than the wait.
__device__ bool wait_for_turn(int* turn, int seen, const Tile& tile, int first_query, const Arguments& args) {
    if (args.deterministic) {
        const int begin = first_query + tile.doc.k_len - tile.doc.q_len - args.shape.look_back;
        const int predecessors = tile.first_key / kKeys - max(0, begin) / kKeys;  // among the keys that the block sees
        while (seen != predecessors) seen = read_turn(turn);
        return predecessors == 0;
    }
    if (seen == 0 && atomicCAS(turn, 0, kClaimed) == 0) return true;
    while (seen != kStored) seen = read_turn(turn);
    return false;
}

// One warp: what the consumers left in shared.dq goes to the sum in global memory, by its first lane.
template <int C>
__device__ void add_dq(Shared<C>& shared, const Arguments& args) {
    const int lane = threadIdx.x % 32;
    barrier_arrive(kDqRead, 160), barrier_arrive(kDqRead + 1, 160);  // both halves are free
    for (Ring<2> tiles;; tiles.next()) {
        shared.tile_full[tiles.stage()].wait(tiles.parity());
        const Tile& tile = shared.tile[tiles.stage()];
        if (tile.kv_head < 0) break;
        // Who claims a block must have its part soon: not while the consumers, at the end of the tile before, wait for
        // another CTA, which may wait for that block.
        if (tiles.count > 0) shared.tile_empty[tiles.stage() ^ 1].wait(Ring<2>{tiles.count - 1}.parity());
        int block = first_block(tile, args), head = 0, seen = 0;
        int padded = padded_row<C>(tile, block, tile.first_head, args);
        for (int left = tile.seeing.size() * tile.num_heads - 1; left >= 0; --left) {
            float* sum = args.dq_sum + int64_t(padded) * C;
            int* turn = args.turns + padded / kRowsOfTurn;
            const bool is_first = lane == 0 && wait_for_turn(turn, seen, tile, block * query_block(C), args);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                __syncwarp();  // the first lane is back
                barrier_sync(kDqWritten + half, 160);  // a warpgroup's dQ is in shared memory
                if (lane == 0)
                    write_sum(sum + half * kDqOfWarpgroup, shared.dq[half], sizeof shared.dq[half], is_first,
                              evict_last());
            }
            if (++head == tile.num_heads) head = 0, block = next_block(block, args);
            padded = padded_row<C>(tile, block, tile.first_head + head, args);
            if (lane == 0 && left > 0) seen = read_turn(args.turns + padded / kRowsOfTurn);  // while the engine reads
            if (lane == 0) wait_bulk_read<1>();  // the first half may be overwritten
            __syncwarp();
            barrier_arrive(kDqRead, 160);
            if (lane == 0) wait_bulk_read<0>();  // the second, too
            __syncwarp();
            barrier_arrive(kDqRead + 1, 160);
            if (lane == 0 && (args.deterministic || is_first)) {
                wait_bulk<0>();  // the sums are in global memory
                end_turn(turn);  // others may add
            }
        }
        if (lane == 0) wait_bulk<0>();  // the last sums are written, and shared memory may go
        __syncwarp();                   // all lanes have read the tile
        if (lane == 0) shared.tile_empty[tiles.stage()].arrive();
    }
}

// One warpgroup's 64 keys of a tile.
template <int C>
struct Consumer {
    static constexpr int kQueries = query_block(C);
    Shared<C>& shared;
    const Arguments& args;
    const int warpgroup, thread, lane;  // 0 or 1, thread in the warpgroup
    Ring<1> kv;
    Ring<kStages> ring;
    float dk[C / 2], dv[C / 2];

    __device__ Consumer(Shared<C>& shared, const Arguments& args, int warpgroup)
        : shared(shared), args(args), warpgroup(warpgroup), thread(threadIdx.x % 128), lane(threadIdx.x % 32) {}

    template <int kRows>
    __device__ __forceinline__ void clear_tail(__nv_bfloat16* tile, int begin) {
        clear_rows<kRows, C>(tile, begin, kTogether + warpgroup);
    }

    // X^T (64 keys x a block of queries) = keys' tile (K or V) times block (Q or dO), not awaited.
    __device__ __forceinline__ void issue_scores(float (&x)[kQueries / 2], const __nv_bfloat16* keys,
                                                 const __nv_bfloat16* block) {
        const uint64_t a = descriptor(shared_address(keys) + warpgroup * 64 * 128);
        const uint64_t b = descriptor(shared_address(block));
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < C / 16; ++c) {  // 16 channels are 32 bytes of a row, 4 of them a panel
            Wgmma<kQueries>::template ss<false, false>(x, further(a, c / 4 * kKeys * 128 + c % 4 * 32),
                                                       further(b, c / 4 * kQueries * 128 + c % 4 * 32), c != 0);
        }
        wgmma_commit();
    }

    // dX (64 keys x C) += P^T or dS^T in registers times block (dO or Q), not awaited.
    __device__ __forceinline__ void issue_gradient(float (&dx)[C / 2], const uint32_t (&a)[kQueries / 4],
                                                   const __nv_bfloat16* block) {
        const uint64_t b = descriptor(shared_address(block), kQueries * 128);
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < kQueries / 16; ++n) {
            Wgmma<C>::template rs<true>(dx, a + 4 * n, further(b, n * 16 * 128), true);
        }
        wgmma_commit();
    }

    // dQ = dS K, not awaited: of 64 queries this warpgroup's half of the channels, or of 128 its half of the queries.
    __device__ __forceinline__ void issue_dq(float (&dq)[kDqOfWarpgroup / 128]) {
        const uint32_t panel = warpgroup * kKeys * 128;  // 64 columns of dS^T or of K
        const uint64_t a = descriptor(shared_address(shared.ds[ring.stage()]) + (C == 64 ? panel : 0));
        const uint64_t b = descriptor(shared_address(shared.k) + (C == 128 ? panel : 0));
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
            Wgmma<64>::template ss<true, true>(dq, further(a, n * 16 * 128), further(b, n * 16 * 128), n != 0);
        }
        wgmma_commit();
    }

    __device__ __forceinline__ void mask(float (&p)[kQueries / 2], const Tile& tile, int block) {
        const Band band{args.shape.look_ahead, args.shape.look_back};
        const int column = block * kQueries + lane % 4 * 2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int key = tile.first_key + warpgroup * 64 + thread / 32 * 16 + lane / 4 + 8 * r;
            Band::Range seeing = band.keys(key - tile.doc.k_len + tile.doc.q_len, tile.doc.q_len);
            if (key >= tile.doc.k_len) seeing.end = 0;
            const int begin = seeing.begin - column, end = seeing.end - column;
#pragma unroll
            for (int i = 0; i < kQueries / 8; ++i) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& x = p[4 * i + 2 * r + j];
                    if (8 * i + j < begin || 8 * i + j >= end) x = 0.0f;
                }
            }
        }
    }

    // All blocks of queries of its part's heads that see the tile: adds to dK and dV, leaves each dQ in shared memory.
    //
    // The tensor cores have work queued while this warpgroup does something else: dP^T under the exponentials, dV under
    // dS, dK under the writing of dS, S^T of the next block under the writing of dQ.
    __device__ __forceinline__ void attend(const Tile& tile) {
        const int num_steps = tile.seeing.size() * tile.num_heads;
        const int tail_block = tile.doc.q_len / kQueries;  // ends behind the document, if it is there at all
        int block = first_block(tile, args), head = 0;
        float s[kQueries / 2], dp[kQueries / 2];
        wait_for_q(tile, block == tail_block);
        issue_scores(s, shared.k, shared.q[ring.stage()]);
        wait_for_d_out(tile, block == tail_block);
        issue_scores(dp, shared.v, shared.d_out[ring.stage()]);
        wgmma_wait<1>(s);
#pragma unroll 1
        for (int left = num_steps - 1; left >= 0; --left) {
            const int stage = ring.stage();
            uint32_t p16[kQueries / 4], ds16[kQueries / 4];
            exponentials(s, shared.lse[stage]);
            if (!tile.whole.contains(block)) mask(s, tile, block);
            pack(s, p16);
            wgmma_wait<0>(dp);
            issue_gradient(dv, p16, shared.d_out[stage]);
            wgmma_wait<1>(dp);  // is done, but what follows stays behind this line: dV is issued at once
            score_gradients(dp, p16, shared.delta[stage]);
            pack(dp, ds16);
            write_ds(ds16);
            issue_gradient(dk, ds16, shared.q[stage]);
            fence_async();
            barrier_sync(kDsWritten, 256);  // both halves of dS are there; both warpgroups are done with the one before
            float dq[kDqOfWarpgroup / 128];
            issue_dq(dq);
            wgmma_wait<2>(dv, p16);
            shared.d_out_empty[stage].arrive_as_warp();
            ring.next();
            if (++head == tile.num_heads) head = 0, block = next_block(block, args);
            if (left > 0) wait_for_q(tile, block == tail_block);
            // NOTE: behind the last block too, where nobody reads s and dp: the assembler makes every wgmma wait if one
            // of them stands under a condition.
            issue_scores(s, shared.k, shared.q[ring.stage()]);
            wgmma_wait<1>(dq, dk, ds16);
            shared.q_empty[stage].arrive_as_warp();
            write_dq(dq);
            if (left > 0) wait_for_d_out(tile, block == tail_block);
            issue_scores(dp, shared.v, shared.d_out[ring.stage()]);
            fence_async();
            barrier_arrive(kDqWritten + warpgroup, 160);  // dQ is there for the copy engine
            wgmma_wait<1>(s);
        }
        wgmma_wait<0>(dp);  // nobody needs them, but they read V
    }

    __device__ __forceinline__ void wait_for_q(const Tile& tile, bool is_tail) {
        shared.q_full[ring.stage()].wait(ring.parity());
        if (is_tail) clear_tail<kQueries>(shared.q[ring.stage()], tile.doc.q_len % kQueries);
    }

    __device__ __forceinline__ void wait_for_d_out(const Tile& tile, bool is_tail) {
        shared.d_out_full[ring.stage()].wait(ring.parity());
        if (is_tail) clear_tail<kQueries>(shared.d_out[ring.stage()], tile.doc.q_len % kQueries);
    }

    // P = exp(S - lse), in place.
    __device__ __forceinline__ void exponentials(float (&s)[kQueries / 2], const float* lse) {
        const float scale = args.shape.scale * kLog2e;
#pragma unroll
        for (int i = 0; i < kQueries / 8; ++i) {
            const float2 subtract = *reinterpret_cast<const float2*>(lse + 8 * i + lane % 4 * 2);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                s[4 * i + 2 * r] = exp2_approx(fmaf(s[4 * i + 2 * r], scale, -subtract.x));
                s[4 * i + 2 * r + 1] = exp2_approx(fmaf(s[4 * i + 2 * r + 1], scale, -subtract.y));
            }
        }
    }

    // dS = P (dP - D), in place of dP.
    __device__ __forceinline__ void score_gradients(float (&dp)[kQueries / 2], const uint32_t (&p16)[kQueries / 4],
                                                    const float* delta) {
#pragma unroll
        for (int i = 0; i < kQueries / 8; ++i) {
            const float2 subtract = *reinterpret_cast<const float2*>(delta + 8 * i + lane % 4 * 2);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint32_t p = p16[2 * i + r];
                dp[4 * i + 2 * r] = __uint_as_float(p << 16) * (dp[4 * i + 2 * r] - subtract.x);
                dp[4 * i + 2 * r + 1] = __uint_as_float(p & 0xffff0000u) * (dp[4 * i + 2 * r + 1] - subtract.y);
            }
        }
    }

    __device__ __forceinline__ void write_dq(const float (&dq)[kDqOfWarpgroup / 128]) {
        barrier_sync(kDqRead + warpgroup, 160);  // the copy engine has read the dQ before
#pragma unroll
        for (int j = 0; j < kDqOfWarpgroup / 512; ++j) {
            reinterpret_cast<float4*>(shared.dq[warpgroup])[j * 128 + thread] =
                float4{dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]};
        }
    }

    // dS^T as panels of 64 queries, rows of 128 bytes, in TMA's swizzle: what issue_dq reads.
    __device__ __forceinline__ void write_ds(const uint32_t (&ds16)[kQueries / 4]) {
        const int row = warpgroup * 64 + thread / 32 * 16 + lane % 16;
        const uint32_t to = shared_address(shared.ds[ring.stage()]) + row * 128;
#pragma unroll
        for (int j = 0; j < kQueries / 16; ++j) {
            const int panel = j / 4 * kKeys * 128;
            store_matrices(to + panel + ((2 * (j % 4) + lane / 16) ^ (row & 7)) * 16, ds16 + 4 * j);
        }
    }

    __device__ __forceinline__ void run(const Tile& tile) {
#pragma unroll
        for (int i = 0; i < C / 2; ++i) dk[i] = dv[i] = 0.0f;
        if (tile.seeing.size() > 0) {
            shared.kv_full.wait(kv.parity());
            kv.next();
            const int tail = tile.doc.k_len - tile.first_key;
            if (tail < kKeys) {
                clear_tail<kKeys>(shared.k, tail);
                clear_tail<kKeys>(shared.v, tail);
            }
            attend(tile);
            shared.kv_empty.arrive_as_warp();
        }
        if (args.dkv_sum && !add_in_turn(tile)) return;
        store(args.dk, dk, args.shape.scale, tile);
        store(args.dv, dv, 1.0f, tile);
    }

    // Of the parts of a group, one after the other, so that every run has the same bits: dK and dV to their sums in
    // global memory, or in the last part those to dK and dV. -> whether it is the last. A warp has 16 keys.
    __device__ __forceinline__ bool add_in_turn(const Tile& tile) {
        // NOTE: what decides where the warp goes comes from a shuffle: the compiler sees that the warp stays together,
        // and keeps what all lanes share in uniform registers, in the main loop too.
        const auto of_warp = [](int x) { return __shfl_sync(~0u, x, 0); };
        const int part = of_warp(tile.part), k_len = of_warp(tile.doc.k_len);
        const int first = of_warp(tile.first_key + warpgroup * 64 + thread / 32 * 16);
        if (first >= k_len) return false;
        int* turn = args.dkv_turns + tile.kv_head * args.shape.num_keys + tile.doc.k_begin + first;
        while (of_warp(read_turn(turn)) != part) continue;  // the part before has added
        __syncwarp();                                       // what the first lane has seen, all have
        const bool is_last = part == Plan::parts(args.shape, hopper_tiles(C)) - 1;
        // In the order of the accumulators' registers, as dQ.
        const int padded = (tile.doc.k_begin / kKeys + tile.document) * kKeys + tile.first_key + warpgroup * 64;
        const int64_t begin = int64_t(tile.kv_head) * args.padded_keys + padded;
        float4* sum = reinterpret_cast<float4*>(args.dkv_sum + begin * C) + thread;
        const int64_t from_dk_to_dv = int64_t(args.shape.kv_heads) * args.padded_keys * (C / 4);
#pragma unroll
        for (int j = 0; j < C / 8; ++j) {
            if (is_last) {
                add_sum(dk + 4 * j, sum + j * 128);
                add_sum(dv + 4 * j, sum + j * 128 + from_dk_to_dv);
            } else {
                write_sum(sum + j * 128, dk + 4 * j, part == 0);
                write_sum(sum + j * 128 + from_dk_to_dv, dv + 4 * j, part == 0);
            }
        }
        __syncwarp();
        if (lane == 0) end_turn(turn);  // all of the warp's writes are there for others with it
        return is_last;
    }

    __device__ __forceinline__ void store(const Packed& out, const float (&x)[C / 2], float scale, const Tile& tile) {
        const int first = tile.first_key + warpgroup * 64 + thread / 32 * 16 + lane / 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first + 8 * r;
            const int64_t place = (tile.doc.k_begin + row) * out.row_stride + tile.kv_head * out.head_stride;
            store_row(static_cast<__nv_bfloat16*>(out.data) + place, x, r, scale, row < tile.doc.k_len);
        }
    }
};

template <int C>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap d_out_map,
                    const __grid_constant__ Arguments args) {
    extern __shared__ __align__(1024) uint8_t memory[];
    // NOTE: no arithmetic on this address: the compiler would lose sight of its being shared, and use slow generic
    // loads.
    Shared<C>& shared = *reinterpret_cast<Shared<C>*>(memory);
    if (threadIdx.x == 0) {
        if (shared_address(&shared) % 1024) __trap();  // TMA's and wgmma's swizzle count on it
        constexpr int kWarps = 8;                      // of the two warpgroups that consume
        for (int i = 0; i < 2; ++i) shared.tile_full[i].init(1), shared.tile_empty[i].init(kWarps + 3);
        shared.kv_full.init(1), shared.kv_empty.init(kWarps);
        for (int i = 0; i < kStages; ++i) {
            shared.q_full[i].init(1), shared.q_empty[i].init(kWarps);
            shared.d_out_full[i].init(1), shared.d_out_empty[i].init(kWarps);
        }
        fence_mbarrier_init();
        prefetch_map(&q_map), prefetch_map(&k_map), prefetch_map(&v_map), prefetch_map(&d_out_map);
    }
    __syncthreads();  // barriers have their counts
    if (threadIdx.x < 128) {
        give_registers<24>();
        const int warp = threadIdx.x / 32;
        if (warp == 0) {
            add_dq(shared, args);
        } else if (elect_one()) {
            const float* delta = args.rows + int64_t(args.shape.heads) * args.padded_rows;
            if (warp == 1) load_keys(shared, args, &k_map, &v_map);
            if (warp == 2)
                load_queries(shared, args, &q_map, args.rows, shared.q, shared.lse, shared.q_full, shared.q_empty);
            if (warp == 3)
                load_queries(shared, args, &d_out_map, delta, shared.d_out, shared.delta, shared.d_out_full,
                             shared.d_out_empty);
        }
    } else {
        take_registers<240>();
        Consumer<C> consumer(shared, args, __shfl_sync(~0u, threadIdx.x / 128, 0) - 1);  // the same in a warp, visibly
        for (Ring<2> tiles;; tiles.next()) {
            shared.tile_full[tiles.stage()].wait(tiles.parity());
            const Tile& tile = shared.tile[tiles.stage()];  // read there when needed: registers are scarce
            if (tile.kv_head < 0) break;
            consumer.run(tile);
            __syncwarp();  // all lanes have read it
            shared.tile_empty[tiles.stage()].arrive_as_warp();
        }
    }
}

template <int C>
void launch(const AttentionBackward& args, int device, cudaStream_t stream) {
    const AttentionShape& shape = args.shape;
    const AttentionShape* s = &shape;
    int* plan = args.plan;
    const int padded_rows = static_cast<int>(attention_padded_rows(shape));
    const Arguments arguments = {shape,
                                 plan,
                                 padded_rows,
                                 args.rows,
                                 args.dq_sum,
                                 args.turns,
                                 args.deterministic,
                                 args.dk,
                                 args.dv,
                                 args.dkv_sum,
                                 args.dkv_turns,
                                 static_cast<int>(attention_padded_keys(shape))};
    static_assert(hopper_tiles(C).keys == kKeys, "the plan's tiles are this kernel's");
    constexpr int kBytes = sizeof(Shared<C>);
    check(cudaFuncSetAttribute(backward_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "cudaFuncSetAttribute");
    backward_kernel<C><<<num_processors(device), kThreads, kBytes, stream>>>(
        tensor_map(args.q, s->num_queries, s->heads, C, query_block(C)),
        tensor_map(args.k, s->num_keys, s->kv_heads, C, kKeys), tensor_map(args.v, s->num_keys, s->kv_heads, C, kKeys),
        tensor_map(args.d_out, s->num_queries, s->heads, C, query_block(C)), arguments);
    check(cudaGetLastError(), "attention_backward_sm90",
          {{"queries", shape.num_queries},
           {"keys", shape.num_keys},
           {"heads", shape.heads},
           {"kv_heads", shape.kv_heads},
           {"head_dim", C}});
}

}  // namespace

void attention_backward_sm90(const AttentionBackward& args, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    attention_prepare(args, hopper_tiles(args.shape.head_dim), false, device, stream);
    for_head_dim<64, 128>(args.shape.head_dim, [&](auto C) { launch<C>(args, device, stream); });
    if (args.dq) attention_finish_sm90(args, device, stream);
}

}  // namespace minitrain
