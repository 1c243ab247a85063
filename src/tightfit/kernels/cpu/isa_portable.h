// Plain C++ over four lanes, for any processor (GCC's vector extensions: SSE2, NEON or whatever there is).
#pragma once

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "matrices are stored in little-endian order");

#include <cstring>

#include "weight.h"

namespace tightfit {
namespace {

struct Portable {
    static constexpr size_t LANES = 4, TOKENS = 2;
    static constexpr size_t ROWS = 4;
    typedef float Vector __attribute__((vector_size(16)));
    typedef int32_t Line __attribute__((vector_size(16)));
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    typedef uint16_t Halves __attribute__((vector_size(8)));

    static Vector zero() { return Vector{}; }
    static Vector add(Vector a, Vector b) { return a + b; }
    static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
    static Vector broadcast(float value) { return Vector{value, value, value, value}; }
    static Vector sub(Vector a, Vector b) { return a - b; }
    static Vector mul(Vector a, Vector b) { return a * b; }
    static Vector div(Vector a, Vector b) { return a / b; }
    static Vector min(Vector a, Vector b) { return a < b ? a : b; }
    static Vector max(Vector a, Vector b) { return a > b ? a : b; }
    // To the nearest whole number, for |a| < 2^22; and two to the power of one from -126 to 127, or 0 for -127.
    static Vector round(Vector a) { return a + 0x1.8p23f - 0x1.8p23f; }
    static Vector power_of_two(Vector n) {
        return floats(reinterpret_cast<Unsigned>((__builtin_convertvector(n, Line) + 127) << 23));
    }
    static void store(float* address, Vector value) { std::memcpy(address, &value, sizeof value); }

    // Rounded to nearest even.
    static void store(BF16* address, Vector value) {
        const Unsigned bits = as_bits(value);
        const Unsigned rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        store_halves(address, (bits & 0x7fffffff) > 0x7f800000 ? Unsigned{} + 0x7fc0 : rounded);
    }
    // A float below the normal halves is rounded by adding one half, whose last place is the last place of a half.
    static void store(F16* address, Vector value) {
        const Unsigned bits = as_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
        const Unsigned normal = (size - 0x37fff001 + (size >> 13 & 1)) >> 13;
        const Unsigned small = as_bits(floats(size) + 0.5f) - 0x3f000000;
        const Unsigned large = size > 0x7f800000 ? Unsigned{} + 0x7e00 : Unsigned{} + 0x7c00;
        store_halves(address, (size < 0x38800000 ? small : size >= 0x47800000 ? large : normal) | sign);
    }
    template <class T>
    static void store_part(T* address, Vector value, size_t count) {
        T values[LANES];
        store(values, value);
        std::memcpy(address, values, count * sizeof(T));
    }

    static Vector load(const float* address) { return load_as<Vector>(address); }
    static Vector load(const BF16* address) { return floats(widen(address) << 16); }

    // Shifting a half's exponent and fraction into a float's leaves an exponent that is too small by 112, which a
    // multiplication mends, subnormal numbers included; infinities and NaNs get their exponent set.
    static Vector load(const F16* address) { return from_f16(widen(address)); }
    static Vector from_f16(Unsigned half) {
        const Unsigned bits = (half & 0x7fff) << 13;
        const Unsigned special = static_cast<Unsigned>(bits >= 0x0f800000) & 0x7f800000;
        const Unsigned value = as_bits(floats(bits) * 0x1p112f) | special;
        return floats(value | (half & 0x8000) << 16);
    }

    template <class T>
    static Vector load_part(const T* address, size_t count) {
        T padded[LANES] = {};
        std::memcpy(padded, address, count * sizeof(T));
        return load(padded);
    }

    static float sum(Vector v) { return (v[0] + v[2]) + (v[1] + v[3]); }

    static float largest(Vector v) {
        const float low = v[0] > v[1] ? v[0] : v[1], high = v[2] > v[3] ? v[2] : v[3];
        return low > high ? low : high;
    }

    static Line load_line(const uint8_t* address) { return load_as<Line>(address); }

    static void transpose(Line (&rows)[LANES]) {
        const Line a = rows[0], b = rows[1], c = rows[2], d = rows[3];
        for (size_t i = 0; i < LANES; i++) rows[i] = Line{a[i], b[i], c[i], d[i]};
    }

    // The lower and the upper halves of each lane as floats.
    static Vector lower(Line words, BF16) { return floats(reinterpret_cast<Unsigned>(words) << 16); }
    static Vector upper(Line words, BF16) { return floats(reinterpret_cast<Unsigned>(words) & 0xffff0000); }
    static Vector lower(Line words, F16) { return from_f16(reinterpret_cast<Unsigned>(words) & 0xffff); }
    static Vector upper(Line words, F16) { return from_f16(reinterpret_cast<Unsigned>(words) >> 16); }

    template <size_t INPUT>
    static Vector int8_codes(Line line) {
        const auto shifted = reinterpret_cast<Line>(reinterpret_cast<Unsigned>(line) << (24 - 8 * INPUT));
        return __builtin_convertvector(shifted >> 24, Vector);
    }

    template <size_t INPUT>
    static Vector int4_codes(Line line) {
        return __builtin_convertvector((line >> (8 * (INPUT % 4) + 4 * (INPUT / 4)) & 15) - 8, Vector);
    }

    struct Row { float codes[8]; };

    static Row int8_row(uint32_t inputs, uint32_t next_inputs) {
        Row row;
        for (int k = 0; k < 4; k++) {
            row.codes[k] = static_cast<int8_t>(inputs >> 8 * k);
            row.codes[4 + k] = static_cast<int8_t>(next_inputs >> 8 * k);
        }
        return row;
    }

    static Row int4_row(uint32_t inputs) {
        Row row;
        for (int k = 0; k < 4; k++) {
            row.codes[k] = static_cast<float>(static_cast<int>(inputs >> 8 * k & 15) - 8);
            row.codes[4 + k] = static_cast<float>(static_cast<int>(inputs >> (8 * k + 4) & 15) - 8);
        }
        return row;
    }

    static void store8(float* out, Row row, float scale) {
        for (int i = 0; i < 8; i++) out[i] = row.codes[i] * scale;
    }

    static void store8(BF16* out, Row row, float scale) {
        for (int i = 0; i < 8; i++) {
            const float value = row.codes[i] * scale;
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            out[i].bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
    }

private:
    template <class V>
    static V load_as(const void* address) {
        V value;
        std::memcpy(&value, address, sizeof value);
        return value;
    }
    template <class T>
    static Unsigned widen(const T* address) {
        return __builtin_convertvector(load_as<Halves>(address), Unsigned);
    }
    template <class T>
    static void store_halves(T* address, Unsigned values) {
        const auto halves = __builtin_convertvector(values, Halves);
        std::memcpy(address, &halves, sizeof halves);
    }
    static Vector floats(Unsigned bits) { return load_as<Vector>(&bits); }
    static Unsigned as_bits(Vector value) { return load_as<Unsigned>(&value); }
};

}  // namespace
}  // namespace tightfit
