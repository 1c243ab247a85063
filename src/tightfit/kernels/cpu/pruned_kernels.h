// Pruned matrices: rows whose weights other than zero are packed, written once over an instruction set `Isa` (isa_*.h).
#pragma once

#include "tiles.h"

namespace tightfit {

// As in Kernels, for pruned matrices.
struct PrunedKernels {
    void (*matmul)(const Weight&, size_t first, size_t last, Rows<const float> x, size_t tokens, Rows<float> out,
                   float accumulate);
    void (*decode)(const Weight&, size_t first, size_t last, Rows<float> out);
    void (*decode_bf16)(const Weight&, size_t first, size_t last, Rows<BF16> out);
};

extern const PrunedKernels portable_pruned_kernels;
#ifdef TIGHTFIT_X86
extern const PrunedKernels avx2_pruned_kernels, avx512_pruned_kernels, amx_pruned_kernels;
#endif

namespace {

constexpr size_t RUN = 32;  // inputs whose halves take turns in the bitmap

// Calls work(i, weights) for each LANES inputs of a word, from i on. `next` has WORD values that can be read; gives the
// first one of the next word.
template <class Isa, class Work>
__attribute__((always_inline)) inline const BF16* for_vectors(const uint8_t* bitmap, const BF16* next, Work work) {
    constexpr size_t STEP = 2 * Isa::LANES;
    for (size_t step = 0; step < WORD; step += STEP) {
        uint64_t bits = 0;
        std::memcpy(&bits, bitmap + step / 8, STEP / 8);
        const typename Isa::Bytes both = Isa::expand(next, bits);
        const size_t i = step / RUN * RUN + step % RUN / 2;
        work(i, Isa::lower(both, BF16()));
        work(i + RUN / 2, Isa::upper(both, BF16()));
        next += __builtin_popcountll(bits);
    }
    return next;
}

// Calls inside(col, i, weights) for each LANES inputs of a row, from col + i on, `col` a multiple of WORD, and for the
// rest of them, where a word or its values may end early, at_end(col, i, weights). Values are read from anywhere in the
// matrix, but not behind it. A bitmap that asks for more than there are is damaged, and gets zeros there.
template <class Isa, class Inside, class AtEnd>
inline void for_words(const Weight& w, size_t row, Inside inside, AtEnd at_end) {
    const size_t cols = w.cols;
    const uint8_t* bitmap = w.data + row * w.row_bytes();
    const BF16* next = reinterpret_cast<const BF16*>(bitmap + w.bitmap_bytes());
    const BF16* end = reinterpret_cast<const BF16*>(w.data + w.rows * w.row_bytes());
    const bool two_lines = 2 * w.kept > cols;  // of values for each word
    size_t col = 0;
    for (; col + WORD <= cols && end - next >= static_cast<ptrdiff_t>(WORD); col += WORD, bitmap += WORD / 8) {
        prefetch(next);
        if (two_lines) prefetch(next + LINE / sizeof(BF16));
        next = for_vectors<Isa>(bitmap, next, [&](size_t i, auto weights) { inside(col, i, weights); });
    }
    for (; col < cols; col += WORD, bitmap += WORD / 8) {
        BF16 rest[WORD] = {};
        if (next < end) std::memcpy(rest, next, std::min<size_t>(end - next, WORD) * sizeof(BF16));
        next += for_vectors<Isa>(bitmap, rest, [&](size_t i, auto weights) { at_end(col, i, weights); }) - rest;
    }
}

// A row is summed in PARTS times LANES partial sums. `ends` are the inputs of the last word, with zeros behind them.
template <class Isa, size_t TOKENS>
inline void pruned_row(const Weight& w, size_t row, Rows<const float> x, const float (&ends)[TOKENS][WORD],
                       Rows<float> out, float accumulate) {
    constexpr size_t PARTS = 4;
    typename Isa::Vector sums[TOKENS][PARTS];
    for (auto& token : sums)
        for (auto& sum : token) sum = Isa::zero();
    const auto add = [&](size_t t, const float* inputs, size_t i, typename Isa::Vector weights) {
        auto& sum = sums[t][i / Isa::LANES % PARTS];
        sum = Isa::fma(weights, Isa::load(inputs + i), sum);
    };
    const auto inside = [&](size_t col, size_t i, auto weights) {
        for (size_t t = 0; t < TOKENS; t++) add(t, x[t] + col, i, weights);
    };
    const auto at_end = [&](size_t col, size_t i, auto weights) {
        for (size_t t = 0; t < TOKENS; t++) add(t, col + WORD <= w.cols ? x[t] + col : ends[t], i, weights);
    };
    for_words<Isa>(w, row, inside, at_end);
    for (size_t t = 0; t < TOKENS; t++) {
        const float sum = Isa::sum(Isa::add(Isa::add(sums[t][0], sums[t][1]), Isa::add(sums[t][2], sums[t][3])));
        *out[t] = accumulate != 0 ? Isa::fma(accumulate, sum, *out[t]) : sum;
    }
}

template <class Isa>
void pruned_matmul(const Weight& w, size_t first, size_t last, Rows<const float> x, size_t tokens, Rows<float> out,
                   float accumulate) {
    const size_t end = w.cols / WORD * WORD;
    for_chunks<Isa::TOKENS / 2>(tokens, [&](size_t t, auto count) {
        float ends[count][WORD] = {};
        for (size_t i = 0; i < count; i++) std::memcpy(ends[i], x[t + i] + end, (w.cols - end) * sizeof(float));
        for (size_t row = first; row < last; row++)
            pruned_row<Isa, count>(w, row, {x[t], x.stride}, ends, {out[t] + row, out.stride}, accumulate);
    });
}

template <class Isa, class T>
void pruned_decode(const Weight& w, size_t first, size_t last, Rows<T> out) {
    for (size_t row = first; row < last; row++) {
        T* place = out[row - first];
        const auto inside = [&](size_t col, size_t i, auto weights) { Isa::store(place + col + i, weights); };
        const auto at_end = [&](size_t col, size_t i, auto weights) {
            if (col + i < w.cols)
                Isa::store_part(place + col + i, weights, std::min(w.cols - col - i, +Isa::LANES));
        };
        for_words<Isa>(w, row, inside, at_end);
    }
}

template <class Isa>
constexpr PrunedKernels pruned_kernels_of() {
    return {pruned_matmul<Isa>, pruned_decode<Isa, float>, pruned_decode<Isa, BF16>};
}

}  // namespace
}  // namespace tightfit
