// Small operations on rows of float32 numbers: norms, activations, sums. A row's bits depend on that row only.
#pragma once

#include "weight.h"

namespace tightfit {

// `outer` times `inner` rows of numbers, e.g. the heads of tokens; strides are in numbers.
template <class T>
struct Block {
    T* data;
    size_t outer_stride, inner_stride;

    T* at(size_t outer, size_t inner) const { return data + outer * outer_stride + inner * inner_stride; }
    Block from(size_t outer, size_t inner) const { return {at(outer, inner), outer_stride, inner_stride}; }
};

enum class Activation { silu, gelu_pytorch_tanh, relu, clamped_swiglu };

// out = x / rms(x) * weight for rows of `cols`; out may be x.
void rms_norm(Block<const float> x, size_t outer, size_t inner, size_t cols, const float* weight, float eps,
              Block<float> out, size_t threads);

// x += scale * y; a stride of 0 adds the same row of y to all.
void add(Rows<float> x, Rows<const float> y, size_t rows, size_t cols, float scale, size_t threads);

// out = activation(gate) * up for rows of `cols`; out may be gate.
void glu(Rows<const float> gate, Rows<const float> up, size_t rows, size_t cols, Activation activation, Rows<float> out,
         size_t threads);

// x = cap * tanh(x / cap)
void softcap(Rows<float> x, size_t rows, size_t cols, float cap, size_t threads);

}  // namespace tightfit
