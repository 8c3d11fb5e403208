// The last step of a weight's gradient: what CTAs have summed up, as one. In a fixed order.
#pragma once

#include <cuda_bf16.h>

#include "common.cuh"

namespace minitrain {

// out (channels,): sums over parts (num_parts, channels). A CTA has 32 channels, a warp of it every 32nd part.
static __global__ void __launch_bounds__(1024)
    sum_parts_kernel(const float* parts, int num_parts, int channels, __nv_bfloat16* out) {
    __shared__ float of_warp[32][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channel = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (channel < channels) {
        for (int part = warp; part < num_parts; part += 32) sum += parts[part * channels + channel];
    }
    of_warp[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || channel >= channels) return;
    for (int w = 1; w < 32; ++w) sum += of_warp[w][lane];
    out[channel] = __float2bfloat16_rn(sum);
}

inline void sum_parts(const float* parts, int num_parts, int channels, void* out, cudaStream_t stream) {
    const int ctas = (channels + 31) / 32;
    sum_parts_kernel<<<ctas, 1024, 0, stream>>>(parts, num_parts, channels, static_cast<__nv_bfloat16*>(out));
    check(cudaGetLastError(), "sum_parts", {{"parts", num_parts}, {"channels", channels}});
}

}  // namespace minitrain
