// AVX-512 F, BW, VL, DQ: Intel servers since Skylake, AMD since Zen 4.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "isa_avx2.h"

namespace tightfit {
namespace {

struct Avx512 {
    static constexpr size_t LANES = 16, TOKENS = 8;
    static constexpr bool SIGNED_DOT = true;
    using Vector = __m512;
    using Sums = __m512i;
    using Bytes = __m512i;
    using Mask = __mmask64;

    // ---- floats ----

    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    static Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
    static Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
    static float fma(float a, float b, float c) {
        return _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c)));
    }
    static Vector broadcast(float value) { return _mm512_set1_ps(value); }
    static Vector div(Vector a, Vector b) { return _mm512_div_ps(a, b); }
    static Vector min(Vector a, Vector b) { return _mm512_min_ps(a, b); }
    static Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
    // To the nearest whole number; and two to the power of a whole number from -126 to 127, or 0 for -127.
    static Vector whole(Vector a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Vector power_of_two(Vector n) {
        const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
        return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
    }
    static void store(float* address, Vector value) { _mm512_storeu_ps(address, value); }
    static void store_part(float* address, Vector value, size_t count) {
        _mm512_mask_storeu_ps(address, first_lanes(count), value);
    }

    static void store(BF16* address, Vector value) {
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(address), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
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

    static void store(F16* address, Vector value) { store_part(address, value, LANES); }
    static void store_part(F16* address, Vector value, size_t count) {
        const __m256i halves = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_mask_storeu_epi16(address, first_lanes(count), halves);
    }
    static void store_part(BF16* address, Vector value, size_t count) {
        BF16 halves[LANES];
        store(halves, value);
        std::memcpy(address, halves, count * sizeof(BF16));
    }

    // ---- words of four bytes: floats, or two halves ----

    // 16 bytes from place `at` on of four rows that lie four apart in the list; transpose() then gives four columns.
    static Bytes load_quarters(const uint8_t* const* rows, size_t at) {
        const Bytes two = _mm512_mask_broadcast_i32x4(_mm512_castsi128_si512(load16(rows[0] + at)), 0x00f0,
                                                      load16(rows[4] + at));
        const Bytes three = _mm512_mask_broadcast_i32x4(two, 0x0f00, load16(rows[8] + at));
        return _mm512_mask_broadcast_i32x4(three, 0xf000, load16(rows[12] + at));
    }

    static Vector lower(Bytes words, BF16) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
    static Vector upper(Bytes words, BF16) {
        return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
    static Vector lower(Bytes words, F16) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }
    static Vector upper(Bytes words, F16) { return lower(_mm512_srli_epi32(words, 16), F16()); }

    // As in isa_portable.h.
    static Bytes expand(const BF16* values, uint64_t bits) {
        const __m256i high = Avx2::expand(values + _mm_popcnt_u64(bits & 0xffff), bits >> 16);
        return _mm512_inserti64x4(_mm512_castsi256_si512(Avx2::expand(values, bits)), high, 1);
    }

    // ---- codes: four bytes to a lane ----

    static Bytes load_bytes(const uint8_t* address) { return _mm512_loadu_si512(address); }
    static void store_bytes(uint8_t* address, Bytes bytes) { _mm512_storeu_si512(address, bytes); }

    // The bits from place FROM on of each byte, moved to place TO, under `mask`.
    template <int FROM, int TO>
    static Bytes field(Bytes bytes, uint8_t mask) {
        if constexpr (FROM > TO) bytes = _mm512_srli_epi16(bytes, FROM - TO);
        if constexpr (FROM < TO) bytes = _mm512_slli_epi16(bytes, TO - FROM);
        return _mm512_and_si512(bytes, every(mask));
    }

    static Bytes combine(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
    static Bytes flip_sign(Bytes bytes) { return _mm512_xor_si512(bytes, every(0x80)); }
    static Bytes look_up(const uint8_t (&table)[16], Bytes indices) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load16(table)), indices);
    }

    static Mask load_mask(const uint8_t* bits) {
        Mask mask;
        std::memcpy(&mask, bits, sizeof mask);
        return mask;
    }

    static Bytes add_where(Mask mask, Bytes bytes, uint8_t value) {
        return _mm512_mask_add_epi8(bytes, mask, bytes, every(value));
    }
    static Bytes subtract_where(Mask mask, uint8_t from, Bytes bytes) {
        return _mm512_mask_sub_epi8(bytes, mask, every(from), bytes);
    }

    // Four lanes of four steps to four steps of four lanes, in each 128 bits.
    static void transpose(Bytes (&steps)[4]) {
        const __m512i low01 = _mm512_unpacklo_epi32(steps[0], steps[1]), low23 = _mm512_unpacklo_epi32(steps[2], steps[3]);
        const __m512i high01 = _mm512_unpackhi_epi32(steps[0], steps[1]), high23 = _mm512_unpackhi_epi32(steps[2], steps[3]);
        steps[0] = _mm512_unpacklo_epi64(low01, low23), steps[1] = _mm512_unpackhi_epi64(low01, low23);
        steps[2] = _mm512_unpacklo_epi64(high01, high23), steps[3] = _mm512_unpackhi_epi64(high01, high23);
    }

    // ---- codes as floats ----

    // Byte INPUT of each lane becomes the low bits of the float 2^23, from which subtracting 2^23 + zero leaves the
    // number: one shuffle and one subtraction, both exact.
    template <size_t INPUT>
    static Vector input(Bytes bytes, float zero) {
        const __m512i places = _mm512_broadcast_i32x4(
            _mm_setr_epi8(INPUT, 0, 0, 0, INPUT + 4, 0, 0, 0, INPUT + 8, 0, 0, 0, INPUT + 12, 0, 0, 0));
        const __m512i number = _mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x4b000000), 0x1111111111111111, bytes, places);
        return _mm512_sub_ps(_mm512_castsi512_ps(number), _mm512_set1_ps(8388608.0f + zero));
    }
    static Vector inputs(const uint8_t* codes, float zero) {
        return _mm512_sub_ps(_mm512_cvtepi32_ps(spread(codes)), _mm512_set1_ps(zero));
    }

    // The permutation reads only the low four bits of each lane, so it needs no mask.
    template <size_t INPUT>
    static Vector look_up_input(const float (&table)[16], Bytes bytes) {
        return _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 8 * INPUT), _mm512_loadu_ps(table));
    }
    static Vector look_up_inputs(const float (&table)[16], const uint8_t* codes) {
        return _mm512_permutexvar_ps(spread(codes), _mm512_loadu_ps(table));
    }

    static void fp8_input(Bytes bytes, int exponent_bits, Vector (&inputs)[4]) {
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        // Two inputs at a time in the upper bytes of halves: four rows of each in 128 bits.
        const __m512i upper = _mm512_broadcast_i32x4(_mm_setr_epi8(-128, 0, -128, 4, -128, 8, -128, 12, -128, 1, -128, 5, -128, 9, -128, 13));
        for (int k = 0; k < 4; k += 2) {
            const __m512i places = _mm512_add_epi8(upper, every(static_cast<uint8_t>(k)));
            const __m512i halves = fp8_halves(_mm512_shuffle_epi8(bytes, places), exponent_bits);
            const __m512i rows = _mm512_permutexvar_epi64(order, halves);
            inputs[k] = _mm512_cvtph_ps(_mm512_castsi512_si256(rows));
            inputs[k + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(rows, 1));
        }
    }
    static Vector fp8_inputs(const uint8_t* codes, int exponent_bits) {
        const __m512i halves = _mm512_castsi256_si512(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load16(codes)), 8));
        return _mm512_cvtph_ps(_mm512_castsi512_si256(fp8_halves(halves, exponent_bits)));
    }

    // ---- products of integers ----

    static Sums zero_sums() { return _mm512_setzero_si512(); }
    static Sums broadcast_sum(int32_t value) { return _mm512_set1_epi32(value); }
    template <int FACTOR>
    static Sums times(int32_t value) {
        if constexpr (FACTOR == 0) return zero_sums();
        const Sums values = broadcast_sum(value);
        if constexpr (FACTOR > 0 && (FACTOR & (FACTOR - 1)) == 0) return _mm512_slli_epi32(values, __builtin_ctz(FACTOR));
        return _mm512_mullo_epi32(values, broadcast_sum(FACTOR));
    }
    template <int SHIFT>
    static Sums shift_add(Sums high, Sums low) { return _mm512_add_epi32(_mm512_slli_epi32(high, SHIFT), low); }
    static Vector to_floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }

    static Sums add_sums(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
    static int32_t total(Sums sums) { return _mm512_reduce_add_epi32(sums); }

    // Sizes of floats as integers, which have the same order, with infinities and NaNs above all.
    static Sums max_size(Sums sizes, Vector v) {
        return _mm512_max_epi32(sizes, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
    }
    static float largest(Sums sizes) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(sizes)))); }

    static Sums round(Vector v) { return _mm512_cvtps_epi32(v); }
    static void store_codes(int8_t* address, Sums codes) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(address), _mm512_cvtepi32_epi8(codes));
    }

    // As in isa_avx2.h.
    template <bool SIGNED, int LARGEST, size_t STEPS, size_t TOKENS, size_t INPUTS>
    static void dot(const Bytes (&steps)[STEPS], const int8_t (&x)[TOKENS][INPUTS], Sums (&sums)[TOKENS]) {
        constexpr size_t ROOM = 32767 / (127 * 2 * LARGEST);
        static_assert(ROOM > 0);
        for (size_t first = 0; first < STEPS; first += ROOM)
            for (size_t t = 0; t < TOKENS; t++) {
                __m512i pairs = _mm512_setzero_si512();
                for (size_t i = first; i < STEPS && i < first + ROOM; i++) {
                    __m512i inputs = _mm512_set1_epi32(load_int(x[t] + 4 * i)), codes = steps[i];
                    if constexpr (SIGNED) {
                        const __mmask64 negative = _mm512_movepi8_mask(codes);
                        inputs = _mm512_mask_sub_epi8(inputs, negative, _mm512_setzero_si512(), inputs);
                        codes = _mm512_abs_epi8(codes);
                    }
                    pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(codes, inputs));
                }
                sums[t] = _mm512_add_epi32(sums[t], _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
            }
    }

protected:
    static int load_int(const void* address) {
        int value;
        std::memcpy(&value, address, sizeof value);
        return value;
    }

private:
    static __m512i every(uint8_t value) { return _mm512_set1_epi8(static_cast<char>(value)); }
    static __m128i load16(const void* address) { return _mm_loadu_si128(static_cast<const __m128i*>(address)); }
    static __m512i spread(const uint8_t* codes) { return _mm512_cvtepu8_epi32(load16(codes)); }
    static __mmask16 first_lanes(size_t count) { return static_cast<__mmask16>((1u << count) - 1); }
    static Vector from_bf16(__m256i halves) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }

    // As in isa_avx2.h.
    static __m512i fp8_halves(__m512i codes, int exponent_bits) {
        const __m512i shift = _mm512_set1_epi16(static_cast<short>(5 - exponent_bits));
        const __m512i kept = _mm512_set1_epi16(static_cast<short>(0x8000 | 0x7fff >> (5 - exponent_bits)));
        return _mm512_and_si512(_mm512_srav_epi16(codes, shift), kept);
    }
};

}  // namespace
}  // namespace tightfit
