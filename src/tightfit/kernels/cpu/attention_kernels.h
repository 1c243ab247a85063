// The kernels behind attention.h, written once over an instruction set `Isa` (isa_*.h).
//
// Keys are taken in blocks at fixed positions, which are folded one after the other into a running maximum, sum and
// output of each query (FlashAttention, https://arxiv.org/abs/2205.14135, with the online softmax of
// https://arxiv.org/abs/1805.02867). Powers are of two: queries come multiplied by log2(e).
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "attention_tasks.h"
#include "math.h"

namespace tightfit {
namespace {

// ---- writing ----

void rotate_head(float* x, const float* cos, const float* sin, size_t half, bool interleaved) {
    const size_t step = interleaved ? 2 : 1, distance = interleaved ? 1 : half;
    for (size_t i = 0; i < half; i++) {
        float &first = x[i * step], &second = x[i * step + distance];
        const float a = first, b = second;
        first = a * cos[i] - b * sin[i];
        second = b * cos[i] + a * sin[i];
    }
}

template <class Isa, class T>
void store_row(const float* x, size_t count, T* out) {
    size_t i = 0;
    for (; i + Isa::LANES <= count; i += Isa::LANES) Isa::store(out + i, Isa::load(x + i));
    if (i < count) Isa::store_part(out + i, Isa::load_part(x + i, count - i), count - i);
}

template <class Isa>
void store(const float* x, size_t count, Kind kind, uint8_t* out) {
    switch (kind) {
        case Kind::f16: return store_row<Isa>(x, count, reinterpret_cast<F16*>(out));
        case Kind::bf16: return store_row<Isa>(x, count, reinterpret_cast<BF16*>(out));
        default: return store_row<Isa>(x, count, reinterpret_cast<float*>(out));
    }
}

// ---- scores: a lane for each key, so that no sum crosses lanes ----

constexpr size_t FEATURES = 64;  // of a tile's keys that are held as columns at once
constexpr size_t VECTORS = 2;    // of keys in a tile, where there are many rows

template <class Isa>
constexpr size_t ROWS_AT_ONCE = Isa::LANES == 16 ? 8 : 4;  // their sums, of VECTORS each, fit the registers

// How many vectors of features each of ROWS rows sums at once: where rows are few, more, so that no sum waits for itself.
template <class Isa, size_t ROWS>
constexpr size_t SPAN = VECTORS * (4 * ROWS <= ROWS_AT_ONCE<Isa> && ROWS_AT_ONCE<Isa> > 4 ? 4
                                   : 2 * ROWS <= ROWS_AT_ONCE<Isa>                          ? 2
                                                                                            : 1);

// What is read next, asked for a little at each step: a core's own prefetcher alone reaches half of the memory's speed.
struct Ahead {
    const char* next;
    bool more;  // whether `next` moves on

