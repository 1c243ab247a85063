// AVX2 with fused multiply-add and half-precision conversion: Intel since Haswell, AMD since Zen.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "weight.h"

namespace tightfit {
namespace {

// For each eight bits, a shuffle that moves the first halves to the places of those that are set, zeros to the others.
struct Spread {
    alignas(16) uint8_t bytes[256][16];

    constexpr Spread() : bytes() {
        for (int bits = 0; bits < 256; bits++)
            for (int i = 0, next = 0; i < 8; i++) {
                const bool set = bits >> i & 1;
                bytes[bits][2 * i] = static_cast<uint8_t>(set ? 2 * next : 0x80);
                bytes[bits][2 * i + 1] = static_cast<uint8_t>(set ? 2 * next + 1 : 0x80);
                next += set;
            }
    }
};

inline __m128i expand_eight(const BF16* values, uint64_t bits) {
    static constexpr Spread spread;
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm_shuffle_epi8(halves, _mm_load_si128(reinterpret_cast<const __m128i*>(spread.bytes[bits & 255])));
}

struct Avx2 {
    static constexpr size_t LANES = 8, TOKENS = 4;
    static constexpr bool SIGNED_DOT = true;
    using Vector = __m256;
    using Sums = __m256i;
    using Bytes = __m256i;
    using Mask = __m256i;

    // ---- floats ----

