// How the codes of each kind of tile unpack, written once over an instruction set `Isa` (isa_*.h).
//
// A "unit" is the smallest run of inputs that unpacks alone: 16 inputs, or 24 for ternary. It gives one register for
// each "step" of four inputs: byte r * 4 + k is the unsigned code u of row r and input k. A register holds Isa::LANES
// rows, so that a tile has SPANS = 16 / LANES of them side by side: one in AVX-512, two in AVX2, four elsewhere.
//
//     const Int4<Isa> code(weight);
//     typename Isa::Bytes steps[Int4<Isa>::STEPS];
//     code.unpack(tile, unit, span, steps);
//
// A weight is (u - ZERO) * unit() * scale (+ offset). The kinds that are a table of floats have no ZERO: floats() and
// row() give the number that u stands for, as they do for all others.
//
// Everything is in an unnamed namespace: the same template compiled under other flags must not be merged with it.
#pragma once

#include <type_traits>

#include "weight.h"

namespace tightfit {
namespace {

// ---- planes: where a tile keeps some bits of each code ----

template <class Isa>
constexpr size_t SPAN_BYTES = sizeof(typename Isa::Bytes);
template <class Isa>
constexpr size_t SPANS = TILE_ROWS / Isa::LANES;

template <class Isa>
inline typename Isa::Bytes line(const uint8_t* plane, size_t index, size_t span) {
    return Isa::load_bytes(plane + index * LINE + span * SPAN_BYTES<Isa>);
}

// Four bits of the codes of a unit.
template <class Isa>
inline void four_bits(const uint8_t* plane, size_t unit, size_t span, typename Isa::Bytes (&steps)[4]) {
    for (size_t i = 0; i < 2; i++) {
        const auto both = line<Isa>(plane, 2 * unit + i, span);
        steps[2 * i] = Isa::template field<0, 0>(both, 15);
        steps[2 * i + 1] = Isa::template field<4, 0>(both, 15);
    }
}

// Two bits, moved to place TO of each byte.
template <class Isa, int TO>
inline void two_bits(const uint8_t* plane, size_t unit, size_t span, typename Isa::Bytes (&steps)[4]) {
    const auto all = line<Isa>(plane, unit, span);
    constexpr uint8_t mask = 3 << TO;
    steps[0] = Isa::template field<0, TO>(all, mask);
    steps[1] = Isa::template field<2, TO>(all, mask);
    steps[2] = Isa::template field<4, TO>(all, mask);
    steps[3] = Isa::template field<6, TO>(all, mask);
}

template <class Isa>
inline typename Isa::Mask one_bit(const uint8_t* plane, size_t step, size_t span) {
    return Isa::load_mask(plane + step * 8 + span * SPAN_BYTES<Isa> / 8);
}

// ---- whole numbers ----

// What all kinds share whose weight is a code minus ZERO. SIGNED codes are signed bytes, and LARGEST is what the
// magnitude of a code can be.
template <class Isa, Kind KIND, int ZERO_CODE, int LARGEST_CODE>
struct Integers {
    using Bytes = typename Isa::Bytes;
    using Vector = typename Isa::Vector;
    static constexpr size_t INPUTS = 16, STEPS = 4, DIGITS = 1, UNIT_BYTES = Weight::code_bytes_of(KIND, INPUTS);
    static constexpr bool SIGNED = false;
    static constexpr int ZERO = ZERO_CODE, LARGEST = LARGEST_CODE;

    explicit Integers(const Weight& w) : group(w.group) {}

    static float unit() { return 1; }

    // The weights, without their scales, of one step: a vector of rows for each of its inputs.
    static void floats(Bytes step, Vector (&inputs)[4]) {
        inputs[0] = Isa::template input<0>(step, ZERO);
        inputs[1] = Isa::template input<1>(step, ZERO);
        inputs[2] = Isa::template input<2>(step, ZERO);
        inputs[3] = Isa::template input<3>(step, ZERO);
    }

