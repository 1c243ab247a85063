// A stored matrix, and the table of kernels that one instruction set provides for it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tightfit {

constexpr size_t TILE_ROWS = 16;
constexpr size_t LARGEST_GROUP = 128;

enum class Kind { f32, f16, bf16, int8, int4 };

struct F16 { uint16_t bits; };
struct BF16 { uint16_t bits; };

// `rows` by `cols` numbers at `data`: row-major for the floating kinds, else tiles of 16 rows by `group` inputs,
// [codes][16 scales in bfloat16], in order of their rows, then of their group (weights/formats/tiles.py has the layout).
// `row_offset` is the first row's place in the first tile.
struct Weight {
    Kind kind;
    size_t group;
    const uint8_t* data;
    size_t rows, cols, row_offset;

    bool tiled() const { return kind == Kind::int8 || kind == Kind::int4; }
    size_t itemsize() const { return kind == Kind::f32 ? 4 : 2; }  // of the floating kinds
    size_t groups() const { return (cols + group - 1) / group; }
    size_t code_bytes() const { return TILE_ROWS * group * (kind == Kind::int8 ? 8 : 4) / 8; }
    size_t tile_bytes() const { return code_bytes() + TILE_ROWS * sizeof(BF16); }
    size_t tile_row_bytes() const { return groups() * tile_bytes(); }
};

// Rows of float32 activations or results, `stride` numbers apart.
template <class T>
struct Rows {
    T* data;
    size_t stride;

    T* operator[](size_t row) const { return data + row * stride; }
};

struct Kernels {
    const char* name;
    // out[t][row] = W[row] . x[t] for the rows [first, last). The order of additions within a row is fixed.
    void (*matmul)(const Weight&, size_t first, size_t last, Rows<const float> x, size_t tokens, Rows<float> out);
    // out[row - first] = W[row] for the rows [first, last) of a tiled matrix.
    void (*decode)(const Weight&, size_t first, size_t last, Rows<float> out);
    void (*decode_bf16)(const Weight&, size_t first, size_t last, Rows<BF16> out);
};

}  // namespace tightfit
