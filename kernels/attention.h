// Attention inside packed documents, forward and backward: what the launchers take. See attention.cuh for the plan.
//
// Dimensions: T queries, S keys, H query heads, K key/value heads (query head h reads key/value head h / (H / K)),
// C channels of a head, N documents. Document i is rows cu_q[i] : cu_q[i + 1] of the queries and cu_k[i] : cu_k[i + 1]
// of the keys. Query i of n and key j of m are in the same place if j == i + m - n; a query sees the keys of its
// document from look_back places before its own to look_ahead after it.
//
// All of these launch on `stream` and return; nothing waits for the device, every launch may be captured in a CUDA
// graph. Throws std::invalid_argument for a head_dim that was not built, std::runtime_error on a CUDA error.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as CUDA declares it: the bindings then compile without CUDA's headers

namespace minitrain {

constexpr int kUnbounded = 1 << 29;  // look_back, look_ahead: everything. Rows are fewer than this

// bf16 rows in packed order: element (row, head, c) is data[row * row_stride + head * head_stride + c].
// Strides are in elements, multiples of 8; data is aligned to 16 bytes.
struct Packed {
    void* data;
    int64_t row_stride, head_stride;
};

struct AttentionShape {
    int num_queries, num_keys, num_documents;  // T, S, N
    int heads, kv_heads, head_dim;             // H, K, C
    int look_back, look_ahead;
    float scale;  // of the scores, before the softmax
};

// What one CTA works on: so many queries of a head in the forward; in the backward so many keys of a key/value head and
// at most so many query heads of its group. They depend on the kernels, and so does the plan, a list of such tiles.
struct AttentionTiles {
    int queries, keys, group;
};

struct AttentionForward {
    AttentionShape shape;
    int* plan;
    Packed q, k, v;
    void* out;   // (T, H, C) bf16; rows outside of all documents become 0
    float* lse;  // (H, T): natural logarithm of the sum of exp(score); -inf where a query sees no key
};

struct AttentionBackward {
    AttentionShape shape;
    int* plan;
    Packed q, k, v, out, d_out;
    const float* lse;    // (H, T)
    const float* d_lse;  // (H, T), or null for zeros
    void* dq;       // (T, H, C) bf16; on Hopper also null: it is left as its sum, for another last step (norm_rotate.h)
    Packed dk, dv;  // (S, K, C); rows outside of all documents become 0, as of dq
    // Workspaces, uninitialised; R = attention_padded_rows.
    float* rows;         // (2, H, R)
    float* dq_sum;       // (H, R, C)
    int* turns;          // (H, R / 64)
    bool deterministic;  // dq is summed in a fixed order; else in any
    // Where groups are split into parts, null else.
    float* dkv_sum;  // (2, K, attention_padded_keys, C)
    int* dkv_turns;  // (K, S), zeros
};

// Hopper's kernels (sm_90a) take head_dim 64 and 128, the portable ones (sm_80 and later) also 96, 192 and 256.
AttentionTiles attention_tiles(int head_dim, bool hopper);

// Parts that the query heads of a group are split into in the backward.
int attention_parts(const AttentionShape& shape, AttentionTiles tiles);

// The plan of a batch of documents: made once, used by every layer and both passes. It depends on T, S, N, H and K.
// cu_q and cu_k (N + 1,) int32; if one of them does not begin at 0, decreases or exceeds its rows, there are no
// documents: all rows are outside of them. plan: attention_plan_ints(...) ints, aligned to 16 bytes. At most 8,192
// tiles of rows.
int64_t attention_plan_ints(const AttentionShape& shape, AttentionTiles tiles);
void attention_plan(const AttentionShape& shape, AttentionTiles tiles, const int* cu_q, const int* cu_k, int* plan,
                    int device, cudaStream_t stream);

// Number of the capture that the stream is in, 0 if it is in none: a plan made in a capture is made again in each
// replay.
uint64_t capture_id(cudaStream_t stream);

// One plan serves one launch at a time: launches that share it are on one stream.
void attention_forward_sm90(const AttentionForward& args, int device, cudaStream_t stream);
void attention_forward_sm80(const AttentionForward& args, int device, cudaStream_t stream);

int64_t attention_padded_rows(const AttentionShape& shape);
int64_t attention_padded_keys(const AttentionShape& shape);
void attention_backward_sm90(const AttentionBackward& args, int device, cudaStream_t stream);
void attention_backward_sm80(const AttentionBackward& args, int device, cudaStream_t stream);

}  // namespace minitrain
