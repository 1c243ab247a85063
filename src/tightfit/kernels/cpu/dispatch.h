// The operations on stored matrices, shared among threads and run by the chosen instruction set's kernels.
#pragma once

#include "weight.h"

namespace tightfit {

// out[t] = W x[t] for every token t; bits depend neither on `tokens` nor on `threads`.
void matmul(const Weight& w, Rows<const float> x, size_t tokens, Rows<float> out, size_t threads);

// out[i] = W[start + i] for the rows [start, stop) of a tiled matrix, in float32 or bfloat16.
template <class T>
void decode_block(const Weight& w, size_t start, size_t stop, Rows<T> out, size_t threads);

// out[i] = W[indices[i]] for `count` rows of a tiled matrix.
void decode_rows(const Weight& w, const int64_t* indices, size_t count, Rows<float> out, size_t threads);

}  // namespace tightfit
