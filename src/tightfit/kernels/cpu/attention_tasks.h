// What the kernels behind attention.h are given: the part of the work that one thread does at once.
#pragma once

#include "attention.h"
#include "pages.h"

namespace tightfit {

constexpr size_t KEY_BLOCK = 128;   // keys that are folded at once, at multiples of it
constexpr float LOWEST = -3.4e38f;  // the maximum before any score: finite, so that scores minus it are no NaNs

// Pieces of the memory at `address`, each at a multiple of 64 bytes; without an address, only their size is found.
class Scratch {
public:
    explicit Scratch(uint8_t* address = nullptr) : next_(reinterpret_cast<uintptr_t>(address)) {}

    template <class T>
    T* take(size_t count) {
        const size_t bytes = round_up(count * sizeof(T), 64);
        used_ += bytes, next_ += bytes;
        return reinterpret_cast<T*>(next_ - bytes);
    }
    size_t used() const { return used_; }

private:
    uintptr_t next_;
    size_t used_ = 0;
};

// The query heads of one key-value head at consecutive tokens: row r is head r % groups of token first + r / groups, and
// sees those up to its own, `window` of them; or if `all`, every one from lows[r / groups] on, if that is not null.
struct Queries {
    size_t rows, groups, first, window;
    float softcap;  // times log2(e)
    bool all = false;
    const int32_t* lows = nullptr;

    size_t position(size_t row) const { return all ? ~size_t(0) / 2 : first + row / groups; }
    size_t lowest(size_t row) const {
        if (all) return lows ? static_cast<size_t>(lows[row / groups]) : 0;
        return position(row) < window ? 0 : position(row) - window + 1;
    }
};

// Tokens of one head that are stored alike, which rows see which of them, and the queries, from the first token and head
// on: with `channels`, those of them that the keys have.
struct Stretch {
    HeadCache head;
    Queries queries;
    size_t from, to;
    Block<const float> q;
    const int32_t* channels = nullptr;
};

// What some rows see, in the order in which it is folded.
class Stretches {
public:
    void add(const Stretch& stretch) {
        if (stretch.from < stretch.to) list_[count_++] = stretch;
    }
    const Stretch* begin() const { return list_; }
    const Stretch* end() const { return list_ + count_; }

private:
    Stretch list_[12];
    size_t count_ = 0;
};

// The running softmax of rows; `acc` has `stride` numbers for each.
struct Folded {
    float *top, *total, *acc;
    size_t stride;
};

struct AttentionKernels {
    // Turns one head.
    void (*rotate)(float* x, const float* cos, const float* sin, size_t half, bool interleaved);
    // Writes `count` numbers rounded to `kind`.
    void (*store)(const float* x, size_t count, Kind kind, uint8_t* out);
    // Folds those of the tokens [from, to) that each row of q (rows, key_dim) sees. `scratch` has room for
    // fold_scratch() numbers. `next` are the keys that this thread will want afterwards, or null.
    void (*fold)(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to,
                 const uint8_t* next, float* scratch, const Folded& folded);
    // Puts together in mass[i] what the rows give to token i of [from, to), if `lse` (rows) is the logarithm to base 2 of
    // the sum of all that each row's softmax adds up. A vote is for a weight of 1 or more: there `lse` is lowered.
    void (*weigh)(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to,
                  const float* lse, Giving giving, float* scratch, float* mass);
    // out[r * stride + i] = the score of row r of q with token from + i.
    void (*score)(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to, float* scratch,
                  float* out, size_t stride);
    // The softmax of `count` scores in their place, of which there is room up to a multiple of 16.
    void (*softmax)(float* scores, size_t count);
    // The numbers of page `page` of coded keys or values, token by token; `side` is the codec's table, if it has one.
    void (*decode)(const Codec& codec, Kind kind, const uint8_t* page, const float* side, float* out);
    // The page of `numbers`.
    void (*encode)(const Codec& codec, Kind kind, const float* numbers, const float* side, uint8_t* page);
    void (*load)(const uint8_t* from, Kind kind, size_t count, float* out);
    // The largest score that a key between `bounds` (2, dim), the lowest and the highest of each channel, can have with one
    // of `rows` queries (rows, dim).
    float (*bound)(const float* bounds, const float* q, size_t rows, size_t dim);
    // out (rows, to) = x (rows, from) times `matrix` (from, to).
    void (*project)(Rows<const float> x, size_t rows, size_t from, const float* matrix, size_t to, Rows<float> out);
};

// Numbers that pages take which are coded or on the disk: a block of keys and values, as they are stored and as they are
// multiplied.
inline size_t page_scratch(size_t key_dim, size_t value_dim, bool made) {
    constexpr size_t ROUNDING = 64 * 2 * KEY_BLOCK / PAGE;  // of pages whose codes are narrow
    return made ? 2 * KEY_BLOCK * (key_dim + value_dim) + ROUNDING : 0;
}

// Numbers that folding takes: scores, pages, and on tiles queries in parts, and keys and values of a block.
inline size_t fold_scratch(size_t rows, size_t key_dim, size_t value_dim, bool made) {
    size_t tiles = 0;
#ifdef TIGHTFIT_X86
    const size_t keys = round_up(key_dim, 32);
    tiles = (round_up(rows, 16) + 16) * (keys * 5 / 2 + KEY_BLOCK) + 2 * keys + KEY_BLOCK * (keys / 2 + 64) + 1024;
#endif
    return rows * KEY_BLOCK + page_scratch(key_dim, value_dim, made) + tiles;
}

// The queries of one task, what they see, and where their results go.
struct Prefill {
    const Stretches& seen;
    size_t rows, groups, key_dim, value_dim;
    Block<float> out;
    float scale;          // times log2(e)
    const float* sinks;   // of the heads, or null
    Rows<float> lse{};    // of tokens and heads, to base 2; or null
};

// out = the queries of `rows` rows, times `scale`.
inline void load_queries(const Stretch& stretch, size_t rows, float scale, float* out) {
    const size_t groups = stretch.queries.groups, dim = stretch.head.key_dim;
    for (size_t r = 0; r < rows; r++, out += dim) {
        const float* from = stretch.q.at(r / groups, r % groups);
        for (size_t d = 0; d < dim; d++)
            out[d] = from[stretch.channels ? static_cast<size_t>(stretch.channels[d]) : d] * scale;
    }
}

// Where attention finds what its rows see: for each of `kv_heads`, at most `longest` tokens of a row that decodes. Where
// pages are coded or on the disk, blocks of them are `made` before they are multiplied.
struct Source {
    const size_t kv_heads, key_dim, value_dim, longest;
    const bool made;

