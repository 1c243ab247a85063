// From the blocks of GGUF files (kernels/ggml.py says what they are) to tiles with the same codes.
#pragma once

#include "weight.h"

namespace tightfit {

enum class Ggml { q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k, mxfp4 };

// The sizes of a type's blocks, and the tiles that hold its codes.
struct GgmlType {
    size_t inputs, nbytes, group;
    Kind kind;
    bool asymmetric;

    size_t tile_bytes() const {
        return Weight::code_bytes_of(kind, group) + TILE_ROWS * sizeof(F16) * (asymmetric ? 2 : 1);
    }
};

const GgmlType& ggml_type(Ggml type);

// Writes the tiles of `rows` rows of `blocks` blocks each, one row after the other. Gives whether all scales and offsets
// are finite numbers of the type that tiles have them in.
bool repack(Ggml type, const uint8_t* stored, size_t rows, size_t blocks, uint8_t* tiles);

}  // namespace tightfit
