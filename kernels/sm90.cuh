// Hopper's asynchronous instructions, each wrapped once: mbarriers, TMA, wgmma, named barriers, register budgets.
//
// Shared-memory addresses are 32-bit integers, as the instructions want them. A tile of R rows of C bf16 lies in panels
// of 64 columns, one after the other: [C / 64][R][64], each row of 128 bytes swizzled by 16-byte chunks (chunk ^= row %
// 8), which is what TMA writes and wgmma reads in their 128-byte mode. Tiles begin at multiples of 1024 bytes.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "attention.h"  // Packed
#include "common.cuh"
#include "sm80.cuh"

namespace minitrain::sm90 {

#define MINITRAIN_DEVICE __device__ __forceinline__

using sm80::exp2_approx, sm80::pack, sm80::shared_address;

// ---- warps and registers

// True in one thread of the warp; all of the warp must call it.
MINITRAIN_DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p;}" : "=r"(elected));
    return elected;
}
// All four warps of a warpgroup; others must have given registers back before this can take them.
template <int kRegisters>
MINITRAIN_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
MINITRAIN_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- named barriers: `threads` counts those that wait and those that only arrive

MINITRAIN_DEVICE void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
MINITRAIN_DEVICE void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- mbarriers: a phase ends when `count` arrivals and all expected bytes are there; waits name the phase's parity

struct Mbarrier {
    uint64_t state;

    MINITRAIN_DEVICE uint32_t address() const { return shared_address(this); }
    MINITRAIN_DEVICE void init(int count) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(count));
    }
    MINITRAIN_DEVICE void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
    }
    MINITRAIN_DEVICE void arrive_as_warp() {
        if (threadIdx.x % 32 == 0) arrive();
    }
    MINITRAIN_DEVICE void arrive_and_expect(uint32_t bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
    }
    MINITRAIN_DEVICE void wait(uint32_t parity) {
        asm volatile(
            "{\n.reg .pred done;\n"
            "again%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again%=;\n}" ::"r"(address()),
            "r"(parity)
            : "memory");
    }
};
// After the inits, before the CTA's barrier: the copy engine sees them too.
MINITRAIN_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// A ring of buffers: which one is next, and the parity of its current round. One register.
template <int kStages>
struct Ring {
    uint32_t count = 0;

    MINITRAIN_DEVICE int stage() const { return count % kStages; }
    MINITRAIN_DEVICE uint32_t parity() const { return count / kStages % 2; }
    MINITRAIN_DEVICE void next() { ++count; }
};

// ---- copies by the engine

// What this thread wrote to shared memory becomes visible to TMA and wgmma; then a barrier tells the others.
MINITRAIN_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

MINITRAIN_DEVICE void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// What L2 is to do with the lines of a copy: give them up before others, or after.
MINITRAIN_DEVICE uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
MINITRAIN_DEVICE uint64_t evict_last() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// Rows row .. row + box of one head, all channels, into a tile; the bytes count on `full`. Rows past the end are zeros.
MINITRAIN_DEVICE void load_tile(uint32_t tile, const CUtensorMap* map, Mbarrier& full, int row, int head,
                                uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4, %3, %5}], [%2], %6;" ::"r"(tile),
        "l"(map), "r"(full.address()), "r"(0), "r"(row), "r"(head), "l"(policy)
        : "memory");
}
MINITRAIN_DEVICE void load_bytes(void* to, const void* from, uint32_t bytes, Mbarrier& full) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(full.address())
                 : "memory");
}
// to[i] = from[i] if it is the first, else to[i] += from[i], fp32, in global memory: one group to wait for.
MINITRAIN_DEVICE void write_sum(float* to, const float* from, uint32_t bytes, bool is_first, uint64_t policy) {
    if (is_first) {
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to),
                     "r"(shared_address(from)), "r"(bytes), "l"(policy)
                     : "memory");
    } else {
        asm volatile(
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [%0], [%1], %2, %3;" ::"l"(to),
            "r"(shared_address(from)), "r"(bytes), "l"(policy)
            : "memory");
    }
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Four accumulators x: *to = x if it is the first, else += x, in global memory.
MINITRAIN_DEVICE void write_sum(float4* to, const float* x, bool is_first) {
    asm volatile(
        "{.reg .pred first; setp.ne.b32 first, %5, 0;\n"
        "@first st.global.v4.f32 [%0], {%1, %2, %3, %4};\n"
        "@!first red.global.add.v4.f32 [%0], {%1, %2, %3, %4};}" ::"l"(to),
        "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(int(is_first))
        : "memory");
}
// x += what others wrote with it.
MINITRAIN_DEVICE void add_sum(float* x, const float4* from) {
    const float4 sum = __ldcg(from);
    x[0] += sum.x, x[1] += sum.y, x[2] += sum.z, x[3] += sum.w;
}
// Rows of a tile that belong to no row of the document become 0: their probabilities are 0, but 0 * NaN is not. Each
// warpgroup that reads the tile calls this: it writes all of these rows, and waits at its barrier for itself alone.
template <int kRows, int kCols>
MINITRAIN_DEVICE void clear_rows(__nv_bfloat16* tile, int begin, int barrier) {
    uint4* chunks = reinterpret_cast<uint4*>(tile);
    for (int i = begin * 8 + threadIdx.x % 128; i < kRows * 8; i += 128) {
#pragma unroll
        for (int panel = 0; panel < kCols / 64; ++panel) chunks[panel * kRows * 8 + i] = uint4{0, 0, 0, 0};
    }
    fence_async();
    barrier_sync(barrier, 128);
}
// Until at most kPending groups of this thread still read their source ...
template <int kPending>
MINITRAIN_DEVICE void wait_bulk_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// ... or are not done.
template <int kPending>
MINITRAIN_DEVICE void wait_bulk() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of bf16 to shared memory: lane l gives the address of row l % 8 of matrix l / 8, and holds in
// x[i] columns 2 (l % 4), 2 (l % 4) + 1 of row l / 4 of matrix i.
MINITRAIN_DEVICE void store_matrices(uint32_t row, const uint32_t* x) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(x[0]), "r"(x[1]),
                 "r"(x[2]), "r"(x[3])
                 : "memory");
}

