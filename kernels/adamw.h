// AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) over a list of tensors, one pass over their memory.
#pragma once

#include <cstdint>
#include <vector>

typedef struct CUstream_st* cudaStream_t;  // as CUDA declares it: the bindings then compile without CUDA's headers

namespace minitrain {

// One tensor of `numel` elements, everything contiguous, at addresses that 16 divides (16 bits: 8).
struct AdamWTensor {
    void* param;          // fp32, or of its bits the lower half, of which rounded is the upper one
    void *mean, *square;  // running ones of the gradient and of its square, fp32 or bf16
    const void* grad;     // bf16 or fp32
    void* rounded;        // bf16, gets the nearest to the new param; null: nothing to write
    const float* step;    // on the device: this step's number, from 1 on
    int64_t numel;
    bool grad_is_bf16, is_split;
};

struct AdamWSettings {
    float lr, eps, weight_decay;
    double beta1, beta2;
    const float* grad_scale;  // on the device: gradients are divided by it
    const float* broken;      // on the device: not 0 leaves everything as it is
    bool moments_are_bf16;    // mean and square are rounded at random, up or down, so that their expectation is exact
};

// Arithmetic in fp32, the same bits in every run (of one list: random bits come from a tensor's place in it). Launches
// on `stream` and returns; throws std::runtime_error on a CUDA error.
void adamw(const std::vector<AdamWTensor>& tensors, const AdamWSettings& settings, int device, cudaStream_t stream);

}  // namespace minitrain
