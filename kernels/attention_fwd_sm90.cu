// Attention forward on Hopper: one persistent CTA of three warpgroups per SM, four with 64 channels.
//
//   warpgroup 0, one thread      takes the next tile, loads Q, then K and V block by block (TMA), two blocks ahead
//   the other warpgroups         64 query rows each: S = Q K^T, online softmax in registers, O += P V
//
// Two overlaps keep the tensor cores busy. Inside a warpgroup: P V of a block is issued behind S of the next one, and
// runs while the softmax of that S is computed. Between warpgroups, by turns: one issues its products while another is
// at its softmax. The next tile's Q, K and V are loaded while this tile's last products and stores go on.
// Two savings: the last block of a document's keys goes in parts where it is far from full, and O gets a new scale only
// where a maximum rose by much; until then exponentials are of the old one, and at most 2^8.
//
// Algorithm: Dao et al. 2022, arXiv:2205.14135; overlaps: Shah et al. 2024, arXiv:2407.08608; online softmax: Milakov &
// Gimelshein 2018, arXiv:1805.02867.

#include "attention.cuh"
#include "sm90.cuh"

namespace minitrain {
namespace {

using namespace sm90;

constexpr int kStages = 2;               // blocks of K and of V in shared memory
constexpr int kPart = 64;                // keys of a part of a block
constexpr float kSmallRise = 8.0f;       // of a maximum, in powers of two: not worth a new scale of the output
constexpr int kTurn = 1, kTogether = 4;  // named barriers, one for each warpgroup that consumes

template <int C>
struct Sizes {
    static constexpr int kRows = hopper_tiles(C).queries;  // of a tile
    static constexpr int kConsumers = kRows / 64;          // warpgroups
    static constexpr int kThreads = 128 * (1 + kConsumers);
    static constexpr int kRegisters = kConsumers == 2 ? 240 : 160, kProducerRegisters = kConsumers == 2 ? 24 : 32;
};

struct Tile {
    Document doc;
    int first_row, head;      // in the document; -1 behind the last tile
    Band::Range seen, whole;  // blocks of keys that it sees, and of these the ones that need no mask
};

template <int C, int kKeys>  // keys of a block
struct alignas(1024) Shared {
    __nv_bfloat16 q[Sizes<C>::kRows * C], k[kStages][kKeys * C], v[kStages][kKeys * C];
    Tile tile[2];
    Mbarrier tile_full[2], tile_empty[2], q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages],
        v_empty[kStages];
};

struct Arguments {
    AttentionShape shape;
    int* plan;
    __nv_bfloat16* out;
    float* lse;
};

// One thread: tells the CTA which tile is next, one ahead of the work, and loads what it needs.
template <int C, int kKeys>
__device__ void produce(Shared<C, kKeys>& shared, const Arguments& args, const CUtensorMap* q_map,
                        const CUtensorMap* k_map, const CUtensorMap* v_map) {
    const AttentionShape& shape = args.shape;
    constexpr int kRows = Sizes<C>::kRows;
    const Plan plan(args.plan, shape, hopper_tiles(C));
    const int num_items = plan.num_query_items(), group = shape.heads / shape.kv_heads;
    const Band band{shape.look_back, shape.look_ahead};
    Ring<1> q;
    Ring<kStages> kv;
    int number = next_item(plan.forward_counter(), num_items);
    for (Ring<2> tiles;; tiles.next()) {
        Tile& tile = shared.tile[tiles.stage()];
        shared.tile_empty[tiles.stage()].wait(tiles.parity() ^ 1);
        if (number >= num_items) {
            tile.head = -1;
            shared.tile_full[tiles.stage()].arrive();
            return;
        }
        const Item item = plan.query_items[number];
        const Document doc = plan.documents[item.document];
        const int first_row = item.tile * kRows, shift = doc.k_len - doc.q_len;  // a query's place less its row
        const int first = first_row + shift, last = min(first_row + kRows, doc.q_len) - 1 + shift;
        const bool sees = item.document < shape.num_documents;  // the rows outside of all documents see nothing
        const int keys = sees ? doc.k_len : 0;
        const Band::Range seen = band.blocks_seen(first, last, keys, kKeys);
        tile = {doc, first_row, item.head, seen, band.blocks_whole(first, last, keys, kKeys)};
        shared.tile_full[tiles.stage()].arrive();
        number = next_item(plan.forward_counter(), num_items);  // early: its latency hides behind the loads
        if (seen.size() == 0) continue;
        shared.q_empty.wait(q.parity() ^ 1);
        q.next();
        shared.q_full.arrive_and_expect(sizeof shared.q);
        load_tile(shared_address(shared.q), q_map, shared.q_full, doc.q_begin + first_row, item.head, evict_first());
#pragma unroll 1
        for (int block = seen.end - 1; block >= seen.begin; --block, kv.next()) {
            const int row = doc.k_begin + block * kKeys, s = kv.stage();
            shared.k_empty[s].wait(kv.parity() ^ 1);
            shared.k_full[s].arrive_and_expect(sizeof shared.k[s]);
            load_tile(shared_address(shared.k[s]), k_map, shared.k_full[s], row, item.head / group, evict_last());
            shared.v_empty[s].wait(kv.parity() ^ 1);
            shared.v_full[s].arrive_and_expect(sizeof shared.v[s]);
            load_tile(shared_address(shared.v[s]), v_map, shared.v_full[s], row, item.head / group, evict_last());
        }
    }
}

// One warpgroup's 64 rows of a tile.
template <int C, int kKeys>
struct Consumer {
    Shared<C, kKeys>& shared;
    const Arguments& args;
    const int warpgroup, thread, lane;  // of those that consume, thread in the warpgroup
    Ring<1> q;
    Ring<kStages> k, v;
    float o[C / 2], max[2], sum[2];  // of the thread's rows r and r + 8

