#include "attention_kernels.h"
#include "isa_avx512.h"

namespace tightfit {

const AttentionKernels avx512_attention_kernels = attention_kernels_of<Avx512>();

}  // namespace tightfit
