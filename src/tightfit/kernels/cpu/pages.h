// Keys and values in pages: dense, or in codes of few bits, in memory or in a file.
#pragma once

#include <cstring>

#include "attention.h"

namespace tightfit {

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

constexpr size_t PAGE = 32;         // tokens of a page
constexpr size_t CODE_GROUP = 32;   // channels of a value that share a scale

// How the numbers of a coded page are stored: codes of `bits` bits, the first in the lowest, or with 16 bits and more as
// they are, of the cache's kind. A number is code * scale + minimum, both in float16.
//
// A page is 32 rows of codes, one for each token, then its scales, then its minima: of keys one for each channel, of values
// one for each token and group of 32 channels, token by token.
//
// Other codecs store more, or something else, with a table of numbers beside the pages: see codec.py, and codecs.h.
struct Codec {
    size_t bits = 16, dim = 0;
    bool per_channel = false;
    size_t group = CODE_GROUP;
    bool affine = false;
    size_t coupled = 0, rank = 0, outliers = 0, wide = 2;

    bool dense() const { return bits >= 16; }
    // Whether a number is its code, scale and minimum, and nothing else.
    bool plain() const { return !affine && !coupled && !rank && !outliers && group == CODE_GROUP; }
    size_t codes() const { return coupled ? dim / coupled : dim; }
    size_t row_bytes() const { return (codes() * bits + 7) / 8; }
    size_t groups() const { return (dim + group - 1) / group; }
    size_t scales() const { return dense() || coupled ? 0 : per_channel ? dim : PAGE * groups(); }
    size_t side() const { return coupled ? dim << bits : (2 * affine + rank) * dim; }
    size_t page_bytes() const {
        const size_t more = PAGE * rank * sizeof(F16) + (sizeof(uint16_t) + wide) * outliers;
        return round_up(PAGE * row_bytes() + 2 * scales() * sizeof(F16) + more, 64);
    }
    const F16* scales_of(const uint8_t* page) const { return reinterpret_cast<const F16*>(page + PAGE * row_bytes()); }
    const F16* minima_of(const uint8_t* page) const { return scales_of(page) + scales(); }
    const uint8_t* parts_of(const uint8_t* page) const { return page + PAGE * row_bytes() + 2 * scales() * sizeof(F16); }
    const uint8_t* outliers_of(const uint8_t* page) const { return parts_of(page) + PAGE * rank * sizeof(F16); }
};

// Keys and values of one sequence and key-value head that are stored alike. Token i lies in slot i % slots, or with a
// `table` in page table[i / PAGE]; `chosen` pages of it take part, or `tokens`, if one is not null. From token `committed`
// on, `path` names the tokens, counted from there.
struct HeadCache {
    Kind kind;
    const uint8_t *keys, *values;
    size_t slots, key_dim, value_dim, value_stride;
    const int32_t* table = nullptr;
    const int32_t* chosen = nullptr;
    const int32_t* tokens = nullptr;
    const int32_t* path = nullptr;
    size_t committed = 0;
    bool coded = false;  // whether the pages are, by these codecs
    Codec key_codec{}, value_codec{};
    const float *key_side = nullptr, *value_side = nullptr;  // tables of these
    int file = -1;  // where the pages are on the disk: at keys_at and values_at the first, one behind the other
    size_t keys_at = 0, values_at = 0;

    bool loaded() const { return !coded && file < 0; }

