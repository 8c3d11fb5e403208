// Residual add and RMSNorm over the hidden width: what comes before each half of a block.
//
// Dimensions: T tokens, D channels: a multiple of 8 up to 16,384. Rows are contiguous and begin at borders of 16 bytes.
// Launches on `stream` and returns. Throws std::invalid_argument for another D, std::runtime_error on a CUDA error.
#pragma once

typedef struct CUstream_st* cudaStream_t;  // as CUDA declares it: the bindings then compile without CUDA's headers

namespace minitrain {

struct AddNorm {
    int tokens, channels;  // T, D
    const void* weight;    // (D,) bf16
    float eps;             // added to the mean square
};

// sum (T, D) = x + delta, and out (T, D) = weight * sum / rms(sum); bf16. delta null: sum is x, and not written.
void add_norm(const AddNorm& args, const void* x, const void* delta, void* sum, void* out, int device,
              cudaStream_t stream);

// dx (T, D): d_sum plus the norm's gradient; weight_grad (D,); bf16. parts (num_parts, D) fp32: memory for the terms of
// the weight's gradient.
int add_norm_num_parts(int device);
void add_norm_backward(const AddNorm& args, const void* d_out, const void* d_sum, const void* sum, void* dx,
                       void* weight_grad, float* parts, int num_parts, int device, cudaStream_t stream);

}  // namespace minitrain
