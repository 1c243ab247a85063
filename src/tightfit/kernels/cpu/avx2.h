// What AVX2 and AVX-512 share: decoding eight inputs of one row.
#pragma once

#include <immintrin.h>

#include "weight.h"

namespace tightfit {
namespace {

struct Avx2Rows {
    static __m256 int8_row(uint32_t inputs, uint32_t next_inputs) {
        const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(uint64_t{next_inputs} << 32 | inputs));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }

    static __m256 int4_row(uint32_t inputs) {
        const __m256i shifts = _mm256_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28);
        const __m256i nibbles = _mm256_and_si256(
            _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(inputs)), shifts), _mm256_set1_epi32(15));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(nibbles, _mm256_set1_epi32(8)));
    }

    static void store8(float* out, __m256 codes, float scale) {
        _mm256_storeu_ps(out, _mm256_mul_ps(codes, _mm256_set1_ps(scale)));
    }

    static void store8(BF16* out, __m256 codes, float scale) {
        const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(codes, _mm256_set1_ps(scale)));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(
            _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        const __m128i halves =
            _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), halves);
    }
};

}  // namespace
}  // namespace tightfit
