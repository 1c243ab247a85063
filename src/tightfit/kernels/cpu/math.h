// Functions of vectors, written once over an instruction set `Isa` (isa_*.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace tightfit {
namespace {

// e^x, within two units in the last place of a float; below -87 it is about 1e-38 instead of less, above 88 about 2e38.
template <class Isa>
inline typename Isa::Vector exp(typename Isa::Vector x) {
    const auto constant = [](float value) { return Isa::broadcast(value); };
    x = Isa::max(Isa::min(x, constant(88.0f)), constant(-87.0f));
    const auto n = Isa::whole(Isa::mul(x, constant(1.44269504f)));
    // x - n ln 2, with ln 2 in two parts of which the first times n is exact.
    auto r = Isa::fma(n, constant(-0.693359375f), x);
    r = Isa::fma(n, constant(2.12194440e-4f), r);
    auto p = constant(1.9875691500e-4f);  // the polynomial of Cephes' expf
    for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = Isa::fma(p, r, constant(coefficient));
    p = Isa::add(Isa::fma(p, Isa::mul(r, r), r), constant(1.0f));
    return Isa::mul(p, Isa::power_of_two(n));
}

// 2^x for x below 127, within two units in the last place of a float; below -126.5 it is 0.
template <class Isa>
inline typename Isa::Vector exp2(typename Isa::Vector x) {
    const auto constant = [](float value) { return Isa::broadcast(value); };
    x = Isa::max(constant(-127.0f), x);  // in this order a NaN stays one
    const auto n = Isa::whole(x);
    const auto r = Isa::sub(x, n);
    auto p = constant(1.535336188e-4f);  // the polynomial of Cephes' exp2f
    for (float coefficient : {1.339887440e-3f, 9.618437357e-3f, 5.550332471e-2f, 2.402264791e-1f, 6.931472028e-1f, 1.0f})
        p = Isa::fma(p, r, constant(coefficient));
    return Isa::mul(p, Isa::power_of_two(n));
}

// tanh(x), with an absolute error of a few units in the last place of 1.
template <class Isa>
inline typename Isa::Vector tanh(typename Isa::Vector x) {
    const auto one = Isa::broadcast(1.0f);
    const auto e = exp<Isa>(Isa::add(x, x));
    return Isa::sub(one, Isa::div(Isa::broadcast(2.0f), Isa::add(e, one)));
}

// Word w of LANES rows of as many words of four bytes.
template <class Isa>
inline void transpose_rows(const uint8_t* const (&rows)[Isa::LANES], typename Isa::Bytes (&words)[Isa::LANES]) {
    for (size_t w = 0; w < Isa::LANES; w += 4) {
        typename Isa::Bytes four[4];
        for (size_t i = 0; i < 4; i++) four[i] = Isa::load_quarters(rows + i, 4 * w);
        Isa::transpose(four);
        for (size_t i = 0; i < 4; i++) words[w + i] = four[i];
    }
}

}  // namespace
}  // namespace tightfit