    static Vector zero() { return _mm256_setzero_ps(); }
    static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
    static Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
    static Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
    static float fma(float a, float b, float c) {
        return _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c)));
    }
    static Vector broadcast(float value) { return _mm256_set1_ps(value); }
    static Vector div(Vector a, Vector b) { return _mm256_div_ps(a, b); }
    static Vector min(Vector a, Vector b) { return _mm256_min_ps(a, b); }
    static Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
    // To the nearest whole number; and two to the power of a whole number from -126 to 127, or 0 for -127.
    static Vector whole(Vector a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Vector power_of_two(Vector n) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    }
    static void store(float* address, Vector value) { _mm256_storeu_ps(address, value); }

    static void store(BF16* address, Vector value) {
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded =
            _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(address), halves);
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

    static void store(F16* address, Vector value) {
        const __m128i halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(address), halves);
    }
    template <class T>
    static void store_part(T* address, Vector value, size_t count) {
        T values[LANES];
        store(values, value);
        std::memcpy(address, values, count * sizeof(T));
    }

    // ---- words of four bytes: floats, or two halves ----

    // 16 bytes from place `at` on of two rows that lie four apart in the list; transpose() then gives four columns.
    static Bytes load_quarters(const uint8_t* const* rows, size_t at) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(rows[0] + at)), load16(rows[4] + at), 1);
    }

    static Vector lower(Bytes words, BF16) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
    static Vector upper(Bytes words, BF16) {
        return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    }
    static Vector lower(Bytes words, F16) {
        const __m256i halves = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
        return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
    }
    static Vector upper(Bytes words, F16) { return lower(_mm256_srli_epi32(words, 16), F16()); }

    // As in isa_portable.h.
    static Bytes expand(const BF16* values, uint64_t bits) {
        const __m128i high = expand_eight(values + _mm_popcnt_u64(bits & 255), bits >> 8);
        return _mm256_inserti128_si256(_mm256_castsi128_si256(expand_eight(values, bits)), high, 1);
    }

    // ---- codes: four bytes to a lane ----

    static Bytes load_bytes(const uint8_t* address) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address));
    }
    static void store_bytes(uint8_t* address, Bytes bytes) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(address), bytes);
    }

    // The bits from place FROM on of each byte, moved to place TO, under `mask`.
    template <int FROM, int TO>
    static Bytes field(Bytes bytes, uint8_t mask) {
        if constexpr (FROM > TO) bytes = _mm256_srli_epi16(bytes, FROM - TO);
        if constexpr (FROM < TO) bytes = _mm256_slli_epi16(bytes, TO - FROM);
        return _mm256_and_si256(bytes, every(mask));
    }

    static Bytes combine(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
    static Bytes flip_sign(Bytes bytes) { return _mm256_xor_si256(bytes, every(0x80)); }
    static Bytes look_up(const uint8_t (&table)[16], Bytes indices) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load16(table)), indices);
    }

    static Mask load_mask(const uint8_t* bits) {
        const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i places = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(load_int(bits)), spread);
        return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, places), places);
    }

    static Bytes add_where(Mask mask, Bytes bytes, uint8_t value) {
        return _mm256_or_si256(bytes, _mm256_and_si256(mask, every(value)));
    }
    static Bytes subtract_where(Mask mask, uint8_t from, Bytes bytes) {
        return _mm256_blendv_epi8(bytes, _mm256_sub_epi8(every(from), bytes), mask);
    }

    // Four lanes of four steps to four steps of four lanes, in each 128 bits.
    static void transpose(Bytes (&steps)[4]) {
        const __m256i low01 = _mm256_unpacklo_epi32(steps[0], steps[1]), low23 = _mm256_unpacklo_epi32(steps[2], steps[3]);
        const __m256i high01 = _mm256_unpackhi_epi32(steps[0], steps[1]), high23 = _mm256_unpackhi_epi32(steps[2], steps[3]);
        steps[0] = _mm256_unpacklo_epi64(low01, low23), steps[1] = _mm256_unpackhi_epi64(low01, low23);
        steps[2] = _mm256_unpacklo_epi64(high01, high23), steps[3] = _mm256_unpackhi_epi64(high01, high23);
    }

    // ---- codes as floats ----

    template <size_t INPUT>
    static Vector input(Bytes bytes, float zero) {
        const __m256i codes = _mm256_and_si256(_mm256_srli_epi32(bytes, 8 * INPUT), _mm256_set1_epi32(255));
        return _mm256_sub_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(zero));
    }
    static Vector inputs(const uint8_t* codes, float zero) {
        return _mm256_sub_ps(_mm256_cvtepi32_ps(spread(codes)), _mm256_set1_ps(zero));
    }

    template <size_t INPUT>
    static Vector look_up_input(const float (&table)[16], Bytes bytes) {
        return entries(table, _mm256_srli_epi32(bytes, 8 * INPUT));
    }
    static Vector look_up_inputs(const float (&table)[16], const uint8_t* codes) {
        return entries(table, spread(codes));
    }

    static void fp8_input(Bytes bytes, int exponent_bits, Vector (&inputs)[4]) {
        // Two inputs at a time in the upper bytes of halves: four rows of each in 128 bits.
        const __m256i upper = _mm256_broadcastsi128_si256(_mm_setr_epi8(-128, 0, -128, 4, -128, 8, -128, 12, -128, 1, -128, 5, -128, 9, -128, 13));
        for (int k = 0; k < 4; k += 2) {
            const __m256i places = _mm256_add_epi8(upper, every(static_cast<uint8_t>(k)));
            const __m256i halves = fp8_halves(_mm256_shuffle_epi8(bytes, places), exponent_bits);
            const __m256i rows = _mm256_permute4x64_epi64(halves, 0b11011000);
            inputs[k] = _mm256_cvtph_ps(_mm256_castsi256_si128(rows));
            inputs[k + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(rows, 1));
        }
    }
    static Vector fp8_inputs(const uint8_t* codes, int exponent_bits) {
        const __m128i bytes = _mm_unpacklo_epi8(_mm_setzero_si128(), load8(codes));
        return _mm256_cvtph_ps(_mm256_castsi256_si128(fp8_halves(_mm256_castsi128_si256(bytes), exponent_bits)));
    }

    // ---- products of integers ----

    static Sums zero_sums() { return _mm256_setzero_si256(); }
    static Sums broadcast_sum(int32_t value) { return _mm256_set1_epi32(value); }
    template <int FACTOR>
    static Sums times(int32_t value) {
        if constexpr (FACTOR == 0) return zero_sums();
        const Sums values = broadcast_sum(value);
        if constexpr (FACTOR > 0 && (FACTOR & (FACTOR - 1)) == 0) return _mm256_slli_epi32(values, __builtin_ctz(FACTOR));
        return _mm256_mullo_epi32(values, broadcast_sum(FACTOR));
    }
    template <int SHIFT>
    static Sums shift_add(Sums high, Sums low) { return _mm256_add_epi32(_mm256_slli_epi32(high, SHIFT), low); }
    static Vector to_floats(Sums sums) { return _mm256_cvtepi32_ps(sums); }

    static Sums add_sums(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
    static int32_t total(Sums sums) {
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0b01001110));
        return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0b10110001)));
    }

    // Sizes of floats as integers, which have the same order, with infinities and NaNs above all.
    static Sums max_size(Sums sizes, Vector v) {
        return _mm256_max_epi32(sizes, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
    }
    static float largest(Sums sizes) {
        __m128i four = _mm_max_epi32(_mm256_castsi256_si128(sizes), _mm256_extracti128_si256(sizes, 1));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0b01001110));
        return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0b10110001))));
    }

    static Sums round(Vector v) { return _mm256_cvtps_epi32(v); }
    static void store_codes(int8_t* address, Sums codes) {
        const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(address), _mm_packs_epi16(halves, halves));
    }

    // sums[t] += the products of the steps' codes with four bytes of x[t] each. Sums of two products are of 16 bits; codes
    // are at most LARGEST, so that none of them saturates, and as many are added as fit. Signed codes give their sign
    // to x.
    template <bool SIGNED, int LARGEST, size_t STEPS, size_t TOKENS, size_t INPUTS>
    static void dot(const Bytes (&steps)[STEPS], const int8_t (&x)[TOKENS][INPUTS], Sums (&sums)[TOKENS]) {
        constexpr size_t ROOM = 32767 / (127 * 2 * LARGEST);
        static_assert(ROOM > 0);
        for (size_t first = 0; first < STEPS; first += ROOM)
            for (size_t t = 0; t < TOKENS; t++) {
                __m256i pairs = _mm256_setzero_si256();
                for (size_t i = first; i < STEPS && i < first + ROOM; i++) {
                    __m256i inputs = _mm256_set1_epi32(load_int(x[t] + 4 * i)), codes = steps[i];
                    if constexpr (SIGNED) {
                        inputs = _mm256_sign_epi8(inputs, codes);
                        codes = _mm256_abs_epi8(codes);
                    }
                    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes, inputs));
                }
                sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
    }