    __device__ Consumer(Shared<C, kKeys>& shared, const Arguments& args, int warpgroup)
        : shared(shared), args(args), warpgroup(warpgroup), thread(threadIdx.x % 128), lane(threadIdx.x % 32) {}

    // S = Q K^T for N keys of the block from key `first` on, not awaited.
    template <int N>
    __device__ __forceinline__ void issue_scores(float (&s)[N / 2], int first) {
        const uint64_t a = descriptor(shared_address(shared.q) + warpgroup * 64 * 128);
        const uint64_t b = descriptor(shared_address(shared.k[k.stage()]) + first * 128);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < C / 16; ++c) {  // 16 channels are 32 bytes of a row, 4 of them a panel
            Wgmma<N>::template ss<false, false>(s, further(a, c / 4 * Sizes<C>::kRows * 128 + c % 4 * 32),
                                                further(b, c / 4 * kKeys * 128 + c % 4 * 32), c != 0);
        }
        wgmma_commit();
    }

    // O += P V, not awaited.
    template <int N>
    __device__ __forceinline__ void issue_output(const uint32_t (&p)[N / 4], int first) {
        const uint64_t b = descriptor(shared_address(shared.v[v.stage()]) + first * 128, kKeys * 128);
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            Wgmma<C>::template rs<true>(o, p + 4 * n, further(b, n * 16 * 128), true);
        }
        wgmma_commit();
    }

    // -infinity for what a query does not see of the keys from `first` on.
    template <int N>
    __device__ __forceinline__ void mask(float (&s)[N], const Tile& tile, int first) {
        const Band band{args.shape.look_back, args.shape.look_ahead};
        const int column = first + lane % 4 * 2;
        const int place =
            tile.first_row + warpgroup * 64 + thread / 32 * 16 + lane / 4 + tile.doc.k_len - tile.doc.q_len;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const Band::Range seen = band.keys(place + 8 * r, tile.doc.k_len);
            const int begin = seen.begin - column, end = seen.end - column;
#pragma unroll
            for (int i = 0; i < N / 4; ++i) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& x = s[4 * i + 2 * r + j];
                    if (8 * i + j < begin || 8 * i + j >= end) x = -INFINITY;
                }
            }
        }
    }

    // s becomes exp(score - max); -> by what earlier sums and outputs must be multiplied.
    template <int N>
    __device__ __forceinline__ void softmax(float (&s)[N], float (&rescale)[2]) {
        const float scale = args.shape.scale * kLog2e;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float high = max[r];
#pragma unroll
            for (int i = 0; i < N / 4; ++i) high = fmaxf(high, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
            if ((high - max[r]) * scale <= kSmallRise) high = max[r];
            const float subtract = high == -INFINITY ? 0.0f : high * scale;  // (-inf) - (-inf) is no number
            rescale[r] = high == max[r] ? 1.0f : exp2_approx(max[r] * scale - subtract);
            max[r] = high;
            float total = 0.0f;
#pragma unroll
            for (int i = 0; i < N / 4; ++i) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& x = s[4 * i + 2 * r + j];
                    x = exp2_approx(fmaf(x, scale, -subtract));
                    total += x;
                }
            }
            sum[r] = sum[r] * rescale[r] + total;
        }
    }

    __device__ __forceinline__ void rescale_output(const float (&rescale)[2]) {
        if (!__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) return;
#pragma unroll
        for (int i = 0; i < C / 2; ++i) o[i] *= rescale[i / 2 % 2];
    }

    __device__ __forceinline__ void run(const Tile& tile) {
#pragma unroll
        for (int i = 0; i < C / 2; ++i) o[i] = 0.0f;
        pin(o);
        max[0] = max[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
        if (tile.seen.size() > 0) attend(tile);
        store(tile);
    }

    __device__ __forceinline__ void attend(const Tile& tile) {
        int block = tile.seen.end - 1;
        const int num_keys = tile.doc.k_len - block * kKeys;  // of the document, in this block
        shared.q_full.wait(q.parity());
        if (num_keys <= kKeys - kPart) attend_to_parts(tile, block--, num_keys);
        if (block >= tile.seen.begin) {
            attend_to_blocks(tile, block);
        } else {
            release_q();
        }
    }

    // The last block of the document's keys, where it lacks as many as a part has or more: part by part.
    __device__ __forceinline__ void attend_to_parts(const Tile& tile, int block, int num_keys) {
        float s[kPart / 2], rescale[2];
        uint32_t p[kPart / 4];
        shared.k_full[k.stage()].wait(k.parity());
        shared.v_full[v.stage()].wait(v.parity());
        if (num_keys % kPart != 0) clear_rows<kKeys, C>(shared.v[v.stage()], num_keys, kTogether + warpgroup);
#pragma unroll 1
        for (int first = 0; first < num_keys; first += kPart) {
            issue_scores<kPart>(s, first);
            wgmma_wait<0>(s);
            mask(s, tile, block * kKeys + first);
            softmax(s, rescale);
            pack(s, p);
            rescale_output(rescale);
            issue_output<kPart>(p, first);
            wgmma_wait<0>(o, p);
        }
        shared.k_empty[k.stage()].arrive_as_warp();
        k.next();
        release_v();
    }

    // This block and all before it.
    __device__ __forceinline__ void attend_to_blocks(const Tile& tile, int block) {
        float s[kKeys / 2], rescale[2];
        uint32_t p[kKeys / 4];
        shared.k_full[k.stage()].wait(k.parity());
        issue_scores<kKeys>(s, 0);
        wgmma_wait<0>(s);
        shared.k_empty[k.stage()].arrive_as_warp();
        k.next();
        if (!tile.whole.contains(block)) mask(s, tile, block * kKeys);
        softmax(s, rescale);
        const int tail = tile.doc.k_len - block * kKeys;
        shared.v_full[v.stage()].wait(v.parity());
        if (tail < kKeys) clear_rows<kKeys, C>(shared.v[v.stage()], tail, kTogether + warpgroup);
        for (bool first = true;; first = false) {
            // NOTE: this wait stands here, not behind the softmax that it follows, because the assembler would move it
            // up over the softmax; it does not move it over the beginning of a loop.
            wgmma_wait<0>(o, p);  // P V of the block before
            if (!first) release_v();
            pack(s, p);
            rescale_output(rescale);
            if (--block < tile.seen.begin) break;
            shared.k_full[k.stage()].wait(k.parity());
            barrier_sync(kTurn + warpgroup, 256);  // the one before has issued its products
            issue_scores<kKeys>(s, 0);
            shared.v_full[v.stage()].wait(v.parity());
            issue_output<kKeys>(p, 0);
            barrier_arrive(kTurn + (warpgroup + 1) % Sizes<C>::kConsumers, 256);
            wgmma_wait<1>(s);  // the scores
            shared.k_empty[k.stage()].arrive_as_warp();
            k.next();
            if (!tile.whole.contains(block)) mask(s, tile, block * kKeys);
            softmax(s, rescale);
        }
        release_q();
        shared.v_full[v.stage()].wait(v.parity());
        issue_output<kKeys>(p, 0);
        wgmma_wait<0>(o, p);
        release_v();
    }

    __device__ __forceinline__ void release_q() {
        shared.q_empty.arrive_as_warp();
        q.next();
    }

    __device__ __forceinline__ void release_v() {
        shared.v_empty[v.stage()].arrive_as_warp();
        v.next();
    }

    __device__ __forceinline__ void store(const Tile& tile) {
        const int first = tile.first_row + warpgroup * 64 + thread / 32 * 16 + lane / 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
            sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
            const float inverse = max[r] == -INFINITY ? 0.0f : 1.0f / sum[r];
            const int row = first + 8 * r;
            const bool valid = row < tile.doc.q_len;
            const int64_t token = tile.doc.q_begin + row;
            if (valid && lane % 4 == 0) {
                args.lse[int64_t(tile.head) * args.shape.num_queries + token] =
                    max[r] * args.shape.scale + kLn2 * log2f(sum[r]);  // -inf where nothing is seen
            }
            store_row(args.out + (token * args.shape.heads + tile.head) * C, o, r, inverse, valid);
        }
    }
};

