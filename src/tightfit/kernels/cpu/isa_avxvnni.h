// AVX2 with products of bytes that add up four at a time: Intel since Alder Lake, AMD since Zen 5.
#pragma once

#include "isa_avx2.h"

namespace tightfit {
namespace {

struct AvxVnni : Avx2 {
    static constexpr bool SIGNED_DOT = false;  // one factor is unsigned

    template <bool SIGNED, int LARGEST, size_t STEPS, size_t TOKENS, size_t INPUTS>
    static void dot(const Bytes (&steps)[STEPS], const int8_t (&x)[TOKENS][INPUTS], Sums (&sums)[TOKENS]) {
        static_assert(!SIGNED);
        for (size_t i = 0; i < STEPS; i++)
            for (size_t t = 0; t < TOKENS; t++)
                sums[t] = _mm256_dpbusd_avx_epi32(sums[t], steps[i], _mm256_set1_epi32(load_int(x[t] + 4 * i)));
    }
};

}  // namespace
}  // namespace tightfit
