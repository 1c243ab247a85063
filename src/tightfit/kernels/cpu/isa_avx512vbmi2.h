// AVX-512 with expansion of 16-bit numbers: Intel servers since Ice Lake, AMD since Zen 4.
#pragma once

#include "isa_avx512.h"

namespace tightfit {
namespace {

// The 32-bit numbers whose upper halves are the 16-bit numbers from FIRST on.
template <int FIRST>
struct Upper {
    alignas(64) uint16_t places[32];

    constexpr Upper() : places() {
        for (int i = 0; i < 16; i++) places[2 * i + 1] = static_cast<uint16_t>(FIRST + i);
    }
};

struct Avx512Vbmi2 : Avx512 {
    // As in isa_portable.h.
    static constexpr size_t EXPANDED = 2;
    static void expand(const BF16* values, uint64_t bits, Vector (&inputs)[EXPANDED]) {
        static constexpr Upper<0> low;
        static constexpr Upper<16> high;
        const __m512i all = _mm512_maskz_expand_epi16(static_cast<__mmask32>(bits), _mm512_loadu_si512(values));
        inputs[0] = upper_halves(low.places, all), inputs[1] = upper_halves(high.places, all);
    }

private:
    static Vector upper_halves(const uint16_t* places, __m512i numbers) {
        return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(places), numbers));
    }
};

}  // namespace
}  // namespace tightfit