template <int C, int kKeys>
__global__ void __launch_bounds__(Sizes<C>::kThreads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map, const __grid_constant__ Arguments args) {
    extern __shared__ __align__(1024) uint8_t memory[];
    // NOTE: no arithmetic on this address: the compiler would lose sight of its being shared, and use slow generic
    // loads.
    Shared<C, kKeys>& shared = *reinterpret_cast<Shared<C, kKeys>*>(memory);
    if (threadIdx.x == 0) {
        if (shared_address(&shared) % 1024) __trap();  // TMA's and wgmma's swizzle count on it
        constexpr int kWarps = 4 * Sizes<C>::kConsumers;
        for (int i = 0; i < 2; ++i) shared.tile_full[i].init(1), shared.tile_empty[i].init(kWarps);
        shared.q_full.init(1), shared.q_empty.init(kWarps);
        for (int i = 0; i < kStages; ++i) {
            shared.k_full[i].init(1), shared.k_empty[i].init(kWarps);
            shared.v_full[i].init(1), shared.v_empty[i].init(kWarps);
        }
        fence_mbarrier_init();
        prefetch_map(&q_map), prefetch_map(&k_map), prefetch_map(&v_map);
    }
    __syncthreads();  // barriers have their counts
    if (threadIdx.x < 128) {
        give_registers<Sizes<C>::kProducerRegisters>();
        if (threadIdx.x < 32 && elect_one()) {
            produce(shared, args, &q_map, &k_map, &v_map);
        }
    } else {
        take_registers<Sizes<C>::kRegisters>();
        Consumer<C, kKeys> consumer(shared, args,
                                    __shfl_sync(~0u, threadIdx.x / 128, 0) - 1);  // the same in a warp, visibly
        if (consumer.warpgroup == Sizes<C>::kConsumers - 1)
            barrier_arrive(kTurn, 256);  // the first turn; one is left over after each tile
        for (Ring<2> tiles;; tiles.next()) {
            shared.tile_full[tiles.stage()].wait(tiles.parity());
            const Tile& tile = shared.tile[tiles.stage()];  // read there when needed: registers are scarce
            if (tile.head < 0) break;
            consumer.run(tile);
            __syncwarp();  // all lanes have read it
            shared.tile_empty[tiles.stage()].arrive_as_warp();
        }
    }
}

