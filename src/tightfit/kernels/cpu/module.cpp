// The Python module: which instruction set is in use, and the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "levels.h"

namespace nb = nanobind;
using namespace tightfit;

NB_MODULE(_cpu, m) {
    m.def("supported", [] {
        std::vector<std::string> names;
        for (Level level : supported_levels()) names.push_back(name_of(level));
        return names;
    });
    m.def("chosen", [] { return std::string(name_of(level())); });
    m.def("choose", &choose);
    bind_matmul(m);
    bind_attention(m);
    bind_pages(m);
    bind_lists(m);
    bind_rows(m);
    bind_encode(m);
    bind_ggml(m);
    bind_gemm(m);
}
