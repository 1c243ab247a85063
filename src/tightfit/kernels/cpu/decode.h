// Rows of tiled matrices as numbers, written once over an instruction set `Isa`.
#pragma once

#include "codes.h"
#include "tiles.h"

namespace tightfit {
namespace {

// Inputs that are decoded together: whole units, and whole 16s, which turn rows of steps to rows of inputs.
template <class Code>
constexpr size_t RUN = Code::INPUTS == 16 ? 16 : 48;

// The codes of a run as 16 rows for each 16 inputs. Rows lie in the order in which transposing leaves them: row_place.
template <class Isa, class Code>
inline void unpack_run(const Code& code, const uint8_t* tile, size_t run, uint8_t (&rows)[RUN<Code> / 16][TILE_ROWS * 16]) {
    constexpr size_t UNITS = RUN<Code> / Code::INPUTS;
    for (size_t span = 0; span < SPANS<Isa>; span++) {
        typename Isa::Bytes steps[RUN<Code> / 4];
        for (size_t unit = 0; unit < UNITS; unit++) {
            typename Isa::Bytes some[Code::STEPS];
            code.unpack(tile, run * UNITS + unit, span, some);
            for (size_t i = 0; i < Code::STEPS; i++) steps[unit * Code::STEPS + i] = some[i];
        }
        for (size_t part = 0; part < RUN<Code> / 16; part++) {
            typename Isa::Bytes four[4] = {steps[4 * part], steps[4 * part + 1], steps[4 * part + 2], steps[4 * part + 3]};
            Isa::transpose(four);
            for (size_t i = 0; i < 4; i++)
                Isa::store_bytes(rows[part] + (4 * span + i) * SPAN_BYTES<Isa>, four[i]);
        }
    }
}

template <class Isa>
constexpr size_t row_place(size_t row) {
    return row / Isa::LANES * Isa::LANES * 16 + row % 4 * SPAN_BYTES<Isa> + row % Isa::LANES / 4 * 16;
}

template <class Isa, class T, class Code>
inline void decode_16(const Code& code, const uint8_t* codes, float scale, float offset, T* out) {
    for (size_t i = 0; i < 16; i += Isa::LANES) {
        const auto values = Isa::mul(code.row(codes + i), Isa::broadcast(scale));
        Isa::store(out + i, Isa::add(values, Isa::broadcast(offset)));
    }
}

// out[r - skip] = the rows r in [skip, end) of one row of tiles.
template <class Isa, class T, class Code>
inline void decode_tiles(const Weight& w, const Code& code, const uint8_t* tile, size_t skip, size_t end, Rows<T> out) {
    uint8_t rows[RUN<Code> / 16][TILE_ROWS * 16];
    const size_t code_bytes = w.code_bytes(), tile_bytes = w.tile_bytes();
    for (size_t start = 0; start < w.cols; start += w.group, tile += tile_bytes) {
        float scales[TILE_ROWS], offsets[TILE_ROWS];
        for (size_t r = 0; r < TILE_ROWS; r += Isa::LANES) {
            const uint8_t* place = tile + code_bytes + r * sizeof(BF16);
            const auto scale = load_scales<Isa>(w, place);
            Isa::store(scales + r, Isa::mul(scale, Isa::broadcast(code.unit())));
            Isa::store(offsets + r, w.asymmetric ? load_offsets<Isa>(w, place, scale) : Isa::zero());
        }
        const size_t inputs = w.group < w.cols - start ? w.group : w.cols - start;
        for (size_t i = 0; i < inputs; i += 16) {
            if (i % RUN<Code> == 0) unpack_run<Isa>(code, tile, i / RUN<Code>, rows);
            const uint8_t* codes = rows[i % RUN<Code> / 16];
            for (size_t r = skip; r < end; r++) {
                T* target = out[r - skip] + start + i;
                if (i + 16 <= inputs) {
                    decode_16<Isa>(code, codes + row_place<Isa>(r), scales[r], offsets[r], target);
                } else {
                    T padded[16];
                    decode_16<Isa>(code, codes + row_place<Isa>(r), scales[r], offsets[r], padded);
                    std::memcpy(target, padded, (inputs - i) * sizeof(T));
                }
            }
        }
    }
}

// out[row - first] = W[row] for the rows [first, last).
template <class Isa, class T>
void decode(const Weight& w, size_t first, size_t last, Rows<T> out) {
    with_code<Isa>(w, [&](const auto& code) {
        for_tile_rows(w, first, last, [&](size_t row, const uint8_t* tile, size_t skip, size_t end) {
            decode_tiles<Isa>(w, code, tile, skip, end, Rows<T>{out[row - first], out.stride});
        });
    });
}

}  // namespace
}  // namespace tightfit
