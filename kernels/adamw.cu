// AdamW over many tensors. Bound: memory, per element 12 bytes read and 12 written of param, mean and square, 2 or 4
// read of the gradient, 2 written of the rounded weight.
//
//   tensors   |  0        | 1 |  2                  |        described in the kernel's own arguments: no copy to the
//   CTAs       0  1  2  3   4   5  6  7  8  9  10  11        device, and as many launches as these need
//
// A CTA has kChunk elements of one tensor and finds which by bisecting the tensors' first CTAs.

#include "adamw.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>

#include "common.cuh"

namespace minitrain {
namespace {

constexpr int kThreads = 256, kEach = 4, kLoads = 4;  // elements of a vector; vectors of a thread, loaded together
constexpr int kChunk = kThreads * kEach * kLoads;
constexpr int kMaxTensors = 440;  // 72 bytes each, below the 32,764 bytes that a launch's arguments may take

struct Work {
    AdamWTensor tensors[kMaxTensors];
    int first_cta[kMaxTensors];
    int count;
    float lr, eps, decay, beta1, beta2, log_beta1, log_beta2;
    const float *grad_scale, *broken;
};
static_assert(sizeof(Work) <= 32764);

struct Rates {  // of a tensor in this step
    float grad_scale, step_size, inverse_root;
};

__device__ void update(const Work& work, const Rates& rates, float grad, float& param, float& mean, float& square) {
    grad *= rates.grad_scale;
    mean = fmaf(1.0f - work.beta1, grad - mean, mean);
    square = fmaf(work.beta2, square, (1.0f - work.beta2) * grad * grad);
    const float root = fmaf(sqrtf(square), rates.inverse_root, work.eps);
    param = fmaf(-rates.step_size, mean / root, param * work.decay);
}

__device__ int tensor_of(const Work& work, int cta) {
    int low = 0, high = work.count;  // first_cta[low] <= cta < first_cta[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (work.first_cta[middle] <= cta ? low : high) = middle;
    }
    return low;
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

__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Work work) {
    if (*work.broken != 0.0f) return;
    const int index = tensor_of(work, blockIdx.x);
    const AdamWTensor& t = work.tensors[index];
    const float step = *t.step;
    // 1 - beta^step, exact to fp32 also where beta^step is near 1.
    const float correction1 = -expm1f(step * work.log_beta1), correction2 = -expm1f(step * work.log_beta2);
    const Rates rates = {1.0f / *work.grad_scale, work.lr / correction1, rsqrtf(correction2)};
    const int64_t start = int64_t(blockIdx.x - work.first_cta[index]) * kChunk;
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
        update(work, rates, grad[k].x, param[k].x, mean[k].x, square[k].x);
        update(work, rates, grad[k].y, param[k].y, mean[k].y, square[k].y);
        update(work, rates, grad[k].z, param[k].z, mean[k].z, square[k].z);
        update(work, rates, grad[k].w, param[k].w, mean[k].w, square[k].w);
        __stcs(reinterpret_cast<float4*>(t.param + i), param[k]);
        __stcs(reinterpret_cast<float4*>(t.mean + i), mean[k]);
        __stcs(reinterpret_cast<float4*>(t.square + i), square[k]);
        if (t.rounded) store_rounded(t.rounded, i, param[k]);
    }
    const int64_t i = whole + threadIdx.x;
    if (whole < start + kChunk && i < t.numel) {  // in the last CTA of a tensor, or one past it where vectors fill them
        update(work, rates, load_grad(t, i), t.param[i], t.mean[i], t.square[i]);
        if (t.rounded) static_cast<__nv_bfloat16*>(t.rounded)[i] = __float2bfloat16_rn(t.param[i]);
    }
}

}  // namespace

void adamw(const std::vector<AdamWTensor>& tensors, const AdamWSettings& settings, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    for (size_t first = 0; first < tensors.size(); first += kMaxTensors) {
        Work work = {};
        work.count = static_cast<int>(std::min<size_t>(kMaxTensors, tensors.size() - first));
        int64_t ctas = 0;
        for (int i = 0; i < work.count; ++i) {
            work.tensors[i] = tensors[first + i];
            work.first_cta[i] = static_cast<int>(ctas);
            ctas += (work.tensors[i].numel + kChunk - 1) / kChunk;
        }
        work.lr = settings.lr, work.eps = settings.eps, work.decay = 1.0f - settings.lr * settings.weight_decay;
        work.beta1 = float(settings.beta1), work.log_beta1 = float(std::log(settings.beta1));
        work.beta2 = float(settings.beta2), work.log_beta2 = float(std::log(settings.beta2));
        work.grad_scale = settings.grad_scale, work.broken = settings.broken;
        if (ctas == 0) continue;
        adamw_kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(work);
        check(cudaGetLastError(), "adamw", {{"tensors", work.count}, {"ctas", ctas}});
    }
}

}  // namespace minitrain
