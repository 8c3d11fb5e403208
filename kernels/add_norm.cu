// Residual add and RMSNorm in one pass, and their gradient, which adds that of the residual stream, in another. Bound:
// memory, 8 bytes a channel each way. 1 / rms is made again backward instead of being kept. All arithmetic in fp32.
//
// A row's threads are some warps, and a thread has the same kVectors times 16 bytes of each of its rows, which it reads
// once and keeps as bf16 until the row's sums are known: the weight's gradient stays in registers over all rows. One
// CTA a processor has several rows at a time, whose warps wait for nobody else: 40 to 100 KB are on their way.

#include <stdexcept>
#include <string>

#include "add_norm.h"
#include "common.cuh"
#include "sum_parts.cuh"
#include "vectors.cuh"

namespace minitrain {
namespace {

constexpr int kMaxWarps = 16;  // of a row

// Of a CTA, at most: what 65,536 registers allow.
template <int kVectors>
constexpr int kForwardWarps = kVectors == 4 ? 24 : 32;
template <int kVectors>
constexpr int kBackwardWarps = kVectors == 4 ? 16 : 24;

// A thread's place: vectors first, first + step, ... of the rows first_row, first_row + rows_step, ...
struct Mine {
    int num_vectors;              // of a row
    int row_in_cta, first, step;  // step: threads of a row
    int64_t first_row, rows_step;

    __device__ Mine(int channels, int threads) : num_vectors(channels / kEach), step(threads) {
        row_in_cta = threadIdx.x / threads, first = threadIdx.x % threads;
        const int rows = blockDim.x / threads;
        first_row = int64_t(blockIdx.x) * rows + row_in_cta, rows_step = int64_t(gridDim.x) * rows;
    }
    __device__ int vector(int j) const { return first + j * step; }
    __device__ bool has(int j) const { return vector(j) < num_vectors; }
};

// Zeros beyond the row's end, and if from is null.
template <int kVectors>
__device__ void load(uint4 (&to)[kVectors], const void* from, int64_t row, const Mine& mine) {
    const uint4* vectors = static_cast<const uint4*>(from) + row * mine.num_vectors;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
        to[j] = from != nullptr && mine.has(j) ? vectors[mine.vector(j)] : uint4{0, 0, 0, 0};
    }
}

__device__ void store(void* to, int64_t row, const Mine& mine, int j, const uint4& bits) {
    if (mine.has(j)) static_cast<uint4*>(to)[row * mine.num_vectors + mine.vector(j)] = bits;
}

// What was made of them is made again instead of being kept: unpacked, a row takes twice as many registers.
template <int kVectors>
__device__ void forget_unpacked(uint4 (&vectors)[kVectors]) {
#pragma unroll
    for (uint4& bits : vectors) asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
}

__device__ void sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Of each of `sums` the sum over a row's threads. Rows take the two halves of of_warp in turn (`is_odd`): a warp that
// is ahead does not write where others of its row read still.
template <int kSums>
__device__ void sum_over_row(float (&sums)[kSums], float (&of_warp)[2][32][kSums], bool is_odd, const Mine& mine) {
#pragma unroll
    for (float& sum : sums) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    }
    if (mine.step == 32) return;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
        if (threadIdx.x % 32 == 0) of_warp[is_odd][threadIdx.x / 32][s] = sums[s];
        sums[s] = 0.0f;
    }
    sync(1 + mine.row_in_cta, mine.step);
    const int warps = mine.step / 32, first = mine.row_in_cta * warps;
#pragma unroll 4
    for (int w = first; w < first + warps; ++w) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) sums[s] += of_warp[is_odd][w][s];
    }
}

template <int kVectors>
__global__ void __launch_bounds__(32 * kForwardWarps<kVectors>, 1)
    forward_kernel(const AddNorm args, int threads_of_row, const void* x, const void* delta, void* sum, void* out) {
    __shared__ float of_warp[2][32][1];
    const Mine mine(args.channels, threads_of_row);
    const float share = 1.0f / args.channels;  // of a channel in a mean
    bool is_odd = false;
    for (int64_t row = mine.first_row; row < args.tokens; row += mine.rows_step, is_odd = !is_odd) {
        uint4 bits[kVectors], added[kVectors], weight[kVectors];
        load(bits, x, row, mine);
        load(added, delta, row, mine);
        float squares[1] = {};
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            float a[kEach], b[kEach];
            unpack8(a, bits[j]);
            if (delta != nullptr) {
                unpack8(b, added[j]);
#pragma unroll
                for (int i = 0; i < kEach; ++i) a[i] += b[i];
                bits[j] = pack8(a);
                store(sum, row, mine, j, bits[j]);
                unpack8(a, bits[j]);  // the norm's input is what others read
            }
#pragma unroll
            for (int i = 0; i < kEach; ++i) squares[0] = fmaf(a[i], a[i], squares[0]);
        }
        load(weight, args.weight, 0, mine);  // from L1
        sum_over_row(squares, of_warp, is_odd, mine);
        const float scale = rsqrtf(squares[0] * share + args.eps);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            float a[kEach], w[kEach];
            unpack8(a, bits[j]);
            unpack8(w, weight[j]);
#pragma unroll
            for (int i = 0; i < kEach; ++i) a[i] *= scale * w[i];
            store(out, row, mine, j, pack8(a));
        }
    }
}

