// The portable attention forward (sm_80 and later): one CTA of 4 warps per tile of queries and head.
//
//   shared memory   | Q (128 or 64 rows) | K (64 keys) | V (64 keys) |     64 KB for 128 channels: 2 CTAs on an SM
//   a warp          a quarter of the rows, all keys, all channels
//   per 64 keys     S = Q K^T -> mask -> P = 2^(S scale log2e - top) -> O = O 2^(old top - top) + P V
//   copies          V of a block comes while S is computed, K of the next block while P V is
//
// Bound: the rate of mma.sync, then shared memory: a warp of 32 rows reads 40 KB per 1 MFLOP, 0.8 of the time of its
// products on an H100. The second CTA computes while the first one waits. 335 to 377 TFLOP/s were measured there.
// Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; loops and copies: Dao 2023, arXiv:2307.08691.

#include <cmath>
#include <stdexcept>
#include <string>

#include "attention.cuh"
#include "common.cuh"
#include "sm80.cuh"

namespace minitrain {
namespace {

using namespace sm80;

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kKeys = 64;       // of a block
constexpr float kSlack = 8.0f;  // how far scores may rise over `top`, in powers of 2, before the sums are rescaled

template <int C>
struct Forward {
    static constexpr int kQueries = attention_tiles_sm80(C).queries;
    static constexpr int kRows = kQueries / kWarps;  // of a warp
    static constexpr int kM = kRows / 16, kN = kKeys / 8;
    static constexpr int kQBytes = kQueries * C * 2, kBlockBytes = kKeys * C * 2;
    static constexpr int kBytes = kQBytes + 2 * kBlockBytes;
    using Scores = float[kM][kN][4];
    using Output = float[kM][C / 8][4];
};

// Online softmax of a warp's rows: this lane's rows are 16 i + 8 half + lane / 4. All in units of raw scores.
template <int kM>
struct Softmax {
    float top[kM][2], sum[kM][2];  // top: a maximum of the row, at most kSlack too low; sum: of this lane's columns

    __device__ Softmax() {
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            top[i][0] = top[i][1] = -INFINITY;
            sum[i][0] = sum[i][1] = 0.0f;
        }
    }

    // scores := 2^(scores * scale - top * scale); out and sum are brought to a new top if there is one.
    template <int kN, int kCols>
    __device__ void step(float (&scores)[kM][kN][4], float (&out)[kM][kCols][4], float scale) {
        float next[kM][2];
        bool rises = false;
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float high = -INFINITY;
#pragma unroll
                for (int j = 0; j < kN; ++j) {
                    high = fmaxf(high, fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
                }
                high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
                high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
                // Both -inf: NaN, which is not above kSlack. The first finite score is always above.
                const bool above = (high - top[i][half]) * scale > kSlack;
                next[i][half] = above ? high : top[i][half];
                rises |= above;
            }
        if (__any_sync(~0u, rises)) {  // rows that do not rise are multiplied by exactly 1: no row sees another
#pragma unroll
            for (int i = 0; i < kM; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const bool same = next[i][half] == top[i][half];
                    const float factor = same ? 1.0f : exp2_approx((top[i][half] - next[i][half]) * scale);
                    top[i][half] = next[i][half];
                    sum[i][half] *= factor;
#pragma unroll
                    for (int j = 0; j < kCols; ++j) {
                        out[i][j][2 * half] *= factor;
                        out[i][j][2 * half + 1] *= factor;
                    }
                }
        }
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // A row without a key so far: 2^-inf = 0, where -inf - -inf would be NaN.
                const float shift = top[i][half] == -INFINITY ? 0.0f : top[i][half] * scale;
#pragma unroll
                for (int j = 0; j < kN; ++j)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e) {
                        scores[i][j][e] = exp2_approx(fmaf(scores[i][j][e], scale, -shift));
                        sum[i][half] += scores[i][j][e];
                    }
            }
    }
};

