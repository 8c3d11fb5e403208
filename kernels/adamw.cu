// AdamW over many tensors. Bound: memory, per element 12 bytes read and 12 written of param, mean and square, 2 or 4
// read of the gradient, 2 written of the rounded weight.

#include "adamw.h"

#include <cuda_bf16.h>

#include <cmath>

#include "common.cuh"
#include "tensor_list.cuh"

namespace minitrain {
namespace {

constexpr int kThreads = 256, kEach = 4, kLoads = 4;  // elements of a vector; vectors of a thread, loaded together
constexpr int kChunk = kThreads * kEach * kLoads;
using List = TensorList<AdamWTensor>;

struct Numbers {
    float lr, eps, decay, beta1, beta2, log_beta1, log_beta2;
    const float *grad_scale, *broken;
};
static_assert(sizeof(List) + sizeof(Numbers) <= kMaxArguments);

struct Rates {  // of a tensor in this step
    float grad_scale, step_size, inverse_root;
};

__device__ void update(const Numbers& numbers, const Rates& rates, float grad, float& param, float& mean, float& square) {
    grad *= rates.grad_scale;
    mean = fmaf(1.0f - numbers.beta1, grad - mean, mean);
    square = fmaf(numbers.beta2, square, (1.0f - numbers.beta2) * grad * grad);
    const float root = fmaf(sqrtf(square), rates.inverse_root, numbers.eps);
    param = fmaf(-rates.step_size, mean / root, param * numbers.decay);
}

__device__ float load_grad(const AdamWTensor& t, int64_t i) {
    return t.grad_is_bf16 ? float(static_cast<const __nv_bfloat16*>(t.grad)[i]) : static_cast<const float*>(t.grad)[i];
}

__device__ float4 load_grads(const AdamWTensor& t, int64_t i) {
    if (!t.grad_is_bf16) return __ldcs(reinterpret_cast<const float4*>(static_cast<const float*>(t.grad) + i));
    const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(t.grad) + i));
    const float2 low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits.x));
    const float2 high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits.y));
    return {low.x, low.y, high.x, high.y};
}

__device__ void store_rounded(void* rounded, int64_t i, float4 x) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y), high = __floats2bfloat162_rn(x.z, x.w);
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(rounded) + i) = {reinterpret_cast<const unsigned&>(low),
                                                                           reinterpret_cast<const unsigned&>(high)};
}

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ List list, const __grid_constant__ Numbers numbers) {
    if (*numbers.broken != 0.0f) return;
    int cta;
    const AdamWTensor& t = list.find(blockIdx.x, cta);
    const float step = *t.step;
    // 1 - beta^step, exact to fp32 also where beta^step is near 1.
    const float correction1 = -expm1f(step * numbers.log_beta1), correction2 = -expm1f(step * numbers.log_beta2);
    const Rates rates = {1.0f / *numbers.grad_scale, numbers.lr / correction1, rsqrtf(correction2)};
    const int64_t start = int64_t(cta) * kChunk;
    const int64_t whole = t.numel / kEach * kEach;  // in vectors; under kEach elements are left

    float4 grad[kLoads], param[kLoads], mean[kLoads], square[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int64_t i = start + (k * kThreads + threadIdx.x) * kEach;
        if (i >= whole) continue;
        grad[k] = load_grads(t, i);
        param[k] = __ldcs(reinterpret_cast<const float4*>(t.param + i));
        mean[k] = __ldcs(reinterpret_cast<const float4*>(t.mean + i));
        square[k] = __ldcs(reinterpret_cast<const float4*>(t.square + i));
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int64_t i = start + (k * kThreads + threadIdx.x) * kEach;
        if (i >= whole) continue;
        update(numbers, rates, grad[k].x, param[k].x, mean[k].x, square[k].x);
        update(numbers, rates, grad[k].y, param[k].y, mean[k].y, square[k].y);
        update(numbers, rates, grad[k].z, param[k].z, mean[k].z, square[k].z);
        update(numbers, rates, grad[k].w, param[k].w, mean[k].w, square[k].w);
        __stcs(reinterpret_cast<float4*>(t.param + i), param[k]);
        __stcs(reinterpret_cast<float4*>(t.mean + i), mean[k]);
        __stcs(reinterpret_cast<float4*>(t.square + i), square[k]);
        if (t.rounded) store_rounded(t.rounded, i, param[k]);
    }
    const int64_t i = whole + threadIdx.x;
    if (whole < start + kChunk && i < t.numel) {  // in the last CTA of a tensor, or one past it where vectors fill them
        update(numbers, rates, load_grad(t, i), t.param[i], t.mean[i], t.square[i]);
        if (t.rounded) static_cast<__nv_bfloat16*>(t.rounded)[i] = __float2bfloat16_rn(t.param[i]);
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
        adamw_kernel<<<ctas, kThreads, 0, stream>>>(list, numbers);
        check(cudaGetLastError(), "adamw", {{"tensors", list.count}, {"ctas", ctas}});
    });
}

}  // namespace minitrain
