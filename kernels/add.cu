// total = or += the sum of some terms. Bound: memory, 2 bytes an element of each term and 4 or 8 of the total.

#include "add.h"

#include "common.cuh"
#include "vectors.cuh"

namespace minitrain {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kThreads = 256;

// A thread has a vector of elements, the last one may have the rest.
template <bool kIsFirst>
__global__ void __launch_bounds__(kThreads)
    add_kernel(float* total, const bf16* terms, const int num_terms, const int64_t numel) {
    const int64_t start = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kEach;
    if (start + kEach > numel) {
        for (int64_t i = start; i < numel; ++i) {
            float sum = kIsFirst ? 0.0f : total[i];
            for (int term = 0; term < num_terms; ++term) sum += float(terms[term * numel + i]);
            total[i] = sum;
        }
        return;
    }
    float4* to = reinterpret_cast<float4*>(total + start);
    float4 low = kIsFirst ? float4{} : to[0], high = kIsFirst ? float4{} : to[1];
#pragma unroll 4
    for (int term = 0; term < num_terms; ++term) {
        float x[kEach];
        load8(x, terms + term * numel + start);
        low = {low.x + x[0], low.y + x[1], low.z + x[2], low.w + x[3]};
        high = {high.x + x[4], high.y + x[5], high.z + x[6], high.w + x[7]};
    }
    to[0] = low;
    to[1] = high;
}

}  // namespace

void add(float* total, const void* terms, int num_terms, int64_t numel, bool is_first, int device,
         cudaStream_t stream) {
    const OnDevice guard(device);
    const int64_t chunk = kThreads * kEach, ctas = (numel + chunk - 1) / chunk;
    if (ctas == 0) return;
    (is_first ? add_kernel<true> : add_kernel<false>)<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(
        total, static_cast<const bf16*>(terms), num_terms, numel);
    check(cudaGetLastError(), "add", {{"terms", num_terms}, {"numel", numel}});
}

}  // namespace minitrain
