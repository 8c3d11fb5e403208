// What the portable attention kernels are made of: tiles in shared memory, and matrix products of one warp from them.
//
// A tile is rows of kCols bf16, in chunks of 16 bytes that trade places inside groups of 8 (or 4, see Tile), so that no
// access of theirs has a bank conflict. A product takes 16 x 16 pieces of its operands:
//
//     ldmatrix.x4   lane i gives the address of row i % 8 of 8x8 matrix i / 8; register r of lane 4g + t then holds
//                   elements (g, 2t) and (g, 2t + 1) of matrix r, or (2t, g) and (2t + 1, g) with .trans
//     mma A         registers: rows 0-7 | rows 8-15 of columns 0-7, then of columns 8-15
//     mma B         registers: k 0-7 | k 8-15 of columns 0-7; two more for columns 8-15, the next mma
//     mma C, D      element e of lane 4g + t: row g + 8 (e / 2), column 2t + e % 2
//
// Instructions: PTX ISA, mma.m16n8k16, ldmatrix, cp.async.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "attention.h"

namespace minitrain {

// Queries: 32 rows to a warp halve what it reads of K and V per product, but above 128 channels the output of 32 rows
// does not fit in registers. Keys: 64 of 256 channels would not fit in the 99 KB of sm_86, sm_89, sm_120 (backward).
__host__ __device__ constexpr AttentionTiles attention_tiles_sm80(int head_dim) {
    return {head_dim <= 128 ? 128 : 64, head_dim <= 192 ? 64 : 32, kUnbounded};
}

namespace sm80 {

using bf16 = __nv_bfloat16;

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes to shared memory; zeros, and nothing is read, if not valid.
__device__ inline void copy16(uint32_t to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// Waits for all copies that this thread started.
__device__ inline void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <bool kTransposed>
__device__ inline void ldmatrix(uint32_t (&r)[4], uint32_t address) {
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address));
    }
}

__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Not atomicAdd: in a kernel that has a fence too, it becomes the instruction with a result (ptxas 13.0 for sm_90).
__device__ inline void add_to(float* sum, float x) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(sum), "f"(x) : "memory");
}

// Waits until *counter is `value`; what others wrote before they set it so is then to be seen.
__device__ inline void wait_for(const int* counter, int value) {
    int now;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (now != value);
}

__device__ inline uint32_t pack(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Chunk c of row r lies where c ^ phase(r) would, so that one chunk of 8 rows covers all 32 banks. Rows of 32 or 96
// elements are an odd number of 64 bytes: neighbours differ without it, and 4 phases do for pairs of rows.
template <int kCols>
struct Tile {
    static constexpr int kRowBytes = kCols * 2;
    static constexpr int kChunks = kCols / 8;
    static constexpr int kGroup = kCols % 64 == 0 ? 8 : 4;

    __device__ static int phase(unsigned row) { return row / (8 / kGroup) % kGroup; }
    __device__ static int offset(int row, int chunk) { return row * kRowBytes + (chunk ^ phase(row)) * 16; }
};

__device__ inline bf16* rows_of(const Packed& x, int64_t row, int head) {
    return static_cast<bf16*>(x.data) + row * x.row_stride + head * x.head_stride;
}

// Starts the copy of kRows rows, `stride` elements apart in global memory; those from num_rows on become zeros.
template <int kCols, int kRows, int kThreads>
__device__ inline void load_tile(uint32_t tile, const bf16* from, int stride, int num_rows) {
    constexpr int kGroup = Tile<kCols>::kGroup, kStep = kThreads / kGroup;
    static_assert(kRows % kStep == 0 && kStep % 8 == 0, "a thread keeps its phase");
    const int first = threadIdx.x / kGroup, chunk = threadIdx.x % kGroup;
    tile += Tile<kCols>::offset(first, chunk);
    from += first * stride + chunk * 8;
#pragma unroll
    for (int row = 0; row < kRows; row += kStep)
#pragma unroll
        for (int c = 0; c < Tile<kCols>::kChunks; c += kGroup) {
            copy16(tile + row * Tile<kCols>::kRowBytes + c * 16, from + row * stride + c * 8, first + row < num_rows);
        }
}

// Writes the first num_rows rows; `thread` is the caller's number among kThreads.
template <int kCols, int kRows, int kThreads>
__device__ inline void store_tile(const char* tile, bf16* to, int stride, int num_rows, int thread) {
    constexpr int kChunks = Tile<kCols>::kChunks;
#pragma unroll 4
    for (int i = thread; i < kRows * kChunks; i += kThreads) {
        const int row = i / kChunks, chunk = i % kChunks;
        if (row >= num_rows) break;
        *reinterpret_cast<uint4*>(to + row * stride + chunk * 8) =
            *reinterpret_cast<const uint4*>(tile + Tile<kCols>::offset(row, chunk));
    }
}

// Two neighbours of an accumulator, rounded, to where they belong: this lane's columns 2t, 2t + 1 of `chunk`.
template <int kCols>
__device__ inline void store_pair(char* tile, int row, int chunk, float low, float high) {
    *reinterpret_cast<uint32_t*>(tile + Tile<kCols>::offset(row, chunk) + threadIdx.x % 4 * 4) = pack(low, high);
}

template <int kCols, int kM, int kN>
__device__ inline void store_accumulators(char* tile, int row, int col, const float (&acc)[kM][kN][4], float factor) {
    row += threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                store_pair<kCols>(tile, row + 16 * i + 8 * half, col / 8 + j, acc[i][j][2 * half] * factor,
                                  acc[i][j][2 * half + 1] * factor);
            }
}

