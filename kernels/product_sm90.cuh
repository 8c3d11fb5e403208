// A matrix product on Hopper that goes on with its result in registers: swiglu_sm90.cu, logits_sm90.cu.
//
// A persistent CTA's two warpgroups take tiles of 128 x 192 in turn: while one has the tensor cores, the other finishes
// and stores its tile. The warps of a third one load (TMA): operands, kStages ahead for both, and what else a tile's
// end reads. CTAs are in clusters of two, with tiles above each other: of the right operand each loads one half for
// both.
//
// Tensor cores are busy in 87 to 89 % of the time. In one tile of 128 x 256 for both warpgroups, which are at its end
// at the same time, it was 74 to 80 %; tiles of 128 x 128 read too much of shared memory.
#pragma once

#include "sm90.cuh"

namespace minitrain::sm90 {

constexpr int kRows = 128, kCols = 192, kDepth = 64;  // of a tile, and of a step
constexpr int kThreads = 384, kPanel = 64;            // columns that lie together in shared memory
constexpr int kBytesA = kRows * kDepth * 2, kBytesB = kCols * kDepth * 2, kBytesSide = kRows * kPanel * 2;
constexpr int kTall = 8;  // a cluster's tiles above each other in the order of work: L2 keeps their left operand
constexpr int kTurn = 1;  // named barriers, one for each warpgroup that multiplies

// Panels of two more matrices, which a tile's end reads. Each warpgroup has its own barriers for those of its tiles:
// one of the other's would look full where it has not come to the phase before.
template <int kStages>
struct SideMemory {
    __nv_bfloat16 panels[kStages][2][kRows * kPanel];
    Mbarrier full[2][kCols / kPanel], empty[kStages];
};
template <>
struct SideMemory<0> {};

template <int kStages, int kSideStages>
struct alignas(1024) Shared {
    __nv_bfloat16 a[kStages][kRows * kDepth], b[kStages][kCols * kDepth];
    SideMemory<kSideStages> side;
    Mbarrier full[kStages], empty[kStages];
};

// ---- copies and barriers of a cluster

inline CUtensorMap matrix_map(const void* data, int rows, int cols, int box_rows) {
    return tensor_map<2>(data, {cuuint64_t(cols), cuuint64_t(rows)}, {cuuint64_t(cols) * 2},
                         {kPanel, cuuint32_t(box_rows)});
}
MINITRAIN_DEVICE void load_box(uint32_t to, const CUtensorMap* map, Mbarrier& full, int row, int column) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(to),
        "l"(map), "r"(full.address()), "r"(column), "r"(row)
        : "memory");
}
// To the same place in both CTAs; the bytes count on both barriers.
MINITRAIN_DEVICE void load_box_for_both(uint32_t to, const CUtensorMap* map, Mbarrier& full, int row, int column) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(map), "r"(full.address()), "r"(column), "r"(row), "h"(uint16_t(3))
        : "memory");
}
MINITRAIN_DEVICE int cluster_rank() { return blockIdx.x % 2; }
MINITRAIN_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// A warp: one lane arrives here and one in the other CTA. Without .release.cluster, a fence of the whole GPU: what was
// read by wgmma needs none.
MINITRAIN_DEVICE void arrive_in_both(Mbarrier& barrier) {
    const int lane = threadIdx.x % 32;
    if (lane < 2) {
        asm volatile(
            "{.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
            "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier.address()),
            "r"(lane)
            : "memory");
    }
}

// ---- a tile and its end

// A cluster's tiles in their order: columns of kTall.
struct Tiles {
    int tall, wide;

    MINITRAIN_DEVICE int count() const { return tall * wide; }
    MINITRAIN_DEVICE int2 at(int number) const {  // -> row, column, in tiles
        const int first = number / (kTall * wide) * kTall, height = min(kTall, tall - first);
        const int within = number - first * wide;
        return {first + within % height, within / height};
    }
};

// The two halves of 64 rows that a warpgroup has of a tile, in sm90.cuh's order.
using Accumulator = float[2][kCols / 2];

// A thread's share of what is stored, in pieces of 8 columns of a row: rows 0, 8, 64 and 72 further on, then the next
// 32 columns.
struct Pieces {
    int row, column, rows, cols;  // of the first piece; of the matrix

