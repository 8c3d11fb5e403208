// SwiGLU on Hopper: its products with the pointwise work between them done on what they leave in registers.

#include "product_sm90.cuh"
#include "swiglu.h"

namespace minitrain {
namespace {

using namespace sm90;

MINITRAIN_DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_approx(-kLog2e * x)); }

struct SwiGLUForward {
    static constexpr bool kTransB = false;
    static constexpr int kWide = kCols / 2, kStages = 5, kSideStages = 0;  // as many columns of up as of gate
    CUtensorMap left, weights[2];
    __nv_bfloat16 *gate, *up, *act;

    MINITRAIN_DEVICE void load_right(uint32_t to, Mbarrier& full, int rank, int k, int column) const {
        load_box_for_both(to + rank * (kBytesB / 2), &weights[rank], full, column, k);
    }
    template <typename Sides>
    MINITRAIN_DEVICE void finish(const Accumulator& x, const Pieces& pieces, Sides&) const {
#pragma unroll
        for (int piece = 0; piece < kWide / 8; ++piece) {
            uint32_t gates[4], ups[4], acts[4];
            Pieces::pack_pairs(x, 0, piece, gates);
            Pieces::pack_pairs(x, kWide, piece, ups);
#pragma unroll
            for (int g = 0; g < 4; ++g) {
                const float2 a = floats(gates[g]), b = floats(ups[g]);  // as they are stored
                acts[g] = pack(a.x * sigmoid(a.x) * b.x, a.y * sigmoid(a.y) * b.y);
            }
            pieces.store(gate, piece, {gather_group(gates)});
            pieces.store(up, piece, {gather_group(ups)});
            pieces.store(act, piece, {gather_group(acts)});
        }
    }
};

struct SwiGLUBackward {
    static constexpr bool kTransB = true;
    static constexpr int kWide = kCols, kStages = 4, kSideStages = 2;
    CUtensorMap left, weight, sides[2];  // gate, up
    __nv_bfloat16* out;                  // their gradients and act, side by side

    MINITRAIN_DEVICE void load_right(uint32_t to, Mbarrier& full, int rank, int k, int column) const {
        const int half = kDepth / 2 * rank;
#pragma unroll
        for (int panel = 0; panel < kCols / kPanel; ++panel) {
            load_box_for_both(to + (panel * kDepth + half) * 128, &weight, full, k + half, column + panel * kPanel);
        }
    }
    template <typename Sides>
    MINITRAIN_DEVICE void finish(const Accumulator& x, const Pieces& pieces, Sides& sides) const {
#pragma unroll
        for (int piece = 0; piece < kWide / 8; ++piece) {
            if (piece % 8 == 0) sides.wait(piece / 8);
            uint32_t d_acts[4];
            Pieces::pack_pairs(x, 0, piece, d_acts);
            uint4 d = gather_group(d_acts), gate = sides.get(0, piece), up = sides.get(1, piece);
            differentiate(d.x, gate.x, up.x);
            differentiate(d.y, gate.y, up.y);
            differentiate(d.z, gate.z, up.z);
            differentiate(d.w, gate.w, up.w);
            pieces.store<3>(out, piece, {gate, up, d});
            if (piece % 8 == 7) sides.release();
        }
    }
    // The gradient of act, gate and up become act and the gradients of gate and up.
    static MINITRAIN_DEVICE void differentiate(uint32_t& d, uint32_t& gate, uint32_t& up) {
        const float2 da = floats(d), g = floats(gate), u = floats(up);
        const float sx = sigmoid(g.x), sy = sigmoid(g.y), silu_x = g.x * sx, silu_y = g.y * sy;
        d = pack(silu_x * u.x, silu_y * u.y);
        gate = pack(da.x * u.x * (sx + silu_x * (1.0f - sx)), da.y * u.y * (sy + silu_y * (1.0f - sy)));
        up = pack(da.x * silu_x, da.y * silu_y);
    }
};

__nv_bfloat16* bf16(void* p) { return static_cast<__nv_bfloat16*>(p); }

}  // namespace

void swiglu_forward(const SwiGLU& sizes, const void* x, const void* gate_weight, const void* up_weight, void* gate,
                    void* up, void* act, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    const auto [T, D, F] = sizes;
    SwiGLUForward product = {};
    product.left = matrix_map(x, T, D, kRows);
    product.weights[0] = matrix_map(gate_weight, F, D, kCols / 2);
    product.weights[1] = matrix_map(up_weight, F, D, kCols / 2);
    product.gate = bf16(gate), product.up = bf16(up), product.act = bf16(act);
    launch("swiglu_forward", product, T, F, D, device, stream);
}

void swiglu_backward(const SwiGLU& sizes, const void* d_out, const void* down_weight, const void* gate, const void* up,
                     void* out, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    const auto [T, D, F] = sizes;
    SwiGLUBackward product = {};
    product.left = matrix_map(d_out, T, D, kRows);
    product.weight = matrix_map(down_weight, D, F, kDepth / 2);
    product.sides[0] = matrix_map(gate, T, F, kRows), product.sides[1] = matrix_map(up, T, F, kRows);
    product.out = bf16(out);
    launch("swiglu_backward", product, T, F, D, device, stream);
}

}  // namespace minitrain