// An operand of a warp's product, in a tile from (row, col) on, both multiples of 16. As it is, A lies there as [m][k]
// and B as [n][k]; transposed, as [k][m] and [k][n]. kWidth: how many columns are read; col is a multiple of it.
enum class Role { A, B, A_transposed, B_transposed };

template <int kCols, int kWidth, Role kRole>
class Operand {
    using In = Tile<kCols>;
    static constexpr bool kTransposed = kRole == Role::A_transposed || kRole == Role::B_transposed;
    static constexpr bool kDown = kRole == Role::A || kRole == Role::B_transposed;  // matrix 1 below 0, else beside it
    static constexpr int kGroupBytes = In::kGroup * 16;
    // Then no bit of col is one of a column counted from it: the exclusive or takes them one after the other, and few
    // addresses, known before the loop, serve all pieces.
    static constexpr bool kSeparate = kWidth == kCols || (kWidth & (kWidth - 1)) == 0;

public:
    __device__ Operand(uint32_t tile, int row, int col) {
        const int lane = threadIdx.x % 32;
        const int lane_row = kDown ? lane % 16 : lane / 16 * 8 + lane % 8;
        const int lane_chunk = kDown ? lane / 16 : lane / 8 % 2;
        const int col_bytes = col * 2;
        address_ = tile + (row + lane_row) * In::kRowBytes;
        flip_ = (lane_chunk ^ In::phase(lane_row)) * 16;
        if constexpr (kSeparate) {
            address_ += col_bytes / kGroupBytes * kGroupBytes;
            flip_ ^= col_bytes % kGroupBytes;
        } else {
            col_bytes_ = col_bytes;
        }
    }
    // Piece `outer` along m or n, `step` along k.
    __device__ void load(uint32_t (&fragment)[4], int outer, int step) const {
        const int down = 16 * (kTransposed ? step : outer) * In::kRowBytes, right = 32 * (kTransposed ? outer : step);
        if constexpr (kSeparate) {
            const int group = right / kGroupBytes * kGroupBytes;
            ldmatrix<kTransposed>(fragment, address_ + ((right - group) ^ flip_) + (down + group));
        } else {
            ldmatrix<kTransposed>(fragment, address_ + ((col_bytes_ + right) ^ flip_) + down);
        }
    }

private:
    uint32_t address_;
    uint32_t flip_;
    uint32_t col_bytes_;
};

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&acc)[kM][kN][4]) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
}

// acc (16 kM, 8 kN) += A (16 kM, 16 kSteps) B (16 kSteps, 8 kN)
template <int kSteps, int kM, int kN, typename A, typename B>
__device__ __forceinline__ void multiply(float (&acc)[kM][kN][4], const A& a, const B& b) {
    static_assert(kN % 2 == 0, "B comes in pieces of 16 columns");
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        uint32_t a_piece[kM][4];
#pragma unroll
        for (int i = 0; i < kM; ++i) a.load(a_piece[i], i, k);
#pragma unroll
        for (int j = 0; j < kN; j += 2) {
            uint32_t b_piece[4];
            b.load(b_piece, j / 2, k);
#pragma unroll
            for (int i = 0; i < kM; ++i) {
                mma(acc[i][j], a_piece[i], b_piece[0], b_piece[1]);
                mma(acc[i][j + 1], a_piece[i], b_piece[2], b_piece[3]);
            }
        }
    }
}

// Probabilities of (16 kM, 8 kN) as the A of the next product: an accumulator's lanes hold what an A piece's lanes do.
template <int kM, int kN>
class AccumulatorOperand {
public:
    __device__ explicit AccumulatorOperand(const float (&acc)[kM][kN][4]) {
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int j = 0; j < kN; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    pieces_[i][j / 2][j % 2 * 2 + half] = pack(acc[i][j][2 * half], acc[i][j][2 * half + 1]);
                }
    }
    __device__ void load(uint32_t (&fragment)[4], int outer, int step) const {
#pragma unroll
        for (int r = 0; r < 4; ++r) fragment[r] = pieces_[outer][step][r];
    }

private:
    uint32_t pieces_[kM][kN / 2][4];
};

}  // namespace sm80
}  // namespace minitrain
