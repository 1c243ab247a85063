#include "isa_avx512.h"
#include "kernels.h"
#include "vector.h"

namespace tightfit {

const Kernels avx512_kernels = kernels_of<Avx512>("avx512");

}  // namespace tightfit