// With n = sum / rms, out = weight n and dn = weight d_out: the norm's gradient is (dn - n mean(dn n)) / rms, and the
// weight's the sum of d_out n.
template <int kVectors>
__global__ void __launch_bounds__(32 * kBackwardWarps<kVectors>, 1)
    backward_kernel(const AddNorm args, int threads_of_row, const void* d_out, const void* d_sum, const void* sum,
                    void* dx, float* parts) {
    __shared__ float of_warp[2][32][2];
    __shared__ float4 of_thread[32 * kBackwardWarps<kVectors>][2];
    const Mine mine(args.channels, threads_of_row);
    const float share = 1.0f / args.channels;
    float grad[kVectors][kEach] = {};  // of the weight
    bool is_odd = false;
    for (int64_t row = mine.first_row; row < args.tokens; row += mine.rows_step, is_odd = !is_odd) {
        uint4 x[kVectors], d[kVectors], other[kVectors], weight[kVectors];
        load(x, sum, row, mine);
        load(d, d_out, row, mine);
        load(other, d_sum, row, mine);
        load(weight, args.weight, 0, mine);  // from L1
        float sums[2] = {};                  // of squares, and of dn sum
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            float xs[kEach], ds[kEach], w[kEach];
            unpack8(xs, x[j]);
            unpack8(ds, d[j]);
            unpack8(w, weight[j]);
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                sums[0] = fmaf(xs[i], xs[i], sums[0]);
                sums[1] = fmaf(ds[i] * w[i], xs[i], sums[1]);
            }
        }
        sum_over_row(sums, of_warp, is_odd, mine);
        forget_unpacked(x);
        forget_unpacked(d);
        load(weight, args.weight, 0, mine);  // again: no register is left to keep it
        const float scale = rsqrtf(sums[0] * share + args.eps);
        const float along = sums[1] * share * scale * scale;  // how much of sum is in dn
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            float xs[kEach], ds[kEach], w[kEach], dxs[kEach];
            unpack8(xs, x[j]);
            unpack8(ds, d[j]);
            unpack8(w, weight[j]);
            unpack8(dxs, other[j]);
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                grad[j][i] = fmaf(ds[i], xs[i] * scale, grad[j][i]);
                dxs[i] = fmaf(fmaf(ds[i], w[i], -along * xs[i]), scale, dxs[i]);
            }
            store(dx, row, mine, j, pack8(dxs));
        }
    }
    // The weight's gradient over the rows that the CTA has at a time.
    float4* const part = reinterpret_cast<float4*>(parts) + int64_t(blockIdx.x) * mine.num_vectors * 2;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
        float4* const mine_of_thread = of_thread[threadIdx.x];
        mine_of_thread[0] = make_float4(grad[j][0], grad[j][1], grad[j][2], grad[j][3]);
        mine_of_thread[1] = make_float4(grad[j][4], grad[j][5], grad[j][6], grad[j][7]);
        __syncthreads();
        for (int half = 0; half < 2 && mine.row_in_cta == 0 && mine.has(j); ++half) {
            float4 total = of_thread[mine.first][half];
            for (int t = mine.first + mine.step; t < blockDim.x; t += mine.step) {
                const float4 term = of_thread[t][half];
                total.x += term.x, total.y += term.y, total.z += term.z, total.w += term.w;
            }
            part[mine.vector(j) * 2 + half] = total;
        }
        __syncthreads();
    }
}

// call(std::integral_constant<int, kVectors>, warps of a row): the fewest vectors beyond its end, then the fewest
// warps.
template <typename Call>
void for_layout(const AddNorm& args, const char* what, Call call) {
    const int num_vectors = args.channels / kEach;
    const auto warps = [=](int vectors) { return (num_vectors + 32 * vectors - 1) / (32 * vectors); };
    if (args.channels < 1 || args.channels % kEach || warps(4) > kMaxWarps) {
        throw std::invalid_argument("channels=" + std::to_string(args.channels) +
                                    " is not a multiple of 8 between 8 and 16384");
    }
    if (4 * warps(4) <= 2 * warps(2) || warps(2) > kMaxWarps) {
        call(std::integral_constant<int, 4>{}, warps(4));
    } else {
        call(std::integral_constant<int, 2>{}, warps(2));
    }
    check(cudaGetLastError(), what, {{"tokens", args.tokens}, {"channels", args.channels}});
}

}  // namespace

void add_norm(const AddNorm& args, const void* x, const void* delta, void* sum, void* out, int device,
              cudaStream_t stream) {
    const OnDevice guard(device);
    for_layout(args, "add_norm", [&](auto vectors, int warps) {
        const int rows = kForwardWarps<vectors> / warps;
        forward_kernel<vectors>
            <<<num_processors(device), 32 * warps * rows, 0, stream>>>(args, 32 * warps, x, delta, sum, out);
    });
}

int add_norm_num_parts(int device) { return num_processors(device); }

void add_norm_backward(const AddNorm& args, const void* d_out, const void* d_sum, const void* sum, void* dx,
                       void* weight_grad, float* parts, int num_parts, int device, cudaStream_t stream) {
    const OnDevice guard(device);
    for_layout(args, "add_norm_backward", [&](auto vectors, int warps) {
        const int rows = kBackwardWarps<vectors> / warps;
        backward_kernel<vectors>
            <<<num_parts, 32 * warps * rows, 0, stream>>>(args, 32 * warps, d_out, d_sum, sum, dx, parts);
        sum_parts(parts, num_parts, args.channels, weight_grad, stream);
    });
}

}  // namespace minitrain
