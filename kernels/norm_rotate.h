// RMSNorm of each head, then rotary positions: what Qwen3 does to queries and keys before attention.
//
// Dimensions: T tokens, H heads, C channels of a head: 64, 128 or 256. Channels i and i + C / 2 turn together. Launches
// on `stream` and returns. Throws std::invalid_argument for another C, std::runtime_error on a CUDA error.
#pragma once

#include <cstdint>

#include "attention.h"  // Packed

namespace minitrain {

struct NormRotate {
    int tokens, heads, head_dim;  // T, H, C
    Packed x;
    const void* weight;      // (C,) bf16
    const float *cos, *sin;  // (T, C / 2)
    float eps;               // added to the mean square
};

// out (T, H, C) bf16
void norm_rotate(const NormRotate& args, void* out, int device, cudaStream_t stream);

// dx and weight_grad (C,) bf16. parts (num_parts, C) fp32: memory for the terms of the weight's gradient.
int norm_rotate_num_parts(int device);
void norm_rotate_backward(const NormRotate& args, const Packed& d_out, const Packed& dx, void* weight_grad,
                          float* parts, int num_parts, int device, cudaStream_t stream);

// The same of queries that attention was given, for a last step of its backward: from args.dq_sum to dx. On Hopper.
int attention_finish_num_parts(int device);
void attention_finish_through_norm_sm90(const AttentionBackward& args, const NormRotate& norm, const Packed& dx,
                                        void* weight_grad, float* parts, int num_parts, int device,
                                        cudaStream_t stream);

}  // namespace minitrain
