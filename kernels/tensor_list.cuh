// One kernel over many tensors, which lie in its own arguments: no copy to the device, as many launches as they need.
//
//   tensors   |  0        | 1 |  2                  |      A CTA has a chunk of one tensor, and finds which by
//   CTAs       0  1  2  3   4   5  6  7  8  9  10  11      bisecting the tensors' first CTAs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace minitrain {

constexpr size_t kMaxArguments = 32764;  // bytes, since CUDA 12.1 on sm_70 and later

template <typename Tensor>  // has a `numel`
struct TensorList {
    static constexpr int kMax = (kMaxArguments - 256) / (sizeof(Tensor) + sizeof(int));  // the rest: other arguments
    Tensor tensors[kMax];
    int first_cta[kMax];
    int count;
    int first;  // number of tensors[0] in the whole list

    // The tensor of a CTA, and the CTA's number in it.
    __device__ const Tensor& find(int cta, int& cta_in_tensor) const {
        int low = 0, high = count;  // first_cta[low] <= cta < first_cta[high]
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (first_cta[middle] <= cta ? low : high) = middle;
        }
        cta_in_tensor = cta - first_cta[low];
        return tensors[low];
    }
};

inline int64_t num_ctas(int64_t numel, int chunk) { return (numel + chunk - 1) / chunk; }

// launch(list, CTAs) for portions of the tensors.
template <typename Tensor, typename Launch>
void for_each_list(const std::vector<Tensor>& tensors, int chunk, Launch launch) {
    using List = TensorList<Tensor>;
    for (size_t first = 0; first < tensors.size(); first += List::kMax) {
        List list = {};
        list.count = static_cast<int>(std::min<size_t>(List::kMax, tensors.size() - first));
        list.first = static_cast<int>(first);
        int64_t ctas = 0;
        for (int i = 0; i < list.count; ++i) {
            list.tensors[i] = tensors[first + i];
            list.first_cta[i] = static_cast<int>(ctas);
            ctas += num_ctas(list.tensors[i].numel, chunk);
        }
        if (ctas > 0) launch(list, static_cast<unsigned>(ctas));
    }
}

}  // namespace minitrain
