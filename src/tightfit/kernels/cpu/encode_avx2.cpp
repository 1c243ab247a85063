#include <immintrin.h>

#include "encode_kernel.h"

namespace tightfit {
namespace {

struct Vectors {
    typedef float Floats __attribute__((vector_size(32)));
    typedef int32_t Ints __attribute__((vector_size(32)));
    typedef uint32_t Unsigned __attribute__((vector_size(32)));
    typedef uint16_t Halves __attribute__((vector_size(16)));
    typedef double Doubles __attribute__((vector_size(64)));

    static Floats look_up(const float (&table)[16], Ints indices) {
        const auto places = reinterpret_cast<__m256i>(indices);
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), places);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), places);
        return reinterpret_cast<Floats>(indices > 7 ? high : low);
    }
};

}  // namespace

const EncodeKernels avx2_encode_kernels = encode_kernels_of<Vectors>();

}  // namespace tightfit
