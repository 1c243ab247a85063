// Plain C++ over four lanes, for any processor (GCC's vector extensions: SSE2, NEON or whatever there is).
#pragma once

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "matrices are stored in little-endian order");

#include <algorithm>
#include <cstring>

#include "weight.h"

namespace tightfit {
namespace {

// For each eight bits, how many are set before each one that is; 8 for the others.
struct Spread {
    uint8_t places[256][8];

    constexpr Spread() : places() {
        for (int bits = 0; bits < 256; bits++)
            for (int i = 0, next = 0; i < 8; i++) places[bits][i] = static_cast<uint8_t>(bits >> i & 1 ? next++ : 8);
    }
};

struct Portable {
    static constexpr size_t LANES = 4, TOKENS = 2;
    static constexpr bool SIGNED_DOT = true;
    typedef float Vector __attribute__((vector_size(16)));
    typedef int32_t Sums __attribute__((vector_size(16)));
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    typedef Bytes Mask;

    // ---- floats ----

    static Vector zero() { return Vector{}; }
    static Vector add(Vector a, Vector b) { return a + b; }
    static Vector sub(Vector a, Vector b) { return a - b; }
    static Vector mul(Vector a, Vector b) { return a * b; }
    static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
    static float fma(float a, float b, float c) { return a * b + c; }
    static Vector broadcast(float value) { return Vector{value, value, value, value}; }
    static Vector div(Vector a, Vector b) { return a / b; }
    static Vector min(Vector a, Vector b) { return a < b ? a : b; }
    static Vector max(Vector a, Vector b) { return a > b ? a : b; }
    // To the nearest whole number, for |a| < 2^22; and two to the power of one from -126 to 127, or 0 for -127.
    static Vector whole(Vector a) { return a + 0x1.8p23f - 0x1.8p23f; }
    static Vector power_of_two(Vector n) {
        return as<Vector>((__builtin_convertvector(n, Sums) + 127) << 23);
    }
    static void store(float* address, Vector value) { std::memcpy(address, &value, sizeof value); }

    static void store(BF16* address, Vector value) {
        const Unsigned bits = as<Unsigned>(value);
        const Halves halves = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves);
        std::memcpy(address, &halves, sizeof halves);
    }

    static Vector load(const float* address) { return load_as<Vector>(address); }
    static Vector load(const BF16* address) { return as<Vector>(widen(address) << 16); }

    static Vector load(const F16* address) { return from_f16(widen(address)); }

    template <class T>
    static Vector load_part(const T* address, size_t count) {
        T padded[LANES] = {};
        std::memcpy(padded, address, count * sizeof(T));
        return load(padded);
    }

    static float sum(Vector v) { return (v[0] + v[2]) + (v[1] + v[3]); }

    static float largest(Vector v) { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); }

    // A float below the normal halves is rounded by adding one half, whose last place is that of the smallest halves.
    static void store(F16* address, Vector value) {
        const Unsigned bits = as<Unsigned>(value), size = bits & 0x7fffffff;
        const Unsigned normal = (size - 0x37fff001 + (size >> 13 & 1)) >> 13;
        const Unsigned subnormal = as<Unsigned>(as<Vector>(size) + 0.5f) - 0x3f000000;
        const Unsigned infinite = size > 0x7f800000 ? Unsigned{} + 0x7e00 : Unsigned{} + 0x7c00;
        const Unsigned half = size < 0x38800000 ? subnormal : size >= 0x47800000 ? infinite : normal;
        const Halves halves = __builtin_convertvector(half | (bits >> 16 & 0x8000), Halves);
        std::memcpy(address, &halves, sizeof halves);
    }
    template <class T>
    static void store_part(T* address, Vector value, size_t count) {
        T values[LANES];
        store(values, value);
        std::memcpy(address, values, count * sizeof(T));
    }

    // ---- words of four bytes: floats, or two halves ----

    // 16 bytes from place `at` on of a row; transpose() then gives four columns.
    static Bytes load_quarters(const uint8_t* const* rows, size_t at) { return load_as<Bytes>(rows[0] + at); }

    static Vector lower(Bytes words, BF16) { return as<Vector>(as<Unsigned>(words) << 16); }
    static Vector upper(Bytes words, BF16) { return as<Vector>(as<Unsigned>(words) & 0xffff0000); }
    static Vector lower(Bytes words, F16) { return from_f16(as<Unsigned>(words) & 0xffff); }
    static Vector upper(Bytes words, F16) { return from_f16(as<Unsigned>(words) >> 16); }