// ---- wgmma: a warpgroup multiplies 64 x 16 by 16 x N into fp32 registers
//
// Accumulator: thread t holds, for i in 0 .. N / 2, row 16 * (t / 32) + (t % 32) / 4 + 8 * (i / 2 % 2),
// column 8 * (i / 4) + 2 * (t % 4) + i % 2. Packed to bf16 in pairs, the registers of 16 columns are an A operand.

// A matrix in shared memory, 8 rows in 1024 bytes. panels_apart: bytes from one panel of 64 columns to the next, used
// if the operand is transposed: read along its columns.
MINITRAIN_DEVICE uint64_t descriptor(uint32_t address, uint32_t panels_apart = 16) {
    return uint64_t((address & 0x3FFFF) >> 4) | (uint64_t(panels_apart >> 4) << 16) | (uint64_t(1024 >> 4) << 32) |
           (uint64_t(1) << 62);
}
// The matrix so many bytes further on, by one addition: made anew from its address it is five instructions, one after
// the other, for which the tensor cores wait.
MINITRAIN_DEVICE uint64_t further(uint64_t descriptor, uint32_t bytes) {
    return (descriptor & 0xFFFFFFFF00000000) | (uint32_t(descriptor) + (bytes >> 4));
}

MINITRAIN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MINITRAIN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Nothing that reads or writes these may move above this line (asm volatile alone does not say that of registers).
template <int N>
MINITRAIN_DEVICE void pin(float (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int N>
MINITRAIN_DEVICE void pin(uint32_t (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}
// Until at most kPending groups are not done; `done` are the registers that the finished ones wrote or read.
template <int kPending, typename... Registers>
MINITRAIN_DEVICE void wgmma_wait(Registers&... done) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    (pin(done), ...);
}

// D (+)= A B, A in shared memory (ss) or registers (rs). kTransA: A is stored as [16][64], kTransB: B as [16][N]; else
// they are stored as [64][16] and [N][16]. accumulate = false: D = A B.
template <int N>
struct Wgmma;

#define MINITRAIN_R0_9 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9"
#define MINITRAIN_R(ten) \
    "%" #ten "0,%" #ten "1,%" #ten "2,%" #ten "3,%" #ten "4,%" #ten "5,%" #ten "6,%" #ten "7,%" #ten "8,%" #ten "9"
#define MINITRAIN_D8(i)                                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define MINITRAIN_D16(i) MINITRAIN_D8(i), MINITRAIN_D8(i + 8)
#define MINITRAIN_D32(i) MINITRAIN_D16(i), MINITRAIN_D16(i + 16)
#define MINITRAIN_D64(i) MINITRAIN_D32(i), MINITRAIN_D32(i + 32)
#define MINITRAIN_D96(i) MINITRAIN_D64(i), MINITRAIN_D32(i + 64)

// REGISTERS: the numbers of the N / 2 operands D; I0 .. I6: those of the inputs, which follow them.
#define MINITRAIN_WGMMA(N, REGISTERS, D, I0, I1, I2, I3, I4, I5, I6)                                             \
    template <>                                                                                                  \
    struct Wgmma<N> {                                                                                            \
        template <bool kTransA, bool kTransB>                                                                    \
        static MINITRAIN_DEVICE void ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {            \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " I2                                                     \
                         ", 0;\n"                                                                                \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, " I0 ", " I1 \
                         ", p, 1, 1, " I3 ", " I4 ";}"                                                           \
                         : D                                                                                     \
                         : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kTransA)), "n"(int(kTransB)));          \
        }                                                                                                        \
        template <bool kTransB>                                                                                  \
        static MINITRAIN_DEVICE void rs(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool accumulate) {     \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " I5                                                     \
                         ", 0;\n"                                                                                \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, {" I0 "," I1 \
                         "," I2 "," I3 "}, " I4 ", p, 1, 1, " I6 ";}"                                            \
                         : D                                                                                     \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),             \
                           "n"(int(kTransB)));                                                                   \
        }                                                                                                        \
    }

