// AVX-512 F, BW, VL, DQ: Intel servers since Skylake, AMD since Zen 4.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "isa_avx2.h"
#include "weight.h"

namespace tightfit {
namespace {

struct Avx512 : Avx2Rows {
    static constexpr size_t LANES = 16, TOKENS = 4;
    static constexpr size_t ROWS = 8;
    using Vector = __m512;
    using Line = __m512i;

    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
    static Vector broadcast(float value) { return _mm512_set1_ps(value); }
    static Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
    static Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
    static Vector div(Vector a, Vector b) { return _mm512_div_ps(a, b); }
    static Vector min(Vector a, Vector b) { return _mm512_min_ps(a, b); }
    static Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
    // To the nearest whole number; and two to the power of a whole number from -126 to 127, or 0 for -127.
    static Vector round(Vector a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Vector power_of_two(Vector n) {
        const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
        return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
    }
    static void store(float* address, Vector value) { _mm512_storeu_ps(address, value); }
    static void store_part(float* address, Vector value, size_t count) {
        _mm512_mask_storeu_ps(address, first_lanes(count), value);
    }

    // Rounded to nearest even.
    static void store(F16* address, Vector value) { store_part(address, value, LANES); }
    static void store(BF16* address, Vector value) { store_part(address, value, LANES); }
    static void store_part(F16* address, Vector value, size_t count) {
        const __m256i halves = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_mask_storeu_epi16(address, first_lanes(count), halves);
    }
    static void store_part(BF16* address, Vector value, size_t count) {
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        const __m512i halves = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
        _mm256_mask_storeu_epi16(address, first_lanes(count), _mm512_cvtepi32_epi16(halves));
    }

    static Vector load(const float* address) { return _mm512_loadu_ps(address); }
    static Vector load(const F16* address) { return _mm512_cvtph_ps(_mm256_loadu_epi16(address)); }
    static Vector load(const BF16* address) { return from_bf16(_mm256_loadu_epi16(address)); }

    static Vector load_part(const float* address, size_t count) {
        return _mm512_maskz_loadu_ps(first_lanes(count), address);
    }
    static Vector load_part(const F16* address, size_t count) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), address));
    }
    static Vector load_part(const BF16* address, size_t count) {
        return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(count), address));
    }

    static float sum(Vector v) {
        const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }

    static float largest(Vector v) { return _mm512_reduce_max_ps(v); }

    static Line load_line(const uint8_t* address) { return _mm512_loadu_si512(address); }

    static void transpose(Line (&rows)[LANES]) {
        Line pairs[LANES], fours[LANES];
        for (size_t i = 0; i < LANES; i += 2) {
            pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        for (size_t i = 0; i < LANES; i += 4)
            for (size_t j = 0; j < 2; j++) {
                fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
                fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
            }
        // A quarter q of fours[4 i + j] now holds column 4 q + j of the rows 4 i to 4 i + 3.
        for (size_t j = 0; j < 4; j++) {
            const Line low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
            const Line low_odd = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
            const Line high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
            const Line high_odd = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
            rows[j] = _mm512_shuffle_i32x4(low, high, 0x88);
            rows[4 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
            rows[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
            rows[12 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
        }
    }

    // The lower and the upper halves of each lane as floats.
    static Vector lower(Line words, BF16) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
    static Vector upper(Line words, BF16) {
        return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
    static Vector lower(Line words, F16) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }
    static Vector upper(Line words, F16) { return lower(_mm512_srli_epi32(words, 16), F16()); }

    // Byte INPUT of each lane, plus 128, becomes the low bits of the float 2^23, from which subtracting 2^23 + 128
    // leaves the code: one shuffle and one subtraction, both exact.
    template <size_t INPUT>
    static Vector int8_codes(Line line) {
        const __m512i bytes = _mm512_xor_si512(line, _mm512_set1_epi32(static_cast<int>(0x80808080)));
        const __m512i base = _mm512_set1_epi32(0x4b000000);
        const __m512i places = _mm512_broadcast_i32x4(
            _mm_setr_epi8(INPUT, 0, 0, 0, INPUT + 4, 0, 0, 0, INPUT + 8, 0, 0, 0, INPUT + 12, 0, 0, 0));
        const __m512i number = _mm512_mask_shuffle_epi8(base, 0x1111111111111111, bytes, places);
        return _mm512_sub_ps(_mm512_castsi512_ps(number), _mm512_set1_ps(8388608.0f + 128.0f));
    }

    // The permutation reads only the low four bits of each lane, so it is a table look-up that needs no mask.
    template <size_t INPUT>
    static Vector int4_codes(Line line) {
        constexpr unsigned shift = 8 * (INPUT % 4) + 4 * (INPUT / 4);
        const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return _mm512_permutexvar_ps(_mm512_srli_epi32(line, shift), values);
    }

private:
    static __mmask16 first_lanes(size_t count) { return static_cast<__mmask16>((1u << count) - 1); }
    static Vector from_bf16(__m256i halves) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
};

}  // namespace
}  // namespace tightfit
