// Pages alone, for the sanitizers (`make sanitize`): stores, runs, queries, results and scratch in buffers without a byte
// to spare, every instruction set of the processor, every way to store a page, odd sizes, and many threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "levels.h"
#include "pages.h"

using namespace tightfit;

namespace {

constexpr size_t SEQUENCES = 2, TABLE_PAGES = 14, TAIL = 20, ALL = std::numeric_limits<size_t>::max() / 2;

std::mt19937 generator(1);
std::normal_distribution<float> normal;
int failures = 0;

void check(bool condition, const char* what) {
    if (!condition) {
        std::printf("failed: %s\n", what);
        failures++;
    }
}

size_t below(size_t count) { return generator() % count; }
size_t itemsize_of(Kind kind) { return kind == Kind::f32 ? 4 : 2; }

std::vector<float> random(size_t count) {
    std::vector<float> numbers(count);
    for (float& number : numbers) number = normal(generator);
    return numbers;
}

class Bytes {
public:
    explicit Bytes(size_t bytes) : data_(nullptr, &std::free) {
        void* data = nullptr;
        if (posix_memalign(&data, 64, std::max<size_t>(bytes, 1)) != 0) std::abort();
        data_.reset(data);
        std::fill(get(), get() + bytes, 0);
    }
    uint8_t* get() { return static_cast<uint8_t*>(data_.get()); }

private:
    std::unique_ptr<void, void (*)(void*)> data_;
};

struct Case {
    Kind kind;
    size_t kv_heads, groups, key_dim, value_dim, key_bits, value_bits, channels;
    bool pool, file, shared, positions;
    size_t recent, resident, window, anchors;

    size_t heads() const { return kv_heads * groups; }
    size_t bits(size_t bits) const { return bits >= 16 ? 8 * itemsize_of(kind) : bits; }
};

struct Store {
    const Case& c;
    size_t dense_pages, coded_pages;
    Codec key_codec, value_codec;
    Bytes keys, values, coded_keys, coded_values, bounds;
    std::vector<int32_t> table, lengths, coded, cold, bounded, dense_free, coded_free, tokens, positions, channels;
    std::FILE* file;
    Pages pages{};

    explicit Store(const Case& c)
        : c(c), dense_pages(c.kv_heads * TABLE_PAGES), coded_pages(c.pool ? c.kv_heads * TABLE_PAGES : 0),
          key_codec{c.bits(c.key_bits), c.channels ? c.channels : c.key_dim, true},
          value_codec{c.bits(c.value_bits), c.value_dim, false},
          keys(SEQUENCES * dense_pages * PAGE * c.key_dim * itemsize_of(c.kind)),
          values(c.shared ? 0 : SEQUENCES * dense_pages * PAGE * c.value_dim * itemsize_of(c.kind)),
          coded_keys(SEQUENCES * coded_pages * key_codec.page_bytes()),
          coded_values(c.shared ? 0 : SEQUENCES * coded_pages * value_codec.page_bytes()),
          bounds(SEQUENCES * c.kv_heads * TABLE_PAGES * 2 * c.key_dim * itemsize_of(c.kind)),
          table(SEQUENCES * c.kv_heads * TABLE_PAGES, -1), lengths(SEQUENCES * c.kv_heads), coded(lengths), cold(lengths),
          bounded(lengths), tokens(SEQUENCES), file(c.file ? std::tmpfile() : nullptr) {
        for (auto [list, count] : {std::pair{&dense_free, dense_pages}, {&coded_free, coded_pages}})
            for (size_t s = 0; s < SEQUENCES; s++) {  // the last pages of a pool are taken first
                list->push_back(static_cast<int32_t>(count));
                for (size_t i = 0; i < count; i++) list->push_back(static_cast<int32_t>(i));
            }
        if (c.positions) positions.resize(SEQUENCES * c.kv_heads * TABLE_PAGES * PAGE);
        for (size_t i = 0; c.channels && i < SEQUENCES * c.kv_heads; i++) {
            std::vector<int32_t> all(c.key_dim);
            std::iota(all.begin(), all.end(), 0);
            std::shuffle(all.begin(), all.end(), generator);
            channels.insert(channels.end(), all.begin(), all.begin() + static_cast<long>(c.channels));
        }
        pages.kind = c.kind, pages.sequences = SEQUENCES, pages.kv_heads = pages.all_heads = c.kv_heads;
        pages.key_dim = c.key_dim, pages.value_dim = c.value_dim, pages.table_pages = TABLE_PAGES;
        pages.dense_pages = dense_pages, pages.coded_pages = coded_pages;
        pages.keys = keys.get(), pages.values = c.shared ? keys.get() : values.get();
        pages.coded_keys = c.pool ? coded_keys.get() : nullptr;
        pages.coded_values = !c.pool ? nullptr : c.shared ? coded_keys.get() : coded_values.get();
        pages.key_codec = key_codec, pages.value_codec = value_codec;
        pages.table = table.data(), pages.lengths = lengths.data(), pages.coded = coded.data(), pages.cold = cold.data();
        pages.bounded = bounded.data(), pages.dense_free = dense_free.data(), pages.coded_free = coded_free.data();
        pages.tokens = tokens.data(), pages.positions = c.positions ? positions.data() : nullptr;
        pages.channels = c.channels ? channels.data() : nullptr;
        pages.bounds = bounds.get(), pages.bound_heads = c.kv_heads, pages.bound_parts = 1;
        pages.file = file ? fileno(file) : -1;
        pages.values_at = SEQUENCES * c.kv_heads * TABLE_PAGES * key_codec.page_bytes();
    }
    ~Store() {
        if (file) std::fclose(file);
    }

