// RMSNorm and rotary positions of each head in one pass, and their gradient in another. Bound: memory, 4 bytes a
// channel forward, 6 backward, which makes 1 / rms again from x instead of keeping it. All arithmetic in fp32.
//
// A warp has a token, C / 16 of its lanes a head, and a lane 8 channels of the first half and their 8 partners of the
// second: 16 bytes at each access, and no exchange for the rotation.

#include <stdexcept>
#include <string>

#include "common.cuh"
#include "norm_rotate.h"
#include "sum_parts.cuh"
#include "vectors.cuh"

namespace minitrain {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Pairs {
    float a[kEach], b[kEach];  // a lane's channels of each half, i and i + C / 2
};

template <int C>
__device__ Pairs load(const bf16* head, int lane) {
    Pairs x;
    load8(x.a, head + kEach * lane);
    load8(x.b, head + C / 2 + kEach * lane);
    return x;
}

template <int C>
__device__ void store(bf16* head, int lane, const Pairs& x) {
    store8(head + kEach * lane, x.a);
    store8(head + C / 2 + kEach * lane, x.b);
}

// Over the lanes of a head.
template <int C>
__device__ float sum_over_head(float x) {
#pragma unroll
    for (int step = C / 32; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

template <int C>
__device__ float inverse_rms(const Pairs& x, float eps) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) squares = fmaf(x.a[i], x.a[i], fmaf(x.b[i], x.b[i], squares));
    return rsqrtf(sum_over_head<C>(squares) / C + eps);
}

struct Angles {
    float cos[kEach], sin[kEach];
};

template <int C>
__device__ Angles load_angles(const NormRotate& args, int64_t token, int lane) {
    Angles angles;
    const float *cos = args.cos + token * (C / 2) + kEach * lane, *sin = args.sin + token * (C / 2) + kEach * lane;
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
        *reinterpret_cast<float4*>(angles.cos + i) = *reinterpret_cast<const float4*>(cos + i);
        *reinterpret_cast<float4*>(angles.sin + i) = *reinterpret_cast<const float4*>(sin + i);
    }
    return angles;
}

__device__ const bf16* head_of(const Packed& x, int64_t token, int head) {
    return static_cast<const bf16*>(x.data) + token * x.row_stride + head * x.head_stride;
}

template <int C>
__global__ void __launch_bounds__(kThreads) forward_kernel(const NormRotate args, bf16* out) {
    constexpr int kLanes = C / 16, kHeads = 32 / kLanes;  // lanes of a head, heads of a warp at a time
    const int64_t token = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    const int lane = threadIdx.x % kLanes;
    if (token >= args.tokens) return;
    const Pairs weight = load<C>(static_cast<const bf16*>(args.weight), lane);
    const Angles angles = load_angles<C>(args, token, lane);
#pragma unroll 2
    for (int first = 0; first < args.heads; first += kHeads) {
        const int head = first + threadIdx.x % 32 / kLanes, valid_head = min(head, args.heads - 1);
        Pairs x = load<C>(head_of(args.x, token, valid_head), lane);
        const float scale = inverse_rms<C>(x, args.eps);  // by all lanes
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const float a = x.a[i] * scale * weight.a[i], b = x.b[i] * scale * weight.b[i];
            x.a[i] = a * angles.cos[i] - b * angles.sin[i];
            x.b[i] = b * angles.cos[i] + a * angles.sin[i];
        }
        if (head < args.heads) store<C>(out + (token * args.heads + head) * C, lane, x);
    }
}

