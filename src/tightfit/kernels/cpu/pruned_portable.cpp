#include "isa_portable.h"
#include "pruned_kernels.h"

namespace tightfit {

const PrunedKernels portable_pruned_kernels = pruned_kernels_of<Portable>();

}  // namespace tightfit