    // As many halves as there are bits for, two to a lane: those whose bit is set are the next ones of `values`, of which
    // as many are read as there are halves; the others are zeros.
    static Bytes expand(const BF16* values, uint64_t bits) {
        static constexpr Spread spread;
        uint16_t some[9];
        std::memcpy(some, values, 8 * sizeof(BF16));
        some[8] = 0;
        const uint8_t(&from)[8] = spread.places[bits & 255];
        uint16_t halves[8];
        for (int i = 0; i < 8; i++) halves[i] = some[from[i]];
        return load_as<Bytes>(halves);
    }

    // ---- codes: four bytes to a lane ----

    static Bytes load_bytes(const uint8_t* address) { return load_as<Bytes>(address); }
    static void store_bytes(uint8_t* address, Bytes bytes) { std::memcpy(address, &bytes, sizeof bytes); }

    template <int FROM, int TO>
    static Bytes field(Bytes bytes, uint8_t mask) {
        if constexpr (FROM > TO) bytes >>= FROM - TO;
        if constexpr (FROM < TO) bytes <<= TO - FROM;
        return bytes & mask;
    }

    static Bytes combine(Bytes a, Bytes b) { return a | b; }
    static Bytes flip_sign(Bytes bytes) { return bytes ^ 0x80; }

    static Bytes look_up(const uint8_t (&table)[16], Bytes indices) {
#ifdef __clang__
        Bytes result;
        for (int i = 0; i < 16; i++) result[i] = table[indices[i]];
        return result;
#else
        return __builtin_shuffle(load_as<Bytes>(table), indices);
#endif
    }

    static Mask load_mask(const uint8_t* bits) {
        typedef uint64_t Pair __attribute__((vector_size(16)));
        const Bytes places = as<Bytes>(Pair{0x8040201008040201, 0x8040201008040201});
        const uint64_t each = 0x0101010101010101;
        const Bytes spread = as<Bytes>(Pair{bits[0] * each, bits[1] * each});
        return static_cast<Bytes>((spread & places) == places);
    }

    static Bytes add_where(Mask mask, Bytes bytes, uint8_t value) { return bytes | (mask & value); }
    static Bytes subtract_where(Mask mask, uint8_t from, Bytes bytes) {
        return (mask & (from - bytes)) | (~mask & bytes);
    }

    static void transpose(Bytes (&steps)[4]) {
        uint32_t words[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) words[j][i] = as<Unsigned>(steps[i])[j];
        std::memcpy(steps, words, sizeof words);
    }

    // ---- codes as floats ----

    template <size_t INPUT>
    static Vector input(Bytes bytes, float zero) {
        return floats(as<Unsigned>(bytes) >> (8 * INPUT) & 255, zero);
    }
    static Vector inputs(const uint8_t* codes, float zero) { return floats(spread(codes), zero); }

    template <size_t INPUT>
    static Vector look_up_input(const float (&table)[16], Bytes bytes) {
        return entries(table, as<Unsigned>(bytes) >> (8 * INPUT) & 15);
    }
    static Vector look_up_inputs(const float (&table)[16], const uint8_t* codes) {
        return entries(table, spread(codes));
    }

    static void fp8_input(Bytes bytes, int exponent_bits, Vector (&inputs)[4]) {
        for (int k = 0; k < 4; k++) inputs[k] = fp8(as<Unsigned>(bytes) << (24 - 8 * k), exponent_bits);
    }
    static Vector fp8_inputs(const uint8_t* codes, int exponent_bits) {
        return fp8(spread(codes) << 24, exponent_bits);
    }

    // ---- products of integers ----

    static Sums zero_sums() { return Sums{}; }
    static Sums broadcast_sum(int32_t value) { return Sums{value, value, value, value}; }
    template <int FACTOR>
    static Sums times(int32_t value) { return broadcast_sum(FACTOR * value); }
    template <int SHIFT>
    static Sums shift_add(Sums high, Sums low) { return (high << SHIFT) + low; }
    static Vector to_floats(Sums sums) { return __builtin_convertvector(sums, Vector); }

    static Sums add_sums(Sums a, Sums b) { return a + b; }
    static int32_t total(Sums sums) { return (sums[0] + sums[2]) + (sums[1] + sums[3]); }

    // Sizes of floats as integers, which have the same order, with infinities and NaNs above all.
    static Sums max_size(Sums sizes, Vector v) {
        const Sums bits = as<Sums>(v) & 0x7fffffff;
        return bits > sizes ? bits : sizes;
    }
    static float largest(Sums sizes) {
        const int32_t size = std::max(std::max(sizes[0], sizes[1]), std::max(sizes[2], sizes[3]));
        return load_as<float>(&size);
    }

