#include "isa_portable.h"
#include "vector.h"

namespace tightfit {

const Kernels portable_kernels = kernels_of<Portable>();

}  // namespace tightfit
