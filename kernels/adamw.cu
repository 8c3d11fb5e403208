// AdamW over many tensors. Bound: memory, per element 12 bytes read and 12 written of param, mean and square (8 and 8
// where these are bf16), 2 or 4 read of the gradient, 2 written of the rounded weight; where that is half of param, 2
// less are written.

#include "adamw.h"

#include <cmath>

#include "common.cuh"
#include "tensor_list.cuh"
#include "vectors.cuh"

namespace minitrain {
namespace {

constexpr int kThreads = 256, kVector = 4;  // elements of a thread
constexpr int kChunk = kThreads * kVector;
using List = TensorList<AdamWTensor>;

struct Numbers {
    float lr, eps, decay, beta1, beta2, log_beta1, log_beta2;
    const float *grad_scale, *broken;
};
static_assert(sizeof(List) + sizeof(Numbers) <= kMaxArguments);

// 64 random bits: SplitMix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195).
__device__ uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

// Up or down to bf16, the nearer the likelier. random: 16 bits.
__device__ __nv_bfloat16 round_randomly(float x, unsigned random) {
    if (!isfinite(x)) return __float2bfloat16_rn(x);
    return __ushort_as_bfloat16(static_cast<unsigned short>((__float_as_uint(x) + random) >> 16));
}

struct Rates {  // of a tensor in this step
    float grad_scale, step_size, inverse_root;
};

__device__ void update(const Numbers& numbers, const Rates& rates, float grad, float& param, float& mean,
                       float& square) {
    grad *= rates.grad_scale;
    mean = fmaf(1.0f - numbers.beta1, grad - mean, mean);
    square = fmaf(numbers.beta2, square, (1.0f - numbers.beta2) * grad * grad);
    const float root = fmaf(sqrtf(square), rates.inverse_root, numbers.eps);
    param = fmaf(-rates.step_size, mean / root, param * numbers.decay);
}

template <bool kIsBf16>
__device__ void store_moment(void* to, int64_t i, float x, uint64_t random) {
    if constexpr (kIsBf16) {
        static_cast<__nv_bfloat16*>(to)[i] = round_randomly(x, random & 0xFFFF);
    } else {
        static_cast<float*>(to)[i] = x;
    }
}

__device__ float4 load4(const void* from, int64_t i, bool is_bf16) {
    if (!is_bf16) return __ldcs(reinterpret_cast<const float4*>(static_cast<const float*>(from) + i));
    const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(from) + i));
    const float2 low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits.x));
    const float2 high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits.y));
    return {low.x, low.y, high.x, high.y};
}

__device__ void store_rounded(void* rounded, int64_t i, float4 x) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y), high = __floats2bfloat162_rn(x.z, x.w);
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(rounded) + i) = {reinterpret_cast<const unsigned&>(low),
                                                                           reinterpret_cast<const unsigned&>(high)};
}

// A param of two halves. The upper one is rounded: what is above its value is the lower one with its sign.
__device__ float join(unsigned upper, unsigned lower) {
    return __uint_as_float((upper << 16) + static_cast<int>(static_cast<short>(lower)));
}
__device__ unsigned upper_half(float x) { return (__float_as_uint(x) + 0x8000) >> 16; }
__device__ unsigned lower_half(float x) { return __float_as_uint(x) & 0xFFFF; }

__device__ float4 load_params(const AdamWTensor& t, int64_t i) {
    if (!t.is_split) return load4(t.param, i, false);
    const uint2 lower = __ldcs(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(t.param) + i));
    const uint2 upper = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(t.rounded) + i);
    return {join(upper.x & 0xFFFF, lower.x), join(upper.x >> 16, lower.x >> 16), join(upper.y & 0xFFFF, lower.y),
            join(upper.y >> 16, lower.y >> 16)};
}

__device__ void store_params(const AdamWTensor& t, int64_t i, float4 x) {
    if (!t.is_split) {
        __stcs(reinterpret_cast<float4*>(static_cast<float*>(t.param) + i), x);
        if (t.rounded) store_rounded(t.rounded, i, x);
        return;
    }
    const auto pack = [x](unsigned half(float)) {
        return uint2{half(x.x) | half(x.y) << 16, half(x.z) | half(x.w) << 16};
    };
    __stcs(reinterpret_cast<uint2*>(static_cast<uint16_t*>(t.param) + i), pack(lower_half));
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(t.rounded) + i) = pack(upper_half);
}

