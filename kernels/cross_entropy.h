// Softmax cross-entropy over the rows of a logits matrix, its gradient written in place. See cross_entropy.cu.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as CUDA declares it: the bindings then compile without CUDA's headers

namespace minitrain {

enum class Dtype { bfloat16, float32 };

// logits (rows, vocab) row-major and contiguous, targets (rows,) int64, loss (rows,) fp32; all on `device`.
//   loss   := logsumexp(logits) - logits[target], natural log; sums in fp32, the same bits in every run
//   logits := softmax(logits) - onehot(target) if write_grad, else untouched
// A row whose target is -100 gets loss 0 and gradient 0, whatever its logits. A target otherwise outside [0, vocab)
// gives that row a NaN loss, as do NaN, +inf and all -inf logits. Any vocab; rows * vocab may pass 2^31.
// Launches on `stream` and returns. Throws std::invalid_argument on sizes, std::runtime_error on a CUDA error.
void softmax_cross_entropy(void* logits, Dtype dtype, const int64_t* targets, float* loss, int64_t rows, int64_t vocab,
                           bool write_grad, int device, cudaStream_t stream);

}  // namespace minitrain
