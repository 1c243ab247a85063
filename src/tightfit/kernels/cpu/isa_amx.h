// What kernels on AMX tiles share: tiles of 16 rows of 64 bytes, and numbers rounded to bfloat16.
#pragma once

#include <algorithm>

#include "isa_avx512.h"

namespace tightfit {
namespace {

// For _tile_loadconfig: all eight tiles at their full size.
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Two vectors of floats, rounded to nearest even; subnormal numbers become 0, as AMX reads them.
inline __m512i round_both(__m512 low, __m512 high) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// The next 32 numbers of a row, of which there are `count` more; zeros beyond them.
inline __m512i load_row(const BF16* row, size_t count) {
    return _mm512_maskz_loadu_epi16(count < 32 ? (1u << count) - 1 : ~0u, row);
}

template <class T>
inline __m512i load_row(const T* row, size_t count) {
    const size_t low = std::min<size_t>(count, 16), high = std::min<size_t>(count - low, 16);
    return round_both(Avx512::load_part(row, low), Avx512::load_part(row + 16, high));
}

}  // namespace
}  // namespace tightfit
