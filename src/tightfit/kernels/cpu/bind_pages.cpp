// A layer's cache in pages, as a handle, built once, that takes addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "bind.h"
#include "pages.h"
#include "staging.h"

namespace nb = nanobind;
using namespace tightfit;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Strided = std::tuple<uintptr_t, size_t, size_t>;          // address, strides of tokens and of heads
using Ragged = std::tuple<uintptr_t, uintptr_t, size_t>;        // places, paths, their stride
using RunOf = std::tuple<uintptr_t, uintptr_t, size_t, size_t>; // keys, values, slots, tokens
using Scores = std::tuple<size_t, float, size_t, float, uintptr_t>;  // heads, scale, window, softcap, sinks
// q, anchor_q, anchors, what is chosen and how many for each head, from which token on all is, whether only what is certain
using Views = std::tuple<Strided, Strided, size_t, uintptr_t, size_t, uintptr_t, bool>;

using CodecOf = std::tuple<size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t>;  // see codec.py

Codec codec_of(const CodecOf& of) {
    const auto& [bits, dim, per_channel, group, affine, coupled, rank, outliers, wide] = of;
    return {bits, dim, per_channel != 0, group, affine != 0, coupled, rank, outliers, wide};
}

template <class T>
Block<T> block(const Strided& of) {
    return {at<T>(std::get<0>(of)), std::get<1>(of), std::get<2>(of)};
}
Attention attention_of(const Scores& of) {
    return {std::get<0>(of), std::get<1>(of), std::get<2>(of), std::get<3>(of), at<const float>(std::get<4>(of))};
}
Run run_of(const RunOf& of) {
    return {at<const uint8_t>(std::get<0>(of)), at<const uint8_t>(std::get<1>(of)), std::get<2>(of), std::get<3>(of)};
}
Looking looking_of(const Views& of) {
    return {block<const float>(std::get<0>(of)), block<const float>(std::get<1>(of)), std::get<2>(of),
            at<const int32_t>(std::get<3>(of)), std::get<4>(of), at<const int32_t>(std::get<5>(of)), std::get<6>(of)};
}

// The same of rows that decode, whose listed tokens must be certain ones.
Looking looking_of(const Views& of, const Pages& pages, const Place* places, size_t rows) {
    const Looking looking = looking_of(of);
    for (size_t i = 0; looking.since && i < rows * pages.kv_heads; i++) {
        const size_t head = pages.at(static_cast<size_t>(places[i / pages.kv_heads].sequence), i % pages.kv_heads);
        const int32_t* list = looking.chosen + i * looking.listed;
        bool fits = looking.since[i] >= 0 && looking.since[i] <= pages.lengths[head];
        for (size_t j = 0; j < looking.listed && list[j] >= 0; j++)
            fits = fits && list[j] < looking.since[i] && (j == 0 || list[j - 1] < list[j]);
        if (!fits) throw nb::index_error("tokens that are not in the cache, or not in order");
    }
    return looking;
}
Paths paths_of(const Ragged& of) { return {at<const int32_t>(std::get<1>(of)), std::get<2>(of), nullptr}; }

const Place* places_of(const Pages& pages, const Ragged& of, size_t count, bool certain = false) {
    const Place* places = at<const Place>(std::get<0>(of));
    for (size_t i = 0; i < count; i++) {
        if (places[i].sequence < 0 || static_cast<size_t>(places[i].sequence) >= pages.sequences)
            throw nb::index_error("a sequence outside of the cache");
        if (certain) continue;
        const int32_t order = places[i].position - pages.tokens[places[i].sequence];
        if (order < 0) throw nb::index_error("a token that is in the cache already");
        for (size_t h = 0; h < pages.kv_heads; h++) {
            const size_t head = pages.at(static_cast<size_t>(places[i].sequence), h);
            const size_t page = static_cast<size_t>(pages.lengths[head] + order) / PAGE;
            if (page >= pages.table_pages || pages.table[head * pages.table_pages + page] < 0)
                throw nb::index_error("more tokens at once than the cache has room for");
        }
    }
    return places;
}

void check_sequence(const Pages& pages, size_t sequence) {
    if (sequence >= pages.sequences) throw nb::index_error("a sequence outside of the cache");
}

}  // namespace