    static MINITRAIN_DEVICE int row_in_tile(int piece) { return piece / 2 % 2 * 64 + piece % 2 * 8; }
    static MINITRAIN_DEVICE int column_in_tile(int piece) { return piece / 4 * 32; }
    MINITRAIN_DEVICE bool valid(int piece) const {
        return row + row_in_tile(piece) < rows && column + column_in_tile(piece) < cols;
    }
    // To kMatrices matrices that lie side by side.
    template <int kMatrices = 1>
    MINITRAIN_DEVICE void store(__nv_bfloat16* to, int piece, const uint4 (&x)[kMatrices]) const {
        const int stride = kMatrices * cols;
        __nv_bfloat16* tile = to + int64_t(row) * stride + column;
        uint4* at = reinterpret_cast<uint4*>(tile + row_in_tile(piece) * stride + column_in_tile(piece));
        if (!valid(piece)) return;
#pragma unroll
        for (int i = 0; i < kMatrices; ++i) __stcs(at + i * (cols / 8), x[i]);  // not to drive operands out of L2
    }
    // Of the accumulator, from column `first` of the tile on: pair g is of columns 8 g + 2 (lane % 4) of the
    // piece's 32.
    static MINITRAIN_DEVICE void pack_pairs(const Accumulator& x, int first, int piece, uint32_t (&pairs)[4]) {
#pragma unroll
        for (int g = 0; g < 4; ++g) {
            const float* pair = x[piece / 2 % 2] + first / 2 + 4 * (4 * (piece / 4) + g) + 2 * (piece % 2);
            pairs[g] = pack(pair[0], pair[1]);
        }
    }
};

MINITRAIN_DEVICE uint4 gather_group(const uint32_t (&x)[4]) { return gather_group(x[0], x[1], x[2], x[3]); }

MINITRAIN_DEVICE float2 floats(uint32_t pair) { return __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(pair)); }

// ---- the kernel

// What a thread reads of the side panels of a tile, one panel after the other.
template <int kStages>
struct SideReader {
    SideMemory<kStages>& side;
    int turn;  // of the CTA's tiles
    Ring<kStages> ring;

    MINITRAIN_DEVICE void wait(int panel) { side.full[turn % 2][panel].wait(turn / 2 % 2); }
    MINITRAIN_DEVICE uint4 get(int matrix, int piece) const {
        const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + Pieces::row_in_tile(piece);
        const int chunk = piece / 4 % 2 * 4 + threadIdx.x % 4;
        return reinterpret_cast<const uint4*>(side.panels[ring.stage()][matrix])[row * 8 + (chunk ^ row % 8)];
    }
    MINITRAIN_DEVICE void release() {
        fence_async();  // its next contents are written by the copy engine
        __syncwarp();
        side.empty[ring.stage()].arrive_as_warp();
        ring.next();
    }
};

// One thread: the operands of this CTA's tiles, step by step.
template <typename Product, typename Memory>
__device__ void load_operands(Memory& shared, const Product& product, const Tiles& tiles, int rank, int steps) {
    Ring<Product::kStages> ring;
    for (int number = blockIdx.x / 2; number < tiles.count(); number += gridDim.x / 2) {
        const int2 tile = tiles.at(number);
#pragma unroll 1
        for (int step = 0; step < steps; ++step, ring.next()) {
            const int s = ring.stage(), k = step * kDepth;
            shared.empty[s].wait(ring.parity() ^ 1);
            shared.full[s].arrive_and_expect(kBytesA + kBytesB);
            load_box(shared_address(shared.a[s]), &product.left, shared.full[s], (2 * tile.x + rank) * kRows, k);
            product.load_right(shared_address(shared.b[s]), shared.full[s], rank, k, tile.y * Product::kWide);
        }
    }
}

// Another thread: the panels that their ends read.
template <typename Product, typename Memory>
__device__ void load_sides(Memory& shared, const Product& product, const Tiles& tiles, int rank) {
    Ring<Product::kSideStages> ring;
    int turn = 0;
    for (int number = blockIdx.x / 2; number < tiles.count(); number += gridDim.x / 2, ++turn) {
        const int2 tile = tiles.at(number);
#pragma unroll 1  // 24 registers
        for (int panel = 0; panel < Product::kWide / kPanel; ++panel, ring.next()) {
            const int s = ring.stage();
            Mbarrier& full = shared.side.full[turn % 2][panel];
            shared.side.empty[s].wait(ring.parity() ^ 1);
            full.arrive_and_expect(2 * kBytesSide);
            for (int i = 0; i < 2; ++i) {
                load_box(shared_address(shared.side.panels[s][i]), &product.sides[i], full, (2 * tile.x + rank) * kRows,
                         tile.y * Product::kWide + panel * kPanel);
            }
        }
    }
}

