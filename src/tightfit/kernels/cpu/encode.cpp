#include "encode.h"

#include "levels.h"

namespace tightfit {
namespace {

const EncodeKernels& kernels() {
    switch (level()) {
#ifdef TIGHTFIT_X86
        case Level::amx:
        case Level::avx512vnni:
        case Level::avx512: return avx512_encode_kernels;
        case Level::avxvnni:
        case Level::avx2: return avx2_encode_kernels;
#endif
        default: return portable_encode_kernels;
    }
}

}  // namespace

template <>
double encode(const Tiles& tiles, Rows<const float> x, float* scratch) { return kernels().f32(tiles, x, scratch); }

template <>
double encode(const Tiles& tiles, Rows<const F16> x, float* scratch) { return kernels().f16(tiles, x, scratch); }

template <>
double encode(const Tiles& tiles, Rows<const BF16> x, float* scratch) { return kernels().bf16(tiles, x, scratch); }

}  // namespace tightfit
