// The kernels of each instruction set, one source file each.
#pragma once

#include "weight.h"

namespace tightfit {

extern const Kernels portable_kernels;
#ifdef TIGHTFIT_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace tightfit
