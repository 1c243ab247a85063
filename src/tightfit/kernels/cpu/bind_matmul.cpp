// Stored matrices as handles, built once, that take addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <iterator>

#include "bind.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace tightfit;

constexpr const char* KINDS[] = {"f32",  "f16",  "bf16", "pruned", "int8", "int6", "int5",
                                 "int4", "int3", "int2", "nf4",    "fp4",  "fp8",  "ternary"};

Kind tightfit::kind_of(const std::string& name) {
    for (size_t i = 0; i < std::size(KINDS); i++)
        if (name == KINDS[i]) return static_cast<Kind>(i);
    throw nb::value_error(("no kernel for matrices of kind " + name).c_str());
}

namespace {

Weight make_weight(const std::string& kind, size_t group, bool asymmetric, uintptr_t address, size_t rows, size_t cols,
                   size_t row_offset, uintptr_t settings, size_t kept, bool half_scales) {
    const Weight weight{kind_of(kind), group,      asymmetric, reinterpret_cast<const uint8_t*>(address), rows, cols,
                        row_offset,    reinterpret_cast<const uint8_t*>(settings), kept, half_scales};
    const size_t multiple = weight.kind == Kind::ternary ? 48 : 16;
    if (weight.tiled() && (group == 0 || group % multiple || row_offset >= TILE_ROWS))
        throw nb::value_error("groups are multiples of 16, of ternary codes of 48, and the row offset is below 16");
    if (weight.kind == Kind::pruned && (kept == 0 || kept > cols))
        throw nb::value_error("rows keep 1 to all of their weights");
    if (half_scales && weight.below_zero() == 0) throw nb::value_error("only whole numbers have scales in float16");
    return weight;
}

Joined make_joined(const std::vector<Weight>& weights) {
    if (weights.empty()) throw nb::value_error("no matrices");
    for (const Weight& weight : weights)
        if (weight.cols != weights[0].cols) throw nb::value_error("matrices of different numbers of columns");
    return Joined(weights);
}

template <class T>
Rows<T> rows_at(uintptr_t address, size_t stride) {
    return {reinterpret_cast<T*>(address), stride};
}

}  // namespace

void tightfit::bind_matmul(nb::module_& m) {
    nb::class_<Joined>(m, "Joined")
        .def(nb::new_(&make_joined))
        .def("scratch_nbytes",
             [](const Joined& matrices, size_t tokens, bool int8) { return int8 ? matrices.scratch_nbytes(tokens) : 0; })
        .def("matmul", [](const Joined& matrices, uintptr_t x, size_t tokens, size_t x_stride, uintptr_t out,
                          size_t out_stride, float accumulate, bool int8, uintptr_t scratch, size_t threads) {
            nb::gil_scoped_release release;
            matmul(matrices, rows_at<const float>(x, x_stride), tokens, rows_at<float>(out, out_stride), accumulate,
                   int8, reinterpret_cast<uint8_t*>(scratch), threads);
        });
    nb::class_<Weight>(m, "Weight")
        .def(nb::new_(&make_weight))
        .def("decode_block",
             [](const Weight& w, size_t start, size_t stop, uintptr_t out, size_t out_stride, bool bf16,
                size_t threads) {
                 if (w.kind <= Kind::bf16 || start > stop || stop > w.rows)
                     throw nb::index_error("rows outside of the matrix");
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
                if (w.kind <= Kind::bf16 || rows[i] < 0 || static_cast<size_t>(rows[i]) >= w.rows)
                    throw nb::index_error(
                        ("row " + std::to_string(rows[i]) + " of a matrix of " + std::to_string(w.rows) + " rows")
                            .c_str());
            nb::gil_scoped_release release;
            decode_rows(w, rows, count, rows_at<float>(out, out_stride), threads);
        });
}
