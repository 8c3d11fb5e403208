// Rows of tokens, copied to the order of their experts and summed back.
//
// Dimensions: T tokens, A copies of each, R = T * A rows, D channels, a multiple of 8. Copy a of token t is row
// place[t * A + a] of R. All is bf16 but where it says fp32. Launches on `stream` and returns; throws
// std::runtime_error on a CUDA error.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as CUDA declares it: the bindings then compile without CUDA's headers

namespace minitrain {

struct RoutedRows {
    int tokens, copies, channels;  // T, A, D
    const int64_t* place;          // (T, A)
    const float* weights;          // (T, A) fp32 factors of the copies; null: 1
};

// out (R, D): out[place[t, a]] = weights[t, a] * x[t].
// y (R, D) or null; with it dots (T, A) fp32: sum over channels of x[t] * y[place[t, a]].
void spread_rows(const RoutedRows& args, const void* x, void* out, const void* y, float* dots, int device,
                 cudaStream_t stream);

// out (T, D): out[t] = sum over a, in this order and in fp32, of weights[t, a] * x[place[t, a]].
void sum_rows(const RoutedRows& args, const void* x, void* out, int device, cudaStream_t stream);

}  // namespace minitrain
