// Products with many vectors through AMX, where the level in use has it.
#include <nanobind/nanobind.h>

#include "bind.h"
#include "gemm.h"

namespace nb = nanobind;
using namespace tightfit;

void tightfit::bind_gemm(nb::module_& m) {
    m.def("has_gemm", &has_gemm);
#ifdef TIGHTFIT_X86
    m.def("gemm_scratch_nbytes", &gemm_scratch_nbytes);
    m.def("gemm", [](const Joined& matrices, uintptr_t x, size_t tokens, size_t x_stride, uintptr_t out,
                     size_t out_stride, float accumulate, uintptr_t scratch, size_t threads) {
        if (!has_gemm()) throw nb::value_error("the kernels in use have no gemm");
        nb::gil_scoped_release release;
        gemm(matrices, {reinterpret_cast<const float*>(x), x_stride}, tokens, {reinterpret_cast<float*>(out), out_stride},
             accumulate, reinterpret_cast<uint8_t*>(scratch), threads);
    });
#endif
}
