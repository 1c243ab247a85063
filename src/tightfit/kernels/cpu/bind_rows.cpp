// Small operations on rows, at addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "bind.h"
#include "rows.h"

namespace nb = nanobind;
using namespace tightfit;

namespace {

Activation activation_of(const std::string& name) {
    if (name == "silu") return Activation::silu;
    if (name == "gelu_pytorch_tanh") return Activation::gelu_pytorch_tanh;
    if (name == "relu") return Activation::relu;
    if (name == "clamped_swiglu") return Activation::clamped_swiglu;
    throw nb::value_error(("no kernel for the activation " + name).c_str());
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void tightfit::bind_rows(nb::module_& m) {
    m.def("rms_norm", [](uintptr_t x, size_t x_outer, size_t x_inner, size_t outer, size_t inner, size_t cols,
                         uintptr_t weight, float eps, uintptr_t out, size_t out_outer, size_t out_inner,
                         size_t threads) {
        nb::gil_scoped_release release;
        rms_norm({at<const float>(x), x_outer, x_inner}, outer, inner, cols, at<const float>(weight), eps,
                 {at<float>(out), out_outer, out_inner}, threads);
    });
    m.def("add", [](uintptr_t x, size_t x_stride, uintptr_t y, size_t y_stride, size_t rows, size_t cols, float scale,
                    size_t threads) {
        nb::gil_scoped_release release;
        add({at<float>(x), x_stride}, {at<const float>(y), y_stride}, rows, cols, scale, threads);
    });
    m.def("glu", [](uintptr_t gate, size_t gate_stride, uintptr_t up, size_t up_stride, size_t rows, size_t cols,
                    const std::string& activation, uintptr_t out, size_t out_stride, size_t threads) {
        const Activation function = activation_of(activation);
        nb::gil_scoped_release release;
        glu({at<const float>(gate), gate_stride}, {at<const float>(up), up_stride}, rows, cols, function,
            {at<float>(out), out_stride}, threads);
    });
    m.def("softcap", [](uintptr_t x, size_t x_stride, size_t rows, size_t cols, float cap, size_t threads) {
        nb::gil_scoped_release release;
        softcap({at<float>(x), x_stride}, rows, cols, cap, threads);
    });
}
