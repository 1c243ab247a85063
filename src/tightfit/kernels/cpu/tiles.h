// What products with tiles share, written once over an instruction set `Isa`.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace tightfit {
namespace {

// Weights are read once, so their speed is the memory's, and a core's own prefetchers reach half of it: they stop at
// the ends of pages. The distances, in bytes, were found by trying: far ahead into the second-level cache, then near.
constexpr size_t FAR = 4096, NEAR = 1024;

// GCC removes calls of a function that only prefetches, so it must not be one.
template <size_t BYTES = LINE>
__attribute__((always_inline)) inline void prefetch(const void* address) {
    for (size_t i = 0; i < BYTES; i += LINE) {
        const char* place = static_cast<const char*>(address) + i;
        __builtin_prefetch(place + FAR, 0, 2);
        __builtin_prefetch(place + NEAR, 0, 3);
    }
}

template <class T>
inline T load_as(const void* address) {
    T value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

// Calls work(row, tile, skip, end) for each row of tiles of the rows [first, last): its first tile, and the rows in it
// [skip, end) that are the matrix's rows from `row` on.
template <class Work>
inline void for_tile_rows(const Weight& w, size_t first, size_t last, Work work) {
    for (size_t row = first; row < last;) {
        const size_t place = w.row_offset + row, skip = place % TILE_ROWS;
        const size_t count = std::min(last - row, TILE_ROWS - skip);
        work(row, w.data + place / TILE_ROWS * w.tile_row_bytes(), skip, skip + count);
        row += count;
    }
}

// The scales of the rows of a span, whose first one is at `place`.
template <class Isa>
inline typename Isa::Vector load_scales(const Weight& w, const uint8_t* place) {
    if (w.half_scales) return Isa::load(reinterpret_cast<const F16*>(place));
    return Isa::load(reinterpret_cast<const BF16*>(place));
}

// Their offsets, which lie after the scales of all rows: what level 0 stands for.
template <class Isa>
inline typename Isa::Vector load_offsets(const Weight& w, const uint8_t* place, typename Isa::Vector scales) {
    const auto offsets = load_scales<Isa>(w, place + TILE_ROWS * sizeof(BF16));
    return w.half_scales ? Isa::fma(Isa::broadcast(w.below_zero()), scales, offsets) : offsets;
}

// out[r - skip] = the rows [skip, end) of a tile's results, or with `accumulate`, accumulate times them more.
template <class Isa>
inline void store_rows(const typename Isa::Vector (&results)[TILE_ROWS / Isa::LANES], size_t skip, size_t end, float* out,
                       float accumulate) {
    float rows[TILE_ROWS] = {};
    if (accumulate != 0) std::memcpy(rows + skip, out, (end - skip) * sizeof(float));
    for (size_t i = 0; i < TILE_ROWS / Isa::LANES; i++) {
        float* place = rows + i * Isa::LANES;
        Isa::store(place, accumulate != 0 ? Isa::fma(Isa::broadcast(accumulate), results[i], Isa::load(place)) : results[i]);
    }
    std::memcpy(out, rows + skip, (end - skip) * sizeof(float));
}

}  // namespace
}  // namespace tightfit