protected:
    static __m256i every(uint8_t value) { return _mm256_set1_epi8(static_cast<char>(value)); }
    static __m128i load16(const void* address) { return _mm_loadu_si128(static_cast<const __m128i*>(address)); }
    static __m128i load8(const void* address) { return _mm_loadl_epi64(static_cast<const __m128i*>(address)); }
    static int load_int(const void* address) {
        int value;
        std::memcpy(&value, address, sizeof value);
        return value;
    }

private:
    template <class T>
    static __m128i load_halves(const T* address) { return load16(address); }
    static __m256i spread(const uint8_t* codes) { return _mm256_cvtepu8_epi32(load8(codes)); }

    // A permutation looks up 8 entries by three bits; bit 3, moved to the sign's place, chooses among two of them.
    static Vector entries(const float (&table)[16], __m256i indices) {
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), indices);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), indices);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(indices, 28)));
    }

    // Codes in the upper byte of each half become float16 numbers whose exponent is as it is stored, and so too small by
    // 15 less the format's bias: a shift, and the copies of the sign that it makes are taken away.
    static __m256i fp8_halves(__m256i codes, int exponent_bits) {
        const __m256i kept = _mm256_set1_epi16(static_cast<short>(0x8000 | 0x7fff >> (5 - exponent_bits)));
        return _mm256_and_si256(_mm256_sra_epi16(codes, _mm_cvtsi32_si128(5 - exponent_bits)), kept);
    }
};

}  // namespace
}  // namespace tightfit
