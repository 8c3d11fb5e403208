// total = grad, or total += grad. Bound: memory, 6 or 10 bytes an element.

#include "add.h"

#include "common.cuh"
#include "vectors.cuh"

namespace minitrain {
namespace {

constexpr int kThreads = 256, kLoads = 4;
constexpr int kChunk = kThreads * kEach * kLoads;  // elements of a CTA

template <bool kIsFirst>
__global__ void __launch_bounds__(kThreads) add_kernel(float* total, const __nv_bfloat16* grad, int64_t numel) {
    const int64_t start = int64_t(blockIdx.x) * kChunk, whole = numel / kEach * kEach;  // the latter in vectors
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int64_t i = start + (k * kThreads + threadIdx.x) * kEach;
        if (i >= whole) break;
        float x[kEach];
        load8(x, grad + i);
        float4* to = reinterpret_cast<float4*>(total + i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* y = x + 4 * half;
            const float4 before = kIsFirst ? float4{} : to[half];
            to[half] = {before.x + y[0], before.y + y[1], before.z + y[2], before.w + y[3]};
        }
    }
    const int64_t i = whole + threadIdx.x;
    if (whole < start + kChunk && i < numel) total[i] = (kIsFirst ? 0.0f : total[i]) + float(grad[i]);  // the last CTA
}

}  // namespace

void add(float* total, const void* grad, int64_t numel, bool is_first, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    const int64_t ctas = (numel + kChunk - 1) / kChunk;
    if (ctas == 0) return;
    (is_first ? add_kernel<true> : add_kernel<false>)<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(
        total, static_cast<const __nv_bfloat16*>(grad), numel);
    check(cudaGetLastError(), "add", {{"numel", numel}});
}

}  // namespace minitrain
