// The portable attention backward (sm_80 and later): one CTA per tile of keys and key/value head. It goes through the
// query heads of the group and, for each, through the blocks of queries that see one of the keys.
//
//   prepare   attention_prepare.cu: lse in base 2 and D per query, dq_sum = 0
//   main      K, V stay in shared memory, dK and dV in registers; per block of queries:
//
//                 S^T = K Q^T, dP^T = V dO^T          warps: n key parts x 2 query parts
//                 P = 2^(S scale log2e - lse), dS = P (dP - D)      --> shared memory, as [key][query]
//                 dV += P^T dO, dK += dS^T Q          warps: parts of 32 keys x parts of the channels
//                 dQ = dS K, added to dq_sum          warps: 2 query parts x n parts of the channels
//
//   finish    dq = scale * dq_sum, in the right order and in bf16
//
// For 128 channels: 64 keys, blocks of 64 queries, 4 warps, two CTAs on an SM. Bound: shared memory, 288 KB for 5.2
// MFLOP, 1.1 times as long as mma.sync takes on an H100 (reasoned; 290 TFLOP/s at most were measured there). Warps of
// 16 keys could keep P and dS in registers, but each would read all of Q and dO: 344 KB.
//
// dq_sum is in the order of the accumulators, [padded row / 16][channel / 8][element e][lane], so that a warp adds to
// 128 bytes in a row. In any order; or, if deterministic, tiles of keys from the last to the first: each waits until
// all later ones that see the queries have added. To have those running or done, CTAs then take the plan's list from
// its end.

#include <cmath>
#include <stdexcept>
#include <string>

#include "attention.cuh"
#include "common.cuh"
#include "sm80.cuh"

namespace minitrain {
namespace {

using namespace sm80;

template <int C, int kStages>  // stages: of Q and dO
struct Backward {
    static constexpr int kKeys = attention_tiles_sm80(C).keys;
    static constexpr int kQueries = C <= 128 ? 64 : 32;  // of a block
    static constexpr int kWarps = kKeys / (C <= 128 ? 16 : 8), kThreads = kWarps * 32;
    static constexpr int kParts = kWarps / 2;
    // What a warp has of S^T and dP^T; of dK and dV; of dQ.
    static constexpr int kScoreKeys = kKeys / kParts, kScoreQueries = kQueries / 2;
    static constexpr int kGradKeys = 32, kGradCols = C / (kWarps / (kKeys / kGradKeys));
    static constexpr int kSumQueries = kQueries / 2, kSumCols = C / kParts;

    static constexpr int kKeyBytes = kKeys * C * 2, kQueryBytes = kQueries * C * 2, kScoreBytes = kKeys * kQueries * 2;
    // K | V | P^T | dS^T | lse, D | stages of Q | stages of dO
    static constexpr int kV = kKeyBytes, kP = kV + kKeyBytes, kDS = kP + kScoreBytes, kRows = kDS + kScoreBytes;
    static constexpr int kQ = kRows + 2 * kQueries * 4, kDO = kQ + kStages * kQueryBytes;
    static constexpr int kBytes = kDO + kStages * kQueryBytes;

    using Scores = float[kScoreKeys / 16][kScoreQueries / 8][4];
    using Grads = float[kGradKeys / 16][kGradCols / 8][4];
    using Sums = float[kSumQueries / 16][kSumCols / 8][4];
};

// What a CTA works on. In shared memory, and read where it is needed: in the loop the registers are full.
struct Work {
    Document doc;
    int tile, kv_head;         // tile: index in the document
    int padded;                // row of the document's first query in the workspaces
    int row_begin, row_end;    // queries that see one of the keys; both multiples of kRowsOfTurn
    int head_begin, head_end;  // query heads
};

// scores := P, d_probs (dP) := dS. rows: lse in base 2 of this lane's first query; kQueries further, D.
template <int kQueries, int kM, int kN>
__device__ void differentiate(float (&scores)[kM][kN][4], float (&d_probs)[kM][kN][4], const float* rows, float scale) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
        const float2 lse = *reinterpret_cast<const float2*>(rows + 8 * j);
        const float2 delta = *reinterpret_cast<const float2*>(rows + kQueries + 8 * j);
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                scores[i][j][e] = exp2_approx(fmaf(scores[i][j][e], scale, -(e % 2 ? lse.y : lse.x)));
                d_probs[i][j][e] = scores[i][j][e] * (d_probs[i][j][e] - (e % 2 ? delta.y : delta.x));
            }
    }
}

