#include "encode_kernel.h"

namespace tightfit {
namespace {

struct Vectors {
    typedef float Floats __attribute__((vector_size(16)));
    typedef int32_t Ints __attribute__((vector_size(16)));
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    typedef uint16_t Halves __attribute__((vector_size(8)));
    typedef double Doubles __attribute__((vector_size(32)));

    static Floats look_up(const float (&table)[16], Ints indices) {
        return Floats{table[indices[0]], table[indices[1]], table[indices[2]], table[indices[3]]};
    }
};

}  // namespace

const EncodeKernels portable_encode_kernels = encode_kernels_of<Vectors>();

}  // namespace tightfit
