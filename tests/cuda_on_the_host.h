// CUDA's words for the host compiler, as far as attention_plan.cu, attention_prepare.cu, attention_*_sm80.cu and
// add_norm.cu say them: test_attention_plan.py, test_portable_kernels.py and test_portable_norm.py run these with it.
//
// The threads of a CTA are fibers: each runs until it waits for others. The warps take turns at random, so that they
// are out of step wherever nothing keeps them together; CTAs come one after another. What a warp does as one, the last
// lane to arrive does for all. A copy to shared memory leaves NaN there until it is waited for.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <typeinfo>
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
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int shared_bytes = 227 << 10;  // that a CTA may have
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
using cudaStream_t = struct CUstream_st*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    return *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : shared_bytes, cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum { cudaSharedmemCarveoutMaxShared = 100 };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
    return value > shared_bytes ? cudaErrorInvalidValue : cudaSuccess;
}

// ---- threads

struct Barrier {
    int arrived = 0, round = 0;
    const std::type_info* what = nullptr;
};
struct Copy {
    char* to;
    const void* from;  // null: zeros
};
// Begins by a context and goes on by longjmp, which is fast: it asks nothing of the operating system. For the same
// reason it does not end, but waits for the next CTA.
struct Fiber {
    ucontext_t begin;
    jmp_buf here;
    std::unique_ptr<char[]> stack{new char[kStack]};
    std::vector<Copy> copies;  // that were not waited for
    bool is_begun = false, is_done;
    const Barrier* waits_at;
    int round;

    static constexpr int kStack = 32 << 10;
    bool can_go_on() const { return !is_done && (waits_at == nullptr || waits_at->round != round); }
};
struct Warp {
    Barrier barriers[32];  // of the lanes from this one on
    void* brought[32];
};
inline std::vector<Fiber> fibers(1024);
inline Barrier cta;
inline std::vector<Warp> warps;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline const char* failure = nullptr;

inline void let_others_run() {
    if (!_setjmp(fibers[threadIdx.x].here)) _longjmp(scheduler, 1);
}
inline void fail(const char* why) {  // on a fiber; the launch throws it
    failure = why;
    _longjmp(scheduler, 1);
}
inline void run_fiber() {
    for (;;) {
        body();
        Fiber& fiber = fibers[threadIdx.x];
        if (!fiber.copies.empty()) fail("a thread ends before its copies");
        fiber.is_done = true;
        let_others_run();
    }
}
inline void go_on(unsigned thread) {
    Fiber& fiber = fibers[thread];
    threadIdx = thread;
    if (_setjmp(scheduler)) return;
    if (fiber.is_begun) _longjmp(fiber.here, 1);
    fiber.is_begun = true;
    getcontext(&fiber.begin);
    fiber.begin.uc_stack.ss_sp = fiber.stack.get(), fiber.begin.uc_stack.ss_size = Fiber::kStack;
    makecontext(&fiber.begin, run_fiber, 0);
    setcontext(&fiber.begin);
}
inline void wait_at(const Barrier& barrier) {
    fibers[threadIdx.x].waits_at = &barrier, fibers[threadIdx.x].round = barrier.round;
    let_others_run();
}
inline void __syncthreads() {
    if (++cta.arrived < static_cast<int>(blockDim.x)) return wait_at(cta);
    cta.arrived = 0, ++cta.round;
}

// bar.sync, of some of a CTA's warps.
inline Barrier named[16];
inline void sync(int barrier, int threads) {
    if (barrier < 1 || barrier > 15) fail("no such barrier, or the CTA's");
    if (++named[barrier].arrived < threads) return wait_at(named[barrier]);
    named[barrier].arrived = 0, ++named[barrier].round;
}

