// AVX2 with fused multiply-add and half-precision conversion: Intel since Haswell, AMD since Zen.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "weight.h"

namespace tightfit {
namespace {

// What AVX-512 shares: decoding eight inputs of one row.
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

struct Avx2 : Avx2Rows {
    static constexpr size_t LANES = 8, TOKENS = 2;
    static constexpr size_t ROWS = 4;
    using Vector = __m256;
    using Line = __m256i;

    static Vector zero() { return _mm256_setzero_ps(); }
    static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
    static Vector broadcast(float value) { return _mm256_set1_ps(value); }
    static Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
    static Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
    static Vector div(Vector a, Vector b) { return _mm256_div_ps(a, b); }
    static Vector min(Vector a, Vector b) { return _mm256_min_ps(a, b); }
    static Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
    // To the nearest whole number; and two to the power of a whole number from -126 to 127, or 0 for -127.
    static Vector round(Vector a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Vector power_of_two(Vector n) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    }
    static void store(float* address, Vector value) { _mm256_storeu_ps(address, value); }

    // Rounded to nearest even.
    static void store(F16* address, Vector value) {
        const __m128i halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(address), halves);
    }
    static void store(BF16* address, Vector value) {
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
        const __m256i words = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
        const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(address), halves);
    }
    template <class T>
    static void store_part(T* address, Vector value, size_t count) {
        T values[LANES];
        store(values, value);
        std::memcpy(address, values, count * sizeof(T));
    }

    static Vector load(const float* address) { return _mm256_loadu_ps(address); }
    static Vector load(const F16* address) { return _mm256_cvtph_ps(load_halves(address)); }
    static Vector load(const BF16* address) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(address)), 16));
    }

    template <class T>
    static Vector load_part(const T* address, size_t count) {
        T padded[LANES] = {};
        std::memcpy(padded, address, count * sizeof(T));
        return load(padded);
    }

    static float sum(Vector v) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }

    static float largest(Vector v) {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }

    static Line load_line(const uint8_t* address) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address));
    }

    static void transpose(Line (&rows)[LANES]) {
        Line pairs[LANES], fours[LANES];
        for (size_t i = 0; i < LANES; i += 2) {
            pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        for (size_t i = 0; i < LANES; i += 4)
            for (size_t j = 0; j < 2; j++) {
                fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
                fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
            }
        for (size_t j = 0; j < 4; j++) {
            rows[j] = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x20);
            rows[4 + j] = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x31);
        }
    }

    // The lower and the upper halves of each lane as floats.
    static Vector lower(Line words, BF16) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
    static Vector upper(Line words, BF16) {
        return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    }
    static Vector lower(Line words, F16) {
        const __m256i halves = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
        return _mm256_cvtph_ps(
            _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
    }
    static Vector upper(Line words, F16) { return lower(_mm256_srli_epi32(words, 16), F16()); }

    template <size_t INPUT>
    static Vector int8_codes(Line line) {
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(line, 24 - 8 * INPUT), 24));
    }

    template <size_t INPUT>
    static Vector int4_codes(Line line) {
        constexpr int shift = 8 * (INPUT % 4) + 4 * (INPUT / 4);
        const __m256i nibbles = _mm256_and_si256(_mm256_srli_epi32(line, shift), _mm256_set1_epi32(15));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(nibbles, _mm256_set1_epi32(8)));
    }

private:
    template <class T>
    static __m128i load_halves(const T* address) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(address));
    }
};

}  // namespace
}  // namespace tightfit
