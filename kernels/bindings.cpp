// The Python module minitrain.kernels: one function per launcher. Pointers and streams are Python ints; dtypes, shapes,
// strides and devices have been checked by the caller in Python. Sees neither torch's nor CUDA's headers.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cross_entropy.h"

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

minitrain::Dtype dtype_of(const std::string& name) {
    if (name == "bfloat16") return minitrain::Dtype::bfloat16;
    if (name == "float32") return minitrain::Dtype::float32;
    throw std::invalid_argument("dtype='" + name + "' is not supported; use 'bfloat16' or 'float32'");
}

}  // namespace

PYBIND11_MODULE(kernels, m) {
    namespace py = pybind11;
    m.doc() = "minitrain's CUDA kernels: each function launches on the stream it is given and returns at once.";
    m.attr("archs") = MINITRAIN_ARCHS;  // what it was built for, for example "80;90a"

    m.def(
        "softmax_cross_entropy_",
        [](uintptr_t logits, const std::string& dtype, uintptr_t targets, uintptr_t loss, int64_t rows, int64_t vocab,
           bool write_grad, int device, uintptr_t stream) {
            minitrain::softmax_cross_entropy(pointer<void>(logits), dtype_of(dtype), pointer<const int64_t>(targets),
                                             pointer<float>(loss), rows, vocab, write_grad, device, stream_of(stream));
        },
        py::arg("logits"), py::arg("dtype"), py::arg("targets"), py::arg("loss"), py::arg("rows"), py::arg("vocab"),
        py::arg("write_grad"), py::arg("device"), py::arg("stream"),
        "loss := logsumexp - logit[target] per row; if write_grad, logits := softmax - onehot(target), in place.\n"
        "logits (rows, vocab) contiguous, targets (rows,) int64 with -100 for rows to skip, loss (rows,) fp32.");
}
