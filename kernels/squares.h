// The sum of the squares of many tensors, for the norm of a whole gradient.
#pragma once

#include <cstdint>
#include <vector>

typedef struct CUstream_st* cudaStream_t;  // as CUDA declares it: the bindings then compile without CUDA's headers

namespace minitrain {

struct Gradient {
    const void* data;  // contiguous, at an address that 16 divides
    int64_t numel;
    bool is_bf16;  // else fp32
};

// parts (num_square_parts(tensors),) fp32: their sum is that of all squares. The same bits in every run. Launches on
// `stream` and returns; throws std::runtime_error on a CUDA error.
int64_t num_square_parts(const std::vector<Gradient>& tensors);
void squares(const std::vector<Gradient>& tensors, float* parts, int device, cudaStream_t stream);

}  // namespace minitrain
