#include "isa_portable.h"
#include "kernels.h"
#include "vector.h"

namespace tightfit {

const Kernels portable_kernels = kernels_of<Portable>("portable");

}  // namespace tightfit
