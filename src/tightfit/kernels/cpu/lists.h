// Which tokens a row that decodes reads, by the scores of the groups that they are in.
#pragma once

#include "rows.h"

namespace tightfit {

// Scores of one head's `count` centroids (count, dim) with `rows` queries: the largest product of any of them; or with
// `sizes` (count), of how many keys each centroid is the mean, the largest share of a key in a query's softmax over all of
// these keys, if each were its centroid and scores products times `scale`. `scratch` has `count` numbers.
void score_centroids(const float* centroids, size_t count, size_t dim, const float* q, size_t q_stride, size_t rows,
                     const int32_t* sizes, float scale, float* scratch, float* scores);

// Lists the first `most` tokens of those whose groups score highest, in order, and then -1: of tokens [0, until), of which
// token i is in group groups[i], or is always listed if that is negative; without `groups` each is its own. Groups that
// score less than `least` are not listed. Of what is listed last only the first tokens may fit. `order` and `quotas` have
// `count` numbers.
void list_best(const float* scores, size_t count, const int32_t* groups, size_t until, float least, int32_t* listed,
               size_t most, int32_t* order, int32_t* quotas);

}  // namespace tightfit
