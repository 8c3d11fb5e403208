// What the attention kernels share on the device: the plan and how it is read, which keys a query sees.
//
// A plan is the list of work of one batch of documents, made on the device by attention_plan.cu:
//
//     [ counts and counters | documents | items of queries | items of keys ]      all int32
//
//     documents   N + 1 of {q_begin, q_len, k_begin, k_len}; the last one holds the rows outside of all documents: its
//                 queries see nothing, and nothing sees its keys
//     items       {document, index of the tile in it, head}: a tile of queries and a query head for the forward, a
//                 tile of keys and a part of a key/value head's group for the backward
//
// Items come in waves of whole (document, head)s, in each the most work under a causal mask first. A wave has at least
// (number of processors) x (the longest item) of work, so that its items begin together and end together: what they
// read at the same time they find in L2, and nothing long begins at the end. But no two parts of a group are in one
// wave: the later one waits for the other. A persistent CTA takes the next number from a counter.
#pragma once

#include <cuda_runtime.h>

#include "attention.h"

namespace minitrain {

// Of the sm_90a kernels. Queries: 64 a warpgroup; with 64 channels the output leaves room for a third one. Group: with
// more heads, what passes through L2 between two tiles' visits of the same queries does not fit there.
__host__ __device__ constexpr AttentionTiles hopper_tiles(int head_dim) { return {head_dim == 64 ? 192 : 128, 128, 2}; }

struct alignas(16) Document {
    int q_begin, q_len, k_begin, k_len;
};

struct Item {
    int document, tile, head;
};

struct Plan {
    int* header;  // number of items of queries, of keys; the next number for the forward, for the backward
    Document* documents;
    Item *query_items, *key_items;

    static constexpr int kHeader = 16;

    __host__ __device__ static int parts(const AttentionShape& shape, AttentionTiles tile) {
        return (shape.heads / shape.kv_heads + tile.group - 1) / tile.group;
    }
    // Heads in the list of keys: part p of key/value head h is p * kv_heads + h.
    __host__ __device__ static int key_heads(const AttentionShape& shape, AttentionTiles tile) {
        return shape.kv_heads * parts(shape, tile);
    }
    __host__ __device__ static int max_items(int rows, int tile, int num_documents, int heads) {
        return (rows / tile + num_documents + 1) * heads;
    }
    __host__ __device__ static int max_query_items(const AttentionShape& shape, AttentionTiles tile) {
        return max_items(shape.num_queries, tile.queries, shape.num_documents, shape.heads);
    }
    __host__ __device__ static int max_key_items(const AttentionShape& shape, AttentionTiles tile) {
        return max_items(shape.num_keys, tile.keys, shape.num_documents, key_heads(shape, tile));
    }
    static int64_t num_ints(const AttentionShape& shape, AttentionTiles tile) {
        return kHeader + int64_t(shape.num_documents + 1) * (sizeof(Document) / sizeof(int)) +
               (int64_t(max_query_items(shape, tile)) + max_key_items(shape, tile)) * (sizeof(Item) / sizeof(int));
    }
    __host__ __device__ Plan(int* plan, const AttentionShape& shape, AttentionTiles tile) : header(plan) {
        documents = reinterpret_cast<Document*>(plan + kHeader);
        query_items = reinterpret_cast<Item*>(documents + shape.num_documents + 1);
        key_items = query_items + max_query_items(shape, tile);
    }
    __device__ int num_query_items() const { return header[0]; }
    __device__ int num_key_items() const { return header[1]; }
    __device__ int* forward_counter() const { return header + 2; }
    __device__ int* backward_counter() const { return header + 3; }
};

// The next number of a launch, for one thread of a CTA. The CTA that gets the last number of all sets the counter back
// to 0 for the next launch: each CTA takes exactly one number that is not below num_items, and stops.
__device__ inline int next_item(int* counter, int num_items) {
    const int item = atomicAdd(counter, 1);
    if (item == num_items + static_cast<int>(gridDim.x) - 1) atomicExch(counter, 0);
    return item;
}

// The band of keys that a query sees. place: the key at the query's own place, i + m - n.
struct Band {
    int look_back, look_ahead;

    struct Range {
        int begin, end;
        __device__ bool contains(int i) const { return begin <= i && i < end; }
        __device__ int size() const { return max(0, end - begin); }
    };
    // Keys (of num_keys) that the query sees.
    __device__ Range keys(int place, int num_keys) const {
        return {max(0, place - look_back), min(num_keys, place + look_ahead + 1)};
    }
    // Blocks of keys that some query of places first .. last sees.
    __device__ Range blocks_seen(int first, int last, int num_keys, int block) const {
        const int begin = max(0, first - look_back), end = min(num_keys, last + look_ahead + 1);
        return {begin / block, end <= begin ? begin / block : (end + block - 1) / block};
    }
    // Blocks of keys that each of these queries sees whole: no mask is needed.
    __device__ Range blocks_whole(int first, int last, int num_keys, int block) const {
        const int begin = max(0, last - look_back), end = max(0, min(num_keys, first + look_ahead + 1));
        return {(begin + block - 1) / block, end / block};
    }
};

// Queries of a block in the sm_90a backward. Documents begin at its multiples in the backward's workspaces, so that a
// block there is of one document. With 64 channels there are registers for twice as many.
__host__ __device__ constexpr int query_block(int head_dim) { return head_dim == 64 ? 128 : 64; }
__device__ inline int padded_begin(const Document& doc, int index, int head_dim) {
    const int block = query_block(head_dim);
    return (doc.q_begin + index * block) / block * block;
}
constexpr int kRowsOfTurn = 64;  // of the workspaces, for which there is a number in `turns`

// First step of a backward: fills args.rows, sets turns and, if asked, dq_sum to 0, for the kernel that follows.
//   rows[h][r]      lse * log2(e), so that P = exp2(score * log2(e) - it); +inf where P is 0: padding, no visible key
//   rows[H + h][r]  D = sum over channels of d_out * out, minus d_lse, so that dS = P * (dP - D); 0 in the padding
void attention_prepare(const AttentionBackward& args, AttentionTiles tile, bool clear_dq_sum, int device,
                       cudaStream_t stream);

// Last step of a Hopper backward: from args.dq_sum to args.dq.
void attention_finish_sm90(const AttentionBackward& args, int device, cudaStream_t stream);

}  // namespace minitrain
