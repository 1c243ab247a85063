// Blocks of GGUF files at addresses, to tiles.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <iterator>

#include "bind.h"
#include "ggml.h"

namespace nb = nanobind;
using namespace tightfit;

constexpr const char* TYPES[] = {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4"};

void tightfit::bind_ggml(nb::module_& m) {
    m.def("repack", [](const std::string& type, uintptr_t stored, size_t rows, size_t blocks, uintptr_t tiles) {
        size_t i = 0;
        while (i < std::size(TYPES) && type != TYPES[i]) i++;
        if (i == std::size(TYPES)) throw nb::value_error(("no kernel for blocks of type " + type).c_str());
        nb::gil_scoped_release release;
        return repack(static_cast<Ggml>(i), reinterpret_cast<const uint8_t*>(stored), rows, blocks,
                      reinterpret_cast<uint8_t*>(tiles));
    });
}