    // To the nearest whole number, even ones first: the low bits of a float to which 1.5 * 2^23 was added.
    static Sums round(Vector v) { return as<Sums>(v + 0x1.8p23f) - 0x4b400000; }
    static void store_codes(int8_t* address, Sums codes) {
        for (size_t i = 0; i < LANES; i++) address[i] = static_cast<int8_t>(codes[i]);
    }

    // Products of bytes fit in 16 bits, and so do sums of 32767 / (127 * 2 * LARGEST) steps: the two inputs at even
    // places, then the two at odd places, of each row.
    template <bool SIGNED, int LARGEST, size_t STEPS, size_t TOKENS, size_t INPUTS>
    static void dot(const Bytes (&steps)[STEPS], const int8_t (&x)[TOKENS][INPUTS], Sums (&sums)[TOKENS]) {
        constexpr size_t ROOM = 32767 / (127 * 2 * LARGEST);
        static_assert(ROOM > 0);
        for (size_t first = 0; first < STEPS; first += ROOM)
            for (size_t t = 0; t < TOKENS; t++) {
                Shorts pairs{};
                for (size_t i = first; i < STEPS && i < first + ROOM; i++) {
                    const int32_t four = load_as<int32_t>(x[t] + 4 * i);
                    const Shorts inputs = as<Shorts>(Sums{four, four, four, four}), codes = as<Shorts>(steps[i]);
                    const Shorts even = SIGNED ? low_half(codes) : codes & 255;
                    const Shorts odd = SIGNED ? codes >> 8 : as<Shorts>(as<UnsignedShorts>(codes) >> 8);
                    pairs += even * low_half(inputs) + odd * (inputs >> 8);
                }
                const Sums both = as<Sums>(pairs);
                sums[t] += (as<Sums>(as<Unsigned>(both) << 16) >> 16) + (both >> 16);
            }
    }

private:
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    typedef uint16_t Halves __attribute__((vector_size(8)));
    typedef int16_t Shorts __attribute__((vector_size(16)));
    typedef uint16_t UnsignedShorts __attribute__((vector_size(16)));

    template <class V>
    static V load_as(const void* address) {
        V value;
        std::memcpy(&value, address, sizeof value);
        return value;
    }
    template <class To, class From>
    static To as(From from) {
        static_assert(sizeof(To) == sizeof(From));
        return load_as<To>(&from);
    }
    template <class T>
    static Unsigned widen(const T* address) {
        return __builtin_convertvector(load_as<Halves>(address), Unsigned);
    }
    // Shifting a half's exponent and fraction into a float's leaves an exponent that is too small by 112, which a
    // multiplication mends, subnormal numbers included; infinities and NaNs get their exponent set.
    static Vector from_f16(Unsigned half) {
        const Unsigned bits = (half & 0x7fff) << 13;
        const Unsigned special = static_cast<Unsigned>(bits >= 0x0f800000) & 0x7f800000;
        const Unsigned value = as<Unsigned>(as<Vector>(bits) * 0x1p112f) | special;
        return as<Vector>(value | (half & 0x8000) << 16);
    }
    static Unsigned spread(const uint8_t* codes) { return Unsigned{codes[0], codes[1], codes[2], codes[3]}; }
    static Shorts low_half(Shorts pairs) { return as<Shorts>(as<UnsignedShorts>(pairs) << 8) >> 8; }
    static Vector floats(Unsigned codes, float zero) {
        return __builtin_convertvector(as<Sums>(codes), Vector) - zero;
    }
    static Vector entries(const float (&table)[16], Unsigned indices) {
        return Vector{table[indices[0]], table[indices[1]], table[indices[2]], table[indices[3]]};
    }

    // Codes in the highest byte. A float with the same exponent above 63 and a leading one that subnormal codes do not
    // have: it is subtracted from them at the exponent that they share with the smallest normal ones.
    static Vector fp8(Unsigned codes, int exponent_bits) {
        const Unsigned magnitude = (codes & 0x7f000000) >> (8 - exponent_bits);
        const Unsigned normal = magnitude + (112u << 23), subnormal = magnitude + (113u << 23);
        const Unsigned is_subnormal = static_cast<Unsigned>(magnitude < (1u << 23));
        const Unsigned value = (is_subnormal & as<Unsigned>(as<Vector>(subnormal) - 0x1p-14f)) | (~is_subnormal & normal);
        return as<Vector>(value | (codes & 0x80000000));
    }
};

}  // namespace
}  // namespace tightfit
