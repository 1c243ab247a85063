// AVX-512 with products of bytes that add up four at a time: Intel servers since Cascade Lake, AMD since Zen 4.
#pragma once

#include "isa_avx512.h"

namespace tightfit {
namespace {

struct Avx512Vnni : Avx512 {
    static constexpr bool SIGNED_DOT = false;  // one factor is unsigned

    template <bool SIGNED, int LARGEST, size_t STEPS, size_t TOKENS, size_t INPUTS>
    static void dot(const Bytes (&steps)[STEPS], const int8_t (&x)[TOKENS][INPUTS], Sums (&sums)[TOKENS]) {
        static_assert(!SIGNED);
        for (size_t i = 0; i < STEPS; i++)
            for (size_t t = 0; t < TOKENS; t++)
                add_products(sums[t], steps[i], x[t] + 4 * i);
    }

private:
    typedef int32_t Four __attribute__((may_alias, aligned(1)));

    // The instruction broadcasts its memory operand. GCC takes another register for that, and registers are what limits
    // how many loads of weights are under way; it would also move the tokens' independent sums apart.
    static void add_products(Sums& sums, Bytes codes, const int8_t* x) {
        asm volatile("vpdpbusd %2%{1to16%}, %1, %0"
                     : "+v"(sums)
                     : "v"(codes), "m"(*reinterpret_cast<const Four*>(x)));
    }
};

}  // namespace
}  // namespace tightfit
