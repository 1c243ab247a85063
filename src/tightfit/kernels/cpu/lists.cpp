#include "lists.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tightfit {
namespace {

float product(const float* a, const float* b, size_t dim) {
    constexpr size_t SUMS = 16;  // in an order that does not depend on the instruction set
    float sums[SUMS] = {};
    size_t d = 0;
    for (; d + SUMS <= dim; d += SUMS)
        for (size_t i = 0; i < SUMS; i++) sums[i] += a[d + i] * b[d + i];
    for (; d < dim; d++) sums[0] += a[d] * b[d];
    return std::accumulate(sums, sums + SUMS, 0.0f);
}

}  // namespace

void score_centroids(const float* centroids, size_t count, size_t dim, const float* q, size_t q_stride, size_t rows,
                     const int32_t* sizes, float scale, float* scratch, float* scores) {
    std::fill(scores, scores + count, -__builtin_inff());
    for (size_t r = 0; r < rows; r++) {
        float top = -__builtin_inff(), total = 0.0f;
        for (size_t c = 0; c < count; c++) {
            scratch[c] = product(centroids + c * dim, q + r * q_stride, dim);
            if (!sizes || sizes[c] > 0) top = std::max(top, scratch[c]);
        }
        for (size_t c = 0; sizes && c < count; c++) {
            scratch[c] = sizes[c] > 0 ? std::exp((scratch[c] - top) * scale) : 0.0f;
            total += scratch[c] * static_cast<float>(sizes[c]);
        }
        for (size_t c = 0; c < count; c++) scores[c] = std::max(scores[c], sizes ? scratch[c] / total : scratch[c]);
    }
}

void list_best(const float* scores, size_t count, const int32_t* groups, size_t until, float least, int32_t* listed,
               size_t most, int32_t* order, int32_t* quotas) {
    const auto better = [&](int32_t a, int32_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; };
    size_t left = 0;  // those that score enough
    for (size_t i = 0; i < count; i++)
        if (scores[i] >= least) order[left++] = static_cast<int32_t>(i);
    size_t used = 0;
    if (!groups) {
        used = std::min(left, most);
        if (used < left) std::nth_element(order, order + used, order + left, better);
        std::sort(order, order + used);
        std::copy(order, order + used, listed);
    } else {
        std::fill(quotas, quotas + count, 0);
        size_t always = 0;
        for (size_t i = 0; i < until; i++) {
            if (groups[i] < 0) always++;
            else quotas[groups[i]]++;
        }
        std::sort(order, order + left, better);
        size_t room = most - std::min(always, most);
        const auto give = [&](int32_t group) {
            quotas[group] = static_cast<int32_t>(std::min(static_cast<size_t>(quotas[group]), room));
            room -= static_cast<size_t>(quotas[group]);
        };
        std::for_each(order, order + left, give);
        for (size_t i = 0; i < count; i++)
            if (scores[i] < least) quotas[i] = 0;
        for (size_t i = 0; i < until && used < most; i++)
            if (groups[i] < 0 || quotas[groups[i]]-- > 0) listed[used++] = static_cast<int32_t>(i);
    }
    std::fill(listed + used, listed + most, -1);
}

}  // namespace tightfit
