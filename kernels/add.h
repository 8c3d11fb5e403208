// Gradients in bf16 added up in fp32.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as CUDA declares it: the bindings then compile without CUDA's headers

namespace minitrain {

// total (numel,) fp32 += grad (numel,) bf16, or = grad if it is the first; both contiguous, at addresses that 16
// divides. Launches on `stream` and returns; throws std::runtime_error on a CUDA error.
void add(float* total, const void* grad, int64_t numel, bool is_first, int device, cudaStream_t stream);

}  // namespace minitrain
