#include "isa_avx2.h"
#include "kernels.h"
#include "vector.h"

namespace tightfit {

const Kernels avx2_kernels = kernels_of<Avx2>("avx2");

}  // namespace tightfit
