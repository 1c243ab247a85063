#include "attention_kernels.h"
#include "isa_avx512.h"

namespace tightfit {
namespace {

constexpr AttentionKernels kernels_of(bool amx) {
    AttentionKernels kernels = attention_kernels_of<Avx512>();
    if (amx) kernels.fold = amx_fold, kernels.weigh = amx_weigh;
    return kernels;
}

}  // namespace

const AttentionKernels avx512_attention_kernels = kernels_of(false);
const AttentionKernels amx_attention_kernels = kernels_of(true);

}  // namespace tightfit
