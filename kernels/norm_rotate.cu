// RMSNorm and rotary positions of each head in one pass, and their gradient in another. Bound: memory, 4 bytes a
// channel forward, 6 backward, which makes 1 / rms again from x instead of keeping it. All arithmetic in fp32.
//
// A warp has a token, C / 16 of its lanes a head, and a lane 8 channels of the first half and their 8 partners of the
// second: 16 bytes at each access, and no exchange for the rotation.

#include "common.cuh"
#include "norm_rotate.cuh"
#include "sum_parts.cuh"

namespace minitrain {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Over the lanes of a head.
template <int C>
__device__ float sum_over_head(float x) {
#pragma unroll
    for (int step = C / 32; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

template <int C>
__device__ float inverse_rms(const Pairs& x, float eps) {
    return rsqrtf(sum_over_head<C>(sum_of_squares(x)) / C + eps);
}

template <int C>
__global__ void __launch_bounds__(kThreads) forward_kernel(const NormRotate args, bf16* out) {
    constexpr int kLanes = C / 16, kHeads = 32 / kLanes;  // lanes of a head, heads of a warp at a time
    const int64_t token = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    const int channel = kEach * (threadIdx.x % kLanes);
    if (token >= args.tokens) return;
    const Pairs weight = load_pairs(static_cast<const bf16*>(args.weight) + channel, C / 2);
    const int64_t of_token = token * (C / 2) + channel;
    const Angles angles = load_angles(args.cos + of_token, args.sin + of_token);
#pragma unroll 2
    for (int first = 0; first < args.heads; first += kHeads) {
        const int head = first + threadIdx.x % 32 / kLanes, valid_head = min(head, args.heads - 1);
        Pairs x = load_pairs(head_of(args.x, token, valid_head) + channel, C / 2);
        const float scale = inverse_rms<C>(x, args.eps);  // by all lanes
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const float a = x.a[i] * scale * weight.a[i], b = x.b[i] * scale * weight.b[i];
            x.a[i] = a * angles.cos[i] - b * angles.sin[i];
            x.b[i] = b * angles.cos[i] + a * angles.sin[i];
        }
        if (head < args.heads) store_pairs(out + (token * args.heads + head) * C + channel, C / 2, x);
    }
}

template <int C>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const NormRotate args, const Packed d_out, const Packed dx, float* parts) {
    constexpr int kLanes = C / 16, kHeads = 32 / kLanes;
    const int channel = kEach * (threadIdx.x % kLanes);
    const Pairs weight = load_pairs(static_cast<const bf16*>(args.weight) + channel, C / 2);
    Pairs grad[1] = {};  // of the weight
    for (int64_t token = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; token < args.tokens;
         token += int64_t(gridDim.x) * kWarps) {
        const int64_t of_token = token * (C / 2) + channel;
        const Angles angles = load_angles(args.cos + of_token, args.sin + of_token);
#pragma unroll 2
        for (int first = 0; first < args.heads; first += kHeads) {
            const int head = first + threadIdx.x % 32 / kLanes, valid_head = min(head, args.heads - 1);
            Pairs x = load_pairs(head_of(args.x, token, valid_head) + channel, C / 2);
            Pairs d = load_pairs(head_of(d_out, token, valid_head) + channel, C / 2);
            if (head >= args.heads) d = {};
            const float scale = inverse_rms<C>(x, args.eps);
            const float mean = sum_over_head<C>(turn_back(d, x, scale, weight, angles, grad[0])) / C;
            norm_gradient(d, x, mean, scale);
            if (head < args.heads) store_pairs(head_of(dx, token, head) + channel, C / 2, d);
        }
    }
    store_part<C, kWarps>(grad, parts);
}

template <typename Launch>
void launch(const NormRotate& args, const char* what, Launch launch) {
    for_head_dim<64, 128, 256>(args.head_dim, launch);
    check(cudaGetLastError(), what, {{"tokens", args.tokens}, {"heads", args.heads}, {"head_dim", args.head_dim}});
}

}  // namespace

void norm_rotate(const NormRotate& args, void* out, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    launch(args, "norm_rotate", [&](auto C) {
        forward_kernel<C><<<(args.tokens + kWarps - 1) / kWarps, kThreads, 0, stream>>>(args, static_cast<bf16*>(out));
    });
}

int norm_rotate_num_parts(int device) { return 2 * num_processors(device); }

void norm_rotate_backward(const NormRotate& args, const Packed& d_out, const Packed& dx, void* weight_grad,
                          float* parts, int num_parts, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    launch(args, "norm_rotate_backward",
           [&](auto C) { backward_kernel<C><<<num_parts, kThreads, 0, stream>>>(args, d_out, dx, parts); });
    sum_parts(parts, num_parts, args.head_dim, weight_grad, stream);
}

}  // namespace minitrain
