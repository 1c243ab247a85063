#include "attention_kernels.h"
#include "isa_portable.h"

namespace tightfit {

const AttentionKernels portable_attention_kernels = attention_kernels_of<Portable>();

}  // namespace tightfit