    Source(size_t kv_heads, size_t key_dim, size_t value_dim, size_t longest, bool made = false)
        : kv_heads(kv_heads), key_dim(key_dim), value_dim(value_dim), longest(longest), made(made) {}

    // The tokens that a row sees are [low, end).
    struct Seen {
        size_t low, end;
    };
    virtual Seen seen(size_t row, size_t head) const = 0;
    // What lies in [from, to) of them, for the row's heads of `queries`.
    virtual void stretches(size_t row, size_t head, size_t from, size_t to, const Queries& queries,
                           Stretches& out) const = 0;
    virtual const uint8_t* first_key(size_t, size_t, size_t) const { return nullptr; }  // row, head, token

protected:
    ~Source() = default;
};

// The same for rows that are prefilled: consecutive tokens from `start` on, counted from the first.
struct PrefillSource {
    const size_t kv_heads, key_dim, value_dim;
    const bool made;

    PrefillSource(size_t kv_heads, size_t key_dim, size_t value_dim, bool made = false)
        : kv_heads(kv_heads), key_dim(key_dim), value_dim(value_dim), made(made) {}
    // `lows` has room for as many numbers as there are tokens.
    virtual void stretches(size_t start, size_t head, const Queries& queries, int32_t* lows, Stretches& out) const = 0;

protected:
    ~PrefillSource() = default;
};

const AttentionKernels& attention_kernels();

// See attend_rows and attend (attention.h). `lse`, unless it is null, gets for each row and head the logarithm to base 2
// of the sum that its softmax divides by.
size_t attend_rows_scratch(const Source& source, size_t rows, size_t heads, size_t threads);
void attend_rows(const Source& source, size_t rows, Block<float> out, Rows<float> lse, const Attention& attention,
                 uint8_t* scratch, size_t threads);
size_t attend_scratch(const PrefillSource& source, size_t count, size_t heads, bool bf16, size_t threads);
void attend(const PrefillSource& source, size_t count, Block<float> out, Rows<float> lse, const Attention& attention,
            bool bf16, uint8_t* scratch, size_t threads);

extern const AttentionKernels portable_attention_kernels;
#ifdef TIGHTFIT_X86
extern const AttentionKernels avx2_attention_kernels;
extern const AttentionKernels avx512_attention_kernels;
extern const AttentionKernels amx_attention_kernels;

// As AttentionKernels' `fold`, with products of the accuracy of float32 on AMX tiles where the cache is in bfloat16 or
// coded.
void amx_fold(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to,
              const uint8_t* next, float* scratch, const Folded& folded);
void amx_weigh(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to, const float* lse,
               Giving giving, float* scratch, float* mass);

// Attention with products in bfloat16 on AMX tiles. The rows that are folded at once, at most, and their scratch:
size_t amx_prefill_rows(size_t key_dim, size_t value_dim);
size_t amx_prefill_scratch(size_t rows, size_t key_dim, size_t value_dim, bool made);
void amx_prefill(const Prefill& prefill, bool made, uint8_t* scratch);
#endif

}  // namespace tightfit
