#include <nanobind/nanobind.h>

#include "bind.h"
#include "lists.h"

namespace nb = nanobind;
using namespace tightfit;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void tightfit::bind_lists(nb::module_& m) {
    m.def("score_centroids", [](uintptr_t centroids, size_t count, size_t dim, uintptr_t q, size_t stride, size_t rows,
                                uintptr_t sizes, float scale, uintptr_t scratch, uintptr_t scores) {
        score_centroids(at<const float>(centroids), count, dim, at<const float>(q), stride, rows, at<const int32_t>(sizes),
                        scale, at<float>(scratch), at<float>(scores));
    });
    m.def("list_best", [](uintptr_t scores, size_t count, uintptr_t groups, size_t until, float least, uintptr_t listed,
                          size_t most, uintptr_t order, uintptr_t quotas) {
        list_best(at<const float>(scores), count, at<const int32_t>(groups), until, least, at<int32_t>(listed), most,
                  at<int32_t>(order), at<int32_t>(quotas));
    });
}
