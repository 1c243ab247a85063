#include "isa_avx2.h"
#include "vector.h"

namespace tightfit {

const Kernels avx2_kernels = kernels_of<Avx2>();

}  // namespace tightfit
