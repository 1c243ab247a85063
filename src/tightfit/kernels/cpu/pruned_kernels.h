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

// The values of a row from the first on. A word of the bitmap may have WORD of them, which can be read from anywhere:
// where the matrix ends before that, from a copy. A bitmap that asks for more than there is, is damaged and gets zeros.
class Values {
public:
    Values(const Weight& w, size_t row)
        : next_(reinterpret_cast<const BF16*>(w.data + row * w.row_bytes() + w.bitmap_bytes())),
          end_(reinterpret_cast<const BF16*>(w.data + w.rows * w.row_bytes())) {}

    const BF16* word() {
        if (end_ - next_ < static_cast<ptrdiff_t>(WORD)) {
            const size_t left = end_ > next_ ? end_ - next_ : 0;
            BF16 rest[WORD] = {};
            std::memcpy(rest, next_, left * sizeof(BF16));
            std::memcpy(rest_, rest, sizeof rest);
            next_ = rest_, end_ = rest_ + left;
        }
        return next_;
    }

    void skip(size_t count) { next_ += count; }

private:
    const BF16 *next_, *end_;
    BF16 rest_[WORD];
};

inline size_t count_ones(uint64_t bits) { return static_cast<size_t>(__builtin_popcountll(bits)); }

// Calls work(col, i, weights) for each LANES inputs of a row, from col + i on; `col` is a multiple of WORD.
template <class Isa, class Work>
inline void for_vectors(const Weight& w, size_t row, Work work) {
    constexpr size_t STEP = 2 * Isa::LANES;
    const uint8_t* bitmap = w.data + row * w.row_bytes();
    Values values(w, row);
    for (size_t col = 0; col < w.cols; col += WORD, bitmap += WORD / 8) {
        const uint64_t bits = load_as<uint64_t>(bitmap);
        const BF16* next = values.word();
        prefetch(next);
        for (size_t step = 0; step < WORD; step += STEP) {
            const uint64_t some = bits >> step & ((uint64_t{1} << STEP) - 1);
            const typename Isa::Bytes both = Isa::expand(next, some);
            const size_t i = step / RUN * RUN + step % RUN / 2;
            work(col, i, Isa::lower(both, BF16()));
            work(col, i + RUN / 2, Isa::upper(both, BF16()));
            next += count_ones(some);
        }
        values.skip(count_ones(bits));
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
    for_vectors<Isa>(w, row, [&](size_t col, size_t i, typename Isa::Vector weights) {
        const size_t part = i / Isa::LANES % PARTS;
        for (size_t t = 0; t < TOKENS; t++) {
            const float* inputs = col + WORD <= w.cols ? x[t] + col : ends[t];
            sums[t][part] = Isa::fma(weights, Isa::load(inputs + i), sums[t][part]);
        }
    });
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
    for (size_t row = first; row < last; row++)
        for_vectors<Isa>(w, row, [&](size_t col, size_t i, typename Isa::Vector weights) {
            col += i;
            if (col < w.cols) Isa::store_part(out[row - first] + col, weights, std::min(w.cols - col, +Isa::LANES));
        });
}

template <class Isa>
constexpr PrunedKernels pruned_kernels_of() {
    return {pruned_matmul<Isa>, pruned_decode<Isa, float>, pruned_decode<Isa, BF16>};
}

}  // namespace
}  // namespace tightfit
