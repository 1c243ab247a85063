// What products with tiles share, written once over an instruction set `Isa`.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace tightfit {
namespace {

// Weights are read once, so their speed is the memory's: a core's own prefetcher alone reaches half of it.
constexpr size_t AHEAD = 2048;  // bytes

// GCC removes calls of a function that only prefetches, so it must not be one.
template <size_t BYTES = LINE>
__attribute__((always_inline)) inline void prefetch(const void* address) {
    for (size_t i = 0; i < BYTES; i += LINE) __builtin_prefetch(static_cast<const char*>(address) + i + AHEAD);
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
