#include "isa_avx2.h"
#include "row_kernels.h"

namespace tightfit {

const RowKernels avx2_row_kernels = row_kernels_of<Avx2>();

}  // namespace tightfit
