// Products with float32 activations, written once over an instruction set `Isa`: of matrices in floating point, and of
// tiles whose codes become floats.
#pragma once

#include "codes.h"
#include "tiles.h"

namespace tightfit {
namespace {

// ---- floating-point matrices: a row is summed in LANES partial sums, which Isa::sum adds up at the end ----

template <class Isa, class T, size_t ROWS, size_t TOKENS>
inline void dense_block(const T* w, size_t cols, Rows<const float> x, Rows<float> out, float accumulate) {
    typename Isa::Vector sums[ROWS][TOKENS];
    for (auto& row : sums)
        for (auto& sum : row) sum = Isa::zero();
    const auto add = [&](size_t col) {
        typename Isa::Vector weights[ROWS];
        for (size_t r = 0; r < ROWS; r++) weights[r] = Isa::load(w + r * cols + col);
        for (size_t t = 0; t < TOKENS; t++) {
            const auto inputs = Isa::load(x[t] + col);
            for (size_t r = 0; r < ROWS; r++) sums[r][t] = Isa::fma(weights[r], inputs, sums[r][t]);
        }
    };

    constexpr size_t VECTORS = LINE / (Isa::LANES * sizeof(T)) > 1 ? LINE / (Isa::LANES * sizeof(T)) : 1;
    size_t col = 0;
    for (; col + VECTORS * Isa::LANES <= cols; col += VECTORS * Isa::LANES) {
        for (size_t r = 0; r < ROWS; r++) prefetch(w + r * cols + col);
        for (size_t v = 0; v < VECTORS; v++) add(col + v * Isa::LANES);
    }
    for (; col + Isa::LANES <= cols; col += Isa::LANES) add(col);
    if (col < cols) {
        typename Isa::Vector weights[ROWS];
        for (size_t r = 0; r < ROWS; r++) weights[r] = Isa::load_part(w + r * cols + col, cols - col);
        for (size_t t = 0; t < TOKENS; t++) {
            const auto inputs = Isa::load_part(x[t] + col, cols - col);
            for (size_t r = 0; r < ROWS; r++) sums[r][t] = Isa::fma(weights[r], inputs, sums[r][t]);
        }
    }
    for (size_t r = 0; r < ROWS; r++)
        for (size_t t = 0; t < TOKENS; t++) {
            const float sum = Isa::sum(sums[r][t]);
            out[t][r] = accumulate != 0 ? Isa::fma(accumulate, sum, out[t][r]) : sum;
        }
}

// Several tokens share each vector of weights, and several rows each vector of a token; one token's weights are read
// fastest from front to end.
template <class Isa, class T>
void dense_matmul(const Weight& w, size_t first, size_t last, Rows<const float> x, size_t tokens, Rows<float> out,
                  float accumulate) {
    const T* data = reinterpret_cast<const T*>(w.data);
    const auto block = [&](size_t row, auto rows) {
        for_chunks<std::min<size_t>(Isa::TOKENS, 4)>(tokens, [&](size_t t, auto count) {
            const Rows<float> columns{out[t] + row, out.stride};
            dense_block<Isa, T, rows, count>(data + row * w.cols, w.cols, {x[t], x.stride}, columns, accumulate);
        });
    };
    if (tokens > 1)
        for (; first + 4 <= last; first += 4) block(first, std::integral_constant<size_t, 4>());
    for (; first < last; first++) block(first, std::integral_constant<size_t, 1>());
}

// ---- tiles: a lane per row; within a group four partial sums (inputs modulo 4), then the scale ----

constexpr size_t PARTS = 4;

// Adds the products of a unit of codes with `inputs` numbers of x (fewer than a unit at a matrix's end).
template <class Isa, size_t TOKENS, class Code>
inline void add_unit(const Code& code, const uint8_t* tile, size_t unit, size_t span, const float* const (&x)[TOKENS],
                     typename Isa::Vector (&sums)[TOKENS][PARTS]) {
    typename Isa::Bytes steps[Code::STEPS];
    code.unpack(tile, unit, span, steps);
    for (size_t step = 0; step < Code::STEPS; step++) {
        typename Isa::Vector weights[4];
        code.floats(steps[step], weights);
        for (size_t t = 0; t < TOKENS; t++)
            for (size_t k = 0; k < 4; k++)
                sums[t][k] = Isa::fma(weights[k], Isa::broadcast(x[t][4 * step + k]), sums[t][k]);
    }
}

// out[t][r - skip] for the rows r in [skip, end) of one row of tiles.
template <class Isa, size_t TOKENS, class Code>
inline void tile_row(const Weight& w, const Code& code, const uint8_t* tile, Rows<const float> x, size_t skip, size_t end,
                     Rows<float> out, float accumulate) {
    using Vector = typename Isa::Vector;
    const size_t code_bytes = w.code_bytes(), tile_bytes = w.tile_bytes();
    Vector results[SPANS<Isa>][TOKENS];
    for (auto& span : results)
        for (auto& result : span) result = Isa::zero();

    for (size_t start = 0; start < w.cols; start += w.group, tile += tile_bytes) {
        const size_t inputs = std::min(w.group, w.cols - start);
        for (size_t span = 0; span < SPANS<Isa>; span++) {
            Vector sums[TOKENS][PARTS], input_sums[TOKENS];
            for (size_t t = 0; t < TOKENS; t++) {
                for (auto& sum : sums[t]) sum = Isa::zero();
                input_sums[t] = Isa::zero();
            }
            for (size_t i = 0; i < inputs; i += Code::INPUTS) {
                const float* next[TOKENS];
                float padded[TOKENS][Code::INPUTS];
                for (size_t t = 0; t < TOKENS; t++) {
                    next[t] = x[t] + start + i;
                    if (i + Code::INPUTS > inputs) {
                        std::fill_n(padded[t], Code::INPUTS, 0.0f);
                        std::memcpy(padded[t], next[t], (inputs - i) * sizeof(float));
                        next[t] = padded[t];
                    }
                }
                const size_t unit = i / Code::INPUTS;
                if (span == 0) prefetch<Code::UNIT_BYTES>(tile + unit * Code::UNIT_BYTES);
                add_unit<Isa>(code, tile, unit, span, next, sums);
                if (w.asymmetric)
                    for (size_t t = 0; t < TOKENS; t++)
                        for (size_t j = 0; j < Code::INPUTS; j += Isa::LANES)
                            input_sums[t] = Isa::add(input_sums[t], Isa::load(next[t] + j));
            }
            if (span == 0) prefetch(tile + code_bytes);
            const uint8_t* scales = tile + code_bytes + span * Isa::LANES * sizeof(BF16);
            const Vector scale = load_scales<Isa>(w, scales);
            for (size_t t = 0; t < TOKENS; t++) {
                const Vector sum = Isa::add(Isa::add(sums[t][0], sums[t][1]), Isa::add(sums[t][2], sums[t][3]));
                results[span][t] = Isa::fma(sum, scale, results[span][t]);
            }
            if (w.asymmetric) {
                const Vector offset = load_offsets<Isa>(w, scales, scale);
                for (size_t t = 0; t < TOKENS; t++) {
                    const Vector sum = Isa::broadcast(Isa::sum(input_sums[t]));
                    results[span][t] = Isa::fma(sum, offset, results[span][t]);
                }
            }
        }
    }
    const Vector unit = Isa::broadcast(code.unit());
    for (size_t t = 0; t < TOKENS; t++) {
        Vector column[SPANS<Isa>];
        for (size_t span = 0; span < SPANS<Isa>; span++) column[span] = Isa::mul(results[span][t], unit);
        store_rows<Isa>(column, skip, end, out[t], accumulate);
    }
}

template <class Isa>
void tile_matmul(const Weight& w, size_t first, size_t last, Rows<const float> x, size_t tokens, Rows<float> out,
                 float accumulate) {
    with_code<Isa>(w, [&](const auto& code) {
        for_tile_rows(w, first, last, [&](size_t row, const uint8_t* tile, size_t skip, size_t end) {
            for_chunks<std::min<size_t>(Isa::TOKENS, 4)>(tokens, [&](size_t t, auto count) {
                tile_row<Isa, count>(w, code, tile, {x[t], x.stride}, skip, end, {out[t] + row, out.stride}, accumulate);
            });
        });
    });
}

template <class Isa>
void matmul(const Weight& w, size_t first, size_t last, Rows<const float> x, size_t tokens, Rows<float> out,
            float accumulate) {
    switch (w.kind) {
        case Kind::f32: return dense_matmul<Isa, float>(w, first, last, x, tokens, out, accumulate);
        case Kind::f16: return dense_matmul<Isa, F16>(w, first, last, x, tokens, out, accumulate);
        case Kind::bf16: return dense_matmul<Isa, BF16>(w, first, last, x, tokens, out, accumulate);
        default: return tile_matmul<Isa>(w, first, last, x, tokens, out, accumulate);
    }
}

}  // namespace
}  // namespace tightfit
