#include "isa_avx512vbmi2.h"
#include "pruned_kernels.h"

namespace tightfit {

const PrunedKernels amx_pruned_kernels = pruned_kernels_of<Avx512Vbmi2>();

}  // namespace tightfit
