// The kernels behind attention.h, written once over an instruction set `Isa` (isa_*.h).
//
// Keys are taken in blocks at fixed positions, which are folded one after the other into a running maximum, sum and
// output of each query (FlashAttention, https://arxiv.org/abs/2205.14135, with the online softmax of
// https://arxiv.org/abs/1805.02867). Powers are of two: queries come multiplied by log2(e).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <type_traits>

#include "attention_tasks.h"
#include "codecs.h"
#include "math.h"
#include "numbers.h"
#include "reader.h"

namespace tightfit {
namespace {

// ---- writing ----

inline void rotate_head(float* x, const float* cos, const float* sin, size_t half, bool interleaved) {
    const size_t step = interleaved ? 2 : 1, distance = interleaved ? 1 : half;
    for (size_t i = 0; i < half; i++) {
        float &first = x[i * step], &second = x[i * step + distance];
        const float a = first, b = second;
        first = a * cos[i] - b * sin[i];
        second = b * cos[i] + a * sin[i];
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
        const bool listed = head.table || head.path;  // only the tokens asked for are sure to have a slot
        size_t slot = listed ? 0 : tile % head.slots;
        for (size_t i = 0; i < TILE; i++) {
            if (listed) slot = head.slot(std::min(std::max(tile + i, from), to - 1));
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
    while (from < to) {  // a ring may wrap, and a list may jump
        const size_t slot = head.slot(from), count = head.run(from, to - from);
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
        const size_t slot = head.slot(head.table ? from : block);  // pages before may lie elsewhere
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

// ---- pages ----

// Where the pages of a block lie in memory; values in those of the keys where these are shared.
struct BlockPages {
    const uint8_t *keys[KEY_BLOCK / PAGE], *values[KEY_BLOCK / PAGE];
};

// Finds the pages of the block at token `block` that have tokens [from, end); those in a file are read to `raw`.
inline BlockPages find_pages(const HeadCache& head, size_t block, size_t from, size_t end, uint8_t* raw) {
    const size_t first = block / PAGE, skipped = from / PAGE - first, pages = (end + PAGE - 1) / PAGE - first;
    const size_t key_page = head.key_codec.page_bytes(), value_page = head.value_codec.page_bytes();
    BlockPages found{};
    for (size_t j = skipped; j < pages && head.file < 0; j++) {
        found.keys[j] = head.keys + head.page(first + j) * key_page;
        found.values[j] = head.shared() ? found.keys[j] : head.values + head.page(first + j) * value_page;
    }
    for (size_t j = skipped, count; j < pages && head.file >= 0; j += count) {
        const size_t page = head.listed(first + j);
        count = 1;  // neighbours in one request
        while (j + count < pages && head.listed(first + j + count) == page + count) count++;
        uint8_t *keys = raw + j * key_page, *values = raw + KEY_BLOCK / PAGE * key_page + j * value_page;
        read_now({head.file, keys, count * key_page, head.keys_at + page * key_page});
        if (!head.shared()) read_now({head.file, values, count * value_page, head.values_at + page * value_page});
        for (size_t i = 0; i < count; i++) {
            found.keys[j + i] = keys + i * key_page;
            found.values[j + i] = head.shared() ? keys + i * key_page : values + i * value_page;
        }
    }
    return found;
}

// Decodes the listed tokens [from, end), which lie in one page, to the places of `keys` and `values` on. Of a page in the
// file, it is read from the first of them on to the last, or where its numbers are codes to the scales behind these; whole
// where they are not plain.
template <class Isa>
void load_listed(const HeadCache& head, size_t from, size_t end, float* keys, float* values, uint8_t* raw) {
    const size_t number = head.token(from) / PAGE, first = head.token(from) % PAGE, last = head.token(end - 1) % PAGE;
    const auto load = [&](const Codec& codec, const float* side, const uint8_t* data, size_t file_at, float* out) {
        const uint8_t* page = raw;
        if (head.file >= 0) {
            const size_t start = codec.plain() ? first * codec.row_bytes() : 0;
            const size_t stop = codec.plain() && codec.dense() ? (last + 1) * codec.row_bytes() : codec.page_bytes();
            read_now({head.file, raw + start, stop - start, file_at + number * codec.page_bytes() + start});
        } else {
            page = data + static_cast<size_t>(head.table[number]) * codec.page_bytes();
        }
        if (codec.plain()) {
            for (size_t i = from; i < end; i++, out += codec.dim)
                decode_row<Isa>(codec, head.kind, page, head.token(i) % PAGE, out);
            return;
        }
        float* whole = reinterpret_cast<float*>(raw + round_up(codec.page_bytes(), 64));
        decode_page<Isa>(codec, head.kind, page, side, whole);
        for (size_t i = from; i < end; i++, out += codec.dim)
            std::copy_n(whole + head.token(i) % PAGE * codec.dim, codec.dim, out);
    };
    load(head.key_codec, head.key_side, head.keys, head.keys_at, keys);
    if (!head.shared()) load(head.value_codec, head.value_side, head.values, head.values_at, values);
}

// The pages of the block at token `block` that have tokens [from, end), in memory and as they are multiplied; `scratch`
// has room for a block of keys and values twice.
template <class Isa>
HeadCache load_block(const HeadCache& head, size_t block, size_t from, size_t end, float* scratch) {
    const bool shared = head.shared();
    float* keys = scratch;
    float* values = shared ? keys : scratch + KEY_BLOCK * head.key_dim;
    float* raw = scratch + KEY_BLOCK * (head.key_dim + head.value_dim);
    const HeadCache loaded{Kind::f32, reinterpret_cast<uint8_t*>(keys), reinterpret_cast<uint8_t*>(values), KEY_BLOCK,
                           head.key_dim, head.value_dim, shared ? head.key_dim : head.value_dim};
    if (head.tokens) {
        for (size_t i = from, next; i < end; i = next) {
            for (next = i + 1; next < end && head.token(next) / PAGE == head.token(i) / PAGE;) next++;
            load_listed<Isa>(head, i, next, keys + (i - block) * head.key_dim, values + (i - block) * head.value_dim,
                             reinterpret_cast<uint8_t*>(raw));
        }
        return loaded;
    }
    const BlockPages pages = find_pages(head, block, from, end, reinterpret_cast<uint8_t*>(raw));
    for (size_t j = (from - block) / PAGE; j < (end - block + PAGE - 1) / PAGE; j++) {
        decode_page<Isa>(head.key_codec, head.kind, pages.keys[j], head.key_side, keys + j * PAGE * head.key_dim);
        if (!shared)
            decode_page<Isa>(head.value_codec, head.kind, pages.values[j], head.value_side,
                             values + j * PAGE * head.value_dim);
    }
    return loaded;
}

template <class Isa>
void fold_dense(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to,
                const uint8_t* next, float* scores, const Folded& folded) {
    switch (head.kind) {
        case Kind::f16: return fold_keys<Isa, F16>(head, queries, q, from, to, next, scores, folded);
        case Kind::bf16: return fold_keys<Isa, BF16>(head, queries, q, from, to, next, scores, folded);
        default: return fold_keys<Isa, float>(head, queries, q, from, to, next, scores, folded);
    }
}

// Calls work(head, from, to) for blocks of tokens [from, to) with their pages as they are multiplied.
template <class Isa, class Work>
void for_blocks(const HeadCache& head, size_t from, size_t to, float* scratch, Work work) {
    while (from < to) {
        const size_t block = from / KEY_BLOCK * KEY_BLOCK, end = std::min(block + KEY_BLOCK, to);
        work(head.loaded() ? head : load_block<Isa>(head, block, from, end, scratch), block, from, end);
        from = end;
    }
}

template <class Isa>
void fold(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to, const uint8_t* next,
          float* scratch, const Folded& folded) {
    if (head.loaded()) return fold_dense<Isa>(head, queries, q, from, to, next, scratch, folded);
    float* pages = scratch + queries.rows * KEY_BLOCK;
    for_blocks<Isa>(head, from, to, pages, [&](const HeadCache& block, size_t, size_t first, size_t end) {
        fold_dense<Isa>(block, queries, q, first, end, nullptr, scratch, folded);
    });
}

// ---- what keys received ----

template <class Isa, class T>
void weigh_keys(const HeadCache& head, const Queries& queries, const float* q, size_t block, size_t from, size_t to,
                const float* lse, Giving giving, float* scores, float* mass) {
    constexpr size_t LANES = Isa::LANES;
    const Ahead none{reinterpret_cast<const char*>(head.keys), false};
    score_block<Isa, T, VECTORS>(head, queries.rows, q, block, from, to, scores, none);
    for (size_t r = 0; r < queries.rows; r++) {
        float* row = scores + r * KEY_BLOCK;
        const size_t low = std::max(from, queries.lowest(r)), high = std::min(to, queries.position(r) + 1);
        if (low >= high) continue;
        const size_t begin = (from - block) / LANES * LANES, end = round_up(to - block, LANES);
        if (queries.softcap != 0.0f) {
            const auto cap = Isa::broadcast(queries.softcap);
            for (size_t i = begin; i < end; i += LANES)
                Isa::store(row + i, Isa::mul(tanh<Isa>(Isa::div(Isa::load(row + i), cap)), cap));
        }
        const auto base = Isa::broadcast(lse[r]);
        for (size_t i = begin; i < end; i += LANES) Isa::store(row + i, exp2<Isa>(Isa::sub(Isa::load(row + i), base)));
        const float* weights = row - block;
        float* to_token = mass - from;
        if (giving == Giving::sum) for (size_t i = low; i < high; i++) to_token[i] += weights[i];
        else if (giving == Giving::most) for (size_t i = low; i < high; i++) to_token[i] = std::max(to_token[i], weights[i]);
        else for (size_t i = low; i < high; i++) to_token[i] += weights[i] >= 1.0f;
    }
}

template <class Isa>
void weigh_tokens(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to,
                  const float* lse, Giving giving, float* scratch, float* mass) {
    float* pages = scratch + queries.rows * KEY_BLOCK;
    for_blocks<Isa>(head, from, to, pages, [&](const HeadCache& loaded, size_t block, size_t first, size_t end) {
        float* at = mass + first - from;
        switch (loaded.kind) {
            case Kind::f16: return weigh_keys<Isa, F16>(loaded, queries, q, block, first, end, lse, giving, scratch, at);
            case Kind::bf16: return weigh_keys<Isa, BF16>(loaded, queries, q, block, first, end, lse, giving, scratch, at);
            default: return weigh_keys<Isa, float>(loaded, queries, q, block, first, end, lse, giving, scratch, at);
        }
    });
}

// ---- what keys would receive ----

template <class Isa>
void score_tokens(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to, float* scratch,
                  float* out, size_t stride) {
    float* pages = scratch + queries.rows * KEY_BLOCK;
    for_blocks<Isa>(head, from, to, pages, [&](const HeadCache& loaded, size_t block, size_t first, size_t end) {
        const Ahead none{reinterpret_cast<const char*>(loaded.keys), false};
        switch (loaded.kind) {
            case Kind::f16: score_block<Isa, F16, VECTORS>(loaded, queries.rows, q, block, first, end, scratch, none); break;
            case Kind::bf16: score_block<Isa, BF16, VECTORS>(loaded, queries.rows, q, block, first, end, scratch, none); break;
            default: score_block<Isa, float, VECTORS>(loaded, queries.rows, q, block, first, end, scratch, none);
        }
        for (size_t r = 0; r < queries.rows; r++)
            std::copy(scratch + r * KEY_BLOCK + first - block, scratch + r * KEY_BLOCK + end - block,
                      out + r * stride + first - from);
    });
}

template <class Isa>
void softmax(float* scores, size_t count) {
    float top = LOWEST, total = 0.0f;
    weigh<Isa>(scores, 0, count, 0, count, 0.0f, top, total);
    for (size_t i = 0; i < count; i++) scores[i] /= total;
}

// ---- products with a matrix: a lane for each column ----

// out[r] = x[r] . SPAN vectors of columns, or a last one of `width`.
template <class Isa, size_t ROWS, size_t SPAN, bool PART>
inline void project_columns(Rows<const float> x, size_t from, Rows<const float> matrix, size_t width, Rows<float> out) {
    constexpr size_t LANES = Isa::LANES;
    typename Isa::Vector sums[ROWS][SPAN] = {};
    for (size_t i = 0; i < from; i++) {
        typename Isa::Vector columns[SPAN];
        for (size_t j = 0; j < SPAN; j++)
            columns[j] = PART ? Isa::load_part(matrix[i], width) : Isa::load(matrix[i] + j * LANES);
        for (size_t r = 0; r < ROWS; r++) {
            const auto feature = Isa::broadcast(x[r][i]);
            for (size_t j = 0; j < SPAN; j++) sums[r][j] = Isa::fma(feature, columns[j], sums[r][j]);
        }
    }
    for (size_t r = 0; r < ROWS; r++)
        for (size_t j = 0; j < SPAN; j++) {
            if (PART) Isa::store_part(out[r], sums[r][j], width);
            else Isa::store(out[r] + j * LANES, sums[r][j]);
        }
}

// The columns from `o` on.
template <class Isa, size_t ROWS, size_t SPAN>
inline void project_rows(Rows<const float> x, size_t from, Rows<const float> matrix, size_t o, size_t to, Rows<float> out) {
    constexpr size_t STEP = SPAN * Isa::LANES;
    const auto columns = [&] { return Rows<const float>{matrix.data + o, matrix.stride}; };
    const auto sums = [&] { return Rows<float>{out.data + o, out.stride}; };
    for (; o + STEP <= to; o += STEP) project_columns<Isa, ROWS, SPAN, false>(x, from, columns(), 0, sums());
    if constexpr (SPAN > 1) project_rows<Isa, ROWS, SPAN / 2>(x, from, matrix, o, to, out);
    else if (o < to) project_columns<Isa, ROWS, 1, true>(x, from, columns(), to - o, sums());
}

template <class Isa>
void project_all(Rows<const float> x, size_t rows, size_t from, const float* matrix, size_t to, Rows<float> out) {
    Ahead none{reinterpret_cast<const char*>(matrix), false};
    for_rows<Isa>(rows, none, [&](size_t r, auto rows_at_once, Ahead&) {
        constexpr size_t ROWS = decltype(rows_at_once)::value;
        project_rows<Isa, ROWS, SPAN<Isa, ROWS>>({x[r], x.stride}, from, {matrix, to}, 0, to, {out[r], out.stride});
    });
}

inline float largest_score(const float* bounds, const float* q, size_t rows, size_t dim) {
    float largest = -__builtin_inff();
    for (size_t r = 0; r < rows; r++) {
        constexpr size_t SUMS = 16;  // in an order that does not depend on the instruction set
        float sums[SUMS] = {};
        size_t d = 0;
        for (; d + SUMS <= dim; d += SUMS)
            for (size_t i = 0; i < SUMS; i++) {
                const float x = q[r * dim + d + i];
                sums[i] += std::max(x * bounds[d + i], x * bounds[dim + d + i]);
            }
        for (; d < dim; d++) sums[0] += std::max(q[r * dim + d] * bounds[d], q[r * dim + d] * bounds[dim + d]);
        float sum = 0.0f;
        for (float part : sums) sum += part;
        largest = std::max(largest, sum);
    }
    return largest;
}

template <class Isa>
constexpr AttentionKernels attention_kernels_of() {
    return {rotate_head,  store<Isa>,       fold<Isa>,        weigh_tokens<Isa>,  score_tokens<Isa>,
            softmax<Isa>, decode_page<Isa>, encode_page<Isa>, load_numbers<Isa>, largest_score,
            project_all<Isa>};
}

}  // namespace
}  // namespace tightfit