MINITRAIN_WGMMA(64, MINITRAIN_R0_9 "," MINITRAIN_R(1) "," MINITRAIN_R(2) ",%30,%31", MINITRAIN_D32(0),  //
                "%32", "%33", "%34", "%35", "%36", "%37", "%38");
MINITRAIN_WGMMA(128,
                MINITRAIN_R0_9 "," MINITRAIN_R(1) "," MINITRAIN_R(2) "," MINITRAIN_R(3) "," MINITRAIN_R(4)  //
                "," MINITRAIN_R(5) ",%60,%61,%62,%63",
                MINITRAIN_D64(0),  //
                "%64", "%65", "%66", "%67", "%68", "%69", "%70");
MINITRAIN_WGMMA(192,
                MINITRAIN_R0_9 "," MINITRAIN_R(1) "," MINITRAIN_R(2) "," MINITRAIN_R(3) "," MINITRAIN_R(4)  //
                "," MINITRAIN_R(5) "," MINITRAIN_R(6) "," MINITRAIN_R(7) "," MINITRAIN_R(8)                 //
                ",%90,%91,%92,%93,%94,%95",
                MINITRAIN_D96(0),  //
                "%96", "%97", "%98", "%99", "%100", "%101", "%102");

// ---- accumulators to bf16

// The accumulator of 64 x N, rounded: the A operands of N / 16 multiplications.
template <int N>
MINITRAIN_DEVICE void pack(const float (&from)[N], uint32_t (&to)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) to[i] = pack(from[2 * i], from[2 * i + 1]);
}

// Four threads hold a row's 8 columns of four groups, 2 columns each: x[g] of thread t is columns 2t, 2t + 1 of group
// g. Then thread t holds all 8 columns of group t, in order: 16 bytes to store at once.
MINITRAIN_DEVICE uint4 gather_group(uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    uint32_t a = __shfl_xor_sync(~0u, odd ? x0 : x1, 1), b = __shfl_xor_sync(~0u, odd ? x2 : x3, 1);
    if (odd)
        x0 = a, x2 = b;
    else
        x1 = a, x3 = b;
    a = __shfl_xor_sync(~0u, upper ? x0 : x2, 2), b = __shfl_xor_sync(~0u, upper ? x1 : x3, 2);
    if (upper)
        x0 = a, x1 = b;
    else
        x2 = a, x3 = b;
    return {x0, x1, x2, x3};
}

// Row 0 or 1 of the two that the thread has of an accumulator, times scale, to N columns of global memory.
template <int kRegisters, int N = 2 * kRegisters>
MINITRAIN_DEVICE void store_row(__nv_bfloat16* to, const float (&x)[kRegisters], int row, float scale, bool valid) {
#pragma unroll
    for (int i = 0; i < N / 8; i += 4) {
        uint32_t pairs[4];
#pragma unroll
        for (int g = 0; g < 4; ++g) {
            const float* pair = x + 4 * (i + g) + 2 * row;
            pairs[g] = pack(pair[0] * scale, pair[1] * scale);
        }
        const uint4 columns = gather_group(pairs[0], pairs[1], pairs[2], pairs[3]);  // by all lanes
        if (valid) reinterpret_cast<uint4*>(to)[i + threadIdx.x % 4] = columns;
    }
}

// ---- host: maps of what TMA reads

// Of bf16, swizzled by 128 bytes: the sizes of its dimensions, their strides but the first's in bytes, and of a box.
template <int kDims>
CUtensorMap tensor_map(const void* data, const cuuint64_t (&sizes)[kDims], const cuuint64_t (&strides)[kDims - 1],
                       const cuuint32_t (&box)[kDims]) {
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const Encode encode = [] {  // looked up at run time: the library then loads where there is no driver
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
              "cuTensorMapEncodeTiled");
        if (found == nullptr) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<Encode>(found);
    }();
    cuuint32_t steps[kDims];
    for (cuuint32_t& step : steps) step = 1;
    CUtensorMap map;
    const CUresult error = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kDims, const_cast<void*>(data), sizes,
                                  strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) {
        std::string message = "cuTensorMapEncodeTiled(row_bytes=" + std::to_string(strides[0]) + ", sizes=";
        for (int i = 0; i < kDims; ++i) message += (i > 0 ? " x " : "") + std::to_string(sizes[i]);
        throw std::runtime_error(message + "): CUresult " + std::to_string(error));
    }
    return map;
}

// Of (rows, heads, C), for boxes of `box_rows` rows of one head.
inline CUtensorMap tensor_map(const Packed& x, int rows, int heads, int head_dim, int box_rows) {
    return tensor_map<4>(x.data, {64, cuuint64_t(rows), cuuint64_t(head_dim / 64), cuuint64_t(heads)},
                         {cuuint64_t(x.row_stride) * 2, 128, cuuint64_t(x.head_stride) * 2},
                         {64, cuuint32_t(box_rows), cuuint32_t(head_dim / 64), 1});
}

}  // namespace minitrain::sm90
