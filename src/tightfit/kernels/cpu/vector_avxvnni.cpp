#include "isa_avxvnni.h"
#include "vector.h"

namespace tightfit {

const Kernels avxvnni_kernels = kernels_of<AvxVnni>();

}  // namespace tightfit
