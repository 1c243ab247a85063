#include "isa_avx512.h"
#include "pruned_kernels.h"

namespace tightfit {
namespace {

// Every processor with AMX expands 16-bit numbers.
struct Vbmi2 : Avx512 {
    static Bytes expand(const BF16* values, uint64_t bits) {
        return _mm512_maskz_expand_epi16(static_cast<__mmask32>(bits), _mm512_loadu_si512(values));
    }
};

}  // namespace

const PrunedKernels amx_pruned_kernels = pruned_kernels_of<Vbmi2>();

}  // namespace tightfit
