// Products with vectors, written once over an instruction set `Isa` (isa_*.h): LANES floats to a
// vector, TOKENS activations that share a decoded weight, and the loads, conversions and arithmetic that are used here.
//
// Everything is in an unnamed namespace: the same template compiled under other flags must not be merged with it.
#pragma once

#include <cstring>

#include "weight.h"

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

constexpr size_t LARGEST_GROUP = 128;
constexpr size_t PARTS = 4;

struct Int8 {
    static constexpr size_t INPUTS = 4;  // in a line
    template <class Isa, size_t INPUT>
    static auto codes(typename Isa::Line line) { return Isa::template int8_codes<INPUT>(line); }
};

struct Int4 {
    static constexpr size_t INPUTS = 8;
    template <class Isa, size_t INPUT>
    static auto codes(typename Isa::Line line) { return Isa::template int4_codes<INPUT>(line); }
};

template <class Isa, class Code, size_t TOKENS, size_t INPUT = 0>
inline void add_line(typename Isa::Line line, const float* const (&x)[TOKENS],
                     typename Isa::Vector (&sums)[TOKENS][PARTS]) {
    if constexpr (INPUT < Code::INPUTS) {
        const auto codes = Code::template codes<Isa, INPUT>(line);
        for (size_t t = 0; t < TOKENS; t++)
            sums[t][INPUT % PARTS] = Isa::fma(codes, Isa::broadcast(x[t][INPUT]), sums[t][INPUT % PARTS]);
        add_line<Isa, Code, TOKENS, INPUT + 1>(line, x, sums);
    }
}

// out[t][r - skip] for the rows r in [skip, end) of one tile row.
template <class Isa, class Code, size_t TOKENS>
inline void tile_block(const Weight& w, const uint8_t* tile, Rows<const float> x, size_t skip, size_t end,
                       Rows<float> out) {
    constexpr size_t SPANS = TILE_ROWS / Isa::LANES;
    const size_t groups = w.groups(), code_bytes = w.code_bytes(), tile_bytes = w.tile_bytes();
    typename Isa::Vector results[SPANS][TOKENS];
    for (auto& span : results)
        for (auto& result : span) result = Isa::zero();

    for (size_t g = 0; g < groups; g++, tile += tile_bytes) {
        const float* inputs[TOKENS];
        float padded[TOKENS][LARGEST_GROUP];
        for (size_t t = 0; t < TOKENS; t++) inputs[t] = x[t] + g * w.group;
        if ((g + 1) * w.group > w.cols) {
            const size_t rest = w.cols - g * w.group;
            for (size_t t = 0; t < TOKENS; t++) {
                std::memcpy(padded[t], inputs[t], rest * sizeof(float));
                std::memset(padded[t] + rest, 0, (w.group - rest) * sizeof(float));
                inputs[t] = padded[t];
            }
        }
        for (size_t s = 0; s < SPANS; s++) {
            typename Isa::Vector sums[TOKENS][PARTS];
            for (auto& parts : sums)
                for (auto& sum : parts) sum = Isa::zero();
            const uint8_t* line = tile + s * LINE / SPANS;
            for (size_t i = 0; i < w.group; i += Code::INPUTS, line += LINE) {
                const float* next[TOKENS];
                for (size_t t = 0; t < TOKENS; t++) next[t] = inputs[t] + i;
                if (s == 0) prefetch(line);
                add_line<Isa, Code, TOKENS>(Isa::load_line(line), next, sums);
            }
            const BF16* scales = reinterpret_cast<const BF16*>(tile + code_bytes) + s * Isa::LANES;
            const auto scale = Isa::load(scales);
            for (size_t t = 0; t < TOKENS; t++) {
                const auto sum = Isa::add(Isa::add(sums[t][0], sums[t][1]), Isa::add(sums[t][2], sums[t][3]));
                results[s][t] = Isa::fma(sum, scale, results[s][t]);
            }
        }
    }
    for (size_t t = 0; t < TOKENS; t++) {
        float rows[TILE_ROWS];
        for (size_t s = 0; s < SPANS; s++) Isa::store(rows + s * Isa::LANES, results[s][t]);
        std::memcpy(out[t], rows + skip, (end - skip) * sizeof(float));
    }
}

