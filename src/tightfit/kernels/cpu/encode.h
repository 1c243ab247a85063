// Encoding: numbers become tiles, each group with the scale that loses least. kernels/encode_reference.py defines the
// bytes that are written here.
#pragma once

#include "weight.h"

namespace tightfit {

// The tiles of `rows` by `cols` numbers; `exponent_bits` are those of an fp8 code.
struct Tiles {
    Kind kind;
    size_t group;
    bool asymmetric;
    unsigned exponent_bits;
    uint8_t* data;
    size_t rows, cols;
};

// What the search tries in 64ths of a base, in this order, until a 0.
struct Factors { int16_t values[11]; };

constexpr Factors factors_of(Kind kind) {
    switch (kind) {
        case Kind::int8: return {{64, 65, 66, 67, 69, 70}};
        case Kind::int6:
        case Kind::int5: return {{64, 54, 68, 63, 66, 62, 73, 47, 60, 70}};
        case Kind::int4:
        case Kind::int3: return {{64, 43, 58, 27, 52, 61, 71, 16, 36, 55}};
        case Kind::int2: return {{64, 39, 23, 51, -50, 31, 16, 57, 45, -34}};
        case Kind::nf4:
        case Kind::fp4: return {{64, 96, 58, 43, 61, 67, 54, 90, 36, 63}};
        case Kind::fp8: return {{64, 90, 66, 76, 74, 65, 99, 71, 86}};
        case Kind::ternary: return {{64, 107, 134, 95, 160, 119}};
        default: return {};
    }
}

// Numbers of scratch that encode() wants for tiles of `group` inputs.
inline size_t encode_scratch(size_t group) { return group * TILE_ROWS; }

// Writes the tiles of `x` (T is float, F16 or BF16). Gives the sum of the squared errors, or NaN, with unspecified tiles,
// if a number is not finite.
template <class T>
double encode(const Tiles& tiles, Rows<const T> x, float* scratch);

struct EncodeKernels {
    double (*f32)(const Tiles&, Rows<const float>, float*);
    double (*f16)(const Tiles&, Rows<const F16>, float*);
    double (*bf16)(const Tiles&, Rows<const BF16>, float*);
};

extern const EncodeKernels portable_encode_kernels;
#ifdef TIGHTFIT_X86
extern const EncodeKernels avx2_encode_kernels;
extern const EncodeKernels avx512_encode_kernels;
#endif

}  // namespace tightfit
