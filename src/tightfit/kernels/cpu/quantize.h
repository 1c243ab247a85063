// Activations in int8, written once over an instruction set `Isa`. Where they lie: Quantized in kernels.h.
//
// A token is quantised in blocks: scale = amax / 127 and code = round(x * (127 / amax)), to nearest even. The sum of a
// block's codes is kept beside it, for weights that are unsigned codes. A block with a number that is not finite has
// scale NaN and codes 0, so that every result of its token is NaN.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace tightfit {
namespace {

// A block without a number above it is zeros: 127 / amax must be finite.
constexpr float SMALLEST_AMAX = 0x1p-100f;

struct BlockEnd {
    float scale;
    int32_t sum;
};

template <class Isa>
inline BlockEnd quantize_block(const float* x, size_t inputs, int8_t* codes) {
    auto sizes = Isa::zero_sums(), sums = Isa::zero_sums();
    for (size_t i = 0; i < inputs; i += Isa::LANES) sizes = Isa::max_size(sizes, Isa::load(x + i));
    const float amax = Isa::largest(sizes);
    const bool finite = amax <= std::numeric_limits<float>::max();
    if (!finite || amax <= SMALLEST_AMAX) {
        std::memset(codes, 0, inputs);
        return {finite ? 0.0f : std::numeric_limits<float>::quiet_NaN(), 0};
    }
    const auto inverse = Isa::broadcast(127 / amax);
    for (size_t i = 0; i < inputs; i += Isa::LANES) {
        const auto rounded = Isa::round(Isa::mul(Isa::load(x + i), inverse));
        Isa::store_codes(codes + i, rounded);
        sums = Isa::add_sums(sums, rounded);
    }
    return {amax / 127, -Isa::total(sums)};
}

// The blocks [first, last) of every token.
template <class Isa>
void quantize(Rows<const float> x, size_t cols, const Quantized& out, size_t first, size_t last) {
    const size_t unit = out.unit();
    for_chunks<Isa::TOKENS>(out.tokens, [&](size_t chunk, auto tokens) {
        for (size_t b = first; b < last; b++) {
            const size_t start = b * out.block;
            uint8_t* codes = out.chunk(chunk) + b * tokens * Quantized::block_bytes(out.block);
            uint8_t* ends = codes + tokens * out.block;
            for (size_t t = 0; t < tokens; t++) {
                float padded[Quantized::LARGEST_BLOCK] = {};
                int8_t quantized[Quantized::LARGEST_BLOCK];
                const bool whole = start + out.block <= cols;
                if (!whole && start < cols) std::memcpy(padded, x[chunk + t] + start, (cols - start) * sizeof(float));
                const BlockEnd end = quantize_block<Isa>(whole ? x[chunk + t] + start : padded, out.block, quantized);
                for (size_t i = 0; i < out.block; i += unit)
                    std::memcpy(codes + i * tokens + t * unit, quantized + i, unit);
                std::memcpy(ends + t * sizeof end.scale, &end.scale, sizeof end.scale);
                std::memcpy(ends + (tokens + t) * sizeof end.sum, &end.sum, sizeof end.sum);
            }
        }
    });
}

}  // namespace
}  // namespace tightfit