    size_t listed(size_t j) const { return chosen ? static_cast<size_t>(chosen[j]) : j; }
    size_t page(size_t j) const { return static_cast<size_t>(table[listed(j)]); }
    size_t token(size_t i) const { return tokens ? static_cast<size_t>(tokens[i]) : i; }
    size_t slot(size_t i) const {
        i = token(i);
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

class Staging;

// Pages of one layer. Of each sequence and head, `lengths` tokens are certain; page j of them is table[j] of the coded
// pages for j below `coded`, of the dense ones from there on, or if j is below `cold`, in the file. What a decoding step
// adds lies behind them until it is certain too. `tokens` of each sequence were certain so far, those that are no longer
// kept included: the next one's position.
struct Pages {
    Kind kind;  // of dense pages: f32, f16 or bf16
    size_t sequences, kv_heads, key_dim, value_dim, table_pages, dense_pages, coded_pages;
    uint8_t *keys, *values;              // (sequences, dense_pages, PAGE, dim); the same where values are part of keys
    uint8_t *coded_keys, *coded_values;  // (sequences, coded_pages, page_bytes), or null
    Codec key_codec, value_codec;        // of coded pages; of those in the file too
    int32_t *table;                      // (sequences, kv_heads, table_pages), -1 where there is none
    int32_t *lengths, *coded, *cold, *bounded;  // (sequences, kv_heads)
    int32_t *dense_free, *coded_free;    // (sequences, 1 + pages): how many are free, and which
    const int32_t* tokens;               // (sequences)
    const int32_t* positions;            // (sequences, kv_heads, table_pages * PAGE), or null: that of token i is i
    const int32_t* channels;             // (sequences, kv_heads, key_codec.dim), of keys that are coded; or null: all
    uint8_t* bounds;                     // (sequences, bound_heads, table_pages, bound_parts, 2, key_dim) like dense pages,
    size_t bound_heads, bound_parts;     // of each of so many parts of a page; or null
    const int32_t* bound_at;             // (kv_heads): where a head's bounds are, -1: nowhere; or null: each its own
    int file = -1;
    size_t keys_at = 0, values_at = 0;   // in it
    const float *key_side, *value_side;  // tables of codecs (kv_heads, side)
    size_t key_tables, value_tables;     // how many of these: one for each sequence, or one
    size_t first_head = 0, all_heads = 0;  // these heads are some of a layer's
    // Pages of the file that are in memory, as they are in the file: page j of a head in place staged[at * staged_stride + j]
    // of both lists. Null: they are read as they are multiplied.
    const int32_t* staged = nullptr;
    size_t staged_stride = 0;
    const uint8_t *staged_keys = nullptr, *staged_values = nullptr;
    Staging* staging = nullptr;   // brings them there, if it is not null
    const Pages* next = nullptr;  // the layer that is looked at after this one

    bool shared() const { return values == keys; }
    bool has_codes() const { return coded_keys != nullptr; }
    size_t at(size_t sequence, size_t head) const { return sequence * all_heads + first_head + head; }
    size_t capacity() const { return table_pages * PAGE; }
    // One head alone, without staging.
    Pages of_head(size_t head) const {
        Pages one = *this;
        one.kv_heads = 1, one.first_head = first_head + head, one.staging = nullptr;
        return one;
    }
};

// Keys and values (kv_heads, slots, dim) of one sequence behind its certain tokens, `count` of them, in the type of dense
// pages. `values` may be `keys`.
struct Run {
    const uint8_t *keys, *values;
    size_t slots, count;
};

// How rows look at pages. The first `anchors` tokens are always seen, by `anchor_q` if that is not null: queries turned to
// the places that they have in the cache. Of `chosen` (rows, kv_heads, listed), in order and then -1, each row sees only
// those: pages of the ones that have bounds, or with `since` (rows, kv_heads), tokens of the certain ones before that. With
// `certain`, rows see nothing that is not: neither what decodes, their own token included, nor the run.
struct Looking {
    Block<const float> q, anchor_q;
    size_t anchors = 0;
    const int32_t* chosen = nullptr;
    size_t listed = 0;
    const int32_t* since = nullptr;
    bool certain = false;
};

// Writes new tokens behind the certain ones, at places counted as if none had been let go.
void append(const Pages& pages, const Place* places, size_t count, Block<const float> k, Block<const float> v,
            size_t threads);

// See attend_rows of attention.h; and what each row's softmax divides by, as a logarithm to base 2, if lse has data.
size_t attend_rows_scratch(const Pages& pages, size_t rows, size_t heads, size_t threads);
void attend_rows(const Pages& pages, const Place* places, const Paths& paths, size_t rows, const Looking& looking,
                 Block<float> out, Rows<float> lse, const Attention& attention, uint8_t* scratch, size_t threads);

// Attention of `count` tokens of the run, from `start` on, over what is certain and over the run up to each.
size_t attend_scratch(const Pages& pages, size_t count, size_t heads, bool bf16, size_t threads);
void attend(const Pages& pages, size_t sequence, const Run& run, size_t start, size_t count, const Looking& looking,
            Block<float> out, Rows<float> lse, const Attention& attention, bool bf16, uint8_t* scratch, size_t threads);

// How what rows give to a token is put together: its sum, the most that one of them gives, or how many give it at least
// what they would if they looked alike at all tokens up to their own.
enum class Giving { sum, most, votes };

// Puts together in `mass` (kv_heads, stride of `mass`) what each token is given by `count` rows that decode, or by as many
// tokens of the run from `start` on; tokens of the run are counted behind those that are certain. Of rows that decode only
// those count that are among the `last` of each PAGE places. `mass` starts with the sequence.
size_t weigh_scratch(const Pages& pages, size_t rows, size_t heads, size_t threads);
void weigh_rows(const Pages& pages, const Place* places, const Paths& paths, size_t rows, const Looking& looking,
                Rows<const float> lse, const Attention& attention, Giving giving, size_t last, Rows<float> mass,
                uint8_t* scratch, size_t threads);
void weigh(const Pages& pages, size_t sequence, const Run& run, size_t start, size_t count, const Looking& looking,
           Rows<const float> lse, const Attention& attention, Giving giving, Rows<float> mass, uint8_t* scratch,
           size_t threads);

// Attention over two sets of tokens from that over each: `out` (rows, heads, dim) and its `lse` become those of both. Where
// the logarithm is minus infinity, nothing was seen.
void join(Block<float> out, Rows<float> lse, Block<const float> other, Rows<const float> other_lse, size_t rows,
          size_t heads, size_t dim);

// out (rows, heads, to) = x (rows, heads, from) times that of `matrices` (kv_heads, from, to) of each head's group.
void project(Block<const float> x, size_t rows, size_t heads, const float* matrices, size_t kv_heads, size_t from, size_t to,
             Block<float> out, size_t threads);

// What happens to a sequence when tokens become certain: those of `run` are added, all but counts[head] `indices` (kv_heads,
// stride) are let go, if that is not null and the count not negative, all but the last `recent` are coded page by page
// where pages have codes, and all but `resident` pages go to the file, `step` at a time. Pages for `tail` more tokens are
// there afterwards.
struct Keeping {
    const int32_t* indices = nullptr;
    size_t stride = 0;
    const int32_t* counts = nullptr;
    size_t recent = 0, resident = ~size_t(0), step = 1, tail = 1;

    // What stays of a head, or null if everything does.
    const int32_t* of(size_t head) const { return indices && counts[head] >= 0 ? indices + head * stride : nullptr; }
};
size_t keep_scratch(const Pages& pages);
void keep(const Pages& pages, size_t sequence, const Run& run, const Keeping& keeping, uint8_t* scratch);

// Certain tokens [from, to) of a head, and those of the run, as float32.
void read(const Pages& pages, size_t sequence, size_t head, const Run& run, size_t from, size_t to, float* k, float* v,
          uint8_t* scratch);

// Makes the tokens behind the certain ones those that `path` names.
void straighten(const Pages& pages, size_t sequence, const int32_t* path, size_t count);

// chosen (rows, kv_heads, count) = the pages of which the bounds of any part allow the largest scores of any of a head's
// queries, in order.
void select(const Pages& pages, const Place* places, size_t rows, Block<const float> q, size_t heads, size_t count,
            int32_t* chosen, uint8_t* scratch, size_t threads);
size_t select_scratch(const Pages& pages, size_t threads);

// The same by the largest score of any of a page's keys, of all pages that are whole: the best into `chosen` (rows, kv_heads,
// count), the next best into `next` (rows, kv_heads, more), and all but the best into `others` (rows, kv_heads, table_pages),
// each in order and then -1.
struct Ranked {
    int32_t *chosen, *next, *others;
    size_t count, more;
};
void rank(const Pages& pages, const Place* places, size_t rows, Block<const float> q, size_t heads, const Ranked& ranked,
          uint8_t* scratch, size_t threads);
size_t rank_scratch(const Pages& pages, size_t threads);
// shares (kv_heads, stride of `shares`) = what the heads of `q` would give to each of the first `until` (kv_heads) tokens of
// a sequence, if these were all: the sums of their softmaxes.
size_t shares_scratch(const Pages& pages, size_t heads, size_t threads);
void shares(const Pages& pages, size_t sequence, Block<const float> q, const Attention& attention, const int32_t* until,
            Rows<float> shares, uint8_t* scratch, size_t threads);

}  // namespace tightfit
