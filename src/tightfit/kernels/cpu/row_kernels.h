// The kernels behind rows.h, written once over an instruction set `Isa` (isa_*.h).
#pragma once

#include <cmath>

#include "math.h"
#include "rows.h"

namespace tightfit {

struct RowKernels {
    void (*rms_norm)(const float* x, size_t cols, const float* weight, float eps, float* out);
    void (*add)(float* x, const float* y, size_t cols, float scale);
    void (*glu)(const float* gate, const float* up, size_t cols, Activation activation, float* out);
    void (*softcap)(float* x, size_t cols, float cap);
};

extern const RowKernels portable_row_kernels;
#ifdef TIGHTFIT_X86
extern const RowKernels avx2_row_kernels;
extern const RowKernels avx512_row_kernels;
#endif

namespace {

// out[i] = function(i-th vectors of the sources), the last ones in part.
template <class Isa, class Function, class... Source>
inline void map(size_t cols, float* out, Function function, const Source*... sources) {
    size_t i = 0;
    for (; i + Isa::LANES <= cols; i += Isa::LANES) Isa::store(out + i, function(Isa::load(sources + i)...));
    if (i < cols) Isa::store_part(out + i, function(Isa::load_part(sources + i, cols - i)...), cols - i);
}

template <class Isa>
void rms_norm_row(const float* x, size_t cols, const float* weight, float eps, float* out) {
    constexpr size_t PARTS = 4;
    typename Isa::Vector sums[PARTS];
    for (auto& sum : sums) sum = Isa::zero();
    size_t i = 0;
    for (; i + PARTS * Isa::LANES <= cols; i += PARTS * Isa::LANES)
        for (size_t p = 0; p < PARTS; p++) {
            const auto value = Isa::load(x + i + p * Isa::LANES);
            sums[p] = Isa::fma(value, value, sums[p]);
        }
    for (; i < cols; i += Isa::LANES) {
        const auto value = i + Isa::LANES <= cols ? Isa::load(x + i) : Isa::load_part(x + i, cols - i);
        sums[0] = Isa::fma(value, value, sums[0]);
    }
    const float sum = Isa::sum(Isa::add(Isa::add(sums[0], sums[1]), Isa::add(sums[2], sums[3])));
    const auto scale = Isa::broadcast(1.0f / std::sqrt(sum / static_cast<float>(cols) + eps));
    map<Isa>(cols, out, [&](auto value, auto w) { return Isa::mul(Isa::mul(value, scale), w); }, x, weight);
}

template <class Isa>
void add_row(float* x, const float* y, size_t cols, float scale) {
    const auto factor = Isa::broadcast(scale);
    map<Isa>(cols, x, [&](auto a, auto b) { return Isa::fma(b, factor, a); }, x, y);
}

template <class Isa>
inline typename Isa::Vector sigmoid(typename Isa::Vector x) {
    const auto one = Isa::broadcast(1.0f);
    return Isa::div(one, Isa::add(one, exp<Isa>(Isa::sub(Isa::zero(), x))));
}

template <class Isa>
void glu_row(const float* gate, const float* up, size_t cols, Activation activation, float* out) {
    const auto constant = [](float value) { return Isa::broadcast(value); };
    const auto each = [&](auto function) { map<Isa>(cols, out, function, gate, up); };
    switch (activation) {
        case Activation::silu:
            return each([&](auto g, auto u) { return Isa::mul(Isa::mul(g, sigmoid<Isa>(g)), u); });
        case Activation::gelu_pytorch_tanh:
            return each([&](auto g, auto u) {
                const auto cube = Isa::mul(Isa::mul(g, g), g);
                const auto inner = Isa::mul(constant(1.5957691216f), Isa::fma(cube, constant(0.044715f), g));
                return Isa::mul(Isa::mul(g, sigmoid<Isa>(inner)), u);  // (1 + tanh(x)) / 2 = sigmoid(2 x)
            });
        case Activation::relu:
            return each([&](auto g, auto u) { return Isa::mul(Isa::max(g, Isa::zero()), u); });
        case Activation::clamped_swiglu:
            return each([&](auto g, auto u) {
                g = Isa::min(g, constant(7.0f));
                u = Isa::max(Isa::min(u, constant(7.0f)), constant(-7.0f));
                const auto gated = Isa::mul(g, sigmoid<Isa>(Isa::mul(g, constant(1.702f))));
                return Isa::mul(gated, Isa::add(u, constant(1.0f)));
            });
    }
}

template <class Isa>
void softcap_row(float* x, size_t cols, float cap) {
    const auto factor = Isa::broadcast(cap);
    map<Isa>(cols, x, [&](auto value) { return Isa::mul(tanh<Isa>(Isa::div(value, factor)), factor); }, x);
}

template <class Isa>
constexpr RowKernels row_kernels_of() {
    return {rms_norm_row<Isa>, add_row<Isa>, glu_row<Isa>, softcap_row<Isa>};
}

}  // namespace
}  // namespace tightfit
