// CUDA's words for the host compiler, as far as attention_plan.cu says them; test_attention_plan.py runs it with them.
// The threads of a CTA are fibers: each runs until it waits for the others. CTAs come one after another.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
using std::max;
using std::min;
struct int2 {
    int x, y;
};
struct int4 {
    int x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
using cudaStream_t = struct CUstream_st*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 132, cudaSuccess; }

// Fibers begin by a context and go on by longjmp, which is fast: it asks nothing of the operating system.
struct Fiber {
    ucontext_t begin;
    jmp_buf here;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool is_begun, is_done;

    static constexpr int kStack = 32 << 10;
};
inline std::vector<Fiber> fibers(1024);
inline jmp_buf scheduler;
inline std::function<void()> body;
inline void run_fiber() {
    body();
    fibers[threadIdx.x].is_done = true;
    _longjmp(scheduler, 1);
}
struct Barrier {
    int arrived = 0, round = 0;
    void wait(int count) {
        const int before = round;
        if (++arrived == count) {
            arrived = 0;
            ++round;
            return;
        }
        while (round == before)
            if (!_setjmp(fibers[threadIdx.x].here)) _longjmp(scheduler, 1);
    }
};
inline Barrier cta;
inline std::vector<Barrier> warps;
inline std::vector<int64_t> passed;
inline void __syncthreads() { cta.wait(blockDim.x); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    const int me = threadIdx.x;
    passed[me] = value;
    warps[me / 32].wait(32);
    const T result = static_cast<T>(passed[me / 32 * 32 + lane]);
    warps[me / 32].wait(32);
    return result;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int step) {
    const int lane = threadIdx.x % 32;
    return __shfl_sync(mask, value, lane < step ? lane : lane - step);
}
inline int atomicAdd(int* p, int value) { return (*p += value) - value; }
inline int atomicMax(int* p, int value) { return std::exchange(*p, std::max(*p, value)); }
inline int atomicExch(int* p, int value) { return std::exchange(*p, value); }

struct Launch {
    dim3 ctas;
    unsigned threads, smem;
    cudaStream_t stream;
    template <typename... Args>
    void operator()(void (*kernel)(Args...), Args... args) {
        body = [=] { kernel(args...); };
        gridDim = ctas, blockDim = threads;
        for (blockIdx.y = 0; blockIdx.y < ctas.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < ctas.x; ++blockIdx.x) run_cta();
    }
    void run_cta() {
        static volatile unsigned i, left;  // longjmp keeps these
        cta = {}, warps.assign(threads / 32, {}), passed.assign(threads, 0);
        for (unsigned t = 0; t < threads; ++t) fibers[t].is_begun = fibers[t].is_done = false;
        do {
            for (left = 0, i = 0; i < threads; i = i + 1) {
                Fiber& fiber = fibers[i];
                if (fiber.is_done) continue;
                left = left + 1, threadIdx = i;
                if (_setjmp(scheduler)) continue;
                if (fiber.is_begun) _longjmp(fiber.here, 1);
                fiber.is_begun = true;
                getcontext(&fiber.begin);
                fiber.begin.uc_stack.ss_sp = fiber.stack.get(), fiber.begin.uc_stack.ss_size = Fiber::kStack;
                makecontext(&fiber.begin, run_fiber, 0);
                setcontext(&fiber.begin);
            }
        } while (left > 0);
    }
};
