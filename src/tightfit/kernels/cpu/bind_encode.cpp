// Encoding of numbers at addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "bind.h"
#include "encode.h"

namespace nb = nanobind;
using namespace tightfit;

namespace {

template <class T>
double encode_at(const Tiles& tiles, uintptr_t x, size_t stride, uintptr_t scratch) {
    return encode(tiles, Rows<const T>{reinterpret_cast<const T*>(x), stride}, reinterpret_cast<float*>(scratch));
}

template <class T>
bool prune_at(const Weight& w, uintptr_t x, size_t stride, uintptr_t out, uintptr_t scratch) {
    return prune(w, Rows<const T>{reinterpret_cast<const T*>(x), stride}, reinterpret_cast<uint8_t*>(out),
                 reinterpret_cast<BF16*>(scratch));
}

}  // namespace

void tightfit::bind_encode(nb::module_& m) {
    m.def("encode_scratch", &encode_scratch);
    m.def("encode", [](const std::string& kind, size_t group, bool asymmetric, unsigned exponent_bits,
                       const std::string& type, uintptr_t x, size_t stride, size_t rows, size_t cols, uintptr_t out,
                       uintptr_t scratch) {
        const Tiles tiles{kind_of(kind), group, asymmetric, exponent_bits, reinterpret_cast<uint8_t*>(out), rows, cols};
        if (tiles.kind <= Kind::pruned || group == 0 || group % (tiles.kind == Kind::ternary ? 48 : 16))
            throw nb::value_error("groups are multiples of 16, of ternary codes of 48");
        if (tiles.kind == Kind::fp8 && (exponent_bits < 2 || exponent_bits > 5))
            throw nb::value_error("fp8 has 2 to 5 bits of exponent");
        nb::gil_scoped_release release;
        if (type == "f32") return encode_at<float>(tiles, x, stride, scratch);
        if (type == "f16") return encode_at<F16>(tiles, x, stride, scratch);
        return encode_at<BF16>(tiles, x, stride, scratch);
    });
    m.def("prune", [](const std::string& type, uintptr_t x, size_t stride, size_t rows, size_t cols, size_t kept,
                      uintptr_t out, uintptr_t scratch) {
        const Weight w{Kind::pruned, 0, false, nullptr, rows, cols, 0, nullptr, kept};
        nb::gil_scoped_release release;
        if (type == "f32") return prune_at<float>(w, x, stride, out, scratch);
        if (type == "f16") return prune_at<F16>(w, x, stride, out, scratch);
        return prune_at<BF16>(w, x, stride, out, scratch);
    });
}