__device__ float load_param(const AdamWTensor& t, int64_t i) {
    if (!t.is_split) return static_cast<const float*>(t.param)[i];
    return join(static_cast<const uint16_t*>(t.rounded)[i], static_cast<const uint16_t*>(t.param)[i]);
}

__device__ void store_param(const AdamWTensor& t, int64_t i, float x) {
    if (t.is_split) {
        static_cast<uint16_t*>(t.param)[i] = lower_half(x);
        static_cast<uint16_t*>(t.rounded)[i] = upper_half(x);
        return;
    }
    static_cast<float*>(t.param)[i] = x;
    if (t.rounded) static_cast<__nv_bfloat16*>(t.rounded)[i] = __float2bfloat16_rn(x);
}

// random: 64 bits, of which bf16 takes all.
template <bool kIsBf16>
__device__ void store_moments(void* to, int64_t i, float4 x, uint64_t random) {
    if constexpr (kIsBf16) {
        const auto bits = [random](float x, int k) {
            return static_cast<unsigned>(__bfloat16_as_ushort(round_randomly(x, random >> 16 * k & 0xFFFF)));
        };
        const uint2 packed = {bits(x.x, 0) | bits(x.y, 1) << 16, bits(x.z, 2) | bits(x.w, 3) << 16};
        __stcs(reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(to) + i), packed);
    } else {
        __stcs(reinterpret_cast<float4*>(static_cast<float*>(to) + i), x);
    }
}

template <bool kIsBf16>  // the moments
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ List list, const __grid_constant__ Numbers numbers) {
    if (*numbers.broken != 0.0f) return;
    int cta;
    const AdamWTensor& t = list.find(blockIdx.x, cta);
    const float step = *t.step;
    // 1 - beta^step, exact to fp32 also where beta^step is near 1.
    const float correction1 = -expm1f(step * numbers.log_beta1), correction2 = -expm1f(step * numbers.log_beta2);
    const Rates rates = {1.0f / *numbers.grad_scale, numbers.lr / correction1, rsqrtf(correction2)};
    // Of random bits: another in each step and tensor.
    const uint64_t seed = mix((uint64_t(step) << 32) + list.first + (&t - list.tensors)) << 1;
    int64_t i = int64_t(cta) * kChunk + threadIdx.x * kVector;
    if (i + kVector <= t.numel) {
        const float4 grad = load4(t.grad, i, t.grad_is_bf16);
        float4 param = load_params(t, i), mean = load4(t.mean, i, kIsBf16), square = load4(t.square, i, kIsBf16);
        update(numbers, rates, grad.x, param.x, mean.x, square.x);
        update(numbers, rates, grad.y, param.y, mean.y, square.y);
        update(numbers, rates, grad.z, param.z, mean.z, square.z);
        update(numbers, rates, grad.w, param.w, mean.w, square.w);
        store_params(t, i, param);
        store_moments<kIsBf16>(t.mean, i, mean, mix(2 * i + seed));
        store_moments<kIsBf16>(t.square, i, square, mix(2 * i + 1 + seed));
        return;
    }
    for (; i < t.numel; ++i) {  // the tensor's last elements, fewer than a vector
        float param = load_param(t, i), mean = load(t.mean, i, kIsBf16), square = load(t.square, i, kIsBf16);
        update(numbers, rates, load(t.grad, i, t.grad_is_bf16), param, mean, square);
        store_param(t, i, param);
        store_moment<kIsBf16>(t.mean, i, mean, mix(2 * i + seed));
        store_moment<kIsBf16>(t.square, i, square, mix(2 * i + 1 + seed));
    }
}

}  // namespace

void adamw(const std::vector<AdamWTensor>& tensors, const AdamWSettings& settings, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    const float decay = 1.0f - settings.lr * settings.weight_decay;
    const Numbers numbers = {settings.lr,
                             settings.eps,
                             decay,
                             float(settings.beta1),
                             float(settings.beta2),
                             float(std::log(settings.beta1)),
                             float(std::log(settings.beta2)),
                             settings.grad_scale,
                             settings.broken};
    for_each_list(tensors, kChunk, [&](const List& list, unsigned ctas) {
        (settings.moments_are_bf16 ? adamw_kernel<true> : adamw_kernel<false>)<<<ctas, kThreads, 0, stream>>>(list,
                                                                                                              numbers);
        check(cudaGetLastError(), "adamw", {{"tensors", list.count}, {"ctas", ctas}});
    });
}

}  // namespace minitrain
