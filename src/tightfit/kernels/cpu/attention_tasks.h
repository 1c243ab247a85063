// What the kernels behind attention.h are given: the part of the work that one thread does at once.
#pragma once

#include "attention.h"

namespace tightfit {

constexpr size_t KEY_BLOCK = 128;   // keys that are folded at once, at multiples of it
constexpr float LOWEST = -3.4e38f;  // the maximum before any score: finite, so that scores minus it are no NaNs

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

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

// The keys and values of one sequence and key-value head.
struct HeadCache {
    Kind kind;
    const uint8_t *keys, *values;
    size_t slots, key_dim, value_dim, value_stride;
};

// The query heads of one key-value head at consecutive positions: row r is head r % groups at first + r / groups.
struct Queries {
    size_t rows, groups, first, window;
    float softcap;  // times log2(e)

    size_t position(size_t row) const { return first + row / groups; }
    size_t lowest(size_t row) const { return position(row) < window ? 0 : position(row) - window + 1; }
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
    // Folds those keys at positions [from, to) that each row of q (rows, key_dim) sees. `scores` has room for
    // (rows, KEY_BLOCK) numbers. `next` are the keys that this thread will want afterwards, or null.
    void (*fold)(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to,
                 const uint8_t* next, float* scores, const Folded& folded);
};

// The queries of one task, from their first query and head on, and where their results go.
struct Prefill {
    HeadCache head;
    Queries queries;
    Block<const float> q;
    Block<float> out;
    float scale;         // times log2(e)
    const float* sinks;  // of the heads, or null
};

extern const AttentionKernels portable_attention_kernels;
#ifdef TIGHTFIT_X86
extern const AttentionKernels avx2_attention_kernels;
extern const AttentionKernels avx512_attention_kernels;

// Attention with products in bfloat16 on AMX tiles. The rows that are folded at once, at most, and their scratch:
size_t amx_prefill_rows(size_t key_dim, size_t value_dim);
size_t amx_prefill_scratch(size_t rows, size_t key_dim, size_t value_dim);
void amx_prefill(const Prefill& prefill, uint8_t* scratch);
#endif

}  // namespace tightfit