    // Those of Isa::LANES codes of one row.
    static Vector row(const uint8_t* codes) { return Isa::inputs(codes, ZERO); }

    const size_t group;
};

template <class Isa>
struct Int8 : Integers<Isa, Kind::int8, 128, 255> {
    using Integers<Isa, Kind::int8, 128, 255>::Integers;
    void unpack(const uint8_t* codes, size_t unit, size_t span, typename Isa::Bytes (&steps)[4]) const {
        for (size_t i = 0; i < 4; i++) steps[i] = Isa::flip_sign(line<Isa>(codes, 4 * unit + i, span));
    }
};

// The codes as they are stored, for instruction sets that multiply signed bytes.
template <class Isa>
struct SignedInt8 : Integers<Isa, Kind::int8, 0, 128> {
    static constexpr bool SIGNED = true;
    using Integers<Isa, Kind::int8, 0, 128>::Integers;
    void unpack(const uint8_t* codes, size_t unit, size_t span, typename Isa::Bytes (&steps)[4]) const {
        for (size_t i = 0; i < 4; i++) steps[i] = line<Isa>(codes, 4 * unit + i, span);
    }
};

template <class Isa>
struct Int6 : Integers<Isa, Kind::int6, 32, 63> {
    using Integers<Isa, Kind::int6, 32, 63>::Integers;
    void unpack(const uint8_t* codes, size_t unit, size_t span, typename Isa::Bytes (&steps)[4]) const {
        typename Isa::Bytes high[4];
        four_bits<Isa>(codes, unit, span, steps);
        two_bits<Isa, 4>(codes + 8 * this->group, unit, span, high);
        for (size_t i = 0; i < 4; i++) steps[i] = Isa::combine(steps[i], high[i]);
    }
};

template <class Isa>
struct Int5 : Integers<Isa, Kind::int5, 16, 31> {
    using Integers<Isa, Kind::int5, 16, 31>::Integers;
    void unpack(const uint8_t* codes, size_t unit, size_t span, typename Isa::Bytes (&steps)[4]) const {
        four_bits<Isa>(codes, unit, span, steps);
        for (size_t i = 0; i < 4; i++)
            steps[i] = Isa::add_where(one_bit<Isa>(codes + 8 * this->group, 4 * unit + i, span), steps[i], 16);
    }
};

template <class Isa>
struct Int4 : Integers<Isa, Kind::int4, 8, 15> {
    using Integers<Isa, Kind::int4, 8, 15>::Integers;
    void unpack(const uint8_t* codes, size_t unit, size_t span, typename Isa::Bytes (&steps)[4]) const {
        four_bits<Isa>(codes, unit, span, steps);
    }
};

template <class Isa>
struct Int3 : Integers<Isa, Kind::int3, 4, 7> {
    using Integers<Isa, Kind::int3, 4, 7>::Integers;
    void unpack(const uint8_t* codes, size_t unit, size_t span, typename Isa::Bytes (&steps)[4]) const {
        two_bits<Isa, 0>(codes, unit, span, steps);
        for (size_t i = 0; i < 4; i++)
            steps[i] = Isa::add_where(one_bit<Isa>(codes + 4 * this->group, 4 * unit + i, span), steps[i], 4);
    }
};

template <class Isa>
struct Int2 : Integers<Isa, Kind::int2, 2, 3> {
    using Integers<Isa, Kind::int2, 2, 3>::Integers;
    void unpack(const uint8_t* codes, size_t unit, size_t span, typename Isa::Bytes (&steps)[4]) const {
        two_bits<Isa, 0>(codes, unit, span, steps);
    }
};

// Two units are 24 inputs each, so that a group of 48 is whole 16s too. u is the trit plus one.
template <class Isa>
struct Ternary : Integers<Isa, Kind::ternary, 1, 2> {
    static constexpr size_t INPUTS = 24, STEPS = 6, UNIT_BYTES = 80;
    using Integers<Isa, Kind::ternary, 1, 2>::Integers;

