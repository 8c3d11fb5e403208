// Sums of squares, one for each CTA. Bound: memory, one read.

#include "squares.h"

#include "common.cuh"
#include "tensor_list.cuh"
#include "vectors.cuh"

namespace minitrain {
namespace {

constexpr int kThreads = 256, kLoads = 8;
constexpr int kChunk = kThreads * kEach * kLoads;  // elements of a CTA
using List = TensorList<Gradient>;

__device__ void load_gradient(float (&to)[kEach], const Gradient& t, int64_t i) {
    if (t.is_bf16) return load8(to, static_cast<const __nv_bfloat16*>(t.data) + i);
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(t.data) + i);
    *reinterpret_cast<float4*>(to) = from[0];
    *reinterpret_cast<float4*>(to + 4) = from[1];
}

__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ List list, float* parts) {
    int cta;
    const Gradient& t = list.find(blockIdx.x, cta);
    const int64_t start = int64_t(cta) * kChunk, whole = t.numel / kEach * kEach;  // the latter in vectors
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int64_t i = start + (k * kThreads + threadIdx.x) * kEach;
        if (i >= whole) break;
        float x[kEach];
        load_gradient(x, t, i);
#pragma unroll
        for (int j = 0; j < kEach; ++j) sum = fmaf(x[j], x[j], sum);
    }
    const int64_t i = whole + threadIdx.x;
    if (whole < start + kChunk && i < t.numel) {  // the last CTA of a tensor
        const float x = load(t.data, i, t.is_bf16);
        sum = fmaf(x, x, sum);
    }
    __shared__ float of_warp[kThreads / 32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < kThreads / 32; ++w) sum += of_warp[w];
    parts[blockIdx.x] = sum;
}

}  // namespace

int64_t num_square_parts(const std::vector<Gradient>& tensors) {
    int64_t parts = 0;
    for (const Gradient& t : tensors) parts += num_ctas(t.numel, kChunk);
    return parts;
}

void squares(const std::vector<Gradient>& tensors, float* parts, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    for_each_list(tensors, kChunk, [&](const List& list, unsigned ctas) {
        squares_kernel<<<ctas, kThreads, 0, stream>>>(list, parts);
        check(cudaGetLastError(), "squares", {{"tensors", list.count}, {"ctas", ctas}});
        parts += ctas;
    });
}

}  // namespace minitrain