    size_t length(size_t sequence, size_t head) const {
        return static_cast<size_t>(lengths[sequence * c.kv_heads + head]);
    }
};

struct Numbers {
    std::vector<float> k, v;
};

Numbers read_all(const Store& store, size_t sequence, size_t head, const Run& run) {
    const Case& c = store.c;
    const size_t count = store.length(sequence, head) + run.count;
    Numbers all{std::vector<float>(count * c.key_dim), std::vector<float>(count * c.value_dim)};
    Bytes scratch(keep_scratch(store.pages));
    read(store.pages, sequence, head, run, 0, count, all.k.data(), all.v.data(), scratch.get());
    if (c.shared)
        for (size_t i = 0; i < count; i++)
            std::copy_n(&all.k[i * c.key_dim], c.value_dim, all.v.begin() + static_cast<long>(i * c.value_dim));
    return all;
}

// A run of `count` tokens in exactly as many slots.
struct OwnRun {
    Bytes keys, values;
    Run run;

    OwnRun(const Case& c, size_t count)
        : keys(c.kv_heads * count * c.key_dim * itemsize_of(c.kind)),
          values(c.shared ? 0 : c.kv_heads * count * c.value_dim * itemsize_of(c.kind)) {
        const KeysValues cache{c.kind, keys.get(), c.shared ? keys.get() : values.get(), 1, c.kv_heads, count, c.key_dim,
                               c.value_dim};
        const std::vector<float> k = random(count * c.kv_heads * c.key_dim), v = random(count * c.kv_heads * c.value_dim);
        std::vector<Place> places;
        for (size_t i = 0; i < count; i++) places.push_back({0, static_cast<int32_t>(i)});
        append(cache, places.data(), count, {k.data(), c.kv_heads * c.key_dim, c.key_dim},
               {v.data(), c.kv_heads * c.value_dim, c.value_dim}, 1);
        run = {cache.keys, cache.values, count, count};
    }
};

// Whether `out` and `lse` are what a query gives that sees `count` tokens.
bool close(const Case& c, const Numbers& all, const float* query, const float* anchor_query, size_t count,
           float scale, const float* out, float lse, double tolerance) {
    std::vector<double> expected(c.value_dim);
    double total = 0;
    for (size_t i = 0; i < count; i++) {
        double score = 0;
        for (size_t d = 0; d < c.key_dim; d++) score += (i < c.anchors ? anchor_query : query)[d] * all.k[i * c.key_dim + d];
        const double weight = std::exp(score * scale);
        total += weight;
        for (size_t d = 0; d < c.value_dim; d++) expected[d] += weight * all.v[i * c.value_dim + d];
    }
    bool same = std::abs(lse - std::log2(total)) <= tolerance;
    for (size_t d = 0; d < c.value_dim; d++) same = same && std::abs(out[d] - expected[d] / total) <= tolerance;
    return same;
}

void check_run(Store& store, size_t sequence, const Run& run, size_t threads) {
    const Case& c = store.c;
    const size_t start = below(run.count), count = 1 + below(run.count - start), heads = c.heads();
    const std::vector<float> q = random(count * heads * c.key_dim), turned = random(q.size());
    std::vector<float> out(count * heads * c.value_dim), lse(count * heads);
    const Block<const float> queries{q.data(), heads * c.key_dim, c.key_dim};
    const Looking looking{queries, {turned.data(), heads * c.key_dim, c.key_dim}, c.anchors, nullptr, 0};
    const Attention attention{heads, 1 / std::sqrt(static_cast<float>(c.key_dim)), c.window, 0, nullptr};
    std::vector<Numbers> all;
    size_t longest = 0;
    for (size_t h = 0; h < c.kv_heads; h++) {
        all.push_back(read_all(store, sequence, h, run));
        longest = std::max(longest, store.length(sequence, h) + start + count);
    }
    for (const bool bf16 : {false, true}) {
        Bytes scratch(attend_scratch(store.pages, count, heads, bf16, threads));
        attend(store.pages, sequence, run, start, count, looking, {out.data(), heads * c.value_dim, c.value_dim},
               {lse.data(), heads}, attention, bf16, scratch.get(), threads);
        for (size_t i = 0; c.window == ALL && i < count * heads; i++) {
            const size_t token = i / heads, h = i % heads / c.groups, seen = store.length(sequence, h) + start + token + 1;
            // Queries, keys, weights and values are rounded by 2^-9, of scores up to 15 and values up to 5.
            check(close(c, all[h], &q[i * c.key_dim], &turned[i * c.key_dim], seen, attention.scale,
                        &out[i * c.value_dim], lse[i], bf16 ? 0.15 : 3e-5),
                  "attention of a run");
        }
    }
    std::vector<float> mass(c.kv_heads * longest);
    Bytes scratch(weigh_scratch(store.pages, count, heads, threads));
    weigh(store.pages, sequence, run, start, count, looking, {lse.data(), heads}, attention, Giving::sum,
          {mass.data(), longest}, scratch.get(), threads);
    const float given = std::accumulate(mass.begin(), mass.end(), 0.0f), all_given = static_cast<float>(count * heads);
    check(std::abs(given - all_given) <= 0.05f * all_given, "what tokens are given adds up");
}

// Some nodes of a tree; then those of one path become certain.
void check_rows(Store& store, size_t sequence, size_t threads) {
    const Case& c = store.c;
    const size_t count = 1 + below(TAIL), heads = c.heads(), capacity = store.pages.capacity();
    const int32_t start = store.tokens[sequence];
    std::vector<Place> places;
    std::vector<std::vector<int32_t>> nodes;
    std::vector<int32_t> list(count * count, -1);
    for (size_t i = 0; i < count; i++) {
        places.push_back({static_cast<int32_t>(sequence), start + static_cast<int32_t>(i)});
        nodes.push_back(i > 0 && below(4) ? nodes[below(i)] : std::vector<int32_t>());
        nodes.back().push_back(static_cast<int32_t>(i));
        std::copy(nodes[i].begin(), nodes[i].end(), list.begin() + static_cast<long>(i * count));
    }
    const Paths paths{list.data(), count, nullptr};
    const std::vector<float> k = random(count * c.kv_heads * c.key_dim), v = random(count * c.kv_heads * c.value_dim);
    append(store.pages, places.data(), count, {k.data(), c.kv_heads * c.key_dim, c.key_dim},
           {v.data(), c.kv_heads * c.value_dim, c.value_dim}, threads);
    const std::vector<float> q = random(count * heads * c.key_dim), turned = random(q.size());
    std::vector<float> out(count * heads * c.value_dim), lse(count * heads), mass(SEQUENCES * c.kv_heads * capacity);
    const Block<const float> queries{q.data(), heads * c.key_dim, c.key_dim};
    const Attention attention{heads, 1 / std::sqrt(static_cast<float>(c.key_dim)), c.window, 0, nullptr};
    std::vector<int32_t> chosen(count * c.kv_heads * 3);
    const auto look = [&](const Looking& looking) {
        Bytes scratch(attend_rows_scratch(store.pages, count, heads, threads));
        attend_rows(store.pages, places.data(), paths, count, looking, {out.data(), heads * c.value_dim, c.value_dim},
                    {lse.data(), heads}, attention, scratch.get(), threads);
        Bytes other(weigh_scratch(store.pages, count, heads, threads));
        weigh_rows(store.pages, places.data(), paths, count, looking, {lse.data(), heads}, attention, Giving::sum, PAGE,
                   {mass.data(), capacity}, other.get(), threads);
    };
    {
        Bytes scratch(select_scratch(store.pages, threads));
        select(store.pages, places.data(), count, queries, heads, 3, chosen.data(), scratch.get(), threads);
    }
    look({queries, {}, 0, chosen.data(), 3});
    look({queries, {turned.data(), heads * c.key_dim, c.key_dim}, c.anchors, nullptr, 0});
    const float given = std::accumulate(mass.begin(), mass.end(), 0.0f), all_given = static_cast<float>(2 * count * heads);
    check(std::abs(given - all_given) <= 0.01f * all_given, "what tokens are given adds up");

    const std::vector<int32_t>& path = nodes[below(count)];
    straighten(store.pages, sequence, path.data(), path.size());
    for (size_t h = 0; h < c.kv_heads; h++) {
        int32_t& length = store.lengths[sequence * c.kv_heads + h];
        for (size_t i = 0; c.positions && i < path.size(); i++)
            store.positions[(sequence * c.kv_heads + h) * capacity + static_cast<size_t>(length) + i] =
                start + static_cast<int32_t>(i);
        length += static_cast<int32_t>(path.size());
    }
    store.tokens[sequence] += static_cast<int32_t>(path.size());
    const size_t row = static_cast<size_t>(path.back());
    for (size_t h = 0; c.window == ALL && h < heads; h++) {
        const size_t i = row * heads + h;
        const Run none{store.pages.keys, store.pages.values, 0, 0};
        check(close(c, read_all(store, sequence, h / c.groups, none), &q[i * c.key_dim], &turned[i * c.key_dim],
                    store.length(sequence, h / c.groups), attention.scale, &out[i * c.value_dim], lse[i], 3e-5),
              "attention of rows");
    }
}

void check_case(const Case& c, size_t threads) {
    Store store(c);
    const size_t capacity = store.pages.capacity();
    for (size_t step = 0; step < 12; step++) {
        const size_t sequence = below(SEQUENCES);
        const bool decodes = store.tokens[sequence] > 0 && below(2);
        if (decodes) check_rows(store, sequence, threads);
        const OwnRun own(c, decodes ? 0 : 1 + below(150));
        if (!decodes) check_run(store, sequence, own.run, threads);
        std::vector<int32_t> indices(c.kv_heads * capacity, -1), counts;
        for (size_t h = 0; h < c.kv_heads; h++) {
            const size_t all = store.length(sequence, h) + own.run.count, most = capacity - TAIL - 12;
            const size_t first = below(all + 1), share = 1 + below(4);
            size_t count = 0;
            for (size_t i = 0; i < all && count < most; i++) {
                if (i >= first && i + 1 < all && below(4) >= share) continue;
                if (c.positions)  // of those that are kept, as far as they were there
                    store.positions[(sequence * c.kv_heads + h) * capacity + count] = static_cast<int32_t>(count);
                indices[h * capacity + count++] = static_cast<int32_t>(i);
            }
            counts.push_back(static_cast<int32_t>(count));
        }
        Bytes scratch(keep_scratch(store.pages));
        keep(store.pages, sequence, own.run, {indices.data(), capacity, counts.data(), c.recent, c.resident, 1, TAIL},
             scratch.get());
        store.tokens[sequence] += static_cast<int32_t>(own.run.count);
        for (size_t h = 0; h < c.kv_heads; h++)
            check(store.length(sequence, h) == static_cast<size_t>(counts[h]), "as many tokens as were to be kept");
    }
}

}  // namespace

