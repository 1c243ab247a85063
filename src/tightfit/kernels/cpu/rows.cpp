#include "rows.h"

#include <algorithm>

#include "levels.h"
#include "pool.h"
#include "row_kernels.h"

namespace tightfit {
namespace {

constexpr size_t TASK_NUMBERS = 32 << 10;  // some microseconds of work, well above what starting a task costs

const RowKernels& kernels() {
    switch (level()) {
#ifdef TIGHTFIT_X86
        case Level::amx:
        case Level::avx512vnni:
        case Level::avx512: return avx512_row_kernels;
        case Level::avxvnni:
        case Level::avx2: return avx2_row_kernels;
#endif
        default: return portable_row_kernels;
    }
}

// work(row) for all rows, shared among threads where there is enough of it.
template <class Work>
void for_rows(size_t rows, size_t cols, size_t threads, Work work) {
    const size_t tasks = std::max<size_t>(std::min(rows, rows * cols / TASK_NUMBERS), 1);
    parallel_for(tasks, threads, [&](size_t task) {
        for (size_t row = rows * task / tasks; row < rows * (task + 1) / tasks; row++) work(row);
    });
}

}  // namespace

void rms_norm(Block<const float> x, size_t outer, size_t inner, size_t cols, const float* weight, float eps,
              Block<float> out, size_t threads) {
    const RowKernels& k = kernels();
    for_rows(outer, inner * cols, threads, [&](size_t row) {
        for (size_t i = 0; i < inner; i++)
            k.rms_norm(x.data + row * x.outer_stride + i * x.inner_stride, cols, weight, eps,
                       out.data + row * out.outer_stride + i * out.inner_stride);
    });
}

void add(Rows<float> x, Rows<const float> y, size_t rows, size_t cols, float scale, size_t threads) {
    const RowKernels& k = kernels();
    for_rows(rows, cols, threads, [&](size_t row) { k.add(x[row], y[row], cols, scale); });
}

void glu(Rows<const float> gate, Rows<const float> up, size_t rows, size_t cols, Activation activation, Rows<float> out,
         size_t threads) {
    const RowKernels& k = kernels();
    for_rows(rows, cols, threads, [&](size_t row) { k.glu(gate[row], up[row], cols, activation, out[row]); });
}

void softcap(Rows<float> x, size_t rows, size_t cols, float cap, size_t threads) {
    const RowKernels& k = kernels();
    for_rows(rows, cols, threads, [&](size_t row) { k.softcap(x[row], cols, cap); });
}

}  // namespace tightfit