// place: of this lane's first query. key: this lane's first one.
template <int kM, int kN>
__device__ void mask(float (&probs)[kM][kN][4], float (&d_scores)[kM][kN][4], const Band& band, int place, int key,
                     int num_keys) {
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const Band::Range seen = band.keys(place + 8 * j + e, num_keys);
#pragma unroll
            for (int i = 0; i < kM; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const bool keep = seen.contains(key + 16 * i + 8 * half);
                    probs[i][j][2 * half + e] = keep ? probs[i][j][2 * half + e] : 0.0f;
                    d_scores[i][j][2 * half + e] = keep ? d_scores[i][j][2 * half + e] : 0.0f;
                }
        }
}

// sums: of 16 rows and 8 channels, then of the next 8 channels, ..., then of the next 16 rows.
template <int C, int kM, int kN>
__device__ void add_accumulators(float* sums, const float (&acc)[kM][kN][4]) {
    sums += threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) add_to(sums + i * 16 * C + j * 128 + e * 32, acc[i][j][e]);
}

template <int C, int kStages>
__global__ void __launch_bounds__(Backward<C, kStages>::kThreads, 8 / Backward<C, kStages>::kWarps)
    backward_kernel(AttentionBackward args, int padded_rows, float scale) {
    using B = Backward<C, kStages>;
    extern __shared__ __align__(128) char shared[];
    __shared__ Work work;
    const AttentionShape& shape = args.shape;
    const Plan plan(args.plan, shape, attention_tiles_sm80(C));
    const int num_items = plan.num_key_items();
    const Band band = {shape.look_back, shape.look_ahead};

    if (threadIdx.x == 0) {
        const int number = next_item(plan.backward_counter(), 0);
        work.row_end = -1;
        if (number < num_items) {
            const Item item = plan.key_items[args.deterministic ? num_items - 1 - number : number];
            const Document doc = plan.documents[item.document];
            const int to_row = doc.q_len - doc.k_len, first_key = item.tile * B::kKeys;
            const int last_key = min(first_key + B::kKeys, doc.k_len) - 1;
            const int num_seeing = item.document < shape.num_documents ? doc.q_len : 0;  // nobody outside of them
            const Band seen_from = {shape.look_ahead, shape.look_back};  // a query's band, as the key sees it
            const Band::Range blocks =
                seen_from.blocks_seen(first_key + to_row, last_key + to_row, num_seeing, kRowsOfTurn);
            const int group = shape.heads / shape.kv_heads;
            work = {doc,
                    item.tile,
                    item.head,
                    padded_begin(doc, item.document, C),
                    blocks.begin * kRowsOfTurn,
                    blocks.end * kRowsOfTurn,
                    item.head * group,
                    (item.head + 1) * group};
        }
    }
    __syncthreads();  // `work` is there
    if (work.row_end < 0) return;

    const uint32_t base = shared_address(shared);
    const auto load_keys = [&](uint32_t to, const Packed& x) {
        const int first = work.tile * B::kKeys;
        load_tile<C, B::kKeys, B::kThreads>(to, rows_of(x, work.doc.k_begin + first, work.kv_head),
                                            static_cast<int>(x.row_stride), work.doc.k_len - first);
    };
    const auto load_queries = [&](int stage, int head, int row) {
        load_tile<C, B::kQueries, B::kThreads>(base + B::kQ + stage * B::kQueryBytes,
                                               rows_of(args.q, work.doc.q_begin + row, head),
                                               static_cast<int>(args.q.row_stride), work.doc.q_len - row);
        load_tile<C, B::kQueries, B::kThreads>(base + B::kDO + stage * B::kQueryBytes,
                                               rows_of(args.d_out, work.doc.q_begin + row, head),
                                               static_cast<int>(args.d_out.row_stride), work.doc.q_len - row);
    };
    const auto load_rows = [&](int head, int row) {  // 4 floats by each of the first threads; there is no row missing
        constexpr int kEach = B::kQueries / 4;
        const int which = threadIdx.x / kEach, i = threadIdx.x % kEach;
        if (which < 2) {
            const int64_t place = int64_t(which * shape.heads + head) * padded_rows + work.padded + row + 4 * i;
            copy16(base + B::kRows + threadIdx.x * 16, args.rows + place, true);
        }
    };
    const bool any = work.row_begin < work.row_end;
    if (any) {
        load_keys(base, args.k);
        load_keys(base + B::kV, args.v);
        load_queries(0, work.head_begin, work.row_begin);
        load_rows(work.head_begin, work.row_begin);
    }

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int score_key = warp / 2 * B::kScoreKeys, score_query = warp % 2 * B::kScoreQueries;
    const int grad_key = warp % (B::kKeys / B::kGradKeys) * B::kGradKeys;
    const int grad_col = warp / (B::kKeys / B::kGradKeys) * B::kGradCols;
    const int sum_query = warp % 2 * B::kSumQueries, sum_col = warp / 2 * B::kSumCols;
    typename B::Grads dk = {}, dv = {};

    int stage = 0;
    int head = work.head_begin, row = work.row_begin;
#pragma unroll 1
    while (any && head < work.head_end) {
        int next_head = head, next_row = row + B::kQueries;
        if (next_row == work.row_end) {
            next_row = work.row_begin;
            ++next_head;
        }
        const bool last = next_head == work.head_end;

        wait_copies();    // this thread's part of Q, dO, lse, D (and of K and V, the first time)
        __syncthreads();  // everybody's part is there, and nobody reads P, dS or that other stage any more
        if (kStages == 2 && !last) load_queries(1 - stage, next_head, next_row);
        const uint32_t q_tile = base + B::kQ + stage * B::kQueryBytes;
        const uint32_t d_out_tile = base + B::kDO + stage * B::kQueryBytes;

        {
            typename B::Scores scores = {}, d_scores = {};
            multiply<C / 16>(scores, Operand<C, C, Role::A>(base, score_key, 0),
                             Operand<C, C, Role::B>(q_tile, score_query, 0));
            multiply<C / 16>(d_scores, Operand<C, C, Role::A>(base + B::kV, score_key, 0),
                             Operand<C, C, Role::B>(d_out_tile, score_query, 0));
            const int query = score_query + lane % 4 * 2;
            differentiate<B::kQueries>(scores, d_scores, reinterpret_cast<float*>(shared + B::kRows) + query, scale);
            const int to_place = work.doc.k_len - work.doc.q_len;
            const int last_row = min(row + B::kQueries, work.doc.q_len) - 1;
            if (!band.blocks_whole(row + to_place, last_row + to_place, work.doc.k_len, B::kKeys).contains(work.tile)) {
                mask(scores, d_scores, band, row + query + to_place, work.tile * B::kKeys + score_key + lane / 4,
                     work.doc.k_len);
            }
            store_accumulators<B::kQueries>(shared + B::kP, score_key, score_query, scores, 1.0f);
            store_accumulators<B::kQueries>(shared + B::kDS, score_key, score_query, d_scores, 1.0f);
        }
        __syncthreads();  // everybody's part of P and dS is there, and nobody reads lse and D any more
        if (!last) load_rows(next_head, next_row);

        multiply<B::kQueries / 16>(dv, Operand<B::kQueries, B::kQueries, Role::A>(base + B::kP, grad_key, 0),
                                   Operand<C, B::kGradCols, Role::B_transposed>(d_out_tile, 0, grad_col));
        multiply<B::kQueries / 16>(dk, Operand<B::kQueries, B::kQueries, Role::A>(base + B::kDS, grad_key, 0),
                                   Operand<C, B::kGradCols, Role::B_transposed>(q_tile, 0, grad_col));
        if (kStages == 1) {
            __syncthreads();  // nobody reads Q and dO any more
            if (!last) load_queries(0, next_head, next_row);
        }

        typename B::Sums dq = {};
        multiply<B::kKeys / 16>(dq,
                                Operand<B::kQueries, B::kSumQueries, Role::A_transposed>(base + B::kDS, 0, sum_query),
                                Operand<C, B::kSumCols, Role::B_transposed>(base, 0, sum_col));
        const int64_t padded = int64_t(head) * padded_rows + work.padded + row;
        if (args.deterministic && row % kRowsOfTurn == 0) {
            if (threadIdx.x == 0) {
                const int place = row + work.doc.k_len - work.doc.q_len;
                const int last_place = min(place + kRowsOfTurn, work.doc.k_len) - 1;
                const int end = band.blocks_seen(place, last_place, work.doc.k_len, B::kKeys).end;
                wait_for(args.turns + padded / kRowsOfTurn, end - 1 - work.tile);
            }
            __syncthreads();  // it is our turn
        }
        add_accumulators<C>(args.dq_sum + (padded + sum_query) * C + sum_col * 16, dq);
        if (args.deterministic && (row + B::kQueries) % kRowsOfTurn == 0) {
            __syncthreads();  // everybody has added
            if (threadIdx.x == 0) {
                __threadfence();  // and the next CTA's additions come after it
                atomicAdd(args.turns + padded / kRowsOfTurn, 1);
            }
        }

        if (kStages == 2) stage = 1 - stage;
        head = next_head;
        row = next_row;
    }

    __syncthreads();  // nobody reads K and V any more: dK and dV take their place, to have 16 bytes per store
    store_accumulators<C>(shared, grad_key, grad_col, dk, shape.scale);
    store_accumulators<C>(shared + B::kV, grad_key, grad_col, dv, 1.0f);
    __syncthreads();  // everybody's part of dK and dV is there
    const int first = work.tile * B::kKeys;
    store_tile<C, B::kKeys, B::kThreads>(shared, rows_of(args.dk, work.doc.k_begin + first, work.kv_head),
                                         static_cast<int>(args.dk.row_stride), work.doc.k_len - first, threadIdx.x);
    store_tile<C, B::kKeys, B::kThreads>(shared + B::kV, rows_of(args.dv, work.doc.k_begin + first, work.kv_head),
                                         static_cast<int>(args.dv.row_stride), work.doc.k_len - first, threadIdx.x);
}

