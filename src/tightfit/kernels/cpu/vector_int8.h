// Products of tiles with activations in int8 (quantize.h), written once over an instruction set `Isa` and the kind of
// code (codes.h). A lane is a row: four bytes of codes times four of x, added to an int32, without a horizontal sum.
#pragma once

#include "codes.h"
#include "tiles.h"

namespace tightfit {
namespace {

// Adds the products of a unit of codes with TOKENS runs of inputs to `sums`, [digit][token].
template <class Isa, size_t TOKENS, class Code>
inline void add_unit(const Code& code, const uint8_t* tile, size_t unit, size_t span,
                     const int8_t (&x)[TOKENS][Code::INPUTS], typename Isa::Sums (&sums)[Code::DIGITS][TOKENS]) {
    typename Isa::Bytes steps[Code::STEPS];
    code.unpack(tile, unit, span, steps);
    if constexpr (Code::DIGITS == 1) {
        Isa::template dot<Code::SIGNED, Code::LARGEST>(steps, x, sums[0]);
    } else {
        typename Isa::Bytes high[Code::STEPS], low[Code::STEPS];
        code.digits(steps, high, low);
        Isa::template dot<Code::SIGNED, Code::LARGEST>(low, x, sums[0]);
        Isa::template dot<Code::SIGNED, Code::LARGEST>(high, x, sums[1]);
    }
}

// What follows the codes of a block.
template <size_t TOKENS>
struct BlockEnds {
    float scales[TOKENS];
    int32_t sums[TOKENS];
};

// out[t][r - skip] for the rows r in [skip, end) of one row of tiles and the TOKENS tokens of the chunk at `x`.
template <class Isa, size_t BLOCK, size_t TOKENS, class Code>
inline void tile_row_int8(const Weight& w, const Code& code, const uint8_t* tile, const uint8_t* x, size_t skip, size_t end, Rows<float> out, float accumulate) {
    using Vector = typename Isa::Vector;
    using Sums = typename Isa::Sums;
    using Inputs = int8_t[TOKENS][Code::INPUTS];
    using Ends = BlockEnds<TOKENS>;
    const size_t code_bytes = w.code_bytes(), tile_bytes = w.tile_bytes(), groups = w.groups();
    constexpr size_t UNITS = BLOCK / Code::INPUTS, BLOCK_BYTES = TOKENS * Quantized::block_bytes(BLOCK);
    const size_t blocks = w.group / BLOCK;
    Vector results[SPANS<Isa>][TOKENS];
    for (auto& span : results)
        for (auto& result : span) result = Isa::zero();

    for (size_t g = 0; g < groups; g++, tile += tile_bytes, x += blocks * BLOCK_BYTES) {
        for (size_t span = 0; span < SPANS<Isa>; span++) {
            Vector sums[TOKENS];
            for (auto& sum : sums) sum = Isa::zero();
            for (size_t b = 0; b < blocks; b++) {
                const uint8_t* block = x + b * BLOCK_BYTES;
                const Ends& ends = *reinterpret_cast<const Ends*>(block + TOKENS * BLOCK);
                Sums dots[Code::DIGITS][TOKENS];
                for (auto& digit : dots)
                    for (size_t t = 0; t < TOKENS; t++) digit[t] = Isa::template times<Code::ZERO>(ends.sums[t]);
                if (span == 0) prefetch<UNITS * Code::UNIT_BYTES>(tile + b * UNITS * Code::UNIT_BYTES);
                for (size_t u = 0; u < UNITS; u++)
                    add_unit<Isa>(code, tile, b * UNITS + u, span, reinterpret_cast<const Inputs*>(block)[u], dots);
                for (size_t t = 0; t < TOKENS; t++) {
                    if constexpr (Code::DIGITS == 2) dots[0][t] = Isa::template shift_add<7>(dots[1][t], dots[0][t]);
                    sums[t] = Isa::fma(Isa::to_floats(dots[0][t]), Isa::broadcast(ends.scales[t]), sums[t]);
                }
            }
            if (span == 0) prefetch(tile + code_bytes);
            const uint8_t* scales = tile + code_bytes + span * Isa::LANES * sizeof(BF16);
            const Vector scale = load_scales<Isa>(w, scales);
            for (size_t t = 0; t < TOKENS; t++) results[span][t] = Isa::fma(sums[t], scale, results[span][t]);
            if (!w.asymmetric) continue;
            const Vector offset = Isa::sub(Isa::zero(), load_offsets<Isa>(w, scales, scale));  // as the sums are negative
            for (size_t b = 0; b < blocks; b++) {
                const Ends& ends = *reinterpret_cast<const Ends*>(x + b * BLOCK_BYTES + TOKENS * BLOCK);
                for (size_t t = 0; t < TOKENS; t++) {
                    const Vector sum = Isa::broadcast(static_cast<float>(ends.sums[t]) * ends.scales[t]);
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

template <class Isa, size_t BLOCK, class Code>
inline void tiles_int8(const Weight& w, const Code& code, size_t first, size_t last, const Quantized& x, Rows<float> out,
                       float accumulate) {
    for_tile_rows(w, first, last, [&](size_t row, const uint8_t* tile, size_t skip, size_t end) {
        for_chunks<Isa::TOKENS>(x.tokens, [&](size_t t, auto tokens) {
            const Rows<float> columns{out[t] + row, out.stride};
            tile_row_int8<Isa, BLOCK, tokens>(w, code, tile, x.chunk(t), skip, end, columns, accumulate);
        });
    });
}

template <class Isa>
void matmul_int8(const Weight& w, size_t first, size_t last, const Quantized& x, Rows<float> out, float accumulate) {
    with_integer_code<Isa>(w, [&](const auto& code) {
        if constexpr (std::decay_t<decltype(code)>::INPUTS == 24)
            tiles_int8<Isa, 48>(w, code, first, last, x, out, accumulate);
        else if (x.block == 32)
            tiles_int8<Isa, 32>(w, code, first, last, x, out, accumulate);
        else
            tiles_int8<Isa, 16>(w, code, first, last, x, out, accumulate);
    });
}

}  // namespace
}  // namespace tightfit