    void unpack(const uint8_t* codes, size_t unit, size_t span, typename Isa::Bytes (&steps)[6]) const {
        // Of the numbers 0 to 13 in balanced ternary: the digits, highest first, plus one.
        static constexpr uint8_t digits[3][16] = {{1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2},
                                                  {1, 1, 2, 2, 2, 0, 0, 0, 1, 1, 1, 2, 2, 2},
                                                  {1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2}};
        const uint8_t* run = codes + unit * 80;
        const auto both = line<Isa>(run, 0, span);
        const typename Isa::Bytes triples[2] = {Isa::template field<0, 0>(both, 15), Isa::template field<4, 0>(both, 15)};
        for (size_t half = 0; half < 2; half++) {
            const auto negative = one_bit<Isa>(run + LINE, half, span);
            for (size_t i = 0; i < 3; i++)
                steps[3 * half + i] = Isa::subtract_where(negative, 2, Isa::look_up(digits[i], triples[half]));
        }
    }
};

// ---- floats in four bits ----

// e2m1, in halves: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.
template <class Isa>
struct Fp4 : Integers<Isa, Kind::fp4, 12, 24> {
    using Integers<Isa, Kind::fp4, 12, 24>::Integers;
    static float unit() { return 0.5f; }
    void unpack(const uint8_t* codes, size_t unit, size_t span, typename Isa::Bytes (&steps)[4]) const {
        static constexpr uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
        four_bits<Isa>(codes, unit, span, steps);
        for (auto& step : steps) step = Isa::look_up(table, step);
    }
};

// The quantiles of QLoRA (arXiv 2305.14314), as in its authors' bitsandbytes.
constexpr float NF4[16] = {-1.0f,
                           -0.6961928009986877f,
                           -0.5250730514526367f,
                           -0.39491748809814453f,
                           -0.28444138169288635f,
                           -0.18477343022823334f,
                           -0.09105003625154495f,
                           0.0f,
                           0.07958029955625534f,
                           0.16093020141124725f,
                           0.24611230194568634f,
                           0.33791524171829224f,
                           0.44070982933044434f,
                           0.5626170039176941f,
                           0.7229568362236023f,
                           1.0f};

template <class Isa>
struct Nf4 {
    using Bytes = typename Isa::Bytes;
    using Vector = typename Isa::Vector;
    static constexpr size_t INPUTS = 16, STEPS = 4, UNIT_BYTES = 128;

    explicit Nf4(const Weight&) {}
    static float unit() { return 1; }
    static void unpack(const uint8_t* codes, size_t unit, size_t span, Bytes (&steps)[4]) {
        four_bits<Isa>(codes, unit, span, steps);
    }
    static void floats(Bytes step, Vector (&inputs)[4]) {
        inputs[0] = Isa::template look_up_input<0>(NF4, step);
        inputs[1] = Isa::template look_up_input<1>(NF4, step);
        inputs[2] = Isa::template look_up_input<2>(NF4, step);
        inputs[3] = Isa::template look_up_input<3>(NF4, step);
    }
    static Vector row(const uint8_t* codes) { return Isa::look_up_inputs(NF4, codes); }
};

// nf4 in fixed point: the table in steps of 1 / (127 * 128), as 128 * high + low where both are signed bytes. digits()
// gives the two for the indices of unpack(): signed, or with their sign bit flipped and so 128 more.
constexpr int NF4_STEPS = 127 * 128;

struct Nf4Digits {
    uint8_t high[16], low[16];