int main() {
    for (Level level : supported_levels()) {
        check(choose(name_of(level)), "choice of kernels");
        for (Kind kind : {Kind::f32, Kind::f16, Kind::bf16})
            for (const Case& c : {Case{kind, 1, 1, 1, 1, 16, 16, 0, false, false, false, false, 0, ALL, ALL, 0},
                                  Case{kind, 2, 3, 40, 24, 8, 4, 0, true, false, false, true, 40, ALL, ALL, 4},
                                  Case{kind, 2, 2, 33, 65, 2, 2, 0, true, true, false, true, 20, 3, ALL, 40},
                                  Case{kind, 1, 5, 72, 40, 4, 8, 50, true, true, false, false, 0, 0, ALL, 0},
                                  Case{kind, 3, 2, 17, 16, 16, 16, 0, false, true, false, true, 0, 2, 50, 4},
                                  Case{kind, 1, 8, 130, 96, 4, 4, 0, true, true, true, true, 33, 4, ALL, 0},
                                  Case{kind, 2, 1, 16, 7, 16, 2, 5, true, false, false, true, 1, ALL, 100, 0}})
                for (size_t threads : {1, 3}) check_case(c, threads);
        std::printf("%s: checked\n", name_of(level));
    }
    std::printf(failures ? "%d checks failed\n" : "pages passed\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