void tightfit::bind_pages(nb::module_& m) {
    m.attr("PAGE") = PAGE;
    m.def("join", [](const Strided& out, const std::tuple<uintptr_t, size_t>& lse, const Strided& other,
                     const std::tuple<uintptr_t, size_t>& other_lse, size_t rows, size_t heads, size_t dim) {
        nb::gil_scoped_release release;
        join(block<float>(out), {at<float>(std::get<0>(lse)), std::get<1>(lse)}, block<const float>(other),
             {at<const float>(std::get<0>(other_lse)), std::get<1>(other_lse)}, rows, heads, dim);
    });
    m.def("project", [](const Strided& x, size_t rows, size_t heads, uintptr_t matrices,
                        const std::tuple<size_t, size_t, size_t>& shape, const Strided& out, size_t threads) {
        nb::gil_scoped_release release;
        const auto& [kv_heads, from, to] = shape;
        project(block<const float>(x), rows, heads, at<const float>(matrices), kv_heads, from, to, block<float>(out), threads);
    });
    m.def("page_bytes", [](const CodecOf& of) { return codec_of(of).page_bytes(); });
    nb::class_<Staging>(m, "Staging")
        .def("counts", [](const Staging& s) {
            return std::make_tuple(s.counts().wanted, s.counts().ahead, s.counts().bytes, s.counts().waited);
        })
        .def("rest", &Staging::rest, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<Reader>(m, "Reader").def(nb::init<>());
    nb::class_<HeadStaging, Staging>(m, "HeadStaging")
        .def("__init__", [](HeadStaging* self, Reader& reader, uintptr_t memory, size_t buffer_bytes, size_t heads,
                            size_t table_pages) {
            new (self) HeadStaging(reader, at<uint8_t>(memory), buffer_bytes, heads, table_pages);
        }, nb::keep_alive<1, 2>());
    nb::class_<PageStaging, Staging>(m, "PageStaging")
        .def("__init__", [](PageStaging* self, Reader& reader, uintptr_t memory, uintptr_t staged, size_t lists,
                            size_t table_pages, size_t places) {
            new (self) PageStaging(reader, at<uint8_t>(memory), at<int32_t>(staged), lists, table_pages, places);
        }, nb::keep_alive<1, 2>())
        .def("prefetch", [](PageStaging& s, const Pages& p, const Ragged& places, size_t rows, uintptr_t wanted, size_t count) {
            const Place* where = places_of(p, places, rows, true);
            nb::gil_scoped_release release;
            s.prefetch(p, where, rows, at<const int32_t>(wanted), count);
        });
    nb::class_<Pages>(m, "Pages")
        .def(nb::new_([](const std::string& kind, const std::tuple<size_t, size_t, size_t, size_t>& sizes,
                         const std::tuple<size_t, size_t, size_t>& pages, const std::tuple<CodecOf, CodecOf>& codecs,
                         const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>& stores,
                         const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>& lists,
                         uintptr_t tokens, uintptr_t positions, uintptr_t channels,
                         const std::tuple<uintptr_t, size_t, size_t, uintptr_t>& bounds,
                         const std::tuple<int, size_t, size_t>& file,
                         const std::tuple<uintptr_t, size_t, uintptr_t, size_t>& sides) {
            Pages p{};
            p.kind = kind_of(kind);
            std::tie(p.sequences, p.kv_heads, p.key_dim, p.value_dim) = sizes;
            std::tie(p.table_pages, p.dense_pages, p.coded_pages) = pages;
            p.key_codec = codec_of(std::get<0>(codecs)), p.value_codec = codec_of(std::get<1>(codecs));
            p.keys = at<uint8_t>(std::get<0>(stores)), p.values = at<uint8_t>(std::get<1>(stores));
            p.coded_keys = at<uint8_t>(std::get<2>(stores)), p.coded_values = at<uint8_t>(std::get<3>(stores));
            p.table = at<int32_t>(std::get<0>(lists)), p.lengths = at<int32_t>(std::get<1>(lists));
            p.coded = at<int32_t>(std::get<2>(lists)), p.cold = at<int32_t>(std::get<3>(lists));
            p.bounded = at<int32_t>(std::get<4>(lists));
            p.dense_free = at<int32_t>(std::get<5>(lists)), p.coded_free = at<int32_t>(std::get<6>(lists));
            p.tokens = at<const int32_t>(tokens), p.positions = at<const int32_t>(positions);
            p.channels = at<const int32_t>(channels);
            p.bounds = at<uint8_t>(std::get<0>(bounds)), p.bound_at = at<const int32_t>(std::get<3>(bounds));
            p.bound_heads = std::get<1>(bounds), p.bound_parts = std::get<2>(bounds);
            std::tie(p.file, p.keys_at, p.values_at) = file;
            p.all_heads = p.kv_heads;
            p.key_side = at<const float>(std::get<0>(sides)), p.key_tables = std::get<1>(sides);
            p.value_side = at<const float>(std::get<2>(sides)), p.value_tables = std::get<3>(sides);
            return p;
        }))
        .def("stage", [](Pages& p, Staging& staging, const Pages& next) { p.staging = &staging, p.next = &next; })
        .def("forget", [](const Pages& p, size_t sequence) {
            nb::gil_scoped_release release;
            for (size_t h = 0; p.staging && h < p.kv_heads; h++) p.staging->forget(p, sequence, h, 0);
        })
        .def("rank_scratch", &rank_scratch)
        .def("rank", [](const Pages& p, const Ragged& places, size_t rows, const Strided& q, size_t heads,
                        const std::tuple<uintptr_t, size_t>& chosen, const std::tuple<uintptr_t, size_t>& next,
                        uintptr_t others, uintptr_t scratch, size_t threads) {
            const Place* where = places_of(p, places, rows, true);
            nb::gil_scoped_release release;
            const Ranked ranked{at<int32_t>(std::get<0>(chosen)), at<int32_t>(std::get<0>(next)), at<int32_t>(others),
                                std::get<1>(chosen), std::get<1>(next)};
            rank(p, where, rows, block<const float>(q), heads, ranked, at<uint8_t>(scratch), threads);
        })
        .def("append", [](const Pages& p, const Ragged& places, size_t count, const Strided& k, const Strided& v,
                          size_t threads) {
            const Place* where = places_of(p, places, count);
            nb::gil_scoped_release release;
            append(p, where, count, block<const float>(k), block<const float>(v), threads);
        })
        .def("attend_rows_scratch", [](const Pages& p, size_t rows, size_t heads, size_t threads) {
            return attend_rows_scratch(p, rows, heads, threads);
        })
        .def("attend_rows", [](const Pages& p, const Ragged& places, size_t rows, const Views& views, const Strided& out,
                               const std::tuple<uintptr_t, size_t>& lse, const Scores& scores, uintptr_t scratch,
                               size_t threads) {
            const Place* where = places_of(p, places, rows, std::get<6>(views));
            const Looking looking = looking_of(views, p, where, rows);
            nb::gil_scoped_release release;
            attend_rows(p, where, paths_of(places), rows, looking, block<float>(out),
                        {at<float>(std::get<0>(lse)), std::get<1>(lse)}, attention_of(scores), at<uint8_t>(scratch), threads);
        })
        .def("attend_scratch", [](const Pages& p, size_t count, size_t heads, bool bf16, size_t threads) {
            return attend_scratch(p, count, heads, bf16, threads);
        })
        .def("attend", [](const Pages& p, size_t sequence, const RunOf& run, size_t start, size_t count,
                          const Views& views, const Strided& out, const std::tuple<uintptr_t, size_t>& lse,
                          const Scores& scores, bool bf16, uintptr_t scratch, size_t threads) {
            check_sequence(p, sequence);
            nb::gil_scoped_release release;
            attend(p, sequence, run_of(run), start, count, looking_of(views), block<float>(out),
                   {at<float>(std::get<0>(lse)), std::get<1>(lse)}, attention_of(scores), bf16, at<uint8_t>(scratch), threads);
        })
        .def("weigh_scratch", [](const Pages& p, size_t rows, size_t heads, size_t threads) {
            return weigh_scratch(p, rows, heads, threads);
        })
        .def("weigh_rows", [](const Pages& p, const Ragged& places, size_t rows, const Views& views,
                              const std::tuple<uintptr_t, size_t>& lse, const Scores& scores, int giving, size_t last,
                              const std::tuple<uintptr_t, size_t>& mass, uintptr_t scratch, size_t threads) {
            const Place* where = places_of(p, places, rows);
            const Looking looking = looking_of(views, p, where, rows);
            nb::gil_scoped_release release;
            weigh_rows(p, where, paths_of(places), rows, looking,
                       {at<const float>(std::get<0>(lse)), std::get<1>(lse)}, attention_of(scores), Giving{giving}, last,
                       {at<float>(std::get<0>(mass)), std::get<1>(mass)}, at<uint8_t>(scratch), threads);
        })
        .def("weigh", [](const Pages& p, size_t sequence, const RunOf& run, size_t start, size_t count, const Views& views,
                         const std::tuple<uintptr_t, size_t>& lse, const Scores& scores, int giving,
                         const std::tuple<uintptr_t, size_t>& mass, uintptr_t scratch, size_t threads) {
            check_sequence(p, sequence);
            nb::gil_scoped_release release;
            weigh(p, sequence, run_of(run), start, count, looking_of(views),
                  {at<const float>(std::get<0>(lse)), std::get<1>(lse)}, attention_of(scores), Giving{giving},
                  {at<float>(std::get<0>(mass)), std::get<1>(mass)}, at<uint8_t>(scratch), threads);
        })
        .def("keep_scratch", &keep_scratch)
        .def("keep", [](const Pages& p, size_t sequence, const RunOf& run, uintptr_t indices, size_t stride,
                        uintptr_t counts, size_t recent, size_t resident, size_t step, size_t tail, uintptr_t scratch) {
            check_sequence(p, sequence);
            nb::gil_scoped_release release;
            keep(p, sequence, run_of(run), {at<const int32_t>(indices), stride, at<const int32_t>(counts), recent, resident, step, tail},
                 at<uint8_t>(scratch));
        })
        .def("read", [](const Pages& p, size_t sequence, size_t head, const RunOf& run, size_t from, size_t to, uintptr_t k,
                        uintptr_t v, uintptr_t scratch) {
            check_sequence(p, sequence);
            if (head >= p.kv_heads || to > static_cast<size_t>(p.lengths[p.at(sequence, head)]) + run_of(run).count)
                throw nb::index_error("tokens outside of the cache");
            nb::gil_scoped_release release;
            read(p, sequence, head, run_of(run), from, to, at<float>(k), at<float>(v), at<uint8_t>(scratch));
        })
        .def("straighten", [](const Pages& p, size_t sequence, uintptr_t path, size_t count) {
            check_sequence(p, sequence);
            straighten(p, sequence, at<const int32_t>(path), count);
        })
        .def("shares_scratch", &shares_scratch)
        .def("shares", [](const Pages& p, size_t sequence, const Strided& q, const Scores& scores, uintptr_t until,
                          const std::tuple<uintptr_t, size_t>& out, uintptr_t scratch, size_t threads) {
            check_sequence(p, sequence);
            for (size_t h = 0; h < p.kv_heads; h++)
                if (at<const int32_t>(until)[h] < 0 || at<const int32_t>(until)[h] > p.lengths[p.at(sequence, h)])
                    throw nb::index_error("tokens that are not in the cache");
            nb::gil_scoped_release release;
            shares(p, sequence, block<const float>(q), attention_of(scores), at<const int32_t>(until),
                   {at<float>(std::get<0>(out)), std::get<1>(out)}, at<uint8_t>(scratch), threads);
        })
        .def("select_scratch", &select_scratch)
        .def("select", [](const Pages& p, const Ragged& places, size_t rows, const Strided& q, size_t heads, size_t count,
                          uintptr_t chosen, uintptr_t scratch, size_t threads) {
            const Place* where = places_of(p, places, rows);
            nb::gil_scoped_release release;
            select(p, where, rows, block<const float>(q), heads, count, at<int32_t>(chosen), at<uint8_t>(scratch), threads);
        });
}