template <int C, int kKeys>
void launch(const AttentionForward& args, int device, cudaStream_t stream) {
    const AttentionShape& shape = args.shape;
    const auto map = [&](const Packed& x, int rows, int heads, int box) { return tensor_map(x, rows, heads, C, box); };
    const Arguments arguments = {shape, args.plan, static_cast<__nv_bfloat16*>(args.out), args.lse};
    constexpr int kBytes = sizeof(Shared<C, kKeys>);
    check(cudaFuncSetAttribute(forward_kernel<C, kKeys>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "cudaFuncSetAttribute");
    forward_kernel<C, kKeys><<<num_processors(device), Sizes<C>::kThreads, kBytes, stream>>>(
        map(args.q, shape.num_queries, shape.heads, Sizes<C>::kRows),
        map(args.k, shape.num_keys, shape.kv_heads, kKeys), map(args.v, shape.num_keys, shape.kv_heads, kKeys),
        arguments);
    check(cudaGetLastError(), "attention_forward_sm90",
          {{"queries", shape.num_queries},
           {"keys", shape.num_keys},
           {"heads", shape.heads},
           {"kv_heads", shape.kv_heads},
           {"head_dim", C}});
}

}  // namespace

void attention_forward_sm90(const AttentionForward& args, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    for_head_dim<64, 128>(args.shape.head_dim, [&](auto C) {
        // With 128 channels a larger block, with fewer turns for the same work, where it does not make a mask's edge
        // wider.
        if constexpr (C == 128) {
            if (args.shape.look_ahead > 0) return launch<C, 192>(args, device, stream);
        }
        launch<C, 128>(args, device, stream);
    });
}

}  // namespace minitrain
