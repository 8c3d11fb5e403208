// Copies of tokens to the order of experts and back. Bound: memory; every row of the R is read or written once, those
// of the T come from L2 after their first use.

#include "routed_rows.h"

#include <algorithm>

#include "common.cuh"
#include "vectors.cuh"

namespace minitrain {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kWarps = 8;

// A warp has a copy. The warps of a CTA have neighbours, mostly of one token.
__global__ void __launch_bounds__(32 * kWarps)
    spread_kernel(const RoutedRows args, const bf16* x, bf16* out, const bf16* y, float* dots) {
    const int64_t copy = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (copy >= int64_t(args.tokens) * args.copies) return;
    const int64_t row = args.place[copy] * args.channels;
    const bf16* from = x + copy / args.copies * args.channels;
    const float weight = args.weights ? args.weights[copy] : 1.0f;
    float dot = 0.0f;
#pragma unroll 4
    for (int c = kEach * lane; c < args.channels; c += 32 * kEach) {
        float values[kEach], others[kEach];
        load8(values, from + c);
        if (y) load8(others, y + row + c);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            if (y) dot = fmaf(values[i], others[i], dot);
            values[i] *= weight;
        }
        store8(out + row + c, values);
    }
    if (!y) return;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
    if (lane == 0) dots[copy] = dot;
}

// A CTA has a token, a thread every blockDim-th vector of it.
__global__ void __launch_bounds__(256) sum_kernel(const RoutedRows args, const bf16* x, bf16* out) {
    const int64_t token = blockIdx.x;
    const int64_t* place = args.place + token * args.copies;
    const float* weights = args.weights ? args.weights + token * args.copies : nullptr;
    for (int c = kEach * threadIdx.x; c < args.channels; c += kEach * blockDim.x) {
        float sums[kEach] = {};
#pragma unroll 8
        for (int a = 0; a < args.copies; ++a) {
            float values[kEach];
            load8(values, x + place[a] * args.channels + c);
            const float weight = weights ? weights[a] : 1.0f;
#pragma unroll
            for (int i = 0; i < kEach; ++i) sums[i] = fmaf(weight, values[i], sums[i]);
        }
        store8(out + token * args.channels + c, sums);
    }
}

void check_launch(const RoutedRows& args, const char* what) {
    check(cudaGetLastError(), what, {{"tokens", args.tokens}, {"copies", args.copies}, {"channels", args.channels}});
}

}  // namespace

void spread_rows(const RoutedRows& args, const void* x, void* out, const void* y, float* dots, int device,
                 cudaStream_t stream) {
    const OnDevice guard(device);
    const int64_t rows = int64_t(args.tokens) * args.copies;
    if (rows == 0) return;
    spread_kernel<<<static_cast<unsigned>((rows + kWarps - 1) / kWarps), 32 * kWarps, 0, stream>>>(
        args, static_cast<const bf16*>(x), static_cast<bf16*>(out), static_cast<const bf16*>(y), dots);
    check_launch(args, "spread_rows");
}

void sum_rows(const RoutedRows& args, const void* x, void* out, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    if (args.tokens == 0) return;
    const int threads = std::min(256, (args.channels / kEach + 31) / 32 * 32);
    sum_kernel<<<args.tokens, threads, 0, stream>>>(args, static_cast<const bf16*>(x), static_cast<bf16*>(out));
    check_launch(args, "sum_rows");
}

}  // namespace minitrain
