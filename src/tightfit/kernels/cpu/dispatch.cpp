#include "dispatch.h"

#include <algorithm>

#include "kernels.h"
#include "levels.h"
#include "pool.h"

namespace tightfit {
namespace {

constexpr size_t TASK_BYTES = 64 << 10;  // of weights: some microseconds, well above what starting a task costs
constexpr size_t TASKS_PER_THREAD = 8;   // so that a thread that is held up does not hold up the others
constexpr size_t UNIT = 16;              // rows: a tile, and whole blocks of the dense kernels

const Kernels* kernels() {
    switch (level()) {
#ifdef TIGHTFIT_X86
        case Level::amx:
        case Level::avx512vnni:
        case Level::avx512: return &avx512_kernels;
        case Level::avxvnni:
        case Level::avx2: return &avx2_kernels;
#endif
        default: return &portable_kernels;
    }
}

// Calls work(first, last) for runs of rows that together are [start, stop), which end where tiles do.
template <class Work>
void for_rows(const Weight& w, size_t start, size_t stop, size_t cost, size_t threads, Work work) {
    const size_t lead = (w.row_offset + start) % UNIT;  // rows of the first unit that are not asked for
    const size_t units = (lead + stop - start + UNIT - 1) / UNIT;
    const size_t most = std::min(units, threads * TASKS_PER_THREAD);
    const size_t tasks = std::max<size_t>(std::min(most, cost / TASK_BYTES), 1);
    parallel_for(tasks, threads, [&](size_t task) {
        const auto border = [&](size_t unit) { return std::max(start + unit * UNIT, start + lead) - lead; };
        work(border(units * task / tasks), std::min(border(units * (task + 1) / tasks), stop));
    });
}

size_t row_bytes(const Weight& w) { return w.tiled() ? w.tile_row_bytes() / TILE_ROWS : w.cols * w.itemsize(); }

void decode_run(const Kernels* k, const Weight& w, size_t first, size_t last, Rows<float> out) {
    k->decode(w, first, last, out);
}

void decode_run(const Kernels* k, const Weight& w, size_t first, size_t last, Rows<BF16> out) {
    k->decode_bf16(w, first, last, out);
}

}  // namespace

void matmul(const Weight& w, Rows<const float> x, size_t tokens, Rows<float> out, size_t threads) {
    if (tokens == 0 || w.rows == 0) return;
    const Kernels* k = kernels();
    for_rows(w, 0, w.rows, w.rows * row_bytes(w) * tokens, threads,
             [&](size_t first, size_t last) { k->matmul(w, first, last, x, tokens, out); });
}

template <class T>
void decode_block(const Weight& w, size_t start, size_t stop, Rows<T> out, size_t threads) {
    if (start >= stop) return;
    const Kernels* k = kernels();
    for_rows(w, start, stop, (stop - start) * w.cols * sizeof(T), threads, [&](size_t first, size_t last) {
        decode_run(k, w, first, last, Rows<T>{out[first - start], out.stride});
    });
}

template void decode_block(const Weight&, size_t, size_t, Rows<float>, size_t);
template void decode_block(const Weight&, size_t, size_t, Rows<BF16>, size_t);

void decode_rows(const Weight& w, const int64_t* indices, size_t count, Rows<float> out, size_t threads) {
    const Kernels* k = kernels();
    const size_t tasks = std::max<size_t>(std::min(count, count * w.cols * sizeof(float) / TASK_BYTES), 1);
    parallel_for(tasks, threads, [&](size_t task) {
        for (size_t i = count * task / tasks; i < count * (task + 1) / tasks; i++) {
            const size_t row = static_cast<size_t>(indices[i]);
            k->decode(w, row, row + 1, Rows<float>{out[i], out.stride});
        }
    });
}

}  // namespace tightfit
