// Codes of pages that are more than a number's own scale and minimum: see Codec (pages.h). Templated over the instruction
// set, for the compiler to use; sums are in one order, so that what is stored is the same on each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "attention_tasks.h"

namespace tightfit {
namespace {

inline unsigned code_at(const uint8_t* codes, size_t i, size_t bits) {
    return codes[i * bits / 8] >> (i * bits % 8) & ((1u << bits) - 1);
}

inline void put_code(uint8_t* codes, size_t i, size_t bits, unsigned code) {  // codes are zeros before
    codes[i * bits / 8] |= static_cast<uint8_t>(code << (i * bits % 8));
}

// The numbers of a token from the centroids (dim / coupled, 2**bits, coupled) that its codes name.
template <size_t COUPLED>
void look_up(const Codec& codec, const uint8_t* codes, const float* centroids, float* out) {
    const size_t entries = size_t(1) << codec.bits;
    for (size_t g = 0; g < codec.codes(); g++) {
        const size_t code = codec.bits == 8 ? codes[g] : code_at(codes, g, codec.bits);
        std::memcpy(out + g * COUPLED, centroids + (g * entries + code) * COUPLED, COUPLED * sizeof(float));
    }
}

inline void decode_coupled(const Codec& codec, const uint8_t* page, const float* centroids, float* out) {
    for (size_t t = 0; t < PAGE; t++, page += codec.row_bytes(), out += codec.dim) switch (codec.coupled) {
            case 1: look_up<1>(codec, page, centroids, out); break;
            case 2: look_up<2>(codec, page, centroids, out); break;
            case 4: look_up<4>(codec, page, centroids, out); break;
            default: look_up<8>(codec, page, centroids, out);
        }
}

// The nearest centroids, of those that are as near as each other the first.
inline void encode_coupled(const Codec& codec, const float* numbers, const float* centroids, uint8_t* page) {
    const size_t entries = size_t(1) << codec.bits, coupled = codec.coupled;
    std::fill(page, page + codec.page_bytes(), uint8_t(0));
    std::vector<float> columns(coupled * entries), distances(entries);
    for (size_t g = 0; g < codec.codes(); g++) {
        const float* of_group = centroids + g * entries * coupled;
        for (size_t e = 0; e < entries; e++)
            for (size_t i = 0; i < coupled; i++) columns[i * entries + e] = of_group[e * coupled + i];
        for (size_t t = 0; t < PAGE; t++) {
            const float* x = numbers + t * codec.dim + g * coupled;
            std::fill(distances.begin(), distances.end(), 0.0f);
            for (size_t i = 0; i < coupled; i++)
                for (size_t e = 0; e < entries; e++) {
                    const float apart = x[i] - columns[i * entries + e];
                    distances[e] += apart * apart;
                }
            const auto nearest = std::min_element(distances.begin(), distances.end()) - distances.begin();
            put_code(page + t * codec.row_bytes(), g, codec.bits, static_cast<unsigned>(nearest));
        }
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

// `load` and `store` are those of numbers of a kind.
template <class Load>
void decode_side(const Codec& codec, Kind kind, const uint8_t* page, const float* side, float* out, Load load) {
    const size_t dim = codec.dim, rank = codec.rank, groups = codec.groups();
    std::vector<float> scales(codec.scales()), minima(codec.scales()), parts(PAGE * rank);
    load(reinterpret_cast<const uint8_t*>(codec.scales_of(page)), Kind::f16, scales.size(), scales.data());
    load(reinterpret_cast<const uint8_t*>(codec.minima_of(page)), Kind::f16, minima.size(), minima.data());
    load(codec.parts_of(page), Kind::f16, parts.size(), parts.data());
    const float* directions = side + (codec.affine ? 2 * dim : 0);
    for (size_t t = 0; t < PAGE; t++) {
        const uint8_t* codes = page + t * codec.row_bytes();
        float* row = out + t * dim;
        for (size_t d = 0; d < dim; d++) row[d] = static_cast<float>(code_at(codes, d, codec.bits));
        if (codec.per_channel) {
            for (size_t d = 0; d < dim; d++) row[d] = row[d] * scales[d] + minima[d];
        } else {
            for (size_t g = 0; g < groups; g++) {
                const float scale = scales[t * groups + g], minimum = minima[t * groups + g];
                for (size_t d = g * codec.group; d < std::min(dim, (g + 1) * codec.group); d++)
                    row[d] = row[d] * scale + minimum;
            }
        }
        for (size_t r = 0; r < rank; r++)
            for (size_t d = 0; d < dim; d++) row[d] += parts[t * rank + r] * directions[r * dim + d];
        if (codec.affine)
            for (size_t d = 0; d < dim; d++) row[d] = row[d] * side[dim + d] + side[d];
    }
    if (codec.outliers == 0) return;
    std::vector<uint16_t> places(codec.outliers);
    std::vector<float> values(codec.outliers);
    std::memcpy(places.data(), codec.outliers_of(page), 2 * codec.outliers);
    load(codec.outliers_of(page) + 2 * codec.outliers, kind, codec.outliers, values.data());
    for (size_t i = 0; i < codec.outliers; i++) out[places[i]] = values[i];
}

template <class Load, class Store>
void encode_side(const Codec& codec, Kind kind, const float* numbers, const float* side, uint8_t* page, Load load,
                 Store store) {
    const size_t dim = codec.dim, rank = codec.rank, groups = codec.groups();
    std::fill(page, page + codec.page_bytes(), uint8_t(0));
    std::vector<float> x(numbers, numbers + PAGE * dim);
    if (codec.affine)
        for (size_t t = 0; t < PAGE; t++)
            for (size_t d = 0; d < dim; d++) x[t * dim + d] = (x[t * dim + d] - side[d]) / side[dim + d];
    std::vector<uint16_t> places;
    if (codec.outliers) {
        places = take_outliers(codec, x);
        std::vector<float> values;
        for (const uint16_t place : places) values.push_back(numbers[place]);
        uint8_t* out = const_cast<uint8_t*>(codec.outliers_of(page));
        std::memcpy(out, places.data(), 2 * places.size());
        store(values.data(), values.size(), kind, out + 2 * places.size());
    }
    const auto scale_of = [&](size_t t, size_t d) { return codec.per_channel ? d : t * groups + d / codec.group; };
    constexpr float MOST = 3.4e38f;
    std::vector<float> low(codec.scales(), MOST), high(codec.scales(), -MOST);
    for (size_t t = 0; t < PAGE; t++)
        for (size_t d = 0; d < dim; d++) {
            const size_t at = scale_of(t, d);
            low[at] = std::min(low[at], x[t * dim + d]), high[at] = std::max(high[at], x[t * dim + d]);
        }
    const float most = static_cast<float>((1 << codec.bits) - 1);
    for (size_t i = 0; i < low.size(); i++) high[i] = (high[i] - low[i]) / most;
    const auto round_to = [&](std::vector<float>& of, const void* at) {  // and as that reads back
        uint8_t* out = static_cast<uint8_t*>(const_cast<void*>(at));
        store(of.data(), of.size(), Kind::f16, out);
        load(out, Kind::f16, of.size(), of.data());
    };
    round_to(high, codec.scales_of(page));
    round_to(low, codec.minima_of(page));
    for (size_t t = 0; t < PAGE; t++)
        for (size_t d = 0; d < dim; d++) {
            const size_t at = scale_of(t, d);
            float& number = x[t * dim + d];
            const float code = std::nearbyint((number - low[at]) / high[at]);
            const float positive = high[at] > 0.0f && code > 0.0f ? code : 0.0f, within = positive < most ? positive : most;
            put_code(page + t * codec.row_bytes(), d, codec.bits, static_cast<unsigned>(within));
            number -= within * high[at] + low[at];  // what the code misses
        }
    if (rank == 0) return;
    for (const uint16_t place : places) x[place] = 0.0f;
    const float* directions = side + (codec.affine ? 2 * dim : 0);
    std::vector<float> parts(PAGE * rank);
    for (size_t t = 0; t < PAGE; t++)
        for (size_t r = 0; r < rank; r++)
            for (size_t d = 0; d < dim; d++) parts[t * rank + r] += x[t * dim + d] * directions[r * dim + d];
    store(parts.data(), parts.size(), Kind::f16, const_cast<uint8_t*>(codec.parts_of(page)));
}

}  // namespace
}  // namespace tightfit
