#include "isa_avx512.h"
#include "vector.h"

namespace tightfit {

const Kernels avx512_kernels = kernels_of<Avx512>();

}  // namespace tightfit
