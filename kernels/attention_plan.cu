// The plan of a batch of documents: see attention.cuh for what it holds, and in which order.
//
// Two lists, of queries and of keys. One CTA writes one wave of one list, sorted by counting: it finds which heads of
// which documents are in its wave, counts how many tiles have 1, 2, 3, ... blocks of work, and gives each tile its
// place. Tiles of equal work come in any order: results do not depend on it. But a part of a group adds to the same
// sums after the one before it, which some CTA must have begun: a wave is never longer than one part of all documents,
// so that no two of a group are in the same wave.

#include <algorithm>

#include "attention.cuh"
#include "common.cuh"
#include "sm80.cuh"

namespace minitrain {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxWaves = 64;
constexpr int kMaxTiles = 8192;  // of all rows
constexpr int kTilesOfThread = kMaxTiles / kThreads;

// Sums over the CTA: of all threads, and of those before this one.
struct Sums {
    int64_t all, before;
};
__device__ Sums sum_over_cta(int64_t value) {
    __shared__ int64_t of_warp[kThreads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t upto = value;
    for (int step = 1; step < 32; step *= 2) {
        const int64_t other = __shfl_up_sync(~0u, upto, step);
        if (lane >= step) upto += other;
    }
    __syncthreads();  // a former call's readers are done
    if (lane == 31) of_warp[warp] = upto;
    __syncthreads();  // every warp's sum is there
    Sums sums = {0, upto - value};
    for (int w = 0; w < kThreads / 32; ++w) {
        if (w == warp) sums.before += sums.all;
        sums.all += of_warp[w];
    }
    return sums;
}

// One of the two lists.
struct List {
    const int* cu;
    int num_documents, num_rows, tile;
    int heads, parts;  // so many heads in each part of all heads

    // Whether cu begins at 0, never decreases, and ends within the rows. All of the CTA.
    __device__ bool is_valid() const {
        int wrong = 0;
        for (int i = threadIdx.x; i <= num_documents; i += kThreads) {
            wrong += i == 0 ? cu[0] != 0 : cu[i] < cu[i - 1] || cu[i] > num_rows;
        }
        return sum_over_cta(wrong).all == 0;
    }
    // Begin and number of document i's rows; the last document has those that no other has.
    __device__ int2 rows(int i) const {
        const int begin = cu ? cu[i] : 0, end = i == num_documents ? num_rows : cu ? cu[i + 1] : 0;
        return {begin, end - begin};
    }
    // Entries: all documents with the first part of their heads, then all with the second, and so on.
    __device__ int size() const { return parts * (num_documents + 1); }
    __device__ int document(int entry) const { return entry % (num_documents + 1); }
    __device__ int first_head(int entry) const { return entry / (num_documents + 1) * heads; }
    __device__ int tiles(int entry) const { return entry < size() ? (rows(document(entry)).y + tile - 1) / tile : 0; }
};

// Blocks that the tiles of a document have to work on under a causal mask: 1 + 2 + ... + tiles.
__device__ int64_t work_of(int tiles) { return int64_t(tiles) * (tiles + 1) / 2; }

// The smallest head whose work begins at or after `begin`, if head 0's begins at `first`.
__device__ int first_head(int64_t begin, int64_t first, int64_t work, int heads) {
    return work == 0 ? 0 : static_cast<int>(min(max((begin - first + work - 1) / work, int64_t(0)), int64_t(heads)));
}

__global__ void __launch_bounds__(kThreads) plan_kernel(AttentionShape shape, AttentionTiles tile, const int* cu_q,
                                                        const int* cu_k, int num_processors, int* out) {
    __shared__ int place[kMaxTiles];  // [t]: of tiles with t + 1 blocks of work: how many; then where the next one goes
    __shared__ int longest;
    const Plan plan(out, shape, tile);
    const bool is_keys = blockIdx.y == 1;
    const int N = shape.num_documents;
    const List of_queries = {cu_q, N, shape.num_queries, tile.queries, shape.heads, 1};
    const List of_keys = {cu_k, N, shape.num_keys, tile.keys, shape.kv_heads, Plan::parts(shape, tile)};
    List list = is_keys ? of_keys : of_queries;
    if (!of_queries.is_valid() || !of_keys.is_valid()) list.cu = nullptr;  // no documents: all rows are outside of them
    for (int t = threadIdx.x; t < kMaxTiles; t += kThreads) place[t] = 0;
    if (threadIdx.x == 0) longest = 1;
    __syncthreads();  // place and longest have their first values

    // How much work there is, and in how many waves.
    int64_t work = 0;
    for (int first = 0; first < list.size(); first += kThreads) {
        const int tiles = list.tiles(first + threadIdx.x);
        work += sum_over_cta(work_of(tiles) * list.heads).all;
        if (tiles > 0) atomicMax(&longest, tiles);
    }
    __syncthreads();  // longest is that of all
    const int64_t enough = work / (int64_t(num_processors) * longest);
    const int64_t waves = min(max(enough, int64_t(list.parts)), int64_t(gridDim.x));
    if (blockIdx.x >= waves) return;
    const int64_t wave_begin = work * blockIdx.x / waves, wave_end = work * (blockIdx.x + 1) / waves;

    // visit(entry, its tiles, first head in this wave, end of heads), of every entry by one thread.
    // -> items of the waves before.
    const auto for_each_entry = [&](auto visit) {
        int64_t begin = 0, items = 0;
        for (int first = 0; first < list.size(); first += kThreads) {
            const int i = first + threadIdx.x, tiles = list.tiles(i);
            const Sums sums = sum_over_cta(work_of(tiles) * list.heads);
            const int from = first_head(wave_begin, begin + sums.before, work_of(tiles), list.heads);
            const int to = first_head(wave_end, begin + sums.before, work_of(tiles), list.heads);
            visit(i, tiles, from, to);
            begin += sums.all;
            items += sum_over_cta(int64_t(tiles) * from).all;
        }
        return static_cast<int>(items);
    };

    const int items_before = for_each_entry([&](int i, int tiles, int from, int to) {
        if (to > from) atomicAdd(&place[tiles - 1], to - from);
    });
    // place[t]: heads of documents of t + 1 tiles -> tiles with t + 1 blocks of work, one of each head of a document of
    // as many tiles or more -> tiles with more work. Each thread has kTilesOfThread, the last ones first.
    const int last = kMaxTiles - 1 - kTilesOfThread * threadIdx.x;
    for (int round = 0; round < 2; ++round) {
        __syncthreads();  // all have counted, or written their sums
        int mine = 0;
        for (int t = 0; t < kTilesOfThread; ++t) mine += place[last - t];
        int sum = static_cast<int>(sum_over_cta(mine).before);
        for (int t = 0; t < kTilesOfThread; ++t) {
            const int here = place[last - t];
            place[last - t] = round == 0 ? sum + here : sum;
            sum += here;
        }
    }
    __syncthreads();  // every place is known
    Item* items = is_keys ? plan.key_items : plan.query_items;
    for_each_entry([&](int i, int tiles, int from, int to) {
        for (int lane = 0; lane < 32; ++lane) {  // a warp writes its 32 entries one after the other
            const int n = __shfl_sync(~0u, tiles, lane), entry = i - threadIdx.x % 32 + lane;
            const int begin = __shfl_sync(~0u, from, lane), heads = __shfl_sync(~0u, to, lane) - begin;
            for (int t = threadIdx.x % 32; heads > 0 && t < n; t += 32) {
                const int first = items_before + atomicAdd(&place[t], heads);
                for (int h = 0; h < heads; ++h) {
                    items[first + h] = {list.document(entry), is_keys ? n - 1 - t : t,
                                        list.first_head(entry) + begin + h};
                }
            }
        }
    });

    if (blockIdx.x > 0) return;
    int64_t all = 0;
    for (int first = 0; first <= N; first += kThreads) {
        const int i = first + threadIdx.x;
        const int tiles = i <= N ? list.tiles(i) : 0;
        all += sum_over_cta(int64_t(tiles) * list.heads * list.parts).all;
        if (i > N) continue;
        const int2 rows = list.rows(i);
        (is_keys ? plan.documents[i].k_begin : plan.documents[i].q_begin) = rows.x;
        (is_keys ? plan.documents[i].k_len : plan.documents[i].q_len) = rows.y;
    }
    if (threadIdx.x == 0) {
        plan.header[is_keys] = static_cast<int>(all);
        plan.header[2 + is_keys] = 0;
    }
}

}  // namespace

int64_t attention_plan_ints(const AttentionShape& shape, AttentionTiles tile) { return Plan::num_ints(shape, tile); }

void attention_plan(const AttentionShape& shape, AttentionTiles tile, const int* cu_q, const int* cu_k, int* plan,
                    int device, cudaStream_t stream) {
    const auto check_rows = [](const char* what, int rows, int tile) {
        if (rows <= kMaxTiles * tile) return;
        throw std::invalid_argument(std::to_string(rows) + " rows of " + what + " are more than " +
                                    std::to_string(kMaxTiles * tile));
    };
    check_rows("q", shape.num_queries, tile.queries);
    check_rows("k and v", shape.num_keys, tile.keys);
    const OnDevice guard(device);
    const int waves = std::max(kMaxWaves, Plan::parts(shape, tile));
    plan_kernel<<<dim3(waves, 2), kThreads, 0, stream>>>(shape, tile, cu_q, cu_k, num_processors(device), plan);
    check(cudaGetLastError(), "attention_plan",
          {{"queries", shape.num_queries}, {"keys", shape.num_keys}, {"documents", shape.num_documents}});
}

uint64_t capture_id(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    unsigned long long id = 0;
    check(cudaStreamGetCaptureInfo(stream, &status, &id), "cudaStreamGetCaptureInfo");
    return status == cudaStreamCaptureStatusActive ? id : 0;
}

AttentionTiles attention_tiles(int head_dim, bool hopper) {
    return hopper ? hopper_tiles(head_dim) : attention_tiles_sm80(head_dim);
}

int attention_parts(const AttentionShape& shape, AttentionTiles tile) { return Plan::parts(shape, tile); }

int64_t attention_padded_rows(const AttentionShape& shape) {
    const int64_t block = query_block(shape.head_dim);
    return (shape.num_queries + block - 1) / block * block + (shape.num_documents + 1) * block;
}

int64_t attention_padded_keys(const AttentionShape& shape) {
    const int64_t tile = hopper_tiles(shape.head_dim).keys;
    return (shape.num_keys + tile - 1) / tile * tile + (shape.num_documents + 1) * tile;
}

}  // namespace minitrain
