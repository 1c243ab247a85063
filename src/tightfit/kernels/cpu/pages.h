// Keys and values in pages: dense, or in codes of few bits; and what a head's list of them looks like to the kernels.
#pragma once

#include <cstring>

#include "weight.h"

namespace tightfit {

constexpr size_t PAGE = 32;         // tokens of a page
constexpr size_t CODE_GROUP = 32;   // channels of a value that share a scale
constexpr size_t SMALLEST_BITS = 2;

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// How the numbers of a coded page are stored: codes of `bits` bits, the first in the lowest, or with 16 bits and more as
// they are, of the cache's kind. A number is code * scale + minimum, both in float16.
//
// A page is 32 rows of codes, one for each token, then its scales, then its minima: of keys one for each channel, of values
// one for each token and group of 32 channels, token by token.
struct Codec {
    size_t bits = 16, dim = 0;
    bool per_channel = false;

    bool dense() const { return bits >= 16; }
    size_t row_bytes() const { return dense() ? dim * bits / 8 : (dim * bits + 7) / 8; }
    size_t groups() const { return (dim + CODE_GROUP - 1) / CODE_GROUP; }
    size_t scales() const { return dense() ? 0 : per_channel ? dim : PAGE * groups(); }
    size_t page_bytes() const { return round_up(PAGE * row_bytes() + 2 * scales() * sizeof(F16), 64); }
    const F16* scales_of(const uint8_t* page) const { return reinterpret_cast<const F16*>(page + PAGE * row_bytes()); }
    const F16* minima_of(const uint8_t* page) const { return scales_of(page) + scales(); }
};

// Keys and values of one sequence and key-value head that are stored alike. Token i lies in slot i % slots, or with a
// `table` in page table[i / PAGE]; `chosen` pages of it take part, if it is not null. From token `committed` on, `path`
// names the tokens, counted from there.
struct HeadCache {
    Kind kind;
    const uint8_t *keys, *values;
    size_t slots, key_dim, value_dim, value_stride;
    const int32_t* table = nullptr;
    const int32_t* chosen = nullptr;
    const int32_t* path = nullptr;
    size_t committed = 0;
    bool coded = false;  // whether the pages are, by these codecs
    Codec key_codec{}, value_codec{};
    int file = -1;  // where the pages are on the disk: at keys_at and values_at the first, one behind the other
    size_t keys_at = 0, values_at = 0;

    bool loaded() const { return !coded && file < 0; }

    size_t listed(size_t j) const { return chosen ? static_cast<size_t>(chosen[j]) : j; }
    size_t page(size_t j) const { return static_cast<size_t>(table[listed(j)]); }
    size_t slot(size_t i) const {
        if (path && i >= committed) i = committed + static_cast<size_t>(path[i - committed]);
        return table ? page(i / PAGE) * PAGE + i % PAGE : i % slots;
    }
    // How many of `most` tokens from i on lie one behind the other.
    size_t run(size_t i, size_t most) const {
        const size_t first = slot(i);
        if (!table && !path) return most < slots - first ? most : slots - first;
        size_t count = 1;
        while (count < most && slot(i + count) == first + count) count++;
        return count;
    }
    bool shared() const { return values == keys; }
};

}  // namespace tightfit
