#include <immintrin.h>

#include "encode_kernel.h"

namespace tightfit {
namespace {

struct Vectors {
    typedef float Floats __attribute__((vector_size(64)));
    typedef int32_t Ints __attribute__((vector_size(64)));
    typedef uint32_t Unsigned __attribute__((vector_size(64)));
    typedef uint16_t Halves __attribute__((vector_size(32)));
    typedef double Doubles __attribute__((vector_size(128)));

    static Floats look_up(const float (&table)[16], Ints indices) {
        const auto entries = _mm512_permutexvar_ps(reinterpret_cast<__m512i>(indices), _mm512_loadu_ps(table));
        return reinterpret_cast<Floats>(entries);
    }
};

}  // namespace

const EncodeKernels avx512_encode_kernels = encode_kernels_of<Vectors>();

}  // namespace tightfit
