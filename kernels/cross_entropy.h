// Softmax cross-entropy over the rows of a logits matrix, its gradient written in place. See cross_entropy.cu.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as CUDA declares it: the bindings then compile without CUDA's headers

namespace minitrain {

// Of some of a row's logits: their maximum times log2(e), and the sum of 2^(x * log2(e) - max). NaNs do not move max;
// they reach the sum.
struct Partial {
    float max, sum;
};
constexpr float kNoMax = -1.7e38f;  // below any logit, and finite: (-inf) - kNoMax is -inf, never NaN

enum class Dtype { bfloat16, float32 };

// logits (rows, vocab) row-major and contiguous, targets (rows,) int64, loss (rows,) fp32; all on `device`.
//   loss   := logsumexp(logits) - logits[target], natural log; sums in fp32, the same bits in every run
//   logits := softmax(logits) - onehot(target) if write_grad, else untouched
// A row whose target is -100 gets loss 0 and gradient 0, whatever its logits. A target otherwise outside [0, vocab)
// gives that row a NaN loss, as do NaN, +inf and all -inf logits. Any vocab; rows * vocab may pass 2^31.
// partials: null, or (rows, num_partials) of all logits, which are then read once, not twice.
// Launches on `stream` and returns. Throws std::invalid_argument on sizes, std::runtime_error on a CUDA error.
void softmax_cross_entropy(void* logits, Dtype dtype, const int64_t* targets, float* loss, int64_t rows, int64_t vocab,
                           bool write_grad, const Partial* partials, int num_partials, int device, cudaStream_t stream);

// On sm_90a: logits (rows, vocab) = x (rows, depth) times weight (vocab, depth), transposed, all bf16, contiguous and
// beginning at 16 bytes, sums in fp32; and partials (rows, num_partials(vocab)). depth is a multiple of 64, vocab of 8.
int num_partials(int vocab);
void logits_with_partials(const void* x, const void* weight, int rows, int depth, int vocab, void* logits,
                          Partial* partials, int device, cudaStream_t stream);

// out[i] = x[i] * *factor in bf16, of numel elements of x in fp32 or bf16.
void scale(const void* x, bool is_bf16, const float* factor, void* out, int64_t numel, int device, cudaStream_t stream);

}  // namespace minitrain
