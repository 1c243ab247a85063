// The table of kernels that each instruction set provides, one source file each, and what they work on.
#pragma once

#include <type_traits>

#include "weight.h"

namespace tightfit {

// Activations in int8, `blocks` blocks of `block` inputs for each token: 48 for ternary weights, whose units are 24
// inputs, else 32 or 16. Tokens are multiplied in chunks (for_chunks), and lie so that a chunk is read from front to
// end: block after block the codes, unit by unit those of all tokens; then all tokens' scales (float) and sums (int32).
struct Quantized {
    static constexpr size_t LARGEST_BLOCK = 48;

    uint8_t* data;
    size_t tokens, block, blocks;

    static size_t block_of(const Weight& w) { return w.kind == Kind::ternary ? 48 : w.group % 32 == 0 ? 32 : 16; }
    size_t unit() const { return block == 48 ? 24 : 16; }
    static constexpr size_t block_bytes(size_t block) { return block + sizeof(float) + sizeof(int32_t); }
    size_t nbytes() const { return tokens * blocks * block_bytes(block); }
    uint8_t* chunk(size_t first_token) const { return data + first_token * blocks * block_bytes(block); }
};

// Calls work(first, count) for chunks of tokens, `count` a std::integral_constant: as many of MOST as there are, then
// halves.
template <size_t MOST, class Work>
inline void for_chunks(size_t tokens, Work work, size_t first = 0) {
    for (; first + MOST <= tokens; first += MOST) work(first, std::integral_constant<size_t, MOST>());
    if constexpr (MOST > 1) for_chunks<MOST / 2>(tokens, work, first);
}

struct Kernels {
    // out[t][row] = W[row] . x[t] for the rows [first, last), or with `accumulate` not zero, accumulate times that is
    // added to it. The order of additions within a row is fixed.
    void (*matmul)(const Weight&, size_t first, size_t last, Rows<const float> x, size_t tokens, Rows<float> out,
                   float accumulate);
    // The same of a matrix in tiles other than fp8, which has no integer codes, with activations in int8.
    void (*matmul_int8)(const Weight&, size_t first, size_t last, const Quantized& x, Rows<float> out, float accumulate);
    // The blocks [first, last) of out.tokens tokens of `cols` numbers; what a block has beyond them is zero.
    void (*quantize)(Rows<const float> x, size_t cols, const Quantized& out, size_t first, size_t last);
    // out[row - first] = W[row] for the rows [first, last) of a tiled matrix.
    void (*decode)(const Weight&, size_t first, size_t last, Rows<float> out);
    void (*decode_bf16)(const Weight&, size_t first, size_t last, Rows<BF16> out);
};

extern const Kernels portable_kernels;
#ifdef TIGHTFIT_X86
extern const Kernels avx2_kernels, avxvnni_kernels, avx512_kernels, avx512vnni_kernels;
#endif

}  // namespace tightfit