    template <size_t BYTES>
    void fetch() {
        for (size_t i = 0; i < BYTES; i += 64) __builtin_prefetch(next + i, 0, 2);
        next += more ? BYTES : 0;
    }
};

// Calls work with `rows` as a constant, if there are any; at most MOST.
template <size_t MOST, class Work>
inline void for_last_rows(size_t rows, Work work) {
    if constexpr (MOST > 0) {
        if (rows == MOST) return work(std::integral_constant<size_t, MOST>());
        for_last_rows<MOST - 1>(rows, work);
    }
}

// Calls work(row, number of rows as a constant, ahead) for all rows, as many at once as the registers hold; only the
// first reads ahead.
template <class Isa, class Work>
inline void for_rows(size_t rows, Ahead& ahead, Work work) {
    constexpr size_t MOST = ROWS_AT_ONCE<Isa>;
    Ahead none{ahead.next, false};
    size_t r = 0;
    for (; r + MOST <= rows; r += MOST) work(r, std::integral_constant<size_t, MOST>(), r == 0 ? ahead : none);
    for_last_rows<MOST - 1>(rows - r, [&](auto count) { work(r, count, r == 0 ? ahead : none); });
}

// columns[f * stride + i] = keys[i][at + f] for f below `count`; further columns up to FEATURES may be written.
template <class Isa, class T>
inline void to_columns(const T* const* keys, size_t at, size_t count, size_t stride, float* columns) {
    constexpr size_t LANES = Isa::LANES, STEP = LANES * sizeof(float) / sizeof(T);
    for (size_t f = 0; f < count; f += STEP) {
        T padded[LANES][STEP];
        const uint8_t* rows[LANES];
        for (size_t i = 0; i < LANES; i++) {
            const T* features = keys[i] + at + f;
            if (f + STEP > count) {
                std::memset(padded[i], 0, sizeof padded[i]);
                std::memcpy(padded[i], features, (count - f) * sizeof(T));
                features = padded[i];
            }
            rows[i] = reinterpret_cast<const uint8_t*>(features);
        }
        typename Isa::Bytes words[LANES];
        transpose_rows<Isa>(rows, words);
        for (size_t i = 0; i < LANES; i++) {
            if constexpr (sizeof(T) == sizeof(float)) {
                std::memcpy(columns + (f + i) * stride, &words[i], sizeof words[i]);
            } else {
                Isa::store(columns + (f + 2 * i) * stride, Isa::lower(words[i], T()));
                Isa::store(columns + (f + 2 * i + 1) * stride, Isa::upper(words[i], T()));
            }
        }
    }
}

// scores[r] = q[r] . columns for ROWS rows, or added to them.
template <class Isa, class T, size_t ROWS, size_t VECTORS>
inline void score_rows(const float* columns, size_t count, Rows<const float> q, bool add, float* scores, Ahead& ahead) {
    constexpr size_t LANES = Isa::LANES;
    typename Isa::Vector sums[ROWS][VECTORS];
    for (size_t r = 0; r < ROWS; r++)
        for (size_t j = 0; j < VECTORS; j++)
            sums[r][j] = add ? Isa::load(scores + r * KEY_BLOCK + j * LANES) : Isa::zero();
    for (size_t f = 0; f < count; f++) {
        ahead.fetch<VECTORS * LANES * sizeof(T)>();
        typename Isa::Vector keys[VECTORS];
        for (size_t j = 0; j < VECTORS; j++) keys[j] = Isa::load(columns + (f * VECTORS + j) * LANES);
        for (size_t r = 0; r < ROWS; r++) {
            const auto feature = Isa::broadcast(q[r][f]);
            for (size_t j = 0; j < VECTORS; j++) sums[r][j] = Isa::fma(feature, keys[j], sums[r][j]);
        }
    }
    for (size_t r = 0; r < ROWS; r++)
        for (size_t j = 0; j < VECTORS; j++) Isa::store(scores + r * KEY_BLOCK + j * LANES, sums[r][j]);
}

// Scores of all rows with the keys at [from, to), which lie in the block that starts at `block`, and with neighbours
// up to whole tiles.
template <class Isa, class T, size_t VECTORS>
void score_block(const HeadCache& head, size_t rows, const float* q, size_t block, size_t from, size_t to,
                 float* scores, Ahead ahead) {
    constexpr size_t LANES = Isa::LANES, TILE = VECTORS * LANES;
    for (size_t tile = from / TILE * TILE; tile < to; tile += TILE) {
        const T* keys[TILE];
        size_t slot = tile % head.slots;
        for (size_t i = 0; i < TILE; i++) {
            keys[i] = reinterpret_cast<const T*>(head.keys) + slot * head.key_dim;
            if (++slot == head.slots) slot = 0;
        }
        for (size_t at = 0; at < head.key_dim; at += FEATURES) {
            float columns[FEATURES * TILE];
            const size_t count = std::min(FEATURES, head.key_dim - at);
            for (size_t j = 0; j < VECTORS; j++)
                to_columns<Isa>(keys + j * LANES, at, count, TILE, columns + j * LANES);
            for_rows<Isa>(rows, ahead, [&](size_t r, auto rows_at_once, Ahead& after) {
                score_rows<Isa, T, decltype(rows_at_once)::value, VECTORS>(columns, count,
                                                                  {q + r * head.key_dim + at, head.key_dim}, at > 0,
                                                                  scores + r * KEY_BLOCK + tile - block, after);
            });
        }
    }
}

// ---- the softmax of a row ----

// Turns the scores of the keys [from, to) into weights, 0 outside of [low, high), and gives by how much what was folded
// before shrinks.
template <class Isa>
float weigh(float* scores, size_t from, size_t to, size_t low, size_t high, float softcap, float& top, float& total) {
    constexpr size_t LANES = Isa::LANES;
    const size_t begin = from / LANES * LANES, end = (to + LANES - 1) / LANES * LANES;
    if (softcap != 0.0f) {
        const auto cap = Isa::broadcast(softcap);
        for (size_t i = begin; i < end; i += LANES)
            Isa::store(scores + i, Isa::mul(tanh<Isa>(Isa::div(Isa::load(scores + i), cap)), cap));
    }
    constexpr float HIDDEN = -__builtin_inff();
    std::fill(scores + begin, scores + low, HIDDEN);
    std::fill(scores + high, scores + end, HIDDEN);
    auto largest = Isa::broadcast(top);
    for (size_t i = begin; i < end; i += LANES) largest = Isa::max(largest, Isa::load(scores + i));
    const float new_top = Isa::largest(largest);
    const auto base = Isa::broadcast(new_top);
    auto sum = Isa::zero();
    for (size_t i = begin; i < end; i += LANES) {
        const auto weight = exp2<Isa>(Isa::sub(Isa::load(scores + i), base));
        Isa::store(scores + i, weight);
        sum = Isa::add(sum, weight);
    }
    float factors[LANES];
    Isa::store(factors, exp2<Isa>(Isa::broadcast(top - new_top)));
    total = total * factors[0] + Isa::sum(sum);
    top = new_top;
    return factors[0];
}

// ---- values: a lane for each feature ----

// acc[r] += weights[r][key] * values[key] for ROWS rows and SPAN vectors of features, or a last one of `width` features.
template <class Isa, class T, size_t ROWS, size_t SPAN, bool PART>
inline void add_features(Rows<const T> values, size_t count, size_t width, const float* weights, Rows<float> acc,
                         Ahead& ahead) {
    constexpr size_t LANES = Isa::LANES;
    typename Isa::Vector sums[ROWS][SPAN];
    for (size_t r = 0; r < ROWS; r++)
        for (size_t j = 0; j < SPAN; j++) sums[r][j] = Isa::load(acc[r] + j * LANES);
    for (size_t key = 0; key < count; key++) {
        ahead.fetch<SPAN * LANES * sizeof(T)>();
        typename Isa::Vector features[SPAN];
        for (size_t j = 0; j < SPAN; j++)
            features[j] = PART ? Isa::load_part(values[key], width) : Isa::load(values[key] + j * LANES);
        for (size_t r = 0; r < ROWS; r++) {
            const auto weight = Isa::broadcast(weights[r * KEY_BLOCK + key]);
            for (size_t j = 0; j < SPAN; j++) sums[r][j] = Isa::fma(weight, features[j], sums[r][j]);
        }
    }
    for (size_t r = 0; r < ROWS; r++)
        for (size_t j = 0; j < SPAN; j++) Isa::store(acc[r] + j * LANES, sums[r][j]);
}

// The features from `d` on, SPAN vectors at once.
template <class Isa, class T, size_t ROWS, size_t SPAN>
inline void add_rows(Rows<const T> values, size_t count, size_t d, size_t dim, const float* weights, Rows<float> acc,
                     Ahead& ahead) {
    constexpr size_t LANES = Isa::LANES;
    const auto from = [&] { return Rows<const T>{values.data + d, values.stride}; };
    const auto to = [&] { return Rows<float>{acc.data + d, acc.stride}; };
    for (; d + SPAN * LANES <= dim; d += SPAN * LANES)
        add_features<Isa, T, ROWS, SPAN, false>(from(), count, 0, weights, to(), ahead);
    if constexpr (SPAN > 1) {
        add_rows<Isa, T, ROWS, SPAN / 2>(values, count, d, dim, weights, acc, ahead);
    } else {
        if (d < dim) add_features<Isa, T, ROWS, 1, true>(from(), count, dim - d, weights, to(), ahead);
    }
}

// acc += weights . values of the keys at [from, to)
template <class Isa, class T>
void add_block(const HeadCache& head, size_t rows, size_t block, size_t from, size_t to, const float* scores,
               Rows<float> acc, Ahead ahead) {
    while (from < to) {  // a ring may wrap
        const size_t slot = from % head.slots, count = std::min(to - from, head.slots - slot);
        const T* values = reinterpret_cast<const T*>(head.values) + slot * head.value_stride;
        for_rows<Isa>(rows, ahead, [&](size_t r, auto rows_at_once, Ahead& after) {
            constexpr size_t ROWS = decltype(rows_at_once)::value;
            add_rows<Isa, T, ROWS, SPAN<Isa, ROWS>>({values, head.value_stride}, count, 0, head.value_dim,
                                                    scores + r * KEY_BLOCK + from - block, {acc[r], acc.stride}, after);
        });
        from += count;
    }
}

template <class Isa, class T>
void fold_keys(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to,
               const uint8_t* next, float* scores, const Folded& folded) {
    const bool shared = head.values == head.keys;
    while (from < to) {
        const size_t block = from / KEY_BLOCK * KEY_BLOCK, end = std::min(block + KEY_BLOCK, to);
        const size_t slot = block % head.slots;
        const auto* keys = reinterpret_cast<const char*>(head.keys) + slot * head.key_dim * sizeof(T);
        const auto* values = reinterpret_cast<const char*>(head.values) + slot * head.value_stride * sizeof(T);
        Ahead after{keys, false};
        if (end < to) after = {keys + KEY_BLOCK * head.key_dim * sizeof(T), true};
        else if (next) after = {reinterpret_cast<const char*>(next), true};
        const Ahead ahead = shared ? after : Ahead{values, true};
        if (queries.rows <= 2)
            score_block<Isa, T, 2 * VECTORS>(head, queries.rows, q, block, from, end, scores, ahead);
        else
            score_block<Isa, T, VECTORS>(head, queries.rows, q, block, from, end, scores, ahead);
        for (size_t r = 0; r < queries.rows; r++) {
            float* row = scores + r * KEY_BLOCK;
            const size_t low = std::max(from, queries.lowest(r)), high = std::min(end, queries.position(r) + 1);
            if (low >= high) {
                std::fill(row + from - block, row + end - block, 0.0f);
                continue;
            }
            const float shrink = weigh<Isa>(row, from - block, end - block, low - block, high - block, queries.softcap,
                                            folded.top[r], folded.total[r]);
            float* acc = folded.acc + r * folded.stride;
            if (shrink != 1.0f)
                for (size_t d = 0; d < folded.stride; d++) acc[d] *= shrink;
        }
        add_block<Isa, T>(head, queries.rows, block, from, end, scores, {folded.acc, folded.stride},
                          {after.next, after.more && !shared});
        from = end;
    }
}

template <class Isa>
void fold(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to, const uint8_t* next,
          float* scores, const Folded& folded) {
    switch (head.kind) {
        case Kind::f16: return fold_keys<Isa, F16>(head, queries, q, from, to, next, scores, folded);
        case Kind::bf16: return fold_keys<Isa, BF16>(head, queries, q, from, to, next, scores, folded);
        default: return fold_keys<Isa, float>(head, queries, q, from, to, next, scores, folded);
    }
}

template <class Isa>
constexpr AttentionKernels attention_kernels_of() {
    return {rotate_head, store<Isa>, fold<Isa>};
}

}  // namespace
}  // namespace tightfit
