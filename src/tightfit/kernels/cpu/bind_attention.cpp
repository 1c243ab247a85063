// Attention over a layer's cache, as handles, built once, that take addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "attention.h"
#include "bind.h"

namespace nb = nanobind;
using namespace tightfit;

namespace {

Kind kind_of(const std::string& name) {
    if (name == "f32") return Kind::f32;
    if (name == "f16") return Kind::f16;
    if (name == "bf16") return Kind::bf16;
    throw nb::value_error(("no kernel for a cache of kind " + name).c_str());
}

KeysValues make_cache(const std::string& kind, uintptr_t keys, uintptr_t values, size_t sequences, size_t kv_heads,
                      size_t slots, size_t key_dim, size_t value_dim) {
    return {kind_of(kind), reinterpret_cast<uint8_t*>(keys), reinterpret_cast<uint8_t*>(values), sequences, kv_heads,
            slots, key_dim, value_dim};
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check_room(const KeysValues& cache, size_t seen) {
    if (seen > cache.slots)
        throw nb::value_error(("attention over " + std::to_string(seen) + " tokens with a cache that keeps " +
                               std::to_string(cache.slots)).c_str());
}

const Place* places_at(const KeysValues& cache, uintptr_t address, size_t count) {
    const Place* places = at<const Place>(address);
    for (size_t i = 0; i < count; i++)
        if (places[i].sequence < 0 || static_cast<size_t>(places[i].sequence) >= cache.sequences || places[i].position < 0)
            throw nb::index_error("a place outside of the cache");
    return places;
}

}  // namespace

void tightfit::bind_attention(nb::module_& m) {
    m.def("rotate", [](uintptr_t x, size_t token_stride, size_t head_stride, size_t tokens, size_t heads, uintptr_t cos,
                       uintptr_t sin, size_t stride, size_t half, bool interleaved, size_t threads) {
        nb::gil_scoped_release release;
        rotate({at<float>(x), token_stride, head_stride}, tokens, heads,
               {{at<const float>(cos), stride}, {at<const float>(sin), stride}, half, interleaved}, threads);
    });
    nb::class_<KeysValues>(m, "KeysValues")
        .def(nb::new_(&make_cache))
        .def("append",
             [](const KeysValues& cache, uintptr_t places, size_t tokens, uintptr_t k, size_t k_token, size_t k_head,
                uintptr_t v, size_t v_token, size_t v_head, size_t threads) {
                 const Place* where = places_at(cache, places, tokens);
                 nb::gil_scoped_release release;
                 append(cache, where, tokens, {at<const float>(k), k_token, k_head},
                        {at<const float>(v), v_token, v_head}, threads);
             })
        .def("rotate_append",
             [](const KeysValues& cache, uintptr_t places, size_t tokens, uintptr_t q, size_t q_token, size_t q_head,
                size_t heads, uintptr_t k, size_t k_token, size_t k_head, uintptr_t v, size_t v_token, size_t v_head,
                uintptr_t cos, uintptr_t sin, size_t stride, size_t half, bool interleaved, size_t threads) {
                 const Place* where = places_at(cache, places, tokens);
                 nb::gil_scoped_release release;
                 rotate_append(cache, where, tokens, {at<float>(q), q_token, q_head}, heads,
                               {at<float>(k), k_token, k_head}, {at<const float>(v), v_token, v_head},
                               {{at<const float>(cos), stride}, {at<const float>(sin), stride}, half, interleaved},
                               threads);
             })
        .def("move", [](const KeysValues& cache, size_t sequence, size_t from, size_t to) {
            if (sequence >= cache.sequences) throw nb::index_error("a sequence outside of the cache");
            move(cache, sequence, from, to);
        })
        .def("attend_rows_scratch",
             [](const KeysValues& cache, size_t rows, size_t heads, size_t threads) {
                 return attend_rows_scratch(cache, rows, heads, threads);
             })
        .def("attend_rows",
             [](const KeysValues& cache, uintptr_t places, uintptr_t paths, size_t stride, uintptr_t committed,
                size_t rows, uintptr_t q, size_t q_token, size_t q_head, size_t heads, uintptr_t out, size_t out_token,
                size_t out_head, float scale, size_t window, float softcap, uintptr_t sinks, uintptr_t scratch,
                size_t threads) {
                 const Place* where = places_at(cache, places, rows);
                 for (size_t i = 0; i < rows; i++)
                     check_room(cache, std::min<size_t>(static_cast<size_t>(where[i].position) + 1, window));
                 nb::gil_scoped_release release;
                 attend_rows(cache, where, {at<const int32_t>(paths), stride, at<const int64_t>(committed)}, rows, {at<const float>(q), q_token, q_head},
                             {at<float>(out), out_token, out_head}, {heads, scale, window, softcap, at<const float>(sinks)},
                             at<uint8_t>(scratch), threads);
             })
        .def("attend_scratch",
             [](const KeysValues& cache, size_t count, size_t heads, bool bf16, size_t threads) {
                 return attend_scratch(cache, count, heads, bf16, threads);
             })
        .def("attend", [](const KeysValues& cache, size_t sequence, size_t first, size_t count, uintptr_t q,
                          size_t q_token, size_t q_head, size_t heads, uintptr_t out, size_t out_token, size_t out_head,
                          float scale, size_t window, float softcap, uintptr_t sinks, bool bf16, uintptr_t scratch,
                          size_t threads) {
            if (sequence >= cache.sequences) throw nb::index_error("a sequence outside of the cache");
            check_room(cache, std::min(first + count, window - 1 + count));
            nb::gil_scoped_release release;
            attend(cache, sequence, first, count, {at<const float>(q), q_token, q_head},
                   {at<float>(out), out_token, out_head}, {heads, scale, window, softcap, at<const float>(sinks)}, bf16,
                   at<uint8_t>(scratch), threads);
        });
}
