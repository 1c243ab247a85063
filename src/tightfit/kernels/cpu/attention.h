// Attention over cached keys and values: what writes them, and what reads them.
//
// A row of a batch is the token of one sequence at one position. Results for a row depend on its query and on the keys
// that it sees only: keys are taken in blocks at fixed positions and combined in order.
#pragma once

#include "rows.h"

namespace tightfit {

// Keys (sequences, kv_heads, slots, key_dim) and values (sequences, kv_heads, slots, value_dim) of one layer. The token
// at position p lies in slot p % slots. Where `values` are `keys`, they are the first features of the keys.
struct KeysValues {
    Kind kind;  // f32, f16 or bf16
    uint8_t *keys, *values;
    size_t sequences, kv_heads, slots, key_dim, value_dim;

    bool shared() const { return values == keys; }
    size_t value_stride() const { return shared() ? key_dim : value_dim; }
};

struct Place {
    int32_t sequence, position;
};

// Of rows that are the nodes of trees: `list` (rows, stride) names the tokens of each from its root on, counted from
// `committed`[row], the first that is not certain yet, and ends with the row's own; what follows is negative. Without a
// list every row sees what lies before it.
struct Paths {
    const int32_t* list = nullptr;
    size_t stride = 0;
    const int64_t* committed = nullptr;

    const int32_t* operator[](size_t row) const { return list + row * stride; }
    size_t length(size_t row) const {
        size_t count = 0;
        while (count < stride && (*this)[row][count] >= 0) count++;
        return count;
    }
};

// How queries look at keys. Scores are q . k * scale, limited by softcap * tanh(score / softcap) if `softcap` is not 0.
// A query sees its own key and the `window` - 1 before it. `sinks` (heads), or null, are logits that take part in the
// sum and give nothing.
struct Attention {
    size_t heads;
    float scale;
    size_t window;
    float softcap;
    const float* sinks;
};

// Cosines and sines (tokens, half) of the angles by which pairs of the first 2 * half features turn: features i and
// half + i, or 2i and 2i + 1 if `interleaved`.
struct Rotation {
    Rows<const float> cos, sin;
    size_t half;
    bool interleaved;
};

// Turns the first features of x (tokens, heads, features) in place.
void rotate(Block<float> x, size_t tokens, size_t heads, const Rotation& rotation, size_t threads);

// Keeps k (tokens, kv_heads, key_dim) and v (tokens, kv_heads, value_dim) at their places, rounded to nearest even.
// v is not read where values are part of the keys.
void append(const KeysValues& cache, const Place* places, size_t tokens, Block<const float> k, Block<const float> v,
            size_t threads);

// Turns q (tokens, heads, features) and k, and appends k and v.
void rotate_append(const KeysValues& cache, const Place* places, size_t tokens, Block<float> q, size_t heads,
                   Block<float> k, Block<const float> v, const Rotation& rotation, size_t threads);

// The token at position `to` becomes a copy of that at `from`.
void move(const KeysValues& cache, size_t sequence, size_t from, size_t to);

// out (rows, heads, value_dim) = attention of q (rows, heads, key_dim), each row alone over its sequence up to its own
// position, or along its path. `scratch` has attend_rows_scratch bytes and starts at a multiple of 64.
size_t attend_rows_scratch(const KeysValues& cache, size_t rows, size_t heads, size_t threads);
void attend_rows(const KeysValues& cache, const Place* places, const Paths& paths, size_t rows, Block<const float> q,
                 Block<float> out, const Attention& attention, uint8_t* scratch, size_t threads);

// The same for `count` consecutive positions of one sequence, from `first` on. With `bf16`, products are made in
// bfloat16 where the processor has instructions for it, and summed in float32.
size_t attend_scratch(const KeysValues& cache, size_t count, size_t heads, bool bf16, size_t threads);
void attend(const KeysValues& cache, size_t sequence, size_t first, size_t count, Block<const float> q,
            Block<float> out, const Attention& attention, bool bf16, uint8_t* scratch, size_t threads);

}  // namespace tightfit
