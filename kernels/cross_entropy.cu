// Softmax cross-entropy in place: one CTA per row, two passes over it.
//
//   logits row   | head |  16-byte vectors: thread t takes t, t + 1024, t + 2048, ...  | tail |
//   pass 1  -->  each thread: running max and sum of exponentials; then one merge over the CTA -> loss. Where the
//                product that made the logits (logits_sm90.cu) has these of every 192 of them, only the merge
//   pass 2  <--  exp(x - max) / sum, written over x; backwards, so that what pass 1 read last is still in L1 and L2
//
// Head and tail (under 8 elements each) are there because a row starts on a 16-byte border only if the vocabulary is a
// multiple of 8. Bound: memory, one read and one write of the logits; the second read is served by the caches.
// A row of 151,936 bf16 logits is 304 KB: 132 CTAs hold 40 MB, below the 50 MB of L2 of an H100. Two CTAs per SM would
// not fit, hence one of 1024 threads with up to 64 registers each (reasoned, not yet measured).
// Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867.

#include "cross_entropy.h"

#include <cuda_bf16.h>

#include <climits>
#include <cmath>

#include "common.cuh"
#include "vectors.cuh"

namespace minitrain {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kLoads = 4;  // 16-byte loads in flight per thread: 64 KB per SM; latency x bandwidth asks for about 30
constexpr int64_t kIgnore = -100;

// Symmetric to the bit, so that all lanes of a butterfly end with the same value.
__device__ Partial merge(Partial a, Partial b) {
    const Partial high = a.max >= b.max ? a : b, low = a.max >= b.max ? b : a;
    return {high.max, fmaf(low.sum, exp2f(low.max - high.max), high.sum)};
}

// Every thread gets the whole CTA's value.
__device__ Partial merge_cta(Partial mine) {
    __shared__ Partial of_warp[kWarps];
    const auto butterfly = [&mine](int width) {
        for (int lane = width / 2; lane > 0; lane /= 2) {
            mine = merge(mine, {__shfl_xor_sync(~0u, mine.max, lane), __shfl_xor_sync(~0u, mine.sum, lane)});
        }
    };
    butterfly(32);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = of_warp[threadIdx.x % kWarps];
    butterfly(kWarps);
    return mine;
}

// 16 bytes of a row.
template <typename T>
struct alignas(16) Vector {
    static constexpr int kSize = 16 / sizeof(T);
    uint4 bits;

    __device__ T& operator[](int j) { return reinterpret_cast<T*>(&bits)[j]; }
    __device__ static Vector filled(float value) {
        Vector v;
#pragma unroll
        for (int j = 0; j < kSize; ++j) v[j] = T(value);
        return v;
    }
};

// One row cut into vectors and, around them, `num_edges` (< 16) single elements; thread t takes edge t.
template <typename T>
struct Row {
    T* x;
    Vector<T>* vectors;
    int64_t num_vectors;
    int num_edges;
    T* edge;  // this thread's; meaningful if has_edge()

    __device__ Row(T* x, int64_t vocab) : x(x) {
        constexpr int kSize = Vector<T>::kSize;
        const int to_border = (16 - static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16)) % 16 / sizeof(T);
        const int head = static_cast<int>(min(static_cast<int64_t>(to_border), vocab));
        vectors = reinterpret_cast<Vector<T>*>(x + head);
        num_vectors = (vocab - head) / kSize;
        num_edges = static_cast<int>(vocab - num_vectors * kSize);
        const int t = threadIdx.x;
        edge = x + (t < head ? t : t + num_vectors * kSize);
    }
    __device__ bool has_edge() const { return threadIdx.x < num_edges; }
};

template <typename T>
__device__ Partial max_and_sum(const Row<T>& row) {
    Partial mine = {kNoMax, 0.0f};
    for (int64_t first = threadIdx.x; first < row.num_vectors; first += kThreads * kLoads) {
        Vector<T> v[kLoads];
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int64_t i = first + k * kThreads;
            v[k] = i < row.num_vectors ? row.vectors[i] : Vector<T>::filled(-INFINITY);
        }
        float highest = -INFINITY;
#pragma unroll
        for (int k = 0; k < kLoads; ++k)
#pragma unroll
            for (int j = 0; j < Vector<T>::kSize; ++j) highest = fmaxf(highest, float(v[k][j]));
        const float max = fmaxf(mine.max, highest * kLog2e);
        mine.sum *= exp2f(mine.max - max);
        mine.max = max;
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < Vector<T>::kSize; ++j) sum += exp2f(fmaf(float(v[k][j]), kLog2e, -max));
            mine.sum += sum;
        }
    }
    if (row.has_edge()) {
        const float x = float(*row.edge);
        const float max = fmaxf(x * kLog2e, kNoMax);
        mine = merge(mine, {max, exp2f(fmaf(x, kLog2e, -max))});
    }
    return mine;
}

__device__ Partial merge_all(const Partial* partials, int count) {
    Partial mine = {kNoMax, 0.0f};
    for (int i = threadIdx.x; i < count; i += kThreads) mine = merge(mine, partials[i]);
    return mine;
}