    constexpr explicit Nf4Digits(uint8_t flip) : high(), low() {
        for (int i = 0; i < 16; i++) {
            const float steps = NF4[i] * NF4_STEPS;
            const int number = static_cast<int>(steps + (steps < 0 ? -0.5f : 0.5f));
            const int part = (number + NF4_STEPS + 64) / 128 - 127;
            high[i] = static_cast<uint8_t>(part) ^ flip;
            low[i] = static_cast<uint8_t>(number - 128 * part) ^ flip;
        }
    }
};

template <class Isa>
struct FixedNf4 : Nf4<Isa> {
    using Bytes = typename Isa::Bytes;
    using Nf4<Isa>::Nf4;
    static constexpr size_t DIGITS = 2;
    static constexpr bool SIGNED = Isa::SIGNED_DOT;
    static constexpr int ZERO = SIGNED ? 0 : 128, LARGEST = SIGNED ? 128 : 255;  // of each digit

    static float unit() { return 1.0f / NF4_STEPS; }
    static void digits(const Bytes (&indices)[4], Bytes (&high)[4], Bytes (&low)[4]) {
        static constexpr Nf4Digits table(SIGNED ? 0 : 0x80);
        for (size_t i = 0; i < 4; i++) {
            high[i] = Isa::look_up(table.high, indices[i]);
            low[i] = Isa::look_up(table.low, indices[i]);
        }
    }
};

// ---- floats in eight bits ----

// A sign, E bits of exponent and 7 - E of mantissa, with subnormal numbers and without infinities or NaNs. They are read
// as float16 is, whose bias is 15, and unit() mends the exponent.
template <class Isa>
struct Fp8 {
    using Bytes = typename Isa::Bytes;
    using Vector = typename Isa::Vector;
    static constexpr size_t INPUTS = 16, STEPS = 4, UNIT_BYTES = 256;

    explicit Fp8(const Weight& w) : exponent_bits(w.exponent_bits()) {}
    float unit() const { return static_cast<float>(1 << (16 - (1 << (exponent_bits - 1)))); }
    static void unpack(const uint8_t* codes, size_t unit, size_t span, Bytes (&steps)[4]) {
        for (size_t i = 0; i < 4; i++) steps[i] = line<Isa>(codes, 4 * unit + i, span);
    }
    void floats(Bytes step, Vector (&inputs)[4]) const { Isa::fp8_input(step, exponent_bits, inputs); }
    Vector row(const uint8_t* codes) const { return Isa::fp8_inputs(codes, exponent_bits); }

    const int exponent_bits;
};

// ---- which of them a matrix has ----

// Calls work(code) with the unpacker of a tiled matrix.
template <class Isa, class Work>
inline void with_code(const Weight& w, Work work) {
    switch (w.kind) {
        case Kind::int8: return work(Int8<Isa>(w));
        case Kind::int6: return work(Int6<Isa>(w));
        case Kind::int5: return work(Int5<Isa>(w));
        case Kind::int4: return work(Int4<Isa>(w));
        case Kind::int3: return work(Int3<Isa>(w));
        case Kind::int2: return work(Int2<Isa>(w));
        case Kind::nf4: return work(Nf4<Isa>(w));
        case Kind::fp4: return work(Fp4<Isa>(w));
        case Kind::fp8: return work(Fp8<Isa>(w));
        case Kind::ternary: return work(Ternary<Isa>(w));
        case Kind::f32:
        case Kind::f16:
        case Kind::bf16:
        case Kind::pruned: break;
    }
}

// The same with the one whose codes are multiplied as integers, which fp8 has not.
template <class Isa, class Work>
inline void with_integer_code(const Weight& w, Work work) {
    switch (w.kind) {
        case Kind::int8: return work(std::conditional_t<Isa::SIGNED_DOT, SignedInt8<Isa>, Int8<Isa>>(w));
        case Kind::int6: return work(Int6<Isa>(w));
        case Kind::int5: return work(Int5<Isa>(w));
        case Kind::int4: return work(Int4<Isa>(w));
        case Kind::int3: return work(Int3<Isa>(w));
        case Kind::int2: return work(Int2<Isa>(w));
        case Kind::nf4: return work(FixedNf4<Isa>(w));
        case Kind::fp4: return work(Fp4<Isa>(w));
        case Kind::ternary: return work(Ternary<Isa>(w));
        default: break;
    }
}

}  // namespace
}  // namespace tightfit
