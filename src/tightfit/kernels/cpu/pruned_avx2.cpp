#include "isa_avx2.h"
#include "pruned_kernels.h"

namespace tightfit {

const PrunedKernels avx2_pruned_kernels = pruned_kernels_of<Avx2>();

}  // namespace tightfit
