// Products with many vectors in bfloat16, for processors with AMX.
#pragma once

#include "dispatch.h"

namespace tightfit {

// Whether the level in use has them.
bool has_gemm();

// out[t] = the matrices' products with x[t], one after the other; with `accumulate` not zero, accumulate times that is
// added to out[t]. Inputs and weights are rounded to bfloat16, and products are added up in float32 in the order of the
// inputs: a token's bits depend neither on the other tokens nor on `threads`. `scratch` is gemm_scratch_nbytes(...)
// bytes that begin with a cache line.
void gemm(const Joined& matrices, Rows<const float> x, size_t tokens, Rows<float> out, float accumulate,
          uint8_t* scratch, size_t threads);
size_t gemm_scratch_nbytes(size_t cols, size_t tokens, size_t threads);

// ---- between how it is divided (gemm.cpp) and what computes (gemm_amx.cpp) ----

// A tile: 16 tokens, or 16 rows, by 32 inputs in bfloat16.
constexpr size_t GEMM_TOKENS = 16, GEMM_STEP = 32, GEMM_TILE = 1024;

// Tokens as tiles: those of all tokens and the first `block` inputs, then of the next; within a block token by token.
struct PackedTokens {
    uint8_t* data;
    size_t tokens, cols, block;

    size_t tiles() const { return (tokens + GEMM_TOKENS - 1) / GEMM_TOKENS; }
    size_t steps() const { return (cols + GEMM_STEP - 1) / GEMM_STEP; }
    size_t blocks() const { return (cols + block - 1) / block; }
    size_t first_step(size_t b) const { return b * (block / GEMM_STEP); }
    size_t steps_of(size_t b) const { return (b + 1 < blocks() ? first_step(b + 1) : steps()) - first_step(b); }
    uint8_t* tile(size_t b, size_t tile) const {
        return data + (first_step(b) * tiles() + tile * steps_of(b)) * GEMM_TILE;
    }
};

// The tile rows [first, last) of `w` times the tokens [begin, end), where `begin` is a tile's first.
struct GemmTask {
    const Weight& w;
    size_t first, last;
    const PackedTokens& x;
    size_t begin, end;
    Rows<float> out;  // of the matrix' first row and token 0
    float accumulate;
    uint8_t* panel;  // GEMM_PANEL bytes
    float* sums;     // 32 rows by the tokens, rounded up to 32, for each of `width` pairs of tile rows
    size_t width;    // pairs whose sums are kept

    size_t token_pairs() const { return (end - begin + 2 * GEMM_TOKENS - 1) / (2 * GEMM_TOKENS); }
};

// At most so many inputs to a block: 32 tokens and 32 rows by it, 18 KiB each, stay in the first-level cache together.
constexpr size_t GEMM_BLOCK = 288;
constexpr size_t GEMM_PANEL = GEMM_BLOCK / GEMM_STEP * 2 * GEMM_TILE;

void amx_pack(Rows<const float> x, size_t token, const PackedTokens& packed);
void amx_multiply(const GemmTask& task);

}  // namespace tightfit
