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

template <class Isa, class T>
void load_numbers(const T* from, size_t count, float* out) {
    size_t i = 0;
    for (; i + Isa::LANES <= count; i += Isa::LANES) Isa::store(out + i, Isa::load(from + i));
    if (i < count) Isa::store_part(out + i, Isa::load_part(from + i, count - i), count - i);
}

template <class Isa>
void load_numbers(const uint8_t* from, Kind kind, size_t count, float* out) {
    switch (kind) {
        case Kind::f16: return load_numbers<Isa>(reinterpret_cast<const F16*>(from), count, out);
        case Kind::bf16: return load_numbers<Isa>(reinterpret_cast<const BF16*>(from), count, out);
        default: return load_numbers<Isa>(reinterpret_cast<const float*>(from), count, out);
    }
}

// out = the lower BITS of each of `count` bytes and those above, in turn: a loop that compilers vectorise.
template <size_t BITS>
inline void halve(const uint8_t* bytes, size_t count, uint8_t* out) {
    for (size_t i = 0; i < count; i++) {
        out[2 * i] = bytes[i] & ((1 << BITS) - 1);
        out[2 * i + 1] = static_cast<uint8_t>(bytes[i] >> BITS);
    }
}

// The codes of `count` numbers, a row of a page, as floats.
template <class Isa, size_t BITS>
void unpack(const uint8_t* codes, size_t count, float* out) {
    constexpr size_t AT_ONCE = 64;
    for (size_t at = 0; at < count; at += AT_ONCE, codes += AT_ONCE * BITS / 8) {
        const size_t now = std::min(count - at, AT_ONCE), bytes = (now * BITS + 7) / 8;
        uint8_t halves[AT_ONCE], quarters[AT_ONCE];
        const uint8_t* from = codes;
        if constexpr (BITS < 8) halve<4>(codes, bytes, halves), from = halves;
        if constexpr (BITS < 4) halve<2>(halves, 2 * bytes, quarters), from = quarters;
        size_t i = 0;
        for (; i + Isa::LANES <= now; i += Isa::LANES) Isa::store(out + at + i, Isa::inputs(from + i, 0.0f));
        for (; i < now; i++) out[at + i] = static_cast<float>(from[i]);
    }
}

template <class Isa>
void unpack_row(const Codec& codec, const uint8_t* codes, float* out) {
    if (codec.bits == 8) unpack<Isa, 8>(codes, codec.dim, out);
    else if (codec.bits == 4) unpack<Isa, 4>(codes, codec.dim, out);
    else unpack<Isa, 2>(codes, codec.dim, out);
}

// The numbers of one token of a page.
template <class Isa>
void decode_row(const Codec& codec, Kind kind, const uint8_t* page, size_t t, float* out) {
    const uint8_t* codes = page + t * codec.row_bytes();
    if (codec.dense()) return load_numbers<Isa>(codes, kind, codec.dim, out);
    unpack_row<Isa>(codec, codes, out);
    const size_t each = codec.per_channel ? 1 : CODE_GROUP;  // numbers that share a scale
    const size_t scales = codec.per_channel ? codec.dim : codec.groups(), first = codec.per_channel ? 0 : t * scales;
    constexpr size_t AT_ONCE = 64;
    float scale[AT_ONCE], minimum[AT_ONCE];
    for (size_t s = 0; s < scales; s += AT_ONCE) {
        const size_t count = std::min(scales - s, AT_ONCE);
        load_numbers<Isa>(codec.scales_of(page) + first + s, count, scale);
        load_numbers<Isa>(codec.minima_of(page) + first + s, count, minimum);
        float* row = out + s * each;
        for (size_t i = 0; i < std::min(count * each, codec.dim - s * each); i++)
            row[i] = row[i] * scale[i / each] + minimum[i / each];
    }
}

template <class Isa>
void decode_page(const Codec& codec, Kind kind, const uint8_t* page, const float* side, float* out) {
    const size_t dim = codec.dim, row_bytes = codec.row_bytes();
    if (codec.coupled) return decode_coupled(codec, page, side, out);
    if (!codec.plain())
        return decode_side(codec, kind, page, side, out, [](const uint8_t* from, Kind of, size_t count, float* to) {
            load_numbers<Isa>(from, of, count, to);
        });
    if (codec.dense()) return load_numbers<Isa>(page, kind, PAGE * dim, out);
    float scales[1024], minima[1024];  // of some rows
    for (size_t t = 0; t < PAGE; t++) {
        unpack_row<Isa>(codec, page + t * row_bytes, out + t * dim);
    }
    if (codec.per_channel) {
        for (size_t d = 0; d < dim; d += std::size(scales)) {
            const size_t count = std::min(dim - d, std::size(scales));
            load_numbers<Isa>(codec.scales_of(page) + d, count, scales);
            load_numbers<Isa>(codec.minima_of(page) + d, count, minima);
            for (size_t t = 0; t < PAGE; t++)
                for (size_t i = 0; i < count; i++) out[t * dim + d + i] = out[t * dim + d + i] * scales[i] + minima[i];
        }
        return;
    }
    const size_t groups = codec.groups();
    for (size_t t = 0; t < PAGE; t++) {
        load_numbers<Isa>(codec.scales_of(page) + t * groups, groups, scales);
        load_numbers<Isa>(codec.minima_of(page) + t * groups, groups, minima);
        for (size_t g = 0; g < groups; g++) {
            const float scale = scales[g], minimum = minima[g];
            float* row = out + t * dim + g * CODE_GROUP;
            for (size_t i = 0; i < std::min(CODE_GROUP, dim - g * CODE_GROUP); i++) row[i] = row[i] * scale + minimum;
        }
    }
}

