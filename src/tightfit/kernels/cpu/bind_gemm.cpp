#include <nanobind/nanobind.h>
#include <vector>
#include "bind.h"
#include "gemm.h"
namespace nb = nanobind;
using namespace tightfit;
namespace tightfit { extern size_t W_, TP_; }
void tightfit::bind_gemm(nb::module_& m) {
    m.def("gemm_tune", [](size_t w, size_t t) { W_ = w; TP_ = t; });
    m.def("gemm_scratch", &gemm_scratch);
    m.def("gemm", [](nb::tuple handles, uintptr_t x, size_t tokens, size_t x_stride, uintptr_t out, size_t out_stride, float accumulate, uintptr_t scratch, size_t threads) {
        std::vector<const Weight*> weights;
        for (nb::handle h : handles) weights.push_back(nb::cast<const Weight*>(h));
        nb::gil_scoped_release release;
        gemm(weights.data(), weights.size(), {reinterpret_cast<const float*>(x), x_stride}, tokens, {reinterpret_cast<float*>(out), out_stride}, accumulate, reinterpret_cast<uint8_t*>(scratch), threads);
    });
}
