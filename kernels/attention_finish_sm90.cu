// The last step of a backward on Hopper: from dQ's sum to dq; or, where norm_rotate made the queries, on through
// rotation and norm to the gradient of what it was given, in one pass over memory for three.
//
// A CTA of 128 threads takes 64 queries of a head at a time. Of a sum, float4 j of panel w, of 64 channels, has what
// thread j % 128 of a warpgroup had in registers 4 (j / 128) ..: rows 16 * (t / 32) + t % 32 / 4 (+ 8), two columns of
// each. Four neighbouring threads share a row. Bound: memory, 4 bytes read and 2 written of each channel; 6 and 2 on
// the way through the norm.

#include "attention.cuh"
#include "norm_rotate.cuh"
#include "sm90.cuh"
#include "sum_parts.cuh"

namespace minitrain {
namespace {

using namespace sm90;
using bf16 = __nv_bfloat16;

constexpr int kQueries = 64, kThreads = 128;

// A CTA's queries, and what a thread has of them: two rows, in each C / 32 groups of 8 channels, as pairs in bf16 that
// its neighbours share.
template <int C>
struct Queries {
    static constexpr int kGroups = C / 32;
    static constexpr int kOfItem = hopper_tiles(C).queries / kQueries;  // so many make a tile of the plan
    int head, rows;                                                     // rows: of a document, at most 0 if it has none
    int64_t token;                                                      // of the first
    uint32_t pairs[2][kGroups][4];

    __device__ Queries(const AttentionBackward& args, const Plan& plan, int padded_rows, int number) {
        const Item item = plan.query_items[number / kOfItem];
        const Document doc = plan.documents[item.document];
        const int first = (item.tile * kOfItem + number % kOfItem) * kQueries;
        head = item.head, rows = doc.q_len - first, token = doc.q_begin + first;
        if (rows <= 0) return;
        const int64_t begin = int64_t(head) * padded_rows + padded_begin(doc, item.document, C);
        const int of_block = first / query_block(C) * query_block(C);
        const bool is_written = args.turns[(begin + of_block) / kRowsOfTurn] > 0;  // else no key is seen
        const float4* sum = reinterpret_cast<const float4*>(args.dq_sum + (begin + first) * C) + threadIdx.x;
        const float scale = args.shape.scale;
#pragma unroll
        for (int i = 0; i < C / 8; ++i) {
            const float4 x = is_written ? __ldcs(sum + i * kThreads) : float4{};
            pairs[0][i / 4][i % 4] = pack(x.x * scale, x.y * scale);
            pairs[1][i / 4][i % 4] = pack(x.z * scale, x.w * scale);
        }
    }

    // Row r of this thread's two, in the CTA's queries.
    __device__ int row(int r) const { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r; }