// Codes of `count` numbers: the nearest whole ones to (number - minimum) / scale, or 0 where that is no number.
template <bool EACH>
inline void find_codes(const float* numbers, const float* scales, const float* minima, size_t count, float most,
                       uint8_t* codes) {
    for (size_t i = 0; i < count; i++) {
        const float scale = scales[EACH ? i : 0], code = std::nearbyint((numbers[i] - minima[EACH ? i : 0]) / scale);
        const float positive = scale > 0.0f && code > 0.0f ? code : 0.0f;
        codes[i] = static_cast<uint8_t>(positive < most ? positive : most);
    }
}

template <size_t BITS>
inline void pack_codes(const uint8_t* codes, size_t count, uint8_t* out) {
    constexpr size_t PER_BYTE = 8 / BITS;
    for (size_t byte = 0; byte < (count + PER_BYTE - 1) / PER_BYTE; byte++) {
        unsigned packed = 0;
        for (size_t i = 0; i < PER_BYTE; i++) packed |= static_cast<unsigned>(codes[byte * PER_BYTE + i]) << (i * BITS);
        out[byte] = static_cast<uint8_t>(packed);
    }
}

// Scales and minima from the lowest and the highest numbers, in float16, and as these read back.
template <class Isa>
inline void round_scales(float* low, float* high, size_t count, float most, F16* scales, F16* minima) {
    for (size_t i = 0; i < count; i++) high[i] = (high[i] - low[i]) / most;
    store_row<Isa>(high, count, scales);
    store_row<Isa>(low, count, minima);
    load_numbers<Isa>(scales, count, high);
    load_numbers<Isa>(minima, count, low);
}

template <class Isa>
void encode_page(const Codec& codec, Kind kind, const float* numbers, const float* side, uint8_t* page) {
    constexpr size_t AT_ONCE = 256;  // channels, a multiple of what shares a byte and of a group
    const size_t dim = codec.dim, row_bytes = codec.row_bytes(), bits = codec.bits, groups = codec.groups();
    if (codec.coupled) return encode_coupled(codec, numbers, side, page);
    if (!codec.plain())
        return encode_side(
            codec, kind, numbers, side, page,
            [](const uint8_t* from, Kind of, size_t count, float* to) { load_numbers<Isa>(from, of, count, to); },
            store<Isa>);
    if (codec.dense()) return store<Isa>(numbers, PAGE * dim, kind, page);
    const float most = static_cast<float>((1 << bits) - 1);
    F16* scales = const_cast<F16*>(codec.scales_of(page));
    F16* minima = const_cast<F16*>(codec.minima_of(page));
    float low[AT_ONCE], high[AT_ONCE];
    uint8_t codes[AT_ONCE + 4];
    for (size_t first = 0; first < dim; first += AT_ONCE) {
        const size_t count = std::min(AT_ONCE, dim - first), of_row = (count + CODE_GROUP - 1) / CODE_GROUP;
        if (codec.per_channel) {
            std::copy(numbers + first, numbers + first + count, low);
            std::copy(low, low + count, high);
            for (size_t t = 1; t < PAGE; t++)
                for (size_t i = 0; i < count; i++) {
                    low[i] = std::min(low[i], numbers[t * dim + first + i]);
                    high[i] = std::max(high[i], numbers[t * dim + first + i]);
                }
            round_scales<Isa>(low, high, count, most, scales + first, minima + first);
        }
        for (size_t t = 0; t < PAGE; t++) {
            const float* row = numbers + t * dim + first;
            if (codec.per_channel) {
                find_codes<true>(row, high, low, count, most, codes);
            } else {
                for (size_t g = 0; g < of_row; g++) {
                    const float* group = row + g * CODE_GROUP;
                    const size_t size = std::min(CODE_GROUP, count - g * CODE_GROUP);
                    low[g] = *std::min_element(group, group + size), high[g] = *std::max_element(group, group + size);
                }
                const size_t at = t * groups + first / CODE_GROUP;
                round_scales<Isa>(low, high, of_row, most, scales + at, minima + at);
                for (size_t g = 0; g < of_row; g++)
                    find_codes<false>(row + g * CODE_GROUP, high + g, low + g, std::min(CODE_GROUP, count - g * CODE_GROUP),
                                      most, codes + g * CODE_GROUP);
            }
            std::fill(codes + count, codes + count + 4, uint8_t(0));
            uint8_t* out = page + t * row_bytes + first * bits / 8;
            if (bits == 8) pack_codes<8>(codes, count, out);
            else if (bits == 4) pack_codes<4>(codes, count, out);
            else pack_codes<2>(codes, count, out);
        }
    }
}

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
            softmax<Isa>, decode_page<Isa>, encode_page<Isa>, load_numbers<Isa>, largest_score};
}

}  // namespace
}  // namespace tightfit
