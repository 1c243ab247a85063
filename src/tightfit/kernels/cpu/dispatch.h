// The operations on stored matrices, shared among threads and run by the chosen instruction set's kernels.
#pragma once

#include <vector>

#include "kernels.h"

namespace tightfit {

// Matrices of the same number of columns that are multiplied with the same vectors.
struct Joined {
    explicit Joined(std::vector<Weight> weights);

    std::vector<Weight> weights;
    size_t rows, cols;
    // Of work: the matrices' rows in runs of whole tiles, about TASK_BYTES each. chunks[i] is the number of the first
    // of weights[i]; at the end, how many there are.
    std::vector<size_t> first_chunk;
    size_t nbytes;

    // Scratch that matmul needs with activations in int8, for each token.
    size_t scratch_nbytes(size_t tokens) const;
};

// out[t] = the matrices' products with x[t], one after the other; with `accumulate` not zero, accumulate times that is
// added to out[t]. `int8` is whether activations are rounded to int8, for the matrices whose codes are integers;
// `scratch` is then scratch_nbytes(tokens) bytes. Bits depend neither on `tokens` nor on `threads`.
void matmul(const Joined& matrices, Rows<const float> x, size_t tokens, Rows<float> out, float accumulate, bool int8,
            uint8_t* scratch, size_t threads);

// out[i] = W[start + i] for the rows [start, stop) of a tiled or pruned matrix, in float32 or bfloat16.
template <class T>
void decode_block(const Weight& w, size_t start, size_t stop, Rows<T> out, size_t threads);

// out[i] = W[indices[i]] for `count` rows of a tiled or pruned matrix.
void decode_rows(const Weight& w, const int64_t* indices, size_t count, Rows<float> out, size_t threads);

}  // namespace tightfit