// With n = x / rms, y = weight n and dn = weight dy: dx = (dn - n mean(dn n)) / rms, d weight = sum of dy n.
template <int C>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const NormRotate args, const Packed d_out, bf16* dx, float* parts) {
    constexpr int kLanes = C / 16, kHeads = 32 / kLanes;
    const int lane = threadIdx.x % kLanes;
    const Pairs weight = load<C>(static_cast<const bf16*>(args.weight), lane);
    Pairs grad = {};  // of the weight
    for (int64_t token = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; token < args.tokens;
         token += int64_t(gridDim.x) * kWarps) {
        const Angles angles = load_angles<C>(args, token, lane);
#pragma unroll 2
        for (int first = 0; first < args.heads; first += kHeads) {
            const int head = first + threadIdx.x % 32 / kLanes, valid_head = min(head, args.heads - 1);
            const bool is_valid = head < args.heads;
            Pairs x = load<C>(head_of(args.x, token, valid_head), lane);
            Pairs d = load<C>(head_of(d_out, token, valid_head), lane);
            const float scale = inverse_rms<C>(x, args.eps);
            float product = 0.0f;
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const float a = d.a[i] * angles.cos[i] + d.b[i] * angles.sin[i];
                const float b = d.b[i] * angles.cos[i] - d.a[i] * angles.sin[i];
                x.a[i] *= scale, x.b[i] *= scale;
                if (is_valid) grad.a[i] += a * x.a[i], grad.b[i] += b * x.b[i];
                d.a[i] = a * weight.a[i], d.b[i] = b * weight.b[i];
                product = fmaf(d.a[i], x.a[i], fmaf(d.b[i], x.b[i], product));
            }
            const float mean = sum_over_head<C>(product) / C;
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                d.a[i] = (d.a[i] - x.a[i] * mean) * scale;
                d.b[i] = (d.b[i] - x.b[i] * mean) * scale;
            }
            if (is_valid) store<C>(dx + (token * args.heads + head) * C, lane, d);
        }
    }
    // The weight's gradient: over the heads of a warp, then over the warps.
    __shared__ float of_warp[kWarps][C];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int step = kLanes; step < 32; step *= 2) {
            grad.a[i] += __shfl_xor_sync(~0u, grad.a[i], step);
            grad.b[i] += __shfl_xor_sync(~0u, grad.b[i], step);
        }
        if (threadIdx.x % 32 < kLanes) {
            of_warp[threadIdx.x / 32][kEach * lane + i] = grad.a[i];
            of_warp[threadIdx.x / 32][C / 2 + kEach * lane + i] = grad.b[i];
        }
    }
    __syncthreads();
    if (threadIdx.x < C) {
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w) sum += of_warp[w][threadIdx.x];
        parts[blockIdx.x * C + threadIdx.x] = sum;
    }
}

// call(std::integral_constant<int, C>) for the C that args has.
template <typename Call>
void for_head_dim(const NormRotate& args, const char* what, Call call) {
    switch (args.head_dim) {
        case 64:
            call(std::integral_constant<int, 64>{});
            break;
        case 128:
            call(std::integral_constant<int, 128>{});
            break;
        case 256:
            call(std::integral_constant<int, 256>{});
            break;
        default:
            throw std::invalid_argument("head_dim=" + std::to_string(args.head_dim) + " is not in 64, 128, 256");
    }
    check(cudaGetLastError(), what, {{"tokens", args.tokens}, {"heads", args.heads}, {"head_dim", args.head_dim}});
}

}  // namespace

void norm_rotate(const NormRotate& args, void* out, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    for_head_dim(args, "norm_rotate", [&](auto C) {
        forward_kernel<C><<<(args.tokens + kWarps - 1) / kWarps, kThreads, 0, stream>>>(args, static_cast<bf16*>(out));
    });
}

int norm_rotate_num_parts(int device) { return 2 * num_processors(device); }

void norm_rotate_backward(const NormRotate& args, const Packed& d_out, void* dx, void* weight_grad, float* parts,
                          int num_parts, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    for_head_dim(args, "norm_rotate_backward", [&](auto C) {
        backward_kernel<C><<<num_parts, kThreads, 0, stream>>>(args, d_out, static_cast<bf16*>(dx), parts);
        sum_parts(parts, num_parts, C, weight_grad, stream);
    });
}

}  // namespace minitrain