// A Product has
//   left, sides      maps of the left operand, and of what the end of a tile reads if kSideStages > 0
//   load_right       one step of a rank's half of the right operand, stored as (depth, columns) if kTransB, else as
//                    (columns, depth)
//   finish           the end of a tile, of kWide columns of what is stored
template <typename Product>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ Product product, Tiles tiles, int rows, int cols, int steps) {
    constexpr int kStages = Product::kStages, kSideStages = Product::kSideStages, kPanels = Product::kWide / kPanel;
    extern __shared__ __align__(1024) uint8_t memory[];
    using Memory = Shared<kStages, kSideStages>;
    Memory& shared = *reinterpret_cast<Memory*>(memory);
    const int rank = cluster_rank();
    if (threadIdx.x == 0) {
        if (shared_address(&shared) % 1024) __trap();  // TMA's and wgmma's swizzle count on it
        for (int i = 0; i < kStages; ++i) shared.full[i].init(1), shared.empty[i].init(8);  // 4 warps of either CTA
        if constexpr (kSideStages > 0) {
            for (int i = 0; i < kSideStages; ++i) shared.side.empty[i].init(4);
            for (int i = 0; i < kPanels; ++i) shared.side.full[0][i].init(1), shared.side.full[1][i].init(1);
        }
        fence_mbarrier_init();
    }
    cluster_sync();  // barriers of both have their counts
    if (threadIdx.x < 128) {
        give_registers<24>();
        if (threadIdx.x / 32 == 0 && elect_one()) load_operands(shared, product, tiles, rank, steps);
        if constexpr (kSideStages > 0) {
            if (threadIdx.x / 32 == 1 && elect_one()) load_sides(shared, product, tiles, rank);
        }
        __syncwarp();
    } else {
        take_registers<240>();
        const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
        Accumulator x;
        if (warpgroup == 1) barrier_arrive(kTurn, 256);  // the other has the first turn
        for (int turn = warpgroup;; turn += 2) {         // of the CTA's tiles
            const int number = (blockIdx.x + turn * gridDim.x) / 2;
            if (number >= tiles.count()) break;
            Ring<kStages> ring{uint32_t(turn * steps)};
            barrier_sync(kTurn + warpgroup, 256);
#pragma unroll 1
            for (int step = 0; step < steps; ++step, ring.next()) {
                const int s = ring.stage();
                shared.full[s].wait(ring.parity());
                const uint64_t a = descriptor(shared_address(shared.a[s]));
                const uint64_t b = descriptor(shared_address(shared.b[s]), kDepth * 128);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < kDepth / 16; ++k) {  // 16 of the depth are 32 bytes of a row, or 16 rows
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        Wgmma<kCols>::template ss<false, Product::kTransB>(
                            x[half], further(a, half * 64 * 128 + k * 32),
                            further(b, Product::kTransB ? k * 16 * 128 : k * 32), step + k > 0);
                    }
                }
                wgmma_commit();
                if (step > 0) {
                    wgmma_wait<1>();
                    arrive_in_both(shared.empty[(ring.count - 1) % kStages]);
                }
            }
            barrier_arrive(kTurn + 1 - warpgroup, 256);
            wgmma_wait<0>(x[0], x[1]);
            arrive_in_both(shared.empty[(ring.count - 1) % kStages]);
            const int2 tile = tiles.at(number);
            const int thread = threadIdx.x % 128;
            const int row = (2 * tile.x + rank) * kRows + thread / 32 * 16 + thread % 32 / 4;
            SideReader<kSideStages> sides{shared.side, turn, {uint32_t(turn * kPanels)}};
            product.finish(x, Pieces{row, tile.y * Product::kWide + thread % 4 * 8, rows, cols}, sides);
        }
    }
    cluster_sync();  // the other CTA may still arrive here
}

// Of (rows, depth) and (depth, cols).
template <typename Product>
void launch(const char* name, const Product& product, int rows, int cols, int depth, int device, cudaStream_t stream) {
    using Memory = Shared<Product::kStages, Product::kSideStages>;
    const auto tiles_of = [](int size, int tile) { return (size + tile - 1) / tile; };
    const Tiles tiles = {tiles_of(rows, 2 * kRows), tiles_of(cols, Product::kWide)};
    check(cudaFuncSetAttribute(product_kernel<Product>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Memory)),
          "cudaFuncSetAttribute");
    product_kernel<Product><<<num_processors(device) / 2 * 2, kThreads, sizeof(Memory), stream>>>(
        product, tiles, rows, cols, tiles_of(depth, kDepth));
    check(cudaGetLastError(), name, {{"rows", rows}, {"cols", cols}, {"depth", depth}});
}

}  // namespace minitrain::sm90
