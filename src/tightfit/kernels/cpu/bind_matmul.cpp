// Stored matrices as handles, built once, that take addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "bind.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace tightfit;

namespace {

Kind kind_of(const std::string& name) {
    if (name == "f32") return Kind::f32;
    if (name == "f16") return Kind::f16;
    if (name == "bf16") return Kind::bf16;
    if (name == "int8") return Kind::int8;
    if (name == "int4") return Kind::int4;
    throw nb::value_error(("no kernel for matrices of kind " + name).c_str());
}

Weight make_weight(const std::string& kind, size_t group, uintptr_t address, size_t rows, size_t cols,
                   size_t row_offset) {
    const Weight weight{kind_of(kind), group, false, reinterpret_cast<const uint8_t*>(address), rows, cols, row_offset, nullptr};
    if (weight.tiled() && (group == 0 || group % 8 || group > 128 || row_offset >= TILE_ROWS))
        throw nb::value_error("groups are multiples of 8 up to 128, and the row offset is below 16");
    return weight;
}

template <class T>
Rows<T> rows_at(uintptr_t address, size_t stride) {
    return {reinterpret_cast<T*>(address), stride};
}

}  // namespace

void tightfit::bind_matmul(nb::module_& m) {
    nb::class_<Weight>(m, "Weight")
        .def(nb::new_(&make_weight))
        .def("matmul",
             [](const Weight& w, uintptr_t x, size_t tokens, size_t x_stride, uintptr_t out, size_t out_stride,
                size_t threads) {
                 nb::gil_scoped_release release;
                 matmul(w, rows_at<const float>(x, x_stride), tokens, rows_at<float>(out, out_stride), threads);
             })
        .def("decode_block",
             [](const Weight& w, size_t start, size_t stop, uintptr_t out, size_t out_stride, bool bf16,
                size_t threads) {
                 if (!w.tiled() || start > stop || stop > w.rows) throw nb::index_error("rows outside of the matrix");
                 nb::gil_scoped_release release;
                 if (bf16)
                     decode_block(w, start, stop, rows_at<BF16>(out, out_stride), threads);
                 else
                     decode_block(w, start, stop, rows_at<float>(out, out_stride), threads);
             })
        .def("decode_rows", [](const Weight& w, uintptr_t indices, size_t count, uintptr_t out, size_t out_stride,
                               size_t threads) {
            const auto* rows = reinterpret_cast<const int64_t*>(indices);
            for (size_t i = 0; i < count; i++)
                if (!w.tiled() || rows[i] < 0 || static_cast<size_t>(rows[i]) >= w.rows)
                    throw nb::index_error(
                        ("row " + std::to_string(rows[i]) + " of a matrix of " + std::to_string(w.rows) + " rows")
                            .c_str());
            nb::gil_scoped_release release;
            decode_rows(w, rows, count, rows_at<float>(out, out_stride), threads);
        });
}
