#include "isa_avx512vnni.h"
#include "vector.h"

namespace tightfit {

const Kernels avx512vnni_kernels = kernels_of<Avx512Vnni>();

}  // namespace tightfit
