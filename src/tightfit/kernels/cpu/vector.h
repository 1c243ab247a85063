// Products with vectors, written once over an instruction set `Isa` (isa_*.h): LANES floats to a
// vector, TOKENS activations that share a decoded weight, and the loads, conversions and arithmetic that are used here.
//
// Everything is in an unnamed namespace: the same template compiled under other flags must not be merged with it.
#pragma once

#include <algorithm>
#include <cstring>

#include "decode.h"

namespace tightfit {
namespace {

// Weights are read once, so their speed is the memory's: a core's own prefetcher alone reaches half of it.
constexpr size_t AHEAD = 2048;  // bytes

template <class T>
inline void prefetch(const T* address) {
    __builtin_prefetch(reinterpret_cast<const char*>(address) + AHEAD);
}

// ---- floating-point matrices: a row is summed in LANES partial sums, which Isa::sum adds up at the end ----

template <class Isa, class T, size_t ROWS, size_t TOKENS>
inline void dense_block(const T* w, size_t cols, Rows<const float> x, Rows<float> out) {
    typename Isa::Vector sums[ROWS][TOKENS];
    for (auto& row : sums)
        for (auto& sum : row) sum = Isa::zero();

    size_t col = 0;
    for (; col + Isa::LANES <= cols; col += Isa::LANES) {
        typename Isa::Vector weights[ROWS];
        for (size_t r = 0; r < ROWS; r++) {
            prefetch(w + r * cols + col);
            weights[r] = Isa::load(w + r * cols + col);
        }
        for (size_t t = 0; t < TOKENS; t++) {
            const auto inputs = Isa::load(x[t] + col);
            for (size_t r = 0; r < ROWS; r++) sums[r][t] = Isa::fma(weights[r], inputs, sums[r][t]);
        }
    }
    if (col < cols) {
        typename Isa::Vector weights[ROWS];
        for (size_t r = 0; r < ROWS; r++) weights[r] = Isa::load_part(w + r * cols + col, cols - col);
        for (size_t t = 0; t < TOKENS; t++) {
            const auto inputs = Isa::load_part(x[t] + col, cols - col);
            for (size_t r = 0; r < ROWS; r++) sums[r][t] = Isa::fma(weights[r], inputs, sums[r][t]);
        }
    }
    for (size_t r = 0; r < ROWS; r++)
        for (size_t t = 0; t < TOKENS; t++) out[t][r] = Isa::sum(sums[r][t]);
}

template <class Isa, class T, size_t ROWS>
inline void dense_rows(const T* w, size_t cols, Rows<const float> x, size_t tokens, Rows<float> out) {
    size_t t = 0;
    for (; t + Isa::TOKENS <= tokens; t += Isa::TOKENS)
        dense_block<Isa, T, ROWS, Isa::TOKENS>(w, cols, {x[t], x.stride}, {out[t], out.stride});
    for (; t < tokens; t++) dense_block<Isa, T, ROWS, 1>(w, cols, {x[t], x.stride}, {out[t], out.stride});
}

template <class Isa, class T>
void dense_matmul(const Weight& w, size_t first, size_t last, Rows<const float> x, size_t tokens, Rows<float> out) {
    constexpr size_t ROWS = 4;
    const T* data = reinterpret_cast<const T*>(w.data);
    size_t row = first;
    for (; row + ROWS <= last; row += ROWS)
        dense_rows<Isa, T, ROWS>(data + row * w.cols, w.cols, x, tokens, {out.data + row, out.stride});
    for (; row < last; row++)
        dense_rows<Isa, T, 1>(data + row * w.cols, w.cols, x, tokens, {out.data + row, out.stride});
}

// ---- tiles: a lane per row; within a group four partial sums (inputs modulo 4), then the scale ----

constexpr size_t PARTS = 4;

// out[t][r - skip] for the rows r in [skip, end) of one row of tiles.
template <class Isa, size_t TOKENS, class Code>
inline void tile_block(const Weight& w, const Code& code, const uint8_t* tile, Rows<const float> x, size_t skip, size_t end,
                       Rows<float> out) {
    constexpr size_t INPUTS = Code::INPUTS;
    const size_t code_bytes = w.code_bytes(), tile_bytes = w.tile_bytes();
    typename Isa::Vector results[SPANS<Isa>][TOKENS];
    for (auto& span : results)
        for (auto& result : span) result = Isa::zero();

    for (size_t start = 0; start < w.cols; start += w.group, tile += tile_bytes) {
        const size_t inputs = std::min(w.group, w.cols - start);
        for (size_t span = 0; span < SPANS<Isa>; span++) {
            typename Isa::Vector sums[TOKENS][PARTS], totals[TOKENS];
            for (auto& parts : sums)
                for (auto& sum : parts) sum = Isa::zero();
            for (auto& total : totals) total = Isa::zero();
            for (size_t i = 0; i < inputs; i += INPUTS) {
                const float* next[TOKENS];
                float padded[TOKENS][INPUTS];
                for (size_t t = 0; t < TOKENS; t++) {
                    next[t] = x[t] + start + i;
                    if (i + INPUTS > inputs) {
                        std::memset(padded[t], 0, sizeof padded[t]);
                        std::memcpy(padded[t], next[t], (inputs - i) * sizeof(float));
                        next[t] = padded[t];
                    }
                }
                typename Isa::Bytes steps[Code::STEPS];
                code.unpack(tile, i / INPUTS, span, steps);
                for (size_t step = 0; step < Code::STEPS; step++) {
                    typename Isa::Vector weights[4];
                    code.floats(steps[step], weights);
                    for (size_t t = 0; t < TOKENS; t++)
                        for (size_t k = 0; k < 4; k++)
                            sums[t][k] = Isa::fma(weights[k], Isa::broadcast(next[t][4 * step + k]), sums[t][k]);
                }
                if (w.asymmetric)
                    for (size_t t = 0; t < TOKENS; t++)
                        for (size_t k = 0; k < INPUTS; k++) totals[t] = Isa::add(totals[t], Isa::broadcast(next[t][k]));
            }
            const uint8_t* scales = tile + code_bytes + span * Isa::LANES * sizeof(BF16);
            const auto scale = Isa::multiply(Isa::load(reinterpret_cast<const BF16*>(scales)), Isa::broadcast(code.unit()));
            for (size_t t = 0; t < TOKENS; t++) {
                const auto sum = Isa::add(Isa::add(sums[t][0], sums[t][1]), Isa::add(sums[t][2], sums[t][3]));
                results[span][t] = Isa::fma(sum, scale, results[span][t]);
            }
            if (w.asymmetric) {
                const auto offset = Isa::load(reinterpret_cast<const BF16*>(scales) + TILE_ROWS);
                for (size_t t = 0; t < TOKENS; t++) results[span][t] = Isa::fma(totals[t], offset, results[span][t]);
            }
        }
    }
    for (size_t t = 0; t < TOKENS; t++) {
        float rows[TILE_ROWS];
        for (size_t s = 0; s < SPANS<Isa>; s++) Isa::store(rows + s * Isa::LANES, results[s][t]);
        std::memcpy(out[t], rows + skip, (end - skip) * sizeof(float));
    }
}

template <class Isa>
void tile_matmul(const Weight& w, size_t first, size_t last, Rows<const float> x, size_t tokens, Rows<float> out) {
    with_code<Isa>(w, [&](const auto& code) {
        for (size_t row = first; row < last;) {
            const size_t place = w.row_offset + row, skip = place % TILE_ROWS;
            const size_t count = std::min(last - row, TILE_ROWS - skip);
            const uint8_t* tile = w.data + place / TILE_ROWS * w.tile_row_bytes();
            const Rows<float> rows{out.data + row, out.stride};
            size_t t = 0;
            for (; t + Isa::TOKENS <= tokens; t += Isa::TOKENS)
                tile_block<Isa, Isa::TOKENS>(w, code, tile, {x[t], x.stride}, skip, skip + count, {rows[t], rows.stride});
            for (; t < tokens; t++)
                tile_block<Isa, 1>(w, code, tile, {x[t], x.stride}, skip, skip + count, {rows[t], rows.stride});
            row += count;
        }
    });
}

template <class Isa>
void matmul(const Weight& w, size_t first, size_t last, Rows<const float> x, size_t tokens, Rows<float> out) {
    switch (w.kind) {
        case Kind::f32: return dense_matmul<Isa, float>(w, first, last, x, tokens, out);
        case Kind::f16: return dense_matmul<Isa, F16>(w, first, last, x, tokens, out);
        case Kind::bf16: return dense_matmul<Isa, BF16>(w, first, last, x, tokens, out);
        default: return tile_matmul<Isa>(w, first, last, x, tokens, out);
    }
}

template <class Isa>
constexpr Kernels kernels_of(const char* name) {
    return {name, matmul<Isa>, decode<Isa, float>, decode<Isa, BF16>};
}

}  // namespace
}  // namespace tightfit
