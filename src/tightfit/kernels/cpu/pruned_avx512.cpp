#include "isa_avx512.h"
#include "pruned_kernels.h"

namespace tightfit {

const PrunedKernels avx512_pruned_kernels = pruned_kernels_of<Avx512>();

}  // namespace tightfit
