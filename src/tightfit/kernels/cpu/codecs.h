// Codes of pages, and the numbers that they stand for: see Codec (pages.h). Templated over the instruction set; sums are in
// one order, so that what is stored is the same on each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <numeric>
#include <vector>

#include "attention_tasks.h"
#include "numbers.h"

namespace tightfit {
namespace {

constexpr size_t NUMBERS_AT_ONCE = 2048;  // of those beside the codes of a page; a token has no more

// ---- codes that are centroids ----

inline unsigned code_at(const uint8_t* codes, size_t i, size_t bits) {
    return codes[i * bits / 8] >> (i * bits % 8) & ((1u << bits) - 1);
}

inline void put_code(uint8_t* codes, size_t i, size_t bits, unsigned code) {  // codes are zeros before
    codes[i * bits / 8] |= static_cast<uint8_t>(code << (i * bits % 8));
}

// Calls work with the number of channels that share a code as a constant.
template <class Work>
inline void for_coupled(const Codec& codec, Work work) {
    switch (codec.coupled) {
        case 1: return work(std::integral_constant<size_t, 1>());
        case 2: return work(std::integral_constant<size_t, 2>());
        case 4: return work(std::integral_constant<size_t, 4>());
        default: return work(std::integral_constant<size_t, 8>());
    }
}

// The centroids (dim / coupled, 2**bits, coupled) that codes name, group by group: those of one are few enough for the
// nearest cache.
inline void decode_coupled(const Codec& codec, const uint8_t* page, const float* centroids, float* out) {
    const size_t row_bytes = codec.row_bytes(), groups = codec.codes();
    for_coupled(codec, [&](auto constant) {
        constexpr size_t COUPLED = decltype(constant)::value;
        for (size_t g = 0; g < groups; g++, centroids += COUPLED << codec.bits)
            for (size_t t = 0; t < PAGE; t++) {
                const uint8_t* codes = page + t * row_bytes;
                const size_t code = codec.bits == 8 ? codes[g] : code_at(codes, g, codec.bits);
                std::memcpy(out + t * codec.dim + g * COUPLED, centroids + code * COUPLED, COUPLED * sizeof(float));
            }
    });
}

// The centroid that is nearest to `x`, of those that are as near as each other the first; `columns` (COUPLED, entries).
template <class Isa, size_t COUPLED>
inline unsigned nearest(const float* x, const float* columns, size_t entries) {
    using Floats = typename Isa::Vector;
    using Ints = decltype(Floats() < Floats());
    constexpr size_t LANES = Isa::LANES;
    Ints at{};
    for (size_t i = 0; i < LANES; i++) at[i] = static_cast<int32_t>(i);
    Ints found = at;
    Floats smallest = Isa::broadcast(__builtin_inff());
    for (size_t e = 0; e < entries; e += LANES, at += static_cast<int32_t>(LANES)) {
        Floats distance = Isa::zero();
        for (size_t i = 0; i < COUPLED; i++) {
            const Floats apart = Isa::broadcast(x[i]) - Isa::load(columns + i * entries + e);
            distance += apart * apart;
        }
        const Ints nearer = distance < smallest;
        smallest = nearer ? distance : smallest;
        found = nearer ? at : found;
    }
    size_t best = 0;
    for (size_t i = 1; i < LANES; i++)
        if (smallest[i] < smallest[best] || (smallest[i] == smallest[best] && found[i] < found[best])) best = i;
    return static_cast<unsigned>(found[best]);
}

template <class Isa>
void encode_coupled(const Codec& codec, const float* numbers, const float* centroids, uint8_t* page) {
    const size_t entries = size_t(1) << codec.bits, padded = round_up(entries, Isa::LANES);
    std::fill(page, page + codec.page_bytes(), uint8_t(0));
    for_coupled(codec, [&](auto constant) {
        constexpr size_t COUPLED = decltype(constant)::value;
        float columns[COUPLED * 256];
        std::fill(std::begin(columns), std::end(columns), __builtin_inff());  // nothing is near those that are not there
        for (size_t g = 0; g < codec.codes(); g++, centroids += COUPLED * entries) {
            for (size_t e = 0; e < entries; e++)
                for (size_t i = 0; i < COUPLED; i++) columns[i * padded + e] = centroids[e * COUPLED + i];
            for (size_t t = 0; t < PAGE; t++)
                put_code(page + t * codec.row_bytes(), g, codec.bits,
                         nearest<Isa, COUPLED>(numbers + t * codec.dim + g * COUPLED, columns, padded));
        }
    });
}

// ---- codes that are whole numbers ----

// out = the lower BITS of each of `count` bytes and those above, in turn: a loop that compilers vectorise.
template <size_t BITS>
inline void halve(const uint8_t* bytes, size_t count, uint8_t* out) {
    for (size_t i = 0; i < count; i++) {
        out[2 * i] = bytes[i] & ((1 << BITS) - 1);
        out[2 * i + 1] = static_cast<uint8_t>(bytes[i] >> BITS);
    }
}

constexpr size_t UNPACKED_AT_ONCE = 256;

template <class Isa, size_t BITS>
[[gnu::always_inline]] inline void unpack_some(const uint8_t* codes, size_t count, float* out) {
    const size_t bytes = (count * BITS + 7) / 8;
    uint8_t halves[UNPACKED_AT_ONCE], quarters[UNPACKED_AT_ONCE];
    const uint8_t* from = codes;
    if constexpr (BITS < 8) halve<4>(codes, bytes, halves), from = halves;
    if constexpr (BITS < 4) halve<2>(halves, 2 * bytes, quarters), from = quarters;
    size_t i = 0;
    for (; i + Isa::LANES <= count; i += Isa::LANES) Isa::store(out + i, Isa::inputs(from + i, 0.0f));
    for (; i < count; i++) out[i] = static_cast<float>(from[i]);
}

// `count` codes, one behind the other, as floats.
template <class Isa, size_t BITS>
void unpack(const uint8_t* codes, size_t count, float* out) {
    constexpr size_t MOST = UNPACKED_AT_ONCE;
    for (; count >= MOST; count -= MOST, codes += MOST * BITS / 8, out += MOST) unpack_some<Isa, BITS>(codes, MOST, out);
    unpack_some<Isa, BITS>(codes, count, out);
}

template <class Isa>
void unpack(const Codec& codec, const uint8_t* codes, size_t count, float* out) {
    if (codec.bits == 8) unpack<Isa, 8>(codes, count, out);
    else if (codec.bits == 4) unpack<Isa, 4>(codes, count, out);
    else unpack<Isa, 2>(codes, count, out);
}

// The numbers of one token of a page.
template <class Isa>
void decode_row(const Codec& codec, Kind kind, const uint8_t* page, size_t t, float* out) {
    const uint8_t* codes = page + t * codec.row_bytes();
    if (codec.dense()) return load_numbers<Isa>(codes, kind, codec.dim, out);
    unpack<Isa>(codec, codes, codec.dim, out);
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

// Turns the codes of a page in `out` into what they stand for.
template <class Isa>
void scale_codes(const Codec& codec, const uint8_t* page, float* out) {
    const size_t dim = codec.dim, groups = codec.groups();
    float scales[NUMBERS_AT_ONCE], minima[NUMBERS_AT_ONCE];
    const auto load = [&](size_t first, size_t count) {
        load_numbers<Isa>(codec.scales_of(page) + first, count, scales);
        load_numbers<Isa>(codec.minima_of(page) + first, count, minima);
    };
    if (codec.per_channel) {
        for (size_t d = 0; d < dim; d += NUMBERS_AT_ONCE) {
            const size_t count = std::min(dim - d, NUMBERS_AT_ONCE);
            load(d, count);
            for (size_t t = 0; t < PAGE; t++)
                for (size_t i = 0; i < count; i++) out[t * dim + d + i] = out[t * dim + d + i] * scales[i] + minima[i];
        }
        return;
    }
    const size_t tokens = NUMBERS_AT_ONCE / groups;
    for (size_t t = 0; t < PAGE; t++) {
        const size_t first = t % tokens * groups;
        if (first == 0) load(t * groups, std::min(tokens, PAGE - t) * groups);
        for (size_t g = 0; g < groups; g++) {
            const float scale = scales[first + g], minimum = minima[first + g];
            float* row = out + t * dim + g * codec.group;
            for (size_t i = 0; i < std::min(codec.group, dim - g * codec.group); i++) row[i] = row[i] * scale + minimum;
        }
    }
}

template <class Isa>
void unpack_page(const Codec& codec, const uint8_t* page, float* out) {
    const size_t dim = codec.dim, row_bytes = codec.row_bytes();
    if (dim * codec.bits % 8 == 0) unpack<Isa>(codec, page, PAGE * dim, out);  // no row ends within a byte
    else for (size_t t = 0; t < PAGE; t++) unpack<Isa>(codec, page + t * row_bytes, dim, out + t * dim);
    scale_codes<Isa>(codec, page, out);
}

// What a page has beside codes, scales and minima.
template <class Isa>
void add_side(const Codec& codec, Kind kind, const uint8_t* page, const float* side, float* out) {
    const size_t dim = codec.dim, rank = codec.rank;
    const float* directions = side + (codec.affine ? 2 * dim : 0);
    float numbers[NUMBERS_AT_ONCE];
    for (size_t t = 0; rank && t < PAGE; t++) {
        const size_t tokens = NUMBERS_AT_ONCE / rank, first = t % tokens * rank;
        if (first == 0) load_numbers<Isa>(codec.parts_of(page) + t * rank * sizeof(F16), Kind::f16,
                                          std::min(tokens, PAGE - t) * rank, numbers);
        for (size_t r = 0; r < rank; r++)
            for (size_t d = 0; d < dim; d++) out[t * dim + d] += numbers[first + r] * directions[r * dim + d];
    }
    for (size_t t = 0; codec.affine && t < PAGE; t++)
        for (size_t d = 0; d < dim; d++) out[t * dim + d] = out[t * dim + d] * side[dim + d] + side[d];
    const uint8_t* places = codec.outliers_of(page);
    const uint8_t* outliers = places + codec.outliers * sizeof(uint16_t);
    for (size_t first = 0; first < codec.outliers; first += NUMBERS_AT_ONCE) {
        const size_t count = std::min(codec.outliers - first, NUMBERS_AT_ONCE);
        load_numbers<Isa>(outliers + first * codec.wide, kind, count, numbers);
        for (size_t i = 0; i < count; i++) {
            uint16_t place;
            std::memcpy(&place, places + (first + i) * sizeof place, sizeof place);
            out[place] = numbers[i];
        }
    }
}

template <class Isa>
void decode_page(const Codec& codec, Kind kind, const uint8_t* page, const float* side, float* out) {
    if (codec.coupled) return decode_coupled(codec, page, side, out);
    if (codec.dense()) return load_numbers<Isa>(page, kind, PAGE * codec.dim, out);
    unpack_page<Isa>(codec, page, out);
    if (!codec.plain()) add_side<Isa>(codec, kind, page, side, out);
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

// The codes, scales and minima of a page.
template <class Isa>
void encode_codes(const Codec& codec, const float* x, uint8_t* page) {
    const size_t dim = codec.dim, bits = codec.bits, groups = codec.groups(), count = codec.scales();
    const float most = static_cast<float>((1 << bits) - 1);
    std::vector<float> low(x, x + count), high(x, x + count);
    const auto size = [&](size_t g) { return std::min(codec.group, dim - g * codec.group); };
    for (size_t t = 0; t < PAGE; t++, x += dim) {
        for (size_t d = 0; codec.per_channel && d < dim; d++)
            low[d] = std::min(low[d], x[d]), high[d] = std::max(high[d], x[d]);
        for (size_t g = 0; !codec.per_channel && g < groups; g++) {
            const float* group = x + g * codec.group;
            low[t * groups + g] = *std::min_element(group, group + size(g));
            high[t * groups + g] = *std::max_element(group, group + size(g));
        }
    }
    x -= PAGE * dim;
    round_scales<Isa>(low.data(), high.data(), count, most, const_cast<F16*>(codec.scales_of(page)),
                      const_cast<F16*>(codec.minima_of(page)));
    std::vector<uint8_t> codes(dim + 4);
    for (size_t t = 0; t < PAGE; t++, x += dim, page += codec.row_bytes()) {
        if (codec.per_channel) find_codes<true>(x, high.data(), low.data(), dim, most, codes.data());
        for (size_t g = 0; !codec.per_channel && g < groups; g++)
            find_codes<false>(x + g * codec.group, &high[t * groups + g], &low[t * groups + g], size(g), most,
                              codes.data() + g * codec.group);
        if (bits == 8) pack_codes<8>(codes.data(), dim, page);
        else if (bits == 4) pack_codes<4>(codes.data(), dim, page);
        else pack_codes<2>(codes.data(), dim, page);
    }
}

// The lower median.
inline float median(std::vector<float>& of) {
    const auto middle = of.begin() + static_cast<std::ptrdiff_t>((of.size() - 1) / 2);
    std::nth_element(of.begin(), middle, of.end());
    return *middle;
}

// Finds the numbers that lie furthest from the median of their channel or token, and puts that in their place.
inline std::vector<uint16_t> take_outliers(const Codec& codec, std::vector<float>& x) {
    const size_t dim = codec.dim, lines = codec.per_channel ? dim : PAGE, length = codec.per_channel ? PAGE : dim;
    std::vector<float> medians(lines), line(length), distances(PAGE * dim);
    const auto line_of = [&](size_t i) { return codec.per_channel ? i % dim : i / dim; };
    for (size_t j = 0; j < lines; j++) {
        for (size_t i = 0; i < length; i++) line[i] = codec.per_channel ? x[i * dim + j] : x[j * dim + i];
        medians[j] = median(line);
    }
    for (size_t i = 0; i < x.size(); i++) distances[i] = std::abs(x[i] - medians[line_of(i)]);
    std::vector<uint16_t> places(x.size());
    std::iota(places.begin(), places.end(), uint16_t(0));
    const auto end = places.begin() + static_cast<std::ptrdiff_t>(codec.outliers);
    std::partial_sort(places.begin(), end, places.end(), [&](uint16_t a, uint16_t b) {
        return distances[a] != distances[b] ? distances[a] > distances[b] : a < b;
    });
    places.resize(codec.outliers);
    for (const uint16_t place : places) x[place] = medians[line_of(place)];
    return places;
}

// A page that has more than codes, scales and minima.
template <class Isa>
void encode_side(const Codec& codec, Kind kind, const float* numbers, const float* side, uint8_t* page) {
    const size_t dim = codec.dim, rank = codec.rank;
    std::fill(page, page + codec.page_bytes(), uint8_t(0));
    std::vector<float> x(numbers, numbers + PAGE * dim);
    for (size_t t = 0; codec.affine && t < PAGE; t++)
        for (size_t d = 0; d < dim; d++) x[t * dim + d] = (x[t * dim + d] - side[d]) / side[dim + d];
    std::vector<uint16_t> places;
    if (codec.outliers) {
        places = take_outliers(codec, x);
        std::vector<float> values;
        for (const uint16_t place : places) values.push_back(numbers[place]);
        uint8_t* out = const_cast<uint8_t*>(codec.outliers_of(page));
        std::memcpy(out, places.data(), 2 * places.size());
        store<Isa>(values.data(), values.size(), kind, out + 2 * places.size());
    }
    encode_codes<Isa>(codec, x.data(), page);
    if (rank == 0) return;
    std::vector<float> found(PAGE * dim), parts(PAGE * rank);
    unpack_page<Isa>(codec, page, found.data());
    for (size_t i = 0; i < x.size(); i++) x[i] -= found[i];
    for (const uint16_t place : places) x[place] = 0.0f;
    const float* directions = side + (codec.affine ? 2 * dim : 0);
    for (size_t t = 0; t < PAGE; t++)
        for (size_t r = 0; r < rank; r++)
            for (size_t d = 0; d < dim; d++) parts[t * rank + r] += x[t * dim + d] * directions[r * dim + d];
    store<Isa>(parts.data(), parts.size(), Kind::f16, const_cast<uint8_t*>(codec.parts_of(page)));
}

template <class Isa>
void encode_page(const Codec& codec, Kind kind, const float* numbers, const float* side, uint8_t* page) {
    if (codec.coupled) return encode_coupled<Isa>(codec, numbers, side, page);
    if (codec.dense()) return store<Isa>(numbers, PAGE * codec.dim, kind, page);
    if (codec.plain()) return encode_codes<Isa>(codec, numbers, page);
    encode_side<Isa>(codec, kind, numbers, side, page);
}

}  // namespace
}  // namespace tightfit