template <class Isa, class Code>
void tile_matmul(const Weight& w, size_t first, size_t last, Rows<const float> x, size_t tokens, Rows<float> out) {
    for (size_t row = first; row < last;) {
        const size_t place = w.row_offset + row, skip = place % TILE_ROWS;
        const size_t count = last - row < TILE_ROWS - skip ? last - row : TILE_ROWS - skip;
        const uint8_t* tile = w.data + place / TILE_ROWS * w.tile_row_bytes();
        const Rows<float> rows{out.data + row, out.stride};
        size_t t = 0;
        for (; t + Isa::TOKENS <= tokens; t += Isa::TOKENS)
            tile_block<Isa, Code, Isa::TOKENS>(w, tile, {x[t], x.stride}, skip, skip + count, {rows[t], rows.stride});
        for (; t < tokens; t++)
            tile_block<Isa, Code, 1>(w, tile, {x[t], x.stride}, skip, skip + count, {rows[t], rows.stride});
        row += count;
    }
}

template <class Isa>
void matmul(const Weight& w, size_t first, size_t last, Rows<const float> x, size_t tokens, Rows<float> out) {
    switch (w.kind) {
        case Kind::f32: return dense_matmul<Isa, float>(w, first, last, x, tokens, out);
        case Kind::f16: return dense_matmul<Isa, F16>(w, first, last, x, tokens, out);
        case Kind::bf16: return dense_matmul<Isa, BF16>(w, first, last, x, tokens, out);
        case Kind::int8: return tile_matmul<Isa, Int8>(w, first, last, x, tokens, out);
        case Kind::int4: return tile_matmul<Isa, Int4>(w, first, last, x, tokens, out);
        default: return;
    }
}

// ---- decoding of tiles: eight inputs of one row at a time ----

inline uint32_t load_u32(const uint8_t* address) {
    uint32_t value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

inline float to_float(BF16 value) {
    const uint32_t bits = uint32_t{value.bits} << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <class Isa, class T>
inline void decode_group(const Weight& w, const uint8_t* tile, size_t row, T* out) {
    BF16 scale;
    std::memcpy(&scale, tile + w.code_bytes() + row * sizeof scale, sizeof scale);
    const uint8_t* codes = tile + row * 4;
    if (w.kind == Kind::int8)
        for (size_t i = 0; i < w.group; i += 8, codes += 2 * LINE)
            Isa::store8(out + i, Isa::int8_row(load_u32(codes), load_u32(codes + LINE)), to_float(scale));
    else
        for (size_t i = 0; i < w.group; i += 8, codes += LINE)
            Isa::store8(out + i, Isa::int4_row(load_u32(codes)), to_float(scale));
}

template <class Isa, class T>
void decode(const Weight& w, size_t first, size_t last, Rows<T> out) {
    const size_t groups = w.groups(), whole = w.cols / w.group;
    for (size_t row = first; row < last;) {
        const size_t place = w.row_offset + row, skip = place % TILE_ROWS;
        const size_t count = last - row < TILE_ROWS - skip ? last - row : TILE_ROWS - skip;
        const uint8_t* tile = w.data + place / TILE_ROWS * w.tile_row_bytes();
        for (size_t g = 0; g < groups; g++, tile += w.tile_bytes())
            for (size_t r = 0; r < count; r++) {
                T* target = out[row + r - first] + g * w.group;
                if (g < whole) {
                    decode_group<Isa>(w, tile, skip + r, target);
                } else {
                    T padded[LARGEST_GROUP];
                    decode_group<Isa>(w, tile, skip + r, padded);
                    std::memcpy(target, padded, (w.cols - g * w.group) * sizeof(T));
                }
            }
        row += count;
    }
}

template <class Isa>
constexpr Kernels kernels_of(const char* name) {
    return {name, matmul<Isa>, decode<Isa, float>, decode<Isa, BF16>};
}

}  // namespace
}  // namespace tightfit