template <typename T>
__device__ void write_zeros(const Row<T>& row) {
    for (int64_t i = threadIdx.x; i < row.num_vectors; i += kThreads) row.vectors[i] = Vector<T>::filled(0.0f);
    if (row.has_edge()) *row.edge = T(0.0f);
}

template <typename T>
__device__ void write_softmax(const Row<T>& row, Partial all) {
    const float scale = 1.0f / all.sum;
    const auto softmax = [=](T x) { return T(exp2f(fmaf(float(x), kLog2e, -all.max)) * scale); };
    if (row.has_edge()) *row.edge = softmax(*row.edge);
    constexpr int64_t kStep = kThreads * kLoads;
    for (int64_t first = (row.num_vectors - 1) / kStep * kStep + threadIdx.x; first >= 0; first -= kStep) {
        Vector<T> v[kLoads];
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int64_t i = first + k * kThreads;
            if (i < row.num_vectors) v[k] = row.vectors[i];
        }
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int64_t i = first + k * kThreads;
            if (i >= row.num_vectors) break;
#pragma unroll
            for (int j = 0; j < Vector<T>::kSize; ++j) v[k][j] = softmax(v[k][j]);
            row.vectors[i] = v[k];
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    cross_entropy_kernel(T* logits, const int64_t* targets, float* loss, int64_t vocab, bool write_grad,
                         const Partial* partials, int num_partials) {
    const Row<T> row(logits + blockIdx.x * vocab, vocab);
    const int64_t target = targets[blockIdx.x];
    if (target == kIgnore) {
        if (threadIdx.x == 0) loss[blockIdx.x] = 0.0f;
        if (write_grad) write_zeros(row);
        return;
    }
    const bool valid = 0 <= target && target < vocab;
    const float x_target = valid ? float(row.x[target]) : NAN;  // before pass 2 overwrites it
    const Partial mine =
        partials ? merge_all(partials + int64_t(blockIdx.x) * num_partials, num_partials) : max_and_sum(row);
    const Partial all = merge_cta(mine);  // its barrier also ends every read of x_target
    // Both terms are relative to the same rounded max, whose error cancels: exact to fp32 however large the logits are.
    const float log2_p = fmaf(x_target, kLog2e, -all.max) - log2f(all.sum);
    if (threadIdx.x == 0) loss[blockIdx.x] = -kLn2 * log2_p;
    if (!write_grad) return;
    write_softmax(row, all);
    __syncthreads();  // the target's thread has written softmax[target]; this write comes after it
    if (threadIdx.x == 0 && valid) row.x[target] = T(exp2f(fmaf(x_target, kLog2e, -all.max)) / all.sum - 1.0f);
}

constexpr int kScaleThreads = 256;

__global__ void scale_kernel(const void* x, bool is_bf16, const float* factor, __nv_bfloat16* out, int64_t numel) {
    const int64_t first = (int64_t(blockIdx.x) * kScaleThreads + threadIdx.x) * kEach;
    if (first + kEach <= numel) {
        float values[kEach];
        if (is_bf16) {
            load8(values, static_cast<const __nv_bfloat16*>(x) + first);
        } else {
            const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(x) + first);
            reinterpret_cast<float4*>(values)[0] = from[0], reinterpret_cast<float4*>(values)[1] = from[1];
        }
#pragma unroll
        for (float& value : values) value *= *factor;
        store8(out + first, values);
    } else {
        for (int64_t i = first; i < numel; ++i) out[i] = __nv_bfloat16(load(x, i, is_bf16) * *factor);
    }
}

}  // namespace

void softmax_cross_entropy(void* logits, Dtype dtype, const int64_t* targets, float* loss, int64_t rows, int64_t vocab,
                           bool write_grad, const Partial* partials, int num_partials, int device,
                           cudaStream_t stream) {
    if (rows < 0 || rows > INT_MAX) throw std::invalid_argument("rows=" + std::to_string(rows) + " is not in 0..2^31");
    if (vocab < 1) throw std::invalid_argument("vocab=" + std::to_string(vocab) + " is not positive");
    if (rows == 0) return;
    const OnDevice guard(device);
    const auto launch = [&](auto* x) {
        cross_entropy_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(x, targets, loss, vocab, write_grad,
                                                                                   partials, num_partials);
    };
    if (dtype == Dtype::bfloat16) {
        launch(static_cast<__nv_bfloat16*>(logits));
    } else {
        launch(static_cast<float*>(logits));
    }
    check(cudaGetLastError(), "softmax_cross_entropy", {{"rows", rows}, {"vocab", vocab}, {"device", device}});
}

void scale(const void* x, bool is_bf16, const float* factor, void* out, int64_t numel, int device,
           cudaStream_t stream) {
    if (numel == 0) return;
    const OnDevice guard(device);
    const int64_t blocks = (numel + kScaleThreads * kEach - 1) / (kScaleThreads * kEach);
    scale_kernel<<<static_cast<unsigned>(blocks), kScaleThreads, 0, stream>>>(x, is_bf16, factor,
                                                                              static_cast<__nv_bfloat16*>(out), numel);
    check(cudaGetLastError(), "scale", {{"numel", numel}});
}

}  // namespace minitrain