// place: of this lane's first row. key: this lane's first one.
template <int kM, int kN>
__device__ void mask(float (&scores)[kM][kN][4], const Band& band, int place, int key, int num_keys) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Band::Range seen = band.keys(place + 16 * i + 8 * half, num_keys);
#pragma unroll
            for (int j = 0; j < kN; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = scores[i][j][2 * half + e];
                    score = seen.contains(key + 8 * j + e) ? score : -INFINITY;
                }
        }
}

// What a CTA works on. In shared memory, and read where it is needed: in the loop the registers are full.
struct Work {
    const bf16 *k, *v;        // of the document and head
    int head, q_row;          // q_row: the tile's first row, counted over all documents
    int num_rows, num_keys;   // of the tile, of the document
    int place;                // of the first row, see Band
    Band::Range seen, whole;  // blocks of keys: those that are visited, those of them that need no mask
};

// Whether one of the rows row .. row + num_rows - 1 of the tile is there and sees a key of the block.
__device__ inline bool sees(const Work& work, const Band& band, int row, int num_rows, int block) {
    const int last = min(row + num_rows, work.num_rows) - 1;
    return row <= last && band.blocks_seen(work.place + row, work.place + last, work.num_keys, kKeys).contains(block);
}

template <int C>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(AttentionForward args, float scale) {
    using F = Forward<C>;
    extern __shared__ __align__(128) char shared[];
    __shared__ Work work;
    const AttentionShape& shape = args.shape;
    const Plan plan(args.plan, shape, attention_tiles_sm80(C));
    if (blockIdx.x >= plan.num_query_items()) return;

    const Band band = {shape.look_back, shape.look_ahead};
    const uint32_t q_tile = shared_address(shared), k_tile = q_tile + F::kQBytes, v_tile = k_tile + F::kBlockBytes;
    const auto load_block = [&](uint32_t to, const bf16* from, const Packed& x, int block) {
        const int stride = static_cast<int>(x.row_stride);
        load_tile<C, kKeys, kThreads>(to, from + int64_t(block) * kKeys * stride, stride,
                                      work.num_keys - block * kKeys);
    };
    {
        const Item item = plan.query_items[blockIdx.x];
        const int kv_head = item.head / (shape.heads / shape.kv_heads);
        Document doc = plan.documents[item.document];
        if (item.document == shape.num_documents) doc.k_len = 0;  // rows outside of all documents see nothing

        const int first = item.tile * F::kQueries, num_rows = min(F::kQueries, doc.q_len - first);
        const int place = first + doc.k_len - doc.q_len;
        if (threadIdx.x == 0) {
            work = {rows_of(args.k, doc.k_begin, kv_head),
                    rows_of(args.v, doc.k_begin, kv_head),
                    item.head,
                    doc.q_begin + first,
                    num_rows,
                    doc.k_len,
                    place,
                    band.blocks_seen(place, place + num_rows - 1, doc.k_len, kKeys),
                    band.blocks_whole(place, place + num_rows - 1, doc.k_len, kKeys)};
        }
        __syncthreads();  // `work` is there
        if (work.seen.size() > 0) {
            load_tile<C, F::kQueries, kThreads>(q_tile, rows_of(args.q, doc.q_begin + first, item.head),
                                                static_cast<int>(args.q.row_stride), num_rows);
            load_block(k_tile, work.k, args.k, work.seen.begin);
        }
    }

    const int warp_row = threadIdx.x / 32 * F::kRows, lane_row = warp_row + threadIdx.x % 32 / 4;
    const Operand<C, C, Role::A> q(q_tile, warp_row, 0);
    const Operand<C, C, Role::B> k(k_tile, 0, 0);
    const Operand<C, C, Role::B_transposed> v(v_tile, 0, 0);
    typename F::Output out = {};
    Softmax<F::kM> softmax;

#pragma unroll 1
    for (int block = work.seen.begin; block < work.seen.end; ++block) {
        wait_copies();    // this thread's part of K (and of Q, the first time)
        __syncthreads();  // everybody's part of K is there, and nobody reads the last block's V any more
        load_block(v_tile, work.v, args.v, block);
        typename F::Scores scores;
        const bool mine = sees(work, band, warp_row, F::kRows, block);  // else the warp leaves the SM to others
        if (mine) {
            clear(scores);
            multiply<C / 16>(scores, q, k);
        }
        wait_copies();    // this thread's part of V
        __syncthreads();  // everybody's part of V is there, and nobody reads this block's K any more
        if (block + 1 < work.seen.end) load_block(k_tile, work.k, args.k, block + 1);
        if (mine) {
            if (!work.whole.contains(block)) {
                mask(scores, band, work.place + lane_row, block * kKeys + threadIdx.x % 4 * 2, work.num_keys);
            }
            softmax.step(scores, out, scale);
            multiply<kKeys / 16>(out, AccumulatorOperand<F::kM, F::kN>(scores), v);
        }
    }

    float* lse = args.lse + int64_t(work.head) * shape.num_queries + work.q_row;
#pragma unroll
    for (int i = 0; i < F::kM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = softmax.sum[i][half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
            for (int j = 0; j < C / 8; ++j) {
                out[i][j][2 * half] *= factor;
                out[i][j][2 * half + 1] *= factor;
            }
            const int row = lane_row + 16 * i + 8 * half;
            if (threadIdx.x % 4 == 0 && row < work.num_rows) {
                lse[row] = sum == 0.0f ? -INFINITY : kLn2 * fmaf(softmax.top[i][half], scale, log2f(sum));
            }
        }
    // Through this warp's rows of Q, which no other warp reads, to have 16 bytes per store.
    __syncwarp();
    store_accumulators<C>(shared, warp_row, 0, out, 1.0f);
    __syncwarp();
    const int64_t row = work.q_row + warp_row;
    store_tile<C, F::kRows, 32>(shared + warp_row * C * 2,
                                static_cast<bf16*>(args.out) + (row * shape.heads + work.head) * C, shape.heads * C,
                                work.num_rows - warp_row, threadIdx.x % 32);
}

template <int C>
void launch(const AttentionForward& args, cudaStream_t stream) {
    using F = Forward<C>;
    const AttentionShape& shape = args.shape;
    const auto set = [](cudaFuncAttribute attribute, int value) {
        check(cudaFuncSetAttribute(forward_kernel<C>, attribute, value), "attention_forward_sm80: attribute",
              {{"head_dim", C}, {"value", value}});
    };
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, F::kBytes);
    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    const int num_ctas = Plan::max_query_items(shape, attention_tiles_sm80(C));  // at most so many: the others return
    forward_kernel<C><<<num_ctas, kThreads, F::kBytes, stream>>>(args, shape.scale * kLog2e);
}

}  // namespace

void attention_forward_sm80(const AttentionForward& args, int device, cudaStream_t stream) {
    const AttentionShape& shape = args.shape;
    const OnDevice guard(device);
    switch (shape.head_dim) {
        case 64:
            launch<64>(args, stream);
            break;
        case 96:
            launch<96>(args, stream);
            break;
        case 128:
            launch<128>(args, stream);
            break;
        case 192:
            launch<192>(args, stream);
            break;
        case 256:
            launch<256>(args, stream);
            break;
        default:
            throw std::invalid_argument("head_dim=" + std::to_string(shape.head_dim) +
                                        " was not built; use 64, 96, 128, 192 or 256");
    }
    check(cudaGetLastError(), "attention_forward_sm80",
          {{"queries", shape.num_queries},
           {"keys", shape.num_keys},
           {"documents", shape.num_documents},
           {"heads", shape.heads},
           {"kv_heads", shape.kv_heads},
           {"head_dim", shape.head_dim}});
}

}  // namespace minitrain