// The lanes in `mask` meet, and the last one does `work` for all: at(lane) is what that lane brought.
template <typename T, typename Work>
void together(unsigned mask, T& mine, Work work) {
    const int lane = threadIdx.x % 32;
    Warp& warp = warps[threadIdx.x / 32];
    Barrier& barrier = warp.barriers[__builtin_ctz(mask)];
    if (barrier.arrived > 0 && *barrier.what != typeid(Work)) fail("the lanes of a warp are not at one instruction");
    if (!(mask >> lane & 1)) fail("a lane is not in its own mask");
    barrier.what = &typeid(Work);
    warp.brought[lane] = &mine;
    if (++barrier.arrived < __builtin_popcount(mask)) return wait_at(barrier);
    work([&](int other) -> T& { return *static_cast<T*>(warp.brought[other]); });
    barrier.arrived = 0, ++barrier.round;
}
inline void __syncwarp() {
    int nothing;
    together(~0u, nothing, [](auto) {});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
    struct {
        T value;
        int lane;
        T result;
    } mine{value, lane, value};
    if (!(mask >> lane & 1)) fail("a shuffle from a lane that takes no part");
    together(mask, mine, [mask](auto at) {
        for (int i = 0; i < 32; ++i)
            if (mask >> i & 1) at(i).result = at(at(i).lane).value;
    });
    return mine.result;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int step) {
    const int lane = threadIdx.x % 32;
    return __shfl_sync(mask, value, lane < step ? lane : lane - step);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
    return __shfl_sync(mask, value, threadIdx.x % 32 ^ step);
}
inline int __any_sync(unsigned mask, int value) {
    together(mask, value, [mask](auto at) {
        int any = 0;
        for (int i = 0; i < 32; ++i) any |= mask >> i & 1 && at(i);
        for (int i = 0; i < 32; ++i)
            if (mask >> i & 1) at(i) = any;
    });
    return value;
}
inline void __threadfence() {}
inline int atomicAdd(int* p, int value) { return (*p += value) - value; }
inline int atomicMax(int* p, int value) { return std::exchange(*p, std::max(*p, value)); }
inline int atomicExch(int* p, int value) { return std::exchange(*p, value); }

inline std::vector<char> shared_memory;
inline char* dynamic_shared;  // in it, aligned; extern __shared__

struct Launch {
    dim3 ctas;
    unsigned threads, smem;
    cudaStream_t stream;
    template <typename... Params, typename... Args>
    void operator()(void (*kernel)(Params...), Args... args) {
        body = [=] { kernel(args...); };
        gridDim = ctas, blockDim = threads;
        for (blockIdx.y = 0; blockIdx.y < ctas.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < ctas.x; ++blockIdx.x) run_cta();
    }
    void run_cta() {
        static uint32_t random = 0;
        constexpr int kAround = 1024, kGuard = 0x5a;
        shared_memory.assign(smem + 2 * kAround, kGuard);
        dynamic_shared = shared_memory.data() + kAround - reinterpret_cast<uintptr_t>(shared_memory.data()) % kAround;
        memset(dynamic_shared, 0xff, smem);
        const unsigned num_warps = threads / 32;
        cta = {}, warps.assign(num_warps, {});
        for (unsigned t = 0; t < threads; ++t) {
            fibers[t].is_done = false, fibers[t].waits_at = nullptr, fibers[t].copies.clear();
        }
        const auto run_warp = [](unsigned warp) {
            bool went = false;
            for (unsigned t = 32 * warp; t < 32 * warp + 32 && !failure; ++t) {
                if (fibers[t].can_go_on()) go_on(t), went = true;
            }
            return went && !failure;
        };
        for (bool went = true; went;) {
            random = random * 1664525 + 1013904223;
            const unsigned first = (random >> 8) % num_warps, turns = 1 + (random >> 16) % 400;
            went = false;
            for (unsigned w = first; w < first + num_warps && !went; ++w)
                for (unsigned i = 0; i < turns && run_warp(w % num_warps); ++i) went = true;
        }
        for (unsigned t = 0; t < threads; ++t)
            if (!fibers[t].is_done && !failure) failure = "threads wait for each other forever";
        const auto is_guard = [](char byte) { return byte == kGuard; };
        if (!std::all_of(shared_memory.data(), dynamic_shared, is_guard) ||
            !std::all_of(dynamic_shared + smem, shared_memory.data() + shared_memory.size(), is_guard)) {
            failure = "written outside of the shared memory";
        }
        if (!failure) return;
        for (Fiber& fiber : fibers) fiber.is_begun = false;  // some are in the middle of their work
        throw std::runtime_error(std::exchange(failure, nullptr));
    }
};

