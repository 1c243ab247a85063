#include "isa_portable.h"
#include "row_kernels.h"

namespace tightfit {

const RowKernels portable_row_kernels = row_kernels_of<Portable>();

}  // namespace tightfit
