// The table of kernels of one instruction set.
//
// Everything that is written over an `Isa` is in an unnamed namespace: the same template compiled under other flags must
// not be merged with it.
#pragma once

#include "decode.h"
#include "quantize.h"
#include "vector_float.h"
#include "vector_int8.h"

namespace tightfit {
namespace {

template <class Isa>
constexpr Kernels kernels_of() {
    return {matmul<Isa>, matmul_int8<Isa>, quantize<Isa>, decode<Isa, float>, decode<Isa, BF16>};
}

}  // namespace
}  // namespace tightfit
