// A stored matrix.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tightfit {

constexpr size_t TILE_ROWS = 16;
constexpr size_t LINE = 64;  // bytes that hold the codes of 4 inputs of 16 rows where a code takes a byte
constexpr size_t WORD = 64;  // inputs of a pruned row whose bits are one number

enum class Kind { f32, f16, bf16, pruned, int8, int6, int5, int4, int3, int2, nf4, fp4, fp8, ternary };

constexpr size_t itemsize(Kind kind) { return kind == Kind::f32 ? 4 : 2; }  // of the floating kinds

struct F16 { uint16_t bits; };
struct BF16 { uint16_t bits; };

// `rows` by `cols` numbers at `data`: row-major for the floating kinds; of pruned rows one after the other the bits of
// the inputs that are not zero and `kept` values (kernels/layout.py); else tiles of 16 rows by `group` inputs,
// [codes][16 scales in bfloat16][16 offsets in bfloat16, if asymmetric], in order of their rows, then of their group
// (kernels/layout.py has the layout). With `half_scales`, of intN, these are float16, and an offset is that of the lowest
// code. `row_offset` is the first row's place in the first tile. `settings` is what a kind must know of the whole matrix:
// for fp8 the number of exponent bits (0 is read as 4); null for the others.
struct Weight {
    Kind kind;
    size_t group;
    bool asymmetric;
    const uint8_t* data;
    size_t rows, cols, row_offset;
    const uint8_t* settings;
    size_t kept = 0;
    bool half_scales = false;

    bool tiled() const { return kind > Kind::pruned; }
    // Of a row that is not in tiles.
    size_t row_bytes() const {
        return kind == Kind::pruned ? bitmap_bytes() + (kept * sizeof(BF16) + 7) / 8 * 8 : cols * itemsize(kind);
    }
    size_t bitmap_bytes() const { return (cols + WORD - 1) / WORD * 8; }
    size_t groups() const { return (cols + group - 1) / group; }
    size_t code_bytes() const { return code_bytes_of(kind, group); }
    size_t tile_bytes() const { return code_bytes() + TILE_ROWS * sizeof(BF16) * (asymmetric ? 2 : 1); }
    size_t tile_row_bytes() const { return groups() * tile_bytes(); }
    int exponent_bits() const { return settings && *settings ? *settings : 4; }  // of fp8

    // How many steps of intN the lowest code is below 0.
    float below_zero() const {
        switch (kind) {
            case Kind::int8: return 128;
            case Kind::int6: return 32;
            case Kind::int5: return 16;
            case Kind::int4: return 8;
            case Kind::int3: return 4;
            case Kind::int2: return 2;
            default: return 0;
        }
    }

    // Bytes of the codes of 16 rows by `inputs`.
    static constexpr size_t code_bytes_of(Kind kind, size_t inputs) {
        switch (kind) {
            case Kind::int8:
            case Kind::fp8: return 16 * inputs;
            case Kind::int6: return 12 * inputs;
            case Kind::int5: return 10 * inputs;
            case Kind::int4:
            case Kind::nf4:
            case Kind::fp4: return 8 * inputs;
            case Kind::int3: return 6 * inputs;
            case Kind::int2: return 4 * inputs;
            case Kind::ternary: return inputs / 24 * 80;
            default: return 0;
        }
    }
};

// Rows of float32 activations or results, `stride` numbers apart.
template <class T>
struct Rows {
    T* data;
    size_t stride;

    T* operator[](size_t row) const { return data + row * stride; }
};

}  // namespace tightfit
