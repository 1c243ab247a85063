// Products of tiles with activations in int8 (quantize.h), written once over an instruction set `Isa` and the kind of
// code (codes.h). A lane is a row: four bytes of codes times four of x, added to an int32, without a horizontal sum.
#pragma once

#include "codes.h"
#include "tiles.h"

namespace tightfit {
namespace {

// Adds the products of a unit of codes with each of TOKENS runs of inputs to `sums`, [digit][token].
template <class Isa, class Code, size_t TOKENS>
inline void add_unit(const Code& code, const uint8_t* tile, size_t unit, size_t span, const int8_t* x,
                     typename Isa::Sums (&sums)[Code::DIGITS][TOKENS]) {
    typename Isa::Bytes steps[Code::STEPS];
    code.unpack(tile, unit, span, steps);
    if constexpr (Code::DIGITS == 1) {
        for (size_t t = 0; t < TOKENS; t++)
            sums[0][t] = Isa::template dot<Code::SIGNED, Code::LARGEST>(sums[0][t], steps, x + t * Code::INPUTS);
    } else {
        typename Isa::Bytes high[Code::STEPS], low[Code::STEPS];
        code.digits(steps, high, low);
        for (size_t t = 0; t < TOKENS; t++) {
            sums[0][t] = Isa::template dot<Code::SIGNED, Code::LARGEST>(sums[0][t], low, x + t * Code::INPUTS);
            sums[1][t] = Isa::template dot<Code::SIGNED, Code::LARGEST>(sums[1][t], high, x + t * Code::INPUTS);
        }
    }
}

// out[t][r - skip] for the rows r in [skip, end) of one row of tiles and the TOKENS tokens of the chunk at `x`.
template <class Isa, size_t TOKENS, class Code>
inline void tile_row_int8(const Weight& w, const Code& code, const uint8_t* tile, const Quantized& activations,
                          const uint8_t* x, size_t skip, size_t end, Rows<float> out, float accumulate) {
    using Vector = typename Isa::Vector;
    const size_t code_bytes = w.code_bytes(), tile_bytes = w.tile_bytes(), groups = w.groups();
    const size_t blocks = w.group / activations.block, units = activations.block / Code::INPUTS;
    const size_t chunk_block = TOKENS * activations.block_bytes();
    Vector results[SPANS<Isa>][TOKENS];
    for (auto& span : results)
        for (auto& result : span) result = Isa::zero();

    for (size_t g = 0; g < groups; g++, tile += tile_bytes, x += blocks * chunk_block) {
        for (size_t span = 0; span < SPANS<Isa>; span++) {
            Vector sums[TOKENS], input_sums[TOKENS];
            for (size_t t = 0; t < TOKENS; t++) sums[t] = input_sums[t] = Isa::zero();
            const uint8_t* block = x;
            for (size_t b = 0; b < blocks; b++, block += chunk_block) {
                const uint8_t* scales = block + TOKENS * activations.block;
                const uint8_t* totals = scales + TOKENS * sizeof(float);
                typename Isa::Sums dots[Code::DIGITS][TOKENS];
                for (auto& digit : dots)
                    for (size_t t = 0; t < TOKENS; t++)
                        digit[t] = Isa::broadcast_sum(-Code::ZERO * load_as<int32_t>(totals + t * sizeof(int32_t)));
                for (size_t u = 0; u < units; u++) {
                    const size_t unit = b * units + u;
                    if (span == 0) prefetch<Code::UNIT_BYTES>(tile + unit * Code::UNIT_BYTES);
                    add_unit<Isa>(code, tile, unit, span,
                                  reinterpret_cast<const int8_t*>(block) + u * TOKENS * Code::INPUTS, dots);
                }
                for (size_t t = 0; t < TOKENS; t++) {
                    if constexpr (Code::DIGITS == 2) dots[0][t] = Isa::template shift_add<7>(dots[1][t], dots[0][t]);
                    const Vector scale = Isa::broadcast(load_as<float>(scales + t * sizeof(float)));
                    sums[t] = Isa::fma(Isa::to_floats(dots[0][t]), scale, sums[t]);
                    if (w.asymmetric) {
                        const auto total = Isa::broadcast_sum(load_as<int32_t>(totals + t * sizeof(int32_t)));
                        input_sums[t] = Isa::fma(Isa::to_floats(total), scale, input_sums[t]);
                    }
                }
            }
            const BF16* scales = reinterpret_cast<const BF16*>(tile + code_bytes) + span * Isa::LANES;
            const Vector scale = Isa::load(scales);
            for (size_t t = 0; t < TOKENS; t++) results[span][t] = Isa::fma(sums[t], scale, results[span][t]);
            if (w.asymmetric) {
                const Vector offset = Isa::load(scales + TILE_ROWS);
                for (size_t t = 0; t < TOKENS; t++)
                    results[span][t] = Isa::fma(input_sums[t], offset, results[span][t]);
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
void matmul_int8(const Weight& w, size_t first, size_t last, const Quantized& x, Rows<float> out, float accumulate) {
    with_integer_code<Isa>(w, [&](const auto& code) {
        for_tile_rows(w, first, last, [&](size_t row, const uint8_t* tile, size_t skip, size_t end) {
            for_chunks<Isa::TOKENS>(x.tokens, [&](size_t t, auto tokens) {
                tile_row_int8<Isa, tokens>(w, code, tile, x, x.chunk(t), skip, end, {out[t] + row, out.stride},
                                           accumulate);
            });
        });
    });
}

}  // namespace
}  // namespace tightfit
