// Elements of tensors, as fp32: one of bf16 or fp32, or eight of bf16.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace minitrain {

constexpr int kEach = 8;  // elements of 16 bytes

__device__ inline float load(const void* from, int64_t i, bool is_bf16) {
    return is_bf16 ? float(static_cast<const __nv_bfloat16*>(from)[i]) : static_cast<const float*>(from)[i];
}

__device__ inline void unpack8(float (&to)[kEach], const uint4& bits) {
    const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&bits);
#pragma unroll
    for (int i = 0; i < kEach / 2; ++i) {
        const float2 pair = __bfloat1622float2(pairs[i]);
        to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    }
}

__device__ inline uint4 pack8(const float (&from)[kEach]) {
    uint4 bits;
    __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&bits);
#pragma unroll
    for (int i = 0; i < kEach / 2; ++i) pairs[i] = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    return bits;
}

__device__ inline void load8(float (&to)[kEach], const __nv_bfloat16* from) {
    unpack8(to, *reinterpret_cast<const uint4*>(from));
}

__device__ inline void store8(__nv_bfloat16* to, const float (&from)[kEach]) {
    *reinterpret_cast<uint4*>(to) = pack8(from);
}

}  // namespace minitrain
