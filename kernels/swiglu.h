// SwiGLU: products of matrices, and the pointwise work between them while their results are in registers. On sm_90a.
//
// T tokens, D hidden, F feed-forward; D and F are multiples of 64. All tensors are bf16, contiguous and begin at 16
// bytes; sums are fp32. Launches on `stream` and returns. Throws std::runtime_error on a CUDA error.
#pragma once

typedef struct CUstream_st* cudaStream_t;  // as CUDA declares it: the bindings then compile without CUDA's headers

namespace minitrain {

struct SwiGLU {
    int tokens, hidden, inner;  // T, D, F
};

// gate, up (T, F): x (T, D) times gate_weight, up_weight (F, D), transposed. act (T, F): silu(gate) * up.
void swiglu_forward(const SwiGLU& sizes, const void* x, const void* gate_weight, const void* up_weight, void* gate,
                    void* up, void* act, int device, cudaStream_t stream);

// d_act = d_out (T, D) times down_weight (D, F) is not kept. Of it, gate and up -> out (T, 3 F): the gradients of gate
// and of up, and act again, side by side.
void swiglu_backward(const SwiGLU& sizes, const void* d_out, const void* down_weight, const void* gate, const void* up,
                     void* out, int device, cudaStream_t stream);

}  // namespace minitrain
