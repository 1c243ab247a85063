#include "attention_kernels.h"
#include "isa_avx2.h"

namespace tightfit {

const AttentionKernels avx2_attention_kernels = attention_kernels_of<Avx2>();

}  // namespace tightfit
