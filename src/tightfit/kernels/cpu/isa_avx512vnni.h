// AVX-512 with products of bytes that add up four at a time: Intel servers since Cascade Lake, AMD since Zen 4.
#pragma once

#include "isa_avx512.h"

namespace tightfit {
namespace {

struct Avx512Vnni : Avx512 {
    static constexpr bool SIGNED_DOT = false;  // one factor is unsigned

    template <bool SIGNED, int LARGEST, size_t STEPS>
    static Sums dot(Sums sums, const Bytes (&steps)[STEPS], const int8_t* x) {
        static_assert(!SIGNED);
        for (size_t i = 0; i < STEPS; i++)
            sums = _mm512_dpbusd_epi32(sums, steps[i], _mm512_set1_epi32(load_int(x + 4 * i)));
        return sums;
    }
};

}  // namespace
}  // namespace tightfit
