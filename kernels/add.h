// Gradients in bf16 added up in fp32: of rows, and of ranks.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as CUDA declares it: the bindings then compile without CUDA's headers

namespace minitrain {

// total (numel,) fp32 += each of terms (num_terms, numel) bf16, in their order; is_first: total begins at zero. Both
// contiguous, every row at an address that 16 divides. Launches on `stream` and returns; throws std::runtime_error on a
// CUDA error.
void add(float* total, const void* terms, int num_terms, int64_t numel, bool is_first, int device, cudaStream_t stream);

}  // namespace minitrain
