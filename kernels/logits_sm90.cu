// Logits on Hopper, and of each row of a tile what its softmax needs, while they are in registers.

#include "cross_entropy.h"
#include "product_sm90.cuh"

namespace minitrain {
namespace {

using namespace sm90;

struct Logits {
    static constexpr bool kTransB = false;
    static constexpr int kWide = kCols, kStages = 5, kSideStages = 0;
    CUtensorMap left, right;
    __nv_bfloat16* logits;
    Partial* partials;
    int num_partials;  // of a row

    MINITRAIN_DEVICE void load_right(uint32_t to, Mbarrier& full, int rank, int k, int column) const {
        load_box_for_both(to + rank * (kBytesB / 2), &right, full, column + rank * (kCols / 2), k);
    }
    template <typename Sides>
    MINITRAIN_DEVICE void finish(const Accumulator& x, const Pieces& pieces, Sides&) const {
        const int first = pieces.column - threadIdx.x % 4 * 8;
#pragma unroll
        for (int row = 0; row < 4; ++row) {  // of those that a thread has a part of
            float max = kNoMax, sum = 0.0f;
#pragma unroll
            for (int piece = row; piece < kWide / 8; piece += 4) {
                uint32_t pairs[4];
                Pieces::pack_pairs(x, 0, piece, pairs);
                pieces.store(logits, piece, {gather_group(pairs)});
                float high = max;
#pragma unroll
                for (int g = 0; g < 4; ++g) {
                    const bool valid = first + Pieces::column_in_tile(piece) + 8 * g < pieces.cols;  // all 8 or none
                    if (!valid) pairs[g] = 0xFF80FF80;                                               // -inf
                    const float2 pair = floats(pairs[g]);
                    high = fmaxf(high, fmaxf(pair.x, pair.y) * kLog2e);
                }
                sum *= exp2_approx(max - high);
                max = high;
#pragma unroll
                for (int g = 0; g < 4; ++g) {
                    const float2 pair = floats(pairs[g]);
                    sum += exp2_approx(fmaf(pair.x, kLog2e, -max)) + exp2_approx(fmaf(pair.y, kLog2e, -max));
                }
            }
            float all = fmaxf(max, __shfl_xor_sync(~0u, max, 1));  // of the four threads that have the row
            all = fmaxf(all, __shfl_xor_sync(~0u, all, 2));
            sum *= exp2_approx(max - all);
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const int64_t token = pieces.row + Pieces::row_in_tile(row);
            if (threadIdx.x % 4 == 0 && token < pieces.rows) {
                partials[token * num_partials + first / kWide] = {all, sum};
            }
        }
    }
};

}  // namespace

int num_partials(int vocab) { return (vocab + kCols - 1) / kCols; }

void logits_with_partials(const void* x, const void* weight, int rows, int depth, int vocab, void* logits,
                          Partial* partials, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    Logits product = {};
    product.left = matrix_map(x, rows, depth, kRows);
    product.right = matrix_map(weight, vocab, depth, kCols / 2);
    product.logits = static_cast<__nv_bfloat16*>(logits);
    product.partials = partials;
    product.num_partials = num_partials(vocab);
    launch("logits_with_partials", product, rows, vocab, depth, device, stream);
}

}  // namespace minitrain