// ---- bf16, and the instructions that sm80.cuh wraps, by the names and with the layouts that it gives them

struct __nv_bfloat16 {
    uint16_t bits;
    explicit operator float() const;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline float to_float(uint32_t bf16_bits) {
    float value;
    return memcpy(&value, &(bf16_bits <<= 16), 4), value;
}
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {to_float(x.x.bits), to_float(x.y.bits)}; }
inline uint32_t pack(float low, float high) {
    uint32_t bits[2];
    memcpy(&bits[0], &low, 4), memcpy(&bits[1], &high, 4);
    for (uint32_t& b : bits) b = (b & 0x7fffffff) > 0x7f800000 ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
    return bits[0] | bits[1] << 16;
}
inline __nv_bfloat16::operator float() const { return to_float(bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {static_cast<uint16_t>(pack(x, 0.0f))}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
    return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
inline float exp2_approx(float x) { return exp2f(x); }
inline void add_to(float* sum, float x) { *sum += x; }
inline void wait_for(const int* counter, int value) {  // CTAs come in order: whoever it waits for is done
    if (*counter != value) fail("not our turn");
}

inline uint32_t shared_address(const void* pointer) { return static_cast<const char*>(pointer) - dynamic_shared; }
inline char* chunk_at(uint32_t address) {
    if (address % 16) fail("an address in shared memory is not a multiple of 16");
    return dynamic_shared + address;
}
inline void copy16(uint32_t to, const void* from, bool valid) {
    if (valid && reinterpret_cast<uintptr_t>(from) % 16) fail("an address in global memory is not a multiple of 16");
    memset(chunk_at(to), 0xff, 16);
    fibers[threadIdx.x].copies.push_back({chunk_at(to), valid ? from : nullptr});
}
inline void wait_copies() {
    for (const auto& [to, from] : fibers[threadIdx.x].copies) from ? memcpy(to, from, 16) : memset(to, 0, 16);
    fibers[threadIdx.x].copies.clear();
}
template <bool kTransposed>
void ldmatrix(uint32_t (&r)[4], uint32_t address) {
    struct {
        uint32_t* r;
        uint32_t address;
    } mine{r, address};
    together(~0u, mine, [](auto at) {
        for (int m = 0; m < 4; ++m) {
            unsigned banks = 0;
            uint16_t matrix[8][8];
            for (int row = 0; row < 8; ++row) {
                memcpy(matrix[row], chunk_at(at(8 * m + row).address), 16);
                banks |= 1u << at(8 * m + row).address / 16 % 8;
            }
            if (banks != 0xff) fail("ldmatrix has a bank conflict");
            for (int lane = 0; lane < 32; ++lane) {
                const int g = lane / 4, t = lane % 4;
                at(lane).r[m] = kTransposed ? matrix[2 * t][g] | matrix[2 * t + 1][g] << 16
                                            : matrix[g][2 * t] | matrix[g][2 * t + 1] << 16;
            }
        }
    });
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct {
        float* d;
        const uint32_t* a;
        uint32_t b[2];
    } mine{d, a, {b0, b1}};
    together(~0u, mine, [](auto at) {
        using Row = float __attribute__((vector_size(32)));  // 8 columns
        using Pairs = uint32_t __attribute__((vector_size(32)));
        uint32_t A[16][8];  // pairs along k
        Pairs B[8];
        Row D[16] = {};
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; ++r) A[g + r % 2 * 8][t + r / 2 * 4] = at(lane).a[r];
            for (int r = 0; r < 2; ++r) B[t + r * 4][g] = at(lane).b[r];
        }
        for (int i = 0; i < 16; ++i)
            for (int k = 0; k < 8; ++k) {
                D[i] += to_float(A[i][k]) * (Row)(B[k] << 16) + to_float(A[i][k] >> 16) * (Row)(B[k] & 0xffff0000);
            }
        for (int lane = 0; lane < 32; ++lane)
            for (int e = 0; e < 4; ++e) at(lane).d[e] += D[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
    });
}

// What a test sees of a call: the text of the exception that it ends in, or null.
template <typename Call>
const char* error_of(Call call) {
    static std::string error;
    try {
        return call(), nullptr;
    } catch (const std::exception& e) {
        return (error = e.what()).c_str();
    }
}
