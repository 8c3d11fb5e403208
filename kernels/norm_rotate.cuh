// Arithmetic of RMSNorm and rotary positions on what a thread has of a head: 8 channels of its first half and their
// partners of the second, which turn together. All in fp32.
#pragma once

#include "norm_rotate.h"
#include "vectors.cuh"

namespace minitrain {

struct Pairs {
    float a[kEach], b[kEach];  // channels i and i + C / 2
};
struct Angles {
    float cos[kEach], sin[kEach];
};

__device__ inline __nv_bfloat16* head_of(const Packed& x, int64_t token, int head) {
    return static_cast<__nv_bfloat16*>(x.data) + token * x.row_stride + head * x.head_stride;
}

// half: C / 2
__device__ inline Pairs load_pairs(const __nv_bfloat16* from, int half) {
    Pairs x;
    load8(x.a, from);
    load8(x.b, from + half);
    return x;
}

__device__ inline void store_pairs(__nv_bfloat16* to, int half, const Pairs& x) {
    store8(to, x.a);
    store8(to + half, x.b);
}

// From the first of these channels on.
__device__ inline Angles load_angles(const float* cos, const float* sin) {
    Angles angles;
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
        *reinterpret_cast<float4*>(angles.cos + i) = *reinterpret_cast<const float4*>(cos + i);
        *reinterpret_cast<float4*>(angles.sin + i) = *reinterpret_cast<const float4*>(sin + i);
    }
    return angles;
}

__device__ inline float sum_of_squares(const Pairs& x) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum = fmaf(x.a[i], x.a[i], fmaf(x.b[i], x.b[i], sum));
    return sum;
}

// Of y = weight n, n = x / rms, turned: from d, the gradient of what was turned, to that of n, dn = weight dy. x
// becomes n; scale: 1 / rms. grad: of the weight, plus dy n. -> this thread's part of the sum of dn n over the head.
__device__ inline float turn_back(Pairs& d, Pairs& x, float scale, const Pairs& weight, const Angles& angles,
                                  Pairs& grad) {
    float product = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const float a = d.a[i] * angles.cos[i] + d.b[i] * angles.sin[i];
        const float b = d.b[i] * angles.cos[i] - d.a[i] * angles.sin[i];
        x.a[i] *= scale, x.b[i] *= scale;
        grad.a[i] += a * x.a[i], grad.b[i] += b * x.b[i];
        d.a[i] = a * weight.a[i], d.b[i] = b * weight.b[i];
        product = fmaf(d.a[i], x.a[i], fmaf(d.b[i], x.b[i], product));
    }
    return product;
}

// The weight's gradient of a CTA, from what its threads have of kPairs pairs each: over the heads of a warp, then over
// the warps, to the CTA's row of parts (CTAs, C). Thread t of a head has channels kEach * (lanes * pair + t) and on.
template <int C, int kWarps, int kPairs>
__device__ void store_part(const Pairs (&grad)[kPairs], float* parts) {
    constexpr int kLanes = C / 2 / kEach / kPairs;  // of a head
    __shared__ float of_warp[kWarps][C];
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            float a = grad[pair].a[i], b = grad[pair].b[i];
#pragma unroll
            for (int step = kLanes; step < 32; step *= 2) {
                a += __shfl_xor_sync(~0u, a, step);
                b += __shfl_xor_sync(~0u, b, step);
            }
            if (threadIdx.x % 32 < kLanes) {
                const int channel = kEach * (kLanes * pair + lane) + i;
                of_warp[threadIdx.x / 32][channel] = a;
                of_warp[threadIdx.x / 32][C / 2 + channel] = b;
            }
        }
    }
    __syncthreads();
    if (threadIdx.x < C) {
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w) sum += of_warp[w][threadIdx.x];
        parts[blockIdx.x * C + threadIdx.x] = sum;
    }
}

// dx = (dn - n mean(dn n)) / rms, in place of dn.
__device__ inline void norm_gradient(Pairs& d, const Pairs& n, float mean, float scale) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        d.a[i] = (d.a[i] - n.a[i] * mean) * scale;
        d.b[i] = (d.b[i] - n.b[i] * mean) * scale;
    }
}

}  // namespace minitrain
