// Numbers of a kind, and as floats. Templated over the instruction set.
#pragma once

#include "attention_tasks.h"

namespace tightfit {
namespace {

template <class Isa, class T>
void store_row(const float* x, size_t count, T* out) {
    size_t i = 0;
    for (; i + Isa::LANES <= count; i += Isa::LANES) Isa::store(out + i, Isa::load(x + i));
    if (i < count) Isa::store_part(out + i, Isa::load_part(x + i, count - i), count - i);
}

template <class Isa>
void store(const float* x, size_t count, Kind kind, uint8_t* out) {
    switch (kind) {
        case Kind::f16: return store_row<Isa>(x, count, reinterpret_cast<F16*>(out));
        case Kind::bf16: return store_row<Isa>(x, count, reinterpret_cast<BF16*>(out));
        default: return store_row<Isa>(x, count, reinterpret_cast<float*>(out));
    }
}

template <class Isa, class T>
void load_numbers(const T* from, size_t count, float* out) {
    size_t i = 0;
    for (; i + Isa::LANES <= count; i += Isa::LANES) Isa::store(out + i, Isa::load(from + i));
    if (i < count) Isa::store_part(out + i, Isa::load_part(from + i, count - i), count - i);
}

template <class Isa>
void load_numbers(const uint8_t* from, Kind kind, size_t count, float* out) {
    switch (kind) {
        case Kind::f16: return load_numbers<Isa>(reinterpret_cast<const F16*>(from), count, out);
        case Kind::bf16: return load_numbers<Isa>(reinterpret_cast<const BF16*>(from), count, out);
        default: return load_numbers<Isa>(reinterpret_cast<const float*>(from), count, out);
    }
}

}  // namespace
}  // namespace tightfit
