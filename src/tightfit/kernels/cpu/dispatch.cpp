#include "dispatch.h"

#include <algorithm>

#include "levels.h"
#include "pool.h"
#include "pruned_kernels.h"
#include "runs.h"

namespace tightfit {
namespace {

constexpr size_t TASK_BYTES = 64 << 10;  // some microseconds, well above what starting a task costs

const Kernels& kernels() {
    switch (level()) {
#ifdef TIGHTFIT_X86
        case Level::amx:
        case Level::avx512vnni: return avx512vnni_kernels;
        case Level::avx512: return avx512_kernels;
        case Level::avxvnni: return avxvnni_kernels;
        case Level::avx2: return avx2_kernels;
#endif
        default: return portable_kernels;
    }
}

const PrunedKernels& pruned_kernels() {
    switch (level()) {
#ifdef TIGHTFIT_X86
        case Level::amx: return amx_pruned_kernels;
        case Level::avx512vnni:
        case Level::avx512: return avx512_pruned_kernels;
        case Level::avxvnni:
        case Level::avx2: return avx2_pruned_kernels;
#endif
        default: return portable_pruned_kernels;
    }
}

size_t row_bytes(const Weight& w) { return w.tiled() ? w.tile_row_bytes() / TILE_ROWS : w.row_bytes(); }

// The rows of a matrix in units that end where tiles do, and that are whole blocks of the dense kernels.
struct Units {
    size_t lead, count;

    Units(const Weight& w, size_t start, size_t stop)
        : lead((w.row_offset + start) % TILE_ROWS), count((lead + stop - start + TILE_ROWS - 1) / TILE_ROWS) {}
    // The first row of a unit, counted from `start`.
    size_t row(size_t unit) const { return std::max(unit * TILE_ROWS, lead) - lead; }
};

size_t chunk_units(const Weight& w) { return std::max<size_t>(TASK_BYTES / (TILE_ROWS * row_bytes(w) + 1), 1); }

// Calls work(first, last) for runs of rows that together are [start, stop).
template <class Work>
void for_rows(const Weight& w, size_t start, size_t stop, size_t cost, size_t threads, Work work) {
    const Units units(w, start, stop);
    const size_t tasks = std::max<size_t>(std::min(units.count, cost / TASK_BYTES), 1);
    parallel_for(tasks, threads, [&](size_t task) {
        work(start + units.row(units.count * task / tasks), std::min(start + units.row(units.count * (task + 1) / tasks), stop));
    });
}

void decode_run(const Weight& w, size_t first, size_t last, Rows<float> out) {
    const auto decode = w.kind == Kind::pruned ? pruned_kernels().decode : kernels().decode;
    decode(w, first, last, out);
}
void decode_run(const Weight& w, size_t first, size_t last, Rows<BF16> out) {
    const auto decode = w.kind == Kind::pruned ? pruned_kernels().decode_bf16 : kernels().decode_bf16;
    decode(w, first, last, out);
}

constexpr size_t BLOCKS[] = {16, 32, 48};

// Whether a matrix is multiplied with activations in int8 where they are asked for.
bool takes_int8(const Weight& w) { return w.tiled() && w.kind != Kind::fp8; }

// The activations in int8 that some of the matrices take in blocks of `block`; without blocks if none does.
Quantized quantized(const Joined& matrices, size_t block, size_t tokens, uint8_t* scratch) {
    Quantized result{scratch, tokens, block, 0};
    for (const Weight& w : matrices.weights)
        if (takes_int8(w) && Quantized::block_of(w) == block)
            result.blocks = std::max(result.blocks, w.groups() * w.group / block);
    return result;
}

void quantize(Rows<const float> x, size_t cols, const Quantized& out, size_t threads) {
    const size_t tasks = std::max<size_t>(std::min(threads, out.nbytes() / TASK_BYTES), 1);
    parallel_for(tasks, threads, [&](size_t task) {
        kernels().quantize(x, cols, out, out.blocks * task / tasks, out.blocks * (task + 1) / tasks);
    });
}

}  // namespace

Joined::Joined(std::vector<Weight> members) : weights(std::move(members)), rows(0), cols(weights.at(0).cols), nbytes(0) {
    size_t chunks = 0;
    for (const Weight& w : weights) {
        first_chunk.push_back(chunks);
        chunks += (Units(w, 0, w.rows).count + chunk_units(w) - 1) / chunk_units(w);
        rows += w.rows;
        nbytes += w.rows * row_bytes(w);
    }
    first_chunk.push_back(chunks);
}

size_t Joined::scratch_nbytes(size_t tokens) const {
    size_t nbytes = 0;
    for (size_t block : BLOCKS) nbytes += quantized(*this, block, tokens, nullptr).nbytes();
    return nbytes;
}

void matmul(const Joined& matrices, Rows<const float> x, size_t tokens, Rows<float> out, float accumulate, bool int8,
            uint8_t* scratch, size_t threads) {
    Quantized activations[std::size(BLOCKS)];
    if (int8)
        for (size_t i = 0; i < std::size(BLOCKS); i++) {
            activations[i] = quantized(matrices, BLOCKS[i], tokens, scratch);
            quantize(x, matrices.cols, activations[i], threads);
            scratch += activations[i].nbytes();
        }
    const size_t chunks = matrices.first_chunk.back();
    threads = std::max<size_t>(std::min({threads, MOST_THREADS, matrices.nbytes * tokens / TASK_BYTES}), 1);
    Runs runs(chunks, threads);
    parallel_for(threads, threads, [&](size_t own) {
        runs.take(own, [&](size_t chunk) {
            size_t i = 0, row = 0;
            for (; chunk >= matrices.first_chunk[i + 1]; i++) row += matrices.weights[i].rows;
            const Weight& w = matrices.weights[i];
            const Units units(w, 0, w.rows);
            const size_t unit = (chunk - matrices.first_chunk[i]) * chunk_units(w);
            const size_t first = units.row(unit), last = std::min(units.row(unit + chunk_units(w)), w.rows);
            const Rows<float> columns{out.data + row, out.stride};
            if (int8 && takes_int8(w))
                kernels().matmul_int8(w, first, last, activations[(Quantized::block_of(w) / 16) - 1], columns, accumulate);
            else if (w.kind == Kind::pruned)
                pruned_kernels().matmul(w, first, last, x, tokens, columns, accumulate);
            else
                kernels().matmul(w, first, last, x, tokens, columns, accumulate);
        });
    });
}

template <class T>
void decode_block(const Weight& w, size_t start, size_t stop, Rows<T> out, size_t threads) {
    if (start >= stop) return;
    for_rows(w, start, stop, (stop - start) * w.cols * sizeof(T), threads, [&](size_t first, size_t last) {
        decode_run(w, first, last, Rows<T>{out[first - start], out.stride});
    });
}

template void decode_block(const Weight&, size_t, size_t, Rows<float>, size_t);
template void decode_block(const Weight&, size_t, size_t, Rows<BF16>, size_t);

void decode_rows(const Weight& w, const int64_t* indices, size_t count, Rows<float> out, size_t threads) {
    const size_t tasks = std::max<size_t>(std::min(count, count * w.cols * sizeof(float) / TASK_BYTES), 1);
    parallel_for(tasks, threads, [&](size_t task) {
        for (size_t i = count * task / tasks; i < count * (task + 1) / tasks; i++) {
            const size_t row = static_cast<size_t>(indices[i]);
            decode_run(w, row, row + 1, Rows<float>{out[i], out.stride});
        }
    });
}

}  // namespace tightfit