constexpr int kFinishThreads = 256;

// dq = scale * dq_sum for a tile of queries and a head. A warp takes 8 rows and 32 channels at once: it reads 128 bytes
// in a row for each of 4 x 2 (8 channels, element e), and writes 64 bytes in a row.
template <int C>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(AttentionBackward args, int padded_rows) {
    constexpr int kRows = attention_tiles_sm80(C).queries, kStrips = C / 32;
    const AttentionShape& shape = args.shape;
    const Plan plan(args.plan, shape, attention_tiles_sm80(C));
    if (blockIdx.x >= plan.num_query_items()) return;
    const Item item = plan.query_items[blockIdx.x];
    const Document doc = plan.documents[item.document];
    const int first = item.tile * kRows, num_rows = min(kRows, doc.q_len - first);
    const float* sums =
        args.dq_sum + (int64_t(item.head) * padded_rows + padded_begin(doc, item.document, C) + first) * C;
    bf16* dq = static_cast<bf16*>(args.dq) + (int64_t(doc.q_begin + first) * shape.heads + item.head) * C;

    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < kRows / 8 * kStrips; i += kFinishThreads / 32) {
        const int eight = i / kStrips, chunk = i % kStrips * 4 + lane % 4;
        const int row = eight * 8 + lane / 4;
        if (row >= num_rows) continue;
        const float* at = sums + eight / 2 * 16 * C + chunk * 128 + eight % 2 * 64 + lane / 4 * 4;
        const float4 even = *reinterpret_cast<const float4*>(at);  // channels 0, 2, 4, 6
        const float4 odd = *reinterpret_cast<const float4*>(at + 32);
        const float scale = shape.scale;
        const uint4 packed = {pack(even.x * scale, odd.x * scale), pack(even.y * scale, odd.y * scale),
                              pack(even.z * scale, odd.z * scale), pack(even.w * scale, odd.w * scale)};
        *reinterpret_cast<uint4*>(dq + row * (shape.heads * C) + chunk * 8) = packed;
    }
}