    // 8 channels of it, from 32 * group + 8 * (threadIdx.x % 4) on; by all lanes.
    __device__ uint4 channels(int r, int group) const {
        const auto& x = pairs[r][group];
        return gather_group(x[0], x[1], x[2], x[3]);
    }
};

template <int C>
__global__ void __launch_bounds__(kThreads) finish_kernel(const AttentionBackward args, int padded_rows) {
    const Plan plan(args.plan, args.shape, hopper_tiles(C));
    if (blockIdx.x >= plan.num_query_items() * Queries<C>::kOfItem) return;
    const Queries<C> queries(args, plan, padded_rows, blockIdx.x);
    if (queries.rows <= 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int64_t place = (queries.token + queries.row(r)) * args.shape.heads + queries.head;
        uint4* to = reinterpret_cast<uint4*>(static_cast<bf16*>(args.dq) + place * C);
#pragma unroll
        for (int g = 0; g < queries.kGroups; ++g) {
            const uint4 channels = queries.channels(r, g);
            if (queries.row(r) < queries.rows) to[4 * g + threadIdx.x % 4] = channels;
        }
    }
}

__device__ float sum_over_row(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// parts (CTAs, C): terms of the weight's gradient.
template <int C>
__global__ void __launch_bounds__(kThreads, 3)
    finish_through_norm_kernel(const AttentionBackward args, int padded_rows, const NormRotate norm, const Packed dx,
                               float* parts) {
    constexpr int kPairs = C / 64;  // of a row, each 8 channels and their partners
    const Plan plan(args.plan, args.shape, hopper_tiles(C));
    const int lane = threadIdx.x % 4;
    Pairs grad[kPairs] = {};
    for (int number = blockIdx.x; number < plan.num_query_items() * Queries<C>::kOfItem; number += gridDim.x) {
        const Queries<C> queries(args, plan, padded_rows, number);
        if (queries.rows <= 0) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool is_valid = queries.row(r) < queries.rows;
            const int64_t token = queries.token + min(queries.row(r), queries.rows - 1);
            const bf16* from = head_of(norm.x, token, queries.head) + kEach * lane;
            Pairs x[kPairs], d[kPairs];
            float squares = 0.0f, product = 0.0f;
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
                x[i] = load_pairs(from + 32 * i, C / 2);
                squares += sum_of_squares(x[i]);
                const uint4 a = queries.channels(r, i), b = queries.channels(r, i + kPairs);
                load8(d[i].a, reinterpret_cast<const bf16*>(&a));
                load8(d[i].b, reinterpret_cast<const bf16*>(&b));
                if (!is_valid) d[i] = {};
            }
            const float scale = rsqrtf(sum_over_row(squares) / C + norm.eps);
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
                const int channel = 32 * i + kEach * lane;
                const Pairs weight = load_pairs(static_cast<const bf16*>(norm.weight) + channel, C / 2);
                const int64_t of_token = token * (C / 2) + channel;
                const Angles angles = load_angles(norm.cos + of_token, norm.sin + of_token);
                product += turn_back(d[i], x[i], scale, weight, angles, grad[i]);
            }
            const float mean = sum_over_row(product) / C;
            bf16* to = head_of(dx, token, queries.head) + kEach * lane;
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
                norm_gradient(d[i], x[i], mean, scale);
                if (is_valid) store_pairs(to + 32 * i, C / 2, d[i]);
            }
            __syncwarp();  // registers for one row at a time
        }
    }
    store_part<C, kThreads / 32>(grad, parts);
}

template <typename Launch>
void launch(const AttentionBackward& args, Launch launch) {
    const AttentionShape& shape = args.shape;
    for_head_dim<64, 128>(shape.head_dim, launch);
    check(cudaGetLastError(), "attention_finish_sm90",
          {{"queries", shape.num_queries}, {"heads", shape.heads}, {"head_dim", shape.head_dim}});
}

}  // namespace

void attention_finish_sm90(const AttentionBackward& args, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    const int padded_rows = static_cast<int>(attention_padded_rows(args.shape));
    launch(args, [&](auto C) {
        const int grid = Plan::max_query_items(args.shape, hopper_tiles(C)) * Queries<C>::kOfItem;
        finish_kernel<C><<<grid, kThreads, 0, stream>>>(args, padded_rows);
    });
}

int attention_finish_num_parts(int device) { return 3 * num_processors(device); }

void attention_finish_through_norm_sm90(const AttentionBackward& args, const NormRotate& norm, const Packed& dx,
                                        void* weight_grad, float* parts, int num_parts, int device,
                                        cudaStream_t stream) {
    const OnDevice guard(device);
    const int padded_rows = static_cast<int>(attention_padded_rows(args.shape));
    launch(args, [&](auto C) {
        finish_through_norm_kernel<C><<<num_parts, kThreads, 0, stream>>>(args, padded_rows, norm, dx, parts);
    });
    sum_parts(parts, num_parts, args.shape.head_dim, weight_grad, stream);
}

}  // namespace minitrain
