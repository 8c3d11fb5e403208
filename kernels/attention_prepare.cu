// The first step of a backward: what it needs of each query, and sums that begin at 0. See attention.cuh.
//
// One CTA for a tile of queries and a head; 8 threads share a row, so that each reads 16 bytes beside its neighbour's.
// Bound: memory. It reads out and d_out once, and writes the fp32 zeros of dq_sum if it must.

#include <cuda_bf16.h>

#include <cmath>

#include "attention.cuh"
#include "common.cuh"

namespace minitrain {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;  // threads of a row

__device__ float dot(uint4 a, uint4 b) {  // of 8 bf16
    const __nv_bfloat162 *x = reinterpret_cast<__nv_bfloat162*>(&a), *y = reinterpret_cast<__nv_bfloat162*>(&b);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 u = __bfloat1622float2(x[i]), v = __bfloat1622float2(y[i]);
        sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
    }
    return sum;
}

__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const AttentionBackward args, AttentionTiles tile, bool clear_dq_sum, int64_t R) {
    const AttentionShape& shape = args.shape;
    const Plan plan(args.plan, shape, tile);
    if (blockIdx.x >= plan.num_query_items()) return;
    const Item item = plan.query_items[blockIdx.x];
    const Document doc = plan.documents[item.document];
    const int head = item.head, C = shape.head_dim;
    const int begin = item.tile * tile.queries;  // row in the document
    const int block = query_block(C), padded_len = (doc.q_len + block - 1) / block * block;
    const bool is_last = begin + tile.queries >= doc.q_len;
    const int rows = is_last ? padded_len - begin : tile.queries;
    const int64_t padded = head * R + padded_begin(doc, item.document, C) + begin;

    if (clear_dq_sum) {
        float4* sums = reinterpret_cast<float4*>(args.dq_sum + padded * C);
        for (int i = threadIdx.x; i < rows * C / 4; i += kThreads) sums[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
    if (threadIdx.x < rows / kRowsOfTurn) args.turns[padded / kRowsOfTurn + threadIdx.x] = 0;

    const int lane = threadIdx.x % kLanes;
    for (int i = threadIdx.x / kLanes; i < rows; i += kThreads / kLanes) {
        float lse = INFINITY, delta = 0.0f;  // of padding
        if (begin + i < doc.q_len) {
            const int64_t token = doc.q_begin + begin + i;
            const auto vectors = [&](const Packed& x) {
                return reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(x.data) + token * x.row_stride +
                                                      head * x.head_stride);
            };
            const uint4 *out = vectors(args.out), *d_out = vectors(args.d_out);
            for (int c = lane; c < C / 8; c += kLanes) delta += dot(out[c], d_out[c]);
            const int64_t place = int64_t(head) * shape.num_queries + token;
            lse = args.lse[place] * kLog2e;
            if (lse == -INFINITY) lse = INFINITY;  // no key is visible: P is 0
            for (int step = 1; step < kLanes; step *= 2)
                delta += __shfl_xor_sync(0xffu << (threadIdx.x % 32 & ~7), delta, step);
            if (args.d_lse) delta -= args.d_lse[place];
        }
        if (lane == 0) {
            args.rows[padded + i] = lse;
            args.rows[shape.heads * R + padded + i] = delta;
        }
    }
}

}  // namespace

void attention_prepare(const AttentionBackward& args, AttentionTiles tile, bool clear_dq_sum, int device,
                       cudaStream_t stream) {
    const AttentionShape& shape = args.shape;
    const OnDevice guard(device);
    const int grid = Plan::max_query_items(shape, tile);
    prepare_kernel<<<grid, kThreads, 0, stream>>>(args, tile, clear_dq_sum, attention_padded_rows(shape));
    check(cudaGetLastError(), "attention_prepare",
          {{"queries", shape.num_queries}, {"heads", shape.heads}, {"head_dim", shape.head_dim}});
}

}  // namespace minitrain
