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

// Numbers of scratch that encode() wants for tiles of `group` inputs.
inline size_t encode_scratch(size_t group) { return group * TILE_ROWS; }

// Writes the tiles of `x` (T is float, F16 or BF16). Gives the sum of the squared errors, or NaN, with unspecified tiles,
// if a number is not finite.
template <class T>
double encode(const Tiles& tiles, Rows<const T> x, float* scratch);

// Writes the rows of `w`, pruned: of each as many of the largest magnitudes in bfloat16 as it keeps, the first of equal
// ones. `scratch` has room for two rows. False, with an unspecified result, if a number is not finite or becomes so.
template <class T>
bool prune(const Weight& w, Rows<const T> x, uint8_t* out, BF16* scratch);

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
