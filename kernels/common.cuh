// What every launcher needs: CUDA errors as exceptions that carry the sizes, the current device, its processors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace minitrain {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;  // softmaxes are in base 2 here

using Sizes = std::initializer_list<std::pair<const char*, int64_t>>;

// Throws std::runtime_error "what(rows=4, vocab=7): cudaErrorName: text". Costs nothing when there is no error.
inline void check(cudaError_t error, const char* what, Sizes sizes = {}) {
    if (error == cudaSuccess) return;
    std::string message = what;
    const char* before = "(";
    for (const auto& [name, value] : sizes) {
        message += before + std::string(name) + "=" + std::to_string(value);
        before = ", ";
    }
    if (sizes.size() > 0) message += ")";
    throw std::runtime_error(message + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Makes `device` the calling thread's current one while it lives, then the former one again. A thread that has not used
// it gets its context, without which there are no tensor maps.
class OnDevice {
public:
    explicit OnDevice(int device) : device_(device) {
        check(cudaGetDevice(&former_), "cudaGetDevice");
        check(cudaSetDevice(device_), "cudaSetDevice", {{"device", device_}});
    }
    ~OnDevice() {
        if (former_ != device_) cudaSetDevice(former_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int device_, former_ = 0;
};

// call(std::integral_constant<int, C>) for the head_dim C, which must be one of these.
template <int... kHeadDims, typename Call>
void for_head_dim(int head_dim, Call call) {
    const auto call_if = [&](auto C) { return head_dim == C ? (call(C), true) : false; };
    if ((call_if(std::integral_constant<int, kHeadDims>{}) || ...)) return;
    std::string known;
    ((known += (known.empty() ? "" : ", ") + std::to_string(kHeadDims)), ...);
    throw std::invalid_argument("head_dim=" + std::to_string(head_dim) + " is not in " + known);
}

inline int num_processors(int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

}  // namespace minitrain
