#include "isa_avx512.h"
#include "row_kernels.h"

namespace tightfit {

const RowKernels avx512_row_kernels = row_kernels_of<Avx512>();

}  // namespace tightfit