template <int C, int kStages>
void launch_main(const AttentionBackward& args, cudaStream_t stream) {
    using B = Backward<C, kStages>;
    const AttentionShape& shape = args.shape;
    const auto set = [](cudaFuncAttribute attribute, int value) {
        check(cudaFuncSetAttribute(backward_kernel<C, kStages>, attribute, value), "attention_backward_sm80: attribute",
              {{"head_dim", C}, {"value", value}});
    };
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, B::kBytes);
    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    const int num_ctas = Plan::max_key_items(shape, attention_tiles_sm80(C));  // at most so many: the others return
    backward_kernel<C, kStages><<<num_ctas, B::kThreads, B::kBytes, stream>>>(
        args, static_cast<int>(attention_padded_rows(shape)), shape.scale * kLog2e);
    check(cudaGetLastError(), "attention_backward_sm80", {{"keys", shape.num_keys}, {"head_dim", C}});
}

template <int C>
void launch(const AttentionBackward& args, int device, cudaStream_t stream) {
    const AttentionShape& shape = args.shape;
    attention_prepare(args, attention_tiles_sm80(C), true, device, stream);
    if constexpr (C == 128) {
        // Two stages where two CTAs fit on an SM with them: not in the 163 KB of sm_80; one CTA does not in 99 KB.
        int shared_bytes = 0;
        check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
              "cudaDeviceGetAttribute", {{"device", device}});
        if (shared_bytes >= 2 * Backward<C, 2>::kBytes) {
            launch_main<C, 2>(args, stream);
        } else {
            launch_main<C, 1>(args, stream);
        }
    } else {
        launch_main<C, C <= 96 ? 2 : 1>(args, stream);
    }
    const int num_ctas = Plan::max_query_items(shape, attention_tiles_sm80(C));
    finish_kernel<C><<<num_ctas, kFinishThreads, 0, stream>>>(args, static_cast<int>(attention_padded_rows(shape)));
    check(cudaGetLastError(), "attention_backward_sm80: finish", {{"queries", shape.num_queries}, {"head_dim", C}});
}

}  // namespace

void attention_backward_sm80(const AttentionBackward& args, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    switch (args.shape.head_dim) {
        case 64:
            return launch<64>(args, device, stream);
        case 96:
            return launch<96>(args, device, stream);
        case 128:
            return launch<128>(args, device, stream);
        case 192:
            return launch<192>(args, device, stream);
        case 256:
            return launch<256>(args, device, stream);
    }
    throw std::invalid_argument("head_dim=" + std::to_string(args.shape.head_dim) +
                                " was not built; use 64, 96, 128, 192 or 256");
}

}  // namespace minitrain
