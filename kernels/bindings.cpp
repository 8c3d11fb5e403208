// The Python module minitrain.kernels: one function per launcher. Pointers and streams are Python ints; dtypes, shapes,
// strides and devices have been checked by the caller in Python. Sees neither torch's nor CUDA's headers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "adamw.h"
#include "add.h"
#include "add_norm.h"
#include "attention.h"
#include "cross_entropy.h"
#include "norm_rotate.h"
#include "routed_rows.h"
#include "squares.h"
#include "swiglu.h"

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

using Tiles = std::tuple<int, int, int>;  // AttentionTiles

minitrain::AttentionTiles tiles_of(const Tiles& tiles) {
    return std::apply([](auto... n) { return minitrain::AttentionTiles{n...}; }, tiles);
}

[[noreturn]] void no_hopper() { throw std::invalid_argument("hopper=True, but built for " MINITRAIN_ARCHS); }

}  // namespace

PYBIND11_MODULE(kernels, m) {
    namespace py = pybind11;
    m.doc() = "minitrain's CUDA kernels: each function launches on the stream it is given and returns at once.";
    m.attr("archs") = MINITRAIN_ARCHS;  // what it was built for, for example "80;90a"

    m.def(
        "softmax_cross_entropy_",
        [](uintptr_t logits, const std::string& dtype, uintptr_t targets, uintptr_t loss, int64_t rows, int64_t vocab,
           bool write_grad, int device, uintptr_t stream, uintptr_t partials, int num_partials) {
            minitrain::softmax_cross_entropy(pointer<void>(logits), dtype_of(dtype), pointer<const int64_t>(targets),
                                             pointer<float>(loss), rows, vocab, write_grad,
                                             pointer<const minitrain::Partial>(partials), num_partials, device,
                                             stream_of(stream));
        },
        py::arg("logits"), py::arg("dtype"), py::arg("targets"), py::arg("loss"), py::arg("rows"), py::arg("vocab"),
        py::arg("write_grad"), py::arg("device"), py::arg("stream"), py::arg("partials") = 0,
        py::arg("num_partials") = 0,
        "loss := logsumexp - logit[target] per row; if write_grad, logits := softmax - onehot(target), in place.\n"
        "logits (rows, vocab) contiguous, targets (rows,) int64 with -100 for rows to skip, loss (rows,) fp32.");

    m.def(
        "scale",
        [](uintptr_t x, bool is_bf16, uintptr_t factor, uintptr_t out, int64_t numel, int device, uintptr_t stream) {
            minitrain::scale(pointer<void>(x), is_bf16, pointer<float>(factor), pointer<void>(out), numel, device,
                             stream_of(stream));
        },
        py::kw_only(), py::arg("x"), py::arg("is_bf16"), py::arg("factor"), py::arg("out"), py::arg("numel"),
        py::arg("device"), py::arg("stream"));
#if MINITRAIN_SM90
    m.def("num_partials", &minitrain::num_partials, py::arg("vocab"));
    m.def(
        "logits_with_partials",
        [](uintptr_t x, uintptr_t weight, int rows, int depth, int vocab, uintptr_t logits, uintptr_t partials,
           int device, uintptr_t stream) {
            minitrain::logits_with_partials(pointer<void>(x), pointer<void>(weight), rows, depth, vocab,
                                            pointer<void>(logits), pointer<minitrain::Partial>(partials), device,
                                            stream_of(stream));
        },
        py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("rows"), py::arg("depth"), py::arg("vocab"),
        py::arg("logits"), py::arg("partials"), py::arg("device"), py::arg("stream"));
#endif

    // Attention: kernels/attention.h says what the arguments are.
    using minitrain::AttentionShape;
    using minitrain::Packed;
    py::class_<AttentionShape>(m, "AttentionShape")
        .def(py::init([](int num_queries, int num_keys, int num_documents, int heads, int kv_heads, int head_dim,
                         int look_back, int look_ahead, float scale) {
                 return AttentionShape{num_queries, num_keys,  num_documents, heads, kv_heads,
                                       head_dim,    look_back, look_ahead,    scale};
             }),
             py::kw_only(), py::arg("num_queries"), py::arg("num_keys"), py::arg("num_documents"), py::arg("heads"),
             py::arg("kv_heads"), py::arg("head_dim"), py::arg("look_back"), py::arg("look_ahead"), py::arg("scale"))
        .def_readonly("num_queries", &AttentionShape::num_queries)
        .def_readonly("num_keys", &AttentionShape::num_keys)
        .def_readonly("heads", &AttentionShape::heads)
        .def_readonly("kv_heads", &AttentionShape::kv_heads);
    py::class_<Packed>(m, "Packed").def(py::init([](uintptr_t data, int64_t row_stride, int64_t head_stride) {
        return Packed{pointer<void>(data), row_stride, head_stride};
    }));
    m.attr("UNBOUNDED") = minitrain::kUnbounded;
    m.def(
        "capture_id", [](uintptr_t stream) { return minitrain::capture_id(stream_of(stream)); },
        "Number of the CUDA graph capture that the stream is in, 0 if it is in none.");
    m.def("attention_tiles", [](int head_dim, bool hopper) {
        const auto tiles = minitrain::attention_tiles(head_dim, hopper);
        return Tiles(tiles.queries, tiles.keys, tiles.group);
    });
    m.def("attention_parts", [](const AttentionShape& shape, const Tiles& tiles) {
        return minitrain::attention_parts(shape, tiles_of(tiles));
    });
    m.def("attention_plan_ints", [](const AttentionShape& shape, const Tiles& tiles) {
        return minitrain::attention_plan_ints(shape, tiles_of(tiles));
    });
    m.def(
        "attention_plan",
        [](const AttentionShape& shape, const Tiles& tiles, uintptr_t cu_q, uintptr_t cu_k, uintptr_t plan, int device,
           uintptr_t stream) {
            minitrain::attention_plan(shape, tiles_of(tiles), pointer<const int>(cu_q), pointer<const int>(cu_k),
                                      pointer<int>(plan), device, stream_of(stream));
        },
        py::arg("shape"), py::arg("tiles"), py::arg("cu_q"), py::arg("cu_k"), py::arg("plan"), py::arg("device"),
        py::arg("stream"));
    m.def(
        "attention_forward",
        [](const AttentionShape& shape, uintptr_t plan, Packed q, Packed k, Packed v, uintptr_t out, uintptr_t lse,
           bool hopper, int device, uintptr_t stream) {
            const minitrain::AttentionForward args = {
                shape, pointer<int>(plan), q, k, v, pointer<void>(out), pointer<float>(lse)};
#if MINITRAIN_SM90
            if (hopper) return minitrain::attention_forward_sm90(args, device, stream_of(stream));
#endif
            if (hopper) no_hopper();
            minitrain::attention_forward_sm80(args, device, stream_of(stream));
        },
        py::arg("shape"), py::arg("plan"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
        py::arg("hopper"), py::arg("device"), py::arg("stream"));
    m.def("attention_padded_rows", &minitrain::attention_padded_rows);
    m.def("attention_padded_keys", &minitrain::attention_padded_keys);
    m.def(
        "attention_backward",
        [](const AttentionShape& shape, uintptr_t plan, Packed q, Packed k, Packed v, Packed out, Packed d_out,
           uintptr_t lse, uintptr_t d_lse, uintptr_t dq, Packed dk, Packed dv, uintptr_t rows, uintptr_t dq_sum,
           uintptr_t turns, uintptr_t dkv_sum, uintptr_t dkv_turns, bool deterministic, bool hopper, int device,
           uintptr_t stream) {
            const minitrain::AttentionBackward args = {shape,
                                                       pointer<int>(plan),
                                                       q,
                                                       k,
                                                       v,
                                                       out,
                                                       d_out,
                                                       pointer<float>(lse),
                                                       pointer<float>(d_lse),
                                                       pointer<void>(dq),
                                                       dk,
                                                       dv,
                                                       pointer<float>(rows),
                                                       pointer<float>(dq_sum),
                                                       pointer<int>(turns),
                                                       deterministic,
                                                       pointer<float>(dkv_sum),
                                                       pointer<int>(dkv_turns)};
#if MINITRAIN_SM90
            if (hopper) return minitrain::attention_backward_sm90(args, device, stream_of(stream));
#endif
            if (hopper) no_hopper();
            minitrain::attention_backward_sm80(args, device, stream_of(stream));
        },
        py::arg("shape"), py::arg("plan"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("d_out"),
        py::arg("lse"), py::arg("d_lse"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("rows"),
        py::arg("dq_sum"), py::arg("turns"), py::arg("dkv_sum"), py::arg("dkv_turns"), py::arg("deterministic"),
        py::arg("hopper"), py::arg("device"), py::arg("stream"));

    // kernels/adamw.h. A tensor is (param, mean, square, grad, rounded, step, numel, whether grad is bf16,
    // whether param is split).
    using AdamWTensor =
        std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, bool, bool>;
    m.def(
        "adamw",
        [](const std::vector<AdamWTensor>& given, float lr, double beta1, double beta2, float eps, float weight_decay,
           uintptr_t grad_scale, uintptr_t broken, bool moments_are_bf16, int device, uintptr_t stream) {
            std::vector<minitrain::AdamWTensor> tensors;
            for (const auto& [param, mean, square, grad, rounded, step, numel, is_bf16, is_split] : given) {
                tensors.push_back({pointer<void>(param), pointer<void>(mean), pointer<void>(square),
                                   pointer<void>(grad), pointer<void>(rounded), pointer<float>(step), numel, is_bf16,
                                   is_split});
            }
            const minitrain::AdamWSettings settings = {lr,
                                                       eps,
                                                       weight_decay,
                                                       beta1,
                                                       beta2,
                                                       pointer<float>(grad_scale),
                                                       pointer<float>(broken),
                                                       moments_are_bf16};
            minitrain::adamw(tensors, settings, device, stream_of(stream));
        },
        py::arg("tensors"), py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("grad_scale"), py::arg("broken"), py::arg("moments_are_bf16"),
        py::arg("device"), py::arg("stream"));

    // kernels/add.h.
    m.def("add", [](uintptr_t total, uintptr_t terms, int num_terms, int64_t numel, bool is_first, int device,
                    uintptr_t stream) {
        minitrain::add(pointer<float>(total), pointer<void>(terms), num_terms, numel, is_first, device,
                       stream_of(stream));
    });

    // kernels/squares.h.
    using minitrain::Gradient;
    py::class_<Gradient>(m, "Gradient").def(py::init([](uintptr_t data, int64_t numel, bool is_bf16) {
        return Gradient{pointer<void>(data), numel, is_bf16};
    }));
    m.def("num_square_parts", &minitrain::num_square_parts);
    m.def("squares", [](const std::vector<Gradient>& tensors, uintptr_t parts, int device, uintptr_t stream) {
        minitrain::squares(tensors, pointer<float>(parts), device, stream_of(stream));
    });

    // RMSNorm of each head and rotary positions: kernels/norm_rotate.h.
    using minitrain::NormRotate;
    py::class_<NormRotate>(m, "NormRotate")
        .def(py::init([](int tokens, int heads, int head_dim, Packed x, uintptr_t weight, uintptr_t cos, uintptr_t sin,
                         float eps) {
                 return NormRotate{
                     tokens, heads, head_dim, x, pointer<void>(weight), pointer<float>(cos), pointer<float>(sin), eps};
             }),
             py::kw_only(), py::arg("tokens"), py::arg("heads"), py::arg("head_dim"), py::arg("x"), py::arg("weight"),
             py::arg("cos"), py::arg("sin"), py::arg("eps"));
    m.def(
        "norm_rotate",
        [](const NormRotate& args, uintptr_t out, int device, uintptr_t stream) {
            minitrain::norm_rotate(args, pointer<void>(out), device, stream_of(stream));
        },
        py::arg("args"), py::kw_only(), py::arg("out"), py::arg("device"), py::arg("stream"));
    m.def("norm_rotate_num_parts", &minitrain::norm_rotate_num_parts);
    m.def(
        "norm_rotate_backward",
        [](const NormRotate& args, Packed d_out, Packed dx, uintptr_t weight_grad, uintptr_t parts, int num_parts,
           int device, uintptr_t stream) {
            minitrain::norm_rotate_backward(args, d_out, dx, pointer<void>(weight_grad), pointer<float>(parts),
                                            num_parts, device, stream_of(stream));
        },
        py::arg("args"), py::kw_only(), py::arg("d_out"), py::arg("dx"), py::arg("weight_grad"), py::arg("parts"),
        py::arg("num_parts"), py::arg("device"), py::arg("stream"));
#if MINITRAIN_SM90
    m.def("attention_finish_num_parts", &minitrain::attention_finish_num_parts);
    m.def(
        "attention_finish_through_norm",
        [](const NormRotate& norm, const AttentionShape& shape, uintptr_t plan, uintptr_t dq_sum, uintptr_t turns,
           Packed dx, uintptr_t weight_grad, uintptr_t parts, int num_parts, int device, uintptr_t stream) {
            minitrain::AttentionBackward args = {};
            args.shape = shape, args.plan = pointer<int>(plan);
            args.dq_sum = pointer<float>(dq_sum), args.turns = pointer<int>(turns);
            minitrain::attention_finish_through_norm_sm90(args, norm, dx, pointer<void>(weight_grad),
                                                          pointer<float>(parts), num_parts, device, stream_of(stream));
        },
        py::arg("norm"), py::kw_only(), py::arg("shape"), py::arg("plan"), py::arg("dq_sum"), py::arg("turns"),
        py::arg("dx"), py::arg("weight_grad"), py::arg("parts"), py::arg("num_parts"), py::arg("device"),
        py::arg("stream"));
#endif

    // Residual add and RMSNorm over the hidden width: kernels/add_norm.h.
    using minitrain::AddNorm;
    py::class_<AddNorm>(m, "AddNorm")
        .def(py::init([](int tokens, int channels, uintptr_t weight, float eps) {
                 return AddNorm{tokens, channels, pointer<void>(weight), eps};
             }),
             py::kw_only(), py::arg("tokens"), py::arg("channels"), py::arg("weight"), py::arg("eps"));
    m.def(
        "add_norm",
        [](const AddNorm& args, uintptr_t x, uintptr_t delta, uintptr_t sum, uintptr_t out, int device,
           uintptr_t stream) {
            minitrain::add_norm(args, pointer<void>(x), pointer<void>(delta), pointer<void>(sum), pointer<void>(out),
                                device, stream_of(stream));
        },
        py::arg("args"), py::kw_only(), py::arg("x"), py::arg("delta"), py::arg("sum"), py::arg("out"),
        py::arg("device"), py::arg("stream"));
    m.def("add_norm_num_parts", &minitrain::add_norm_num_parts);
    m.def(
        "add_norm_backward",
        [](const AddNorm& args, uintptr_t d_out, uintptr_t d_sum, uintptr_t sum, uintptr_t dx, uintptr_t weight_grad,
           uintptr_t parts, int num_parts, int device, uintptr_t stream) {
            minitrain::add_norm_backward(args, pointer<void>(d_out), pointer<void>(d_sum), pointer<void>(sum),
                                         pointer<void>(dx), pointer<void>(weight_grad), pointer<float>(parts),
                                         num_parts, device, stream_of(stream));
        },
        py::arg("args"), py::kw_only(), py::arg("d_out"), py::arg("d_sum"), py::arg("sum"), py::arg("dx"),
        py::arg("weight_grad"), py::arg("parts"), py::arg("num_parts"), py::arg("device"), py::arg("stream"));

    // kernels/swiglu.h.
#if MINITRAIN_SM90
    using minitrain::SwiGLU;
    py::class_<SwiGLU>(m, "SwiGLU")
        .def(py::init([](int tokens, int hidden, int inner) { return SwiGLU{tokens, hidden, inner}; }), py::kw_only(),
             py::arg("tokens"), py::arg("hidden"), py::arg("inner"));
    m.def(
        "swiglu_forward",
        [](const SwiGLU& sizes, uintptr_t x, uintptr_t gate_weight, uintptr_t up_weight, uintptr_t gate, uintptr_t up,
           uintptr_t act, int device, uintptr_t stream) {
            minitrain::swiglu_forward(sizes, pointer<void>(x), pointer<void>(gate_weight), pointer<void>(up_weight),
                                      pointer<void>(gate), pointer<void>(up), pointer<void>(act), device,
                                      stream_of(stream));
        },
        py::arg("sizes"), py::kw_only(), py::arg("x"), py::arg("gate_weight"), py::arg("up_weight"), py::arg("gate"),
        py::arg("up"), py::arg("act"), py::arg("device"), py::arg("stream"));
    m.def(
        "swiglu_backward",
        [](const SwiGLU& sizes, uintptr_t d_out, uintptr_t down_weight, uintptr_t gate, uintptr_t up, uintptr_t out,
           int device, uintptr_t stream) {
            minitrain::swiglu_backward(sizes, pointer<void>(d_out), pointer<void>(down_weight), pointer<void>(gate),
                                       pointer<void>(up), pointer<void>(out), device, stream_of(stream));
        },
        py::arg("sizes"), py::kw_only(), py::arg("d_out"), py::arg("down_weight"), py::arg("gate"), py::arg("up"),
        py::arg("out"), py::arg("device"), py::arg("stream"));
#endif

    // Rows of tokens to the order of experts and back: kernels/routed_rows.h.
    using minitrain::RoutedRows;
    py::class_<RoutedRows>(m, "RoutedRows")
        .def(py::init([](int tokens, int copies, int channels, uintptr_t place, uintptr_t weights) {
                 return RoutedRows{tokens, copies, channels, pointer<int64_t>(place), pointer<float>(weights)};
             }),
             py::kw_only(), py::arg("tokens"), py::arg("copies"), py::arg("channels"), py::arg("place"),
             py::arg("weights"));
    m.def(
        "spread_rows",
        [](const RoutedRows& args, uintptr_t x, uintptr_t out, uintptr_t y, uintptr_t dots, int device,
           uintptr_t stream) {
            minitrain::spread_rows(args, pointer<void>(x), pointer<void>(out), pointer<void>(y), pointer<float>(dots),
                                   device, stream_of(stream));
        },
        py::arg("args"), py::arg("x"), py::arg("out"), py::arg("y"), py::arg("dots"), py::arg("device"),
        py::arg("stream"));
    m.def(
        "sum_rows",
        [](const RoutedRows& args, uintptr_t x, uintptr_t out, int device, uintptr_t stream) {
            minitrain::sum_rows(args, pointer<void>(x), pointer<void>(out), device, stream_of(stream));
        },
        py::arg("args"), py::arg("x"), py::arg("out"), py::arg("device"), py::arg("stream"));
}
