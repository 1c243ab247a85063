#include "pages.h"

#include <algorithm>
#include <cmath>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <unistd.h>
#include <vector>

#include "attention_tasks.h"
#include "pool.h"
#include "staging.h"

namespace tightfit {
namespace {

constexpr float LOG2_E = 1.44269504f;
constexpr size_t WEIGHED_ROWS = 128;  // queries times heads that are weighed at once

size_t dense_bytes(const Pages& p, size_t dim) { return PAGE * dim * itemsize(p.kind); }

// The list of a head's tokens.
struct Head {
    const Pages& p;
    size_t sequence, head, index;

    Head(const Pages& pages, size_t sequence, size_t head)
        : p(pages), sequence(sequence), head(head), index(pages.at(sequence, head)) {}

    size_t length() const { return static_cast<size_t>(p.lengths[index]); }
    size_t coded() const { return static_cast<size_t>(p.coded[index]); }
    size_t cold() const { return static_cast<size_t>(p.cold[index]); }
    size_t bounded() const { return static_cast<size_t>(p.bounded[index]); }
    bool bounds() const { return p.bounds && (!p.bound_at || p.bound_at[p.first_head + head] >= 0); }
    uint8_t* bounds(size_t page) const {
        const size_t own = p.first_head + head, at = p.bound_at ? static_cast<size_t>(p.bound_at[own]) : own;
        const size_t numbers = p.bound_parts * 2 * p.key_dim;
        return p.bounds + ((sequence * p.bound_heads + at) * p.table_pages + page) * numbers * itemsize(p.kind);
    }
    int32_t* table() const { return p.table + index * p.table_pages; }
    const int32_t* channels() const {
        return p.channels ? p.channels + index * p.key_codec.dim : nullptr;
    }

    const float* key_side() const { return side(p.key_side, p.key_codec, p.key_tables); }
    const float* value_side() const { return side(p.value_side, p.value_codec, p.value_tables); }
    const float* side(const float* tables, const Codec& codec, size_t count) const {
        return tables ? tables + (sequence % count * p.kv_heads + head) * codec.side() : nullptr;
    }

    uint8_t* dense(uint8_t* base, size_t dim, int32_t page) const {
        return base + (sequence * p.dense_pages + static_cast<size_t>(page)) * dense_bytes(p, dim);
    }
    uint8_t* code(uint8_t* base, const Codec& codec, int32_t page) const {
        return base + (sequence * p.coded_pages + static_cast<size_t>(page)) * codec.page_bytes();
    }
    size_t keys_in_file(size_t page) const {
        return p.keys_at + (index * p.table_pages + page) * p.key_codec.page_bytes();
    }
    size_t values_in_file(size_t page) const {
        return p.values_at + (index * p.table_pages + page) * p.value_codec.page_bytes();
    }

    HeadCache dense_pages() const {
        HeadCache cache{p.kind, dense(p.keys, p.key_dim, 0), dense(p.values, p.value_dim, 0), 1, p.key_dim, p.value_dim,
                        p.shared() ? p.key_dim : p.value_dim};
        if (p.shared()) cache.values = cache.keys;
        cache.table = table();
        return cache;
    }
    HeadCache made_pages(bool in_file) const {
        HeadCache cache{p.kind, nullptr, nullptr, 1, p.key_codec.dim, p.value_dim, p.value_dim};
        cache.coded = true, cache.key_codec = p.key_codec, cache.value_codec = p.value_codec;
        cache.key_side = key_side(), cache.value_side = value_side();
        cache.table = table();
        if (in_file) {
            cache.file = p.file, cache.keys_at = keys_in_file(0), cache.values_at = values_in_file(0);
            static const uint8_t anywhere[2] = {};  // values are other memory than keys, unless they are shared
            cache.keys = anywhere, cache.values = p.shared() ? anywhere : anywhere + 1;
        } else {
            cache.keys = code(p.coded_keys, p.key_codec, 0);
            cache.values = p.shared() ? cache.keys : code(p.coded_values, p.value_codec, 0);
        }
        return cache;
    }

    HeadCache staged_pages() const {
        HeadCache cache = made_pages(true);
        cache.file = -1, cache.table = p.staged + index * p.staged_stride, cache.keys = p.staged_keys;
        cache.values = p.shared() ? cache.keys : p.staged_values;
        if (p.channels || !p.key_codec.dense() || !p.value_codec.dense()) return cache;
        cache.coded = false, cache.value_stride = p.shared() ? p.key_dim : p.value_dim;  // as they are multiplied
        return cache;
    }

    // Adds tokens [from, to), of all or of those that are chosen `like` has, which are stored in up to three ways.
    void add(size_t from, size_t to, const HeadCache& like, const Queries& queries, Block<const float> q, size_t count,
             Stretches& out) const {
        const auto first = [&](const int32_t* list, size_t number) {  // that is not below `number`
            return static_cast<size_t>(std::lower_bound(list, list + count, static_cast<int32_t>(number)) - list);
        };
        const auto below = [&](size_t page) -> size_t {  // tokens in pages below `page`
            return like.chosen ? first(like.chosen, page) * PAGE : like.tokens ? first(like.tokens, page * PAGE) : page * PAGE;
        };
        const size_t cold_end = below(cold()), coded_end = std::max(below(p.has_codes() ? coded() : 0), cold_end);
        const auto part = [&](HeadCache cache, size_t a, size_t b) {
            cache.chosen = like.chosen, cache.tokens = like.tokens;
            cache.path = like.path, cache.committed = like.committed;
            const bool pruned = cache.coded && p.channels;
            out.add({cache, queries, std::max(from, a), std::min(to, b), q, pruned ? channels() : nullptr});
        };
        if (cold_end > from) part(p.staged ? staged_pages() : made_pages(true), 0, cold_end);
        if (coded_end > cold_end) part(made_pages(false), cold_end, coded_end);
        part(dense_pages(), coded_end, to);
    }
};

// ---- rows that decode ----

struct PageRows final : Source {
    const Pages& p;
    const Place* places;
    const Paths paths;
    const Looking looking;
    size_t groups, window;

    PageRows(const Pages& p, const Place* places, const Paths& paths, const Looking& looking, size_t heads, size_t window)
        : Source(p.kv_heads, p.key_dim, p.value_dim, p.capacity(), p.has_codes() || p.file >= 0), p(p), places(places),
          paths(paths), looking(looking), groups(heads / p.kv_heads), window(window) {}

    Head head_of(size_t row, size_t head) const { return {p, static_cast<size_t>(places[row].sequence), head}; }
    // How many tokens that are not certain a row sees, its own included.
    size_t tail(size_t row) const {
        if (looking.certain) return 0;
        if (paths.list) return paths.length(row);
        return static_cast<size_t>(places[row].position - p.tokens[places[row].sequence]) + 1;
    }
    const int32_t* chosen(size_t row, size_t head) const {
        return looking.chosen ? looking.chosen + (row * p.all_heads + p.first_head + head) * looking.listed : nullptr;
    }
    size_t count(const int32_t* chosen) const {
        size_t n = 0;
        while (n < looking.listed && chosen[n] >= 0) n++;
        return n;
    }
    size_t unit() const { return looking.since ? 1 : PAGE; }
    // From this token of a head on a row sees all.
    size_t since(const Head& head, size_t row) const {
        return looking.since ? static_cast<size_t>(looking.since[row * p.all_heads + p.first_head + head.head]) : head.bounded() * PAGE;
    }
    size_t low(const Head& head, size_t row) const {
        const size_t tail = this->tail(row), length = head.length();
        const size_t position = static_cast<size_t>(p.tokens[head.sequence]) + tail - 1;
        if (position < window) return 0;
        if (tail > window) return length + tail - window;
        const size_t hidden = position - window;  // the last position that is not seen
        if (!p.positions) return std::min(hidden + 1, length);
        const int32_t* at = p.positions + head.index * p.capacity();
        const size_t low = static_cast<size_t>(std::upper_bound(at, at + length, static_cast<int32_t>(hidden)) - at);
        return low;
    }
    Seen seen(size_t row, size_t h) const override {
        const Head head = head_of(row, h);
        const size_t end = head.length() + tail(row);
        if (looking.chosen) return {0, count(chosen(row, h)) * unit() + end - since(head, row)};
        return {looking.anchors ? 0 : low(head, row), end};
    }
    void stretches(size_t row, size_t h, size_t from, size_t to, const Queries& queries, Stretches& out) const override {
        const Head head = head_of(row, h);
        const Block<const float> q = looking.q.from(row, h * groups);
        Queries all = queries;
        all.all = true;
        HeadCache like{};
        if (paths.list) like.path = paths[row], like.committed = head.length();
        if (looking.chosen) {
            const int32_t* list = chosen(row, h);
            const size_t listed = count(list), first = listed * unit(), skipped = since(head, row);
            HeadCache some = like;
            (looking.since ? some.tokens : some.chosen) = list;
            if (from < first) head.add(from, std::min(to, first), some, all, q, listed, out);
            if (to > first) head.add(std::max(from, first) - first + skipped, to - first + skipped, like, all, q, 0, out);
            return;
        }
        const size_t anchors = std::min(looking.anchors, head.length() + tail(row));
        if (from < anchors) {
            const Block<const float> turned = looking.anchor_q.data ? looking.anchor_q.from(row, h * groups) : q;
            head.add(from, std::min(to, anchors), like, all, turned, 0, out);
        }
        const size_t low = std::max({from, anchors, this->low(head, row)});
        if (low < to) head.add(low, to, like, all, q, 0, out);
    }
};

// ---- prefill ----

struct PagePrefill final : PrefillSource {
    const Pages& p;
    size_t sequence, start, groups, window;
    const Run run;
    const Looking looking;

    PagePrefill(const Pages& p, size_t sequence, const Run& run, size_t start, const Looking& looking, size_t heads,
                size_t window)
        : PrefillSource(p.kv_heads, p.key_dim, p.value_dim, p.has_codes() || p.file >= 0), p(p), sequence(sequence),
          start(start), groups(heads / p.kv_heads), window(window), run(run), looking(looking) {}

    void stretches(size_t at, size_t h, const Queries& queries, int32_t* lows, Stretches& out) const override {
        const Head head(p, sequence, h);
        const size_t length = head.length(), tokens = queries.rows / queries.groups, first = start + at;
        const Block<const float> q = looking.q.from(at, h * groups);
        const Block<const float> turned = looking.anchor_q.data ? looking.anchor_q.from(at, h * groups) : q;
        const size_t anchors = std::min(looking.anchors, length);
        Queries all = queries;
        all.all = true;
        if (anchors > 0) head.add(0, anchors, {}, all, turned, 0, out);
        const int32_t* positions = p.positions ? p.positions + head.index * p.capacity() : nullptr;
        for (size_t i = 0; i < tokens; i++) {
            const size_t position = static_cast<size_t>(p.tokens[sequence]) + first + i;
            size_t low = 0;
            if (position >= window) {
                const size_t hidden = position - window;
                low = !positions ? std::min(hidden + 1, length)
                                 : static_cast<size_t>(std::upper_bound(positions, positions + length,
                                                                        static_cast<int32_t>(hidden)) - positions);
            }
            lows[i] = static_cast<int32_t>(low);
        }
        all.lows = lows;
        head.add(std::max(anchors, static_cast<size_t>(lows[0])), length, {}, all, q, 0, out);

        const size_t each = run.slots * itemsize(p.kind), stride = p.shared() ? p.key_dim : p.value_dim;
        if (looking.certain) return;
        const HeadCache own{p.kind, run.keys + h * each * p.key_dim, run.values + h * each * stride, run.slots, p.key_dim,
                            p.value_dim, stride};
        Queries causal = queries;
        causal.first = first;
        const size_t left = std::min(looking.anchors - anchors, first + tokens), end = first + tokens;
        causal.window = ~size_t(0) / 2;
        out.add({own, causal, 0, left, turned});
        causal.window = window;
        out.add({own, causal, std::max(left, causal.lowest(0)), end, q});
    }
};

// ---- what tokens are given ----

// Puts together in mass[token - from] what the rows of a stretch give to each of its tokens.
void weigh_stretch(const Stretch& stretch, const float* lse, float scale, Giving giving, float* scratch, float* mass) {
    const size_t rows = stretch.queries.rows;
    float* q = scratch + round_up(fold_scratch(rows, stretch.head.key_dim, stretch.head.value_dim, true), 16);
    load_queries(stretch, rows, scale, q);
    attention_kernels().weigh(stretch.head, stretch.queries, q, stretch.from, stretch.to, lse, giving, scratch, mass);
}

// What a row's softmax divides by, or for votes the weight that is one: that of each of `seen` tokens if they were alike.
float divisor(float lse, Giving giving, size_t seen) {
    return giving == Giving::votes ? lse - std::log2(static_cast<float>(seen)) : lse;
}

// What the rows of a stretch of listed tokens give to each, put together in mass[token].
void weigh_listed(const Stretch& stretch, const float* lse, float scale, Giving giving, float* scratch, float* mass) {
    for (size_t at = stretch.from; at < stretch.to; at += KEY_BLOCK) {
        Stretch block = stretch;
        block.from = at, block.to = std::min(at + KEY_BLOCK, stretch.to);
        float given[KEY_BLOCK];
        for (size_t i = at; i < block.to; i++) given[i - at] = mass[stretch.head.token(i)];
        weigh_stretch(block, lse, scale, giving, scratch, given);
        for (size_t i = at; i < block.to; i++) mass[stretch.head.token(i)] = given[i - at];
    }
}

size_t weigh_floats(const Pages& p, size_t rows) {
    return round_up(fold_scratch(rows, p.key_dim, p.value_dim, true), 16) + round_up(rows * p.key_dim, 16) +
           round_up(rows, 16) + round_up(rows, 16);
}

// ---- keeping ----

int32_t take(int32_t* free) {
    if (free[0] == 0) throw std::runtime_error("no page is left: the plan of the cache is mistaken");
    return free[free[0]--];
}
void give(int32_t* free, int32_t page) { free[++free[0]] = page; }

void write_at(int file, const uint8_t* data, size_t count, size_t at) {
    while (count > 0) {
        const ssize_t done = pwrite(file, data, count, static_cast<off_t>(at));
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) throw std::runtime_error("the cache cannot be written to the disk: " + std::string(std::strerror(errno)));
        data += done, at += static_cast<size_t>(done), count -= static_cast<size_t>(done);
    }
}

void read_whole(int file, uint8_t* out, size_t count, size_t at) {
    while (count > 0) {
        const ssize_t got = pread(file, out, count, static_cast<off_t>(at));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) throw std::runtime_error("the cache cannot be read from the disk: " + std::string(std::strerror(errno)));
        out += got, at += static_cast<size_t>(got), count -= static_cast<size_t>(got);
    }
}

// A page of a head, in float32; and one as it is stored.
struct PageBuffer {
    float *keys, *values, *pruned;
    uint8_t *stored_keys, *stored_values;

    static size_t bytes(const Pages& p) {
        Scratch all;
        PageBuffer(p, all);
        return all.used();
    }
    PageBuffer(const Pages& p, Scratch& all)
        : keys(all.take<float>(PAGE * p.key_dim)), values(all.take<float>(PAGE * p.value_dim)),
          pruned(all.take<float>(PAGE * p.key_dim)),
          stored_keys(all.take<uint8_t>(std::max(p.key_codec.page_bytes(), dense_bytes(p, p.key_dim)))),
          stored_values(all.take<uint8_t>(std::max(p.value_codec.page_bytes(), dense_bytes(p, p.value_dim)))) {}
};

// Where page j of a head lies.
enum class Where { nowhere, file, coded, dense };

Where where(const Head& head, size_t j) {
    if (j < head.cold()) return Where::file;
    if (j >= head.p.table_pages || head.table()[j] < 0) return Where::nowhere;
    return head.p.has_codes() && j < head.coded() ? Where::coded : Where::dense;
}

// Reads page j into float32: `tokens` of it are there. Channels that were let go are zeros.
void load_page(const Head& head, size_t j, PageBuffer& buffer) {
    const Pages& p = head.p;
    const AttentionKernels& k = attention_kernels();
    const Where place = where(head, j);
    if (place == Where::dense) {
        const int32_t page = head.table()[j];
        k.load(head.dense(p.keys, p.key_dim, page), p.kind, PAGE * p.key_dim, buffer.keys);
        if (!p.shared()) k.load(head.dense(p.values, p.value_dim, page), p.kind, PAGE * p.value_dim, buffer.values);
        return;
    }
    const uint8_t *keys = buffer.stored_keys, *values = buffer.stored_values;
    if (place == Where::file) {
        read_whole(p.file, buffer.stored_keys, p.key_codec.page_bytes(), head.keys_in_file(j));
        if (!p.shared()) read_whole(p.file, buffer.stored_values, p.value_codec.page_bytes(), head.values_in_file(j));
    } else {
        keys = head.code(p.coded_keys, p.key_codec, head.table()[j]);
        if (!p.shared()) values = head.code(p.coded_values, p.value_codec, head.table()[j]);
    }
    const size_t width = p.key_codec.dim;
    float* out = p.channels ? buffer.pruned : buffer.keys;
    k.decode(p.key_codec, p.kind, keys, head.key_side(), out);
    if (!p.shared()) k.decode(p.value_codec, p.kind, values, head.value_side(), buffer.values);
    if (!p.channels) return;
    std::fill(buffer.keys, buffer.keys + PAGE * p.key_dim, 0.0f);
    for (size_t t = 0; t < PAGE; t++)
        for (size_t c = 0; c < width; c++)
            buffer.keys[t * p.key_dim + static_cast<size_t>(head.channels()[c])] = out[t * width + c];
}

int32_t* dense_free(const Head& head) { return head.p.dense_free + head.sequence * (head.p.dense_pages + 1); }
int32_t* coded_free(const Head& head) { return head.p.coded_free + head.sequence * (head.p.coded_pages + 1); }

// Gives the memory of page j back, if it has some.
void release_page(const Head& head, size_t j) {
    int32_t& page = head.table()[j];
    const Where place = where(head, j);
    if (place == Where::dense) give(dense_free(head), page);
    if (place == Where::coded) give(coded_free(head), page);
    page = -1;
}

void store_page(const Head& head, size_t j, Where place, PageBuffer& buffer, size_t tokens) {
    const Pages& p = head.p;
    const AttentionKernels& k = attention_kernels();
    int32_t& page = head.table()[j];
    if (where(head, j) != place) {
        release_page(head, j);
        if (place == Where::dense) page = take(dense_free(head));
        if (place == Where::coded) page = take(coded_free(head));
    }
    if (place == Where::dense) {
        k.store(buffer.keys, tokens * p.key_dim, p.kind, head.dense(p.keys, p.key_dim, page));
        if (!p.shared()) k.store(buffer.values, tokens * p.value_dim, p.kind, head.dense(p.values, p.value_dim, page));
        return;
    }
    const float* keys = buffer.keys;
    const size_t width = p.key_codec.dim;
    if (p.channels) {
        for (size_t t = 0; t < PAGE; t++)
            for (size_t c = 0; c < width; c++)
                buffer.pruned[t * width + c] = keys[t * p.key_dim + static_cast<size_t>(head.channels()[c])];
        keys = buffer.pruned;
    }
    const bool coded = place == Where::coded;
    k.encode(p.key_codec, p.kind, keys, head.key_side(), coded ? head.code(p.coded_keys, p.key_codec, page) : buffer.stored_keys);
    if (!p.shared())
        k.encode(p.value_codec, p.kind, buffer.values, head.value_side(),
                 coded ? head.code(p.coded_values, p.value_codec, page) : buffer.stored_values);
    if (coded) return;
    write_at(p.file, buffer.stored_keys, p.key_codec.page_bytes(), head.keys_in_file(j));
    if (!p.shared()) write_at(p.file, buffer.stored_values, p.value_codec.page_bytes(), head.values_in_file(j));
}

// A coded page goes to the file as it is.
void spill_page(const Head& head, size_t j) {
    const Pages& p = head.p;
    const int32_t page = head.table()[j];
    write_at(p.file, head.code(p.coded_keys, p.key_codec, page), p.key_codec.page_bytes(), head.keys_in_file(j));
    if (!p.shared())
        write_at(p.file, head.code(p.coded_values, p.value_codec, page), p.value_codec.page_bytes(),
                 head.values_in_file(j));
    release_page(head, j);
}

// The lowest and the highest number of each channel of the parts of page j, as they are multiplied.
void bound_page(const Head& head, size_t j, PageBuffer& buffer) {
    const Pages& p = head.p;
    load_page(head, j, buffer);
    float* exact = buffer.pruned;
    const size_t size = PAGE / p.bound_parts, numbers = p.bound_parts * 2 * p.key_dim;
    for (size_t part = 0; part < p.bound_parts; part++) {
        const float* keys = buffer.keys + part * size * p.key_dim;
        float* low = exact + part * 2 * p.key_dim;
        float* high = low + p.key_dim;
        for (size_t d = 0; d < p.key_dim; d++) {
            low[d] = high[d] = keys[d];
            for (size_t t = 1; t < size; t++) {
                low[d] = std::min(low[d], keys[t * p.key_dim + d]);
                high[d] = std::max(high[d], keys[t * p.key_dim + d]);
            }
        }
    }
    uint8_t* out = head.bounds(j);
    const AttentionKernels& k = attention_kernels();
    k.store(exact, numbers, p.kind, out);
    if (p.kind == Kind::f32) return;
    float* rounded = buffer.keys;
    k.load(out, p.kind, numbers, rounded);
    for (size_t d = 0; d < numbers; d++) {  // numbers of codes may be rounded to what does not bound them
        const bool up = d / p.key_dim % 2;
        if (up ? rounded[d] >= exact[d] : rounded[d] <= exact[d]) continue;
        uint16_t bits;
        std::memcpy(&bits, out + 2 * d, sizeof bits);
        const bool negative = bits >> 15;
        bits = !up && bits == 0 ? 0x8001 : up && bits == 0x8000 ? 1 : up != negative ? bits + 1 : bits - 1;
        std::memcpy(out + 2 * d, &bits, sizeof bits);
    }
}

// The pages of a head after it keeps what it is told to.
struct Outcome {
    size_t length, first, cold, coded;  // from page `first` on they are written anew

    Outcome(const Head& head, const Run& run, const Keeping& k) {
        const Pages& p = head.p;
        length = head.length() + run.count, first = head.length() / PAGE;
        if (const int32_t* list = k.of(head.head)) {
            length = static_cast<size_t>(k.counts[head.head]);
            size_t same = 0;
            while (same < length && list[same] == static_cast<int32_t>(same)) same++;
            first = std::min(same, head.length()) / PAGE;
        }
        coded = p.has_codes() && length > k.recent ? (length - k.recent) / PAGE : 0;
        coded = std::max(coded, std::min(head.coded(), first));
        const size_t pages = (length + PAGE - 1) / PAGE, whole = p.has_codes() ? coded : length / PAGE;
        cold = p.file >= 0 && pages > k.resident ? std::min(pages - k.resident, whole) / k.step * k.step : 0;
        cold = std::max(cold, std::min(head.cold(), first));
    }
    Where place(const Pages& p, size_t j) const {
        return j < cold ? Where::file : p.has_codes() && j < coded ? Where::coded : Where::dense;
    }
};

void keep_head(const Head& head, const Run& run, const Keeping& keeping, uint8_t* scratch) {
    const Pages& p = head.p;
    const AttentionKernels& k = attention_kernels();
    Scratch all(scratch);
    PageBuffer source(p, all), target(p, all);
    const Outcome outcome(head, run, keeping);
    const int32_t* staying = keeping.of(head.head);
    if (p.staging) p.staging->forget(p, head.sequence, head.head, outcome.first);
    const size_t before = head.length(), each = run.slots * itemsize(p.kind);
    const uint8_t* run_keys = run.keys + head.head * each * p.key_dim;
    const uint8_t* run_values = run.values + head.head * each * p.value_dim;

    // Pages that hold the same tokens as before, but perhaps elsewhere.
    size_t changed = outcome.first;  // from here on pages hold other numbers than before
    for (size_t j = std::min(head.cold(), outcome.first); j < outcome.first; j++) {
        const Where from = where(head, j), to = outcome.place(p, j);
        if (from == to) continue;
        if (from == Where::coded) {
            spill_page(head, j);
            continue;
        }
        load_page(head, j, source);
        store_page(head, j, to, source, PAGE);
        if (!p.key_codec.dense() || p.channels) changed = std::min(changed, j);
    }
    // The others are filled token by token, in order: the place of a token never lies behind where it comes from, so
    // that of each page that is written everything that is still wanted was read before.
    size_t loaded = ~size_t(0), released = outcome.first;
    for (size_t i = outcome.first * PAGE; i < outcome.length; i++) {
        const size_t from = staying ? static_cast<size_t>(staying[i]) : i;
        float* key = target.keys + i % PAGE * p.key_dim;
        float* value = target.values + i % PAGE * p.value_dim;
        if (from < before) {
            if (from / PAGE != loaded) {
                load_page(head, loaded = from / PAGE, source);
                for (; released <= loaded; released++)  // these were read, and those that are written may want them
                    if (released > i / PAGE) release_page(head, released);
            }
            std::memcpy(key, source.keys + from % PAGE * p.key_dim, p.key_dim * sizeof(float));
            if (!p.shared()) std::memcpy(value, source.values + from % PAGE * p.value_dim, p.value_dim * sizeof(float));
        } else {
            k.load(run_keys + (from - before) * p.key_dim * itemsize(p.kind), p.kind, p.key_dim, key);
            if (!p.shared())
                k.load(run_values + (from - before) * p.value_dim * itemsize(p.kind), p.kind, p.value_dim, value);
        }
        const size_t j = i / PAGE;
        if (i % PAGE == PAGE - 1) store_page(head, j, outcome.place(p, j), target, PAGE);
        else if (i + 1 == outcome.length) store_page(head, j, Where::dense, target, i % PAGE + 1);
    }
    // What lies behind is given back, or wanted for the tokens that come next.
    const size_t pages = (outcome.length + PAGE - 1) / PAGE, wanted = (outcome.length + keeping.tail + PAGE - 1) / PAGE;
    for (size_t j = pages; j < p.table_pages; j++) {
        if (where(head, j) == Where::coded || j >= wanted) release_page(head, j);
    }
    p.lengths[head.index] = static_cast<int32_t>(outcome.length);
    p.coded[head.index] = static_cast<int32_t>(outcome.coded);
    p.cold[head.index] = static_cast<int32_t>(outcome.cold);
    for (size_t j = pages; j < wanted; j++)
        if (head.table()[j] < 0) head.table()[j] = take(dense_free(head));
    if (!head.bounds()) return;
    const size_t whole = outcome.length / PAGE;
    for (size_t j = std::min(changed, head.bounded()); j < whole; j++) bound_page(head, j, source);
    p.bounded[head.index] = static_cast<int32_t>(whole);
}

float dot(const float* x, const float* y, size_t count) {
    constexpr size_t SUMS = 16;  // in an order that does not depend on the instruction set
    float sums[SUMS] = {}, sum = 0.0f;
    size_t i = 0;
    for (; i + SUMS <= count; i += SUMS)
        for (size_t s = 0; s < SUMS; s++) sums[s] += x[i + s] * y[i + s];
    for (; i < count; i++) sums[0] += x[i] * y[i];
    for (float part : sums) sum += part;
    return sum;
}

bool by_heads(const Pages& p) { return p.staging && p.staging->heads_at_once(p) < p.kv_heads; }

}  // namespace

void append(const Pages& p, const Place* places, size_t count, Block<const float> k, Block<const float> v, size_t) {
    const AttentionKernels& kernels = attention_kernels();
    for (size_t t = 0; t < count; t++)
        for (size_t h = 0; h < p.kv_heads; h++) {
            const Head head(p, static_cast<size_t>(places[t].sequence), h);
            const size_t i = head.length() + static_cast<size_t>(places[t].position - p.tokens[head.sequence]);
            const size_t size = itemsize(p.kind);
            const int32_t page = head.table()[i / PAGE];
            kernels.store(k.at(t, h), p.key_dim, p.kind,
                          head.dense(p.keys, p.key_dim, page) + i % PAGE * p.key_dim * size);
            if (!p.shared())
                kernels.store(v.at(t, h), p.value_dim, p.kind,
                              head.dense(p.values, p.value_dim, page) + i % PAGE * p.value_dim * size);
        }
}

size_t attend_rows_scratch(const Pages& pages, size_t rows, size_t heads, size_t threads) {
    if (by_heads(pages)) return attend_rows_scratch(pages.of_head(0), rows, heads / pages.kv_heads, threads);
    return attend_rows_scratch(PageRows(pages, nullptr, {}, {}, heads, 0), rows, heads, threads);
}

void attend_rows(const Pages& pages, const Place* places, const Paths& paths, size_t rows, const Looking& looking,
                 Block<float> out, Rows<float> lse, const Attention& attention, uint8_t* scratch, size_t threads) {
    if (pages.staging)
        return pages.staging->attend_rows(pages, places, paths, rows, looking, out, lse, attention, scratch, threads);
    const PageRows source(pages, places, paths, looking, attention.heads, attention.window);
    attend_rows(source, rows, out, lse, attention, scratch, threads);
}

size_t attend_scratch(const Pages& pages, size_t count, size_t heads, bool bf16, size_t threads) {
    if (by_heads(pages)) return attend_scratch(pages.of_head(0), count, heads / pages.kv_heads, bf16, threads);
    return attend_scratch(PagePrefill(pages, 0, {}, 0, {}, heads, 0), count, heads, bf16, threads);
}

void attend(const Pages& pages, size_t sequence, const Run& run, size_t start, size_t count, const Looking& looking,
            Block<float> out, Rows<float> lse, const Attention& attention, bool bf16, uint8_t* scratch, size_t threads) {
    if (pages.staging)
        return pages.staging->attend(pages, sequence, run, start, count, looking, out, lse, attention, bf16, scratch,
                                     threads);
    const PagePrefill source(pages, sequence, run, start, looking, attention.heads, attention.window);
    attend(source, count, out, lse, attention, bf16, scratch, threads);
}

void join(Block<float> out, Rows<float> lse, Block<const float> other, Rows<const float> other_lse, size_t rows,
          size_t heads, size_t dim) {
    for (size_t r = 0; r < rows; r++)
        for (size_t h = 0; h < heads; h++) {
            const float here = lse[r][h], there = other_lse[r][h], top = std::max(here, there);
            if (there == -__builtin_inff()) continue;
            float own = std::exp2(here - top), others = std::exp2(there - top);
            const float total = own + others;
            own /= total, others /= total;
            float* sum = out.at(r, h);
            const float* more = other.at(r, h);
            for (size_t d = 0; d < dim; d++) sum[d] = sum[d] * own + more[d] * others;
            lse[r][h] = top + std::log2(total);
        }
}

void project(Block<const float> x, size_t rows, size_t heads, const float* matrices, size_t kv_heads, size_t from, size_t to,
             Block<float> out, size_t threads) {
    constexpr size_t AT_ONCE = 32, WORTH_A_THREAD = size_t(1) << 16;  // rows, and products
    if (rows * heads * from * to < WORTH_A_THREAD) threads = 1;
    parallel_for((rows + AT_ONCE - 1) / AT_ONCE * heads, threads, [&](size_t task) {
        const size_t r = task / heads * AT_ONCE, h = task % heads;
        attention_kernels().project({x.at(r, h), x.outer_stride}, std::min(rows - r, AT_ONCE), from,
                                    matrices + h / (heads / kv_heads) * from * to, to, {out.at(r, h), out.outer_stride});
    });
}

size_t weigh_scratch(const Pages& p, size_t rows, size_t heads, size_t threads) {
    const size_t groups = heads / p.kv_heads, at_once = std::max(WEIGHED_ROWS / groups, size_t(1));
    return std::min(threads, p.kv_heads) * weigh_floats(p, std::min(at_once, rows) * groups) * sizeof(float);
}

void weigh_rows(const Pages& p, const Place* places, const Paths& paths, size_t rows, const Looking& looking,
                Rows<const float> lse, const Attention& attention, Giving giving, size_t last, Rows<float> mass,
                uint8_t* scratch, size_t threads) {
    const PageRows source(p, places, paths, looking, attention.heads, attention.window);
    const size_t groups = source.groups, each = weigh_floats(p, groups), workers = std::min(threads, p.kv_heads);
    parallel_for(workers, workers, [&](size_t worker) {
        float* own = reinterpret_cast<float*>(scratch) + worker * each;
        float* sums = own + each - round_up(groups, 16);
        for (size_t h = worker; h < p.kv_heads; h += workers)
            for (size_t row = 0; row < rows; row++) {
                const auto position = static_cast<size_t>(places[row].position);
                if (position % PAGE + last < PAGE) continue;
                for (size_t g = 0; g < groups; g++)
                    sums[g] = divisor(lse[row][h * groups + g], giving, std::min(position + 1, attention.window));
                const auto sequence = static_cast<size_t>(places[row].sequence);
                float* to = mass[sequence * p.kv_heads + h];
                const Source::Seen seen = source.seen(row, h);
                Stretches stretches;
                source.stretches(row, h, seen.low, seen.end,
                                 {groups, groups, 0, attention.window, attention.softcap * LOG2_E}, stretches);
                for (const Stretch& stretch : stretches) {
                    if (stretch.head.tokens) {
                        weigh_listed(stretch, sums, attention.scale * LOG2_E, giving, own, to);
                        continue;
                    }
                    if (!stretch.head.chosen) {
                        weigh_stretch(stretch, sums, attention.scale * LOG2_E, giving, own, to + stretch.from);
                        continue;
                    }
                    for (size_t at = stretch.from; at < stretch.to; at += PAGE) {  // each page in its own place
                        Stretch page = stretch;
                        page.from = at, page.to = std::min(at + PAGE, stretch.to);
                        weigh_stretch(page, sums, attention.scale * LOG2_E, giving, own,
                                      to + stretch.head.listed(at / PAGE) * PAGE);
                    }
                }
            }
    });
}

void weigh(const Pages& p, size_t sequence, const Run& run, size_t start, size_t count, const Looking& looking,
           Rows<const float> lse, const Attention& attention, Giving giving, Rows<float> mass, uint8_t* scratch,
           size_t threads) {
    const PagePrefill source(p, sequence, run, start, looking, attention.heads, attention.window);
    const size_t groups = source.groups, at_once = std::min(count, std::max(WEIGHED_ROWS / groups, size_t(1)));
    const size_t each = weigh_floats(p, at_once * groups), workers = std::min(threads, p.kv_heads);
    const size_t first = static_cast<size_t>(p.tokens[sequence]) + start;  // the position of the first of them
    parallel_for(workers, workers, [&](size_t worker) {
        float* own = reinterpret_cast<float*>(scratch) + worker * each;
        float* sums = own + each - 2 * round_up(at_once * groups, 16);
        auto* lows = reinterpret_cast<int32_t*>(sums + round_up(at_once * groups, 16));
        for (size_t h = worker; h < p.kv_heads; h += workers) {
            const size_t length = Head(p, sequence, h).length();
            for (size_t at = 0; at < count; at += at_once) {
                const size_t tokens = std::min(at_once, count - at), rows = tokens * groups;
                for (size_t r = 0; r < rows; r++)
                    sums[r] = divisor(lse[at + r / groups][h * groups + r % groups], giving,
                                      std::min(first + at + r / groups + 1, attention.window));
                Stretches stretches;
                source.stretches(at, h, {rows, groups, 0, attention.window, attention.softcap * LOG2_E}, lows, stretches);
                for (const Stretch& stretch : stretches)
                    weigh_stretch(stretch, sums, attention.scale * LOG2_E, giving, own,
                                  mass[h] + stretch.from + (stretch.head.table ? 0 : length));
            }
        }
    });
}

size_t keep_scratch(const Pages& p) { return 2 * PageBuffer::bytes(p); }

void keep(const Pages& p, size_t sequence, const Run& run, const Keeping& keeping, uint8_t* scratch) {
    // Heads that shrink come first: their pages may be wanted by those that grow.
    std::vector<std::pair<int64_t, size_t>> order;
    for (size_t h = 0; h < p.kv_heads; h++) {
        const Head head(p, sequence, h);
        order.emplace_back(static_cast<int64_t>(Outcome(head, run, keeping).length) - static_cast<int64_t>(head.length()), h);
    }
    std::sort(order.begin(), order.end());
    for (const auto& [growth, h] : order) keep_head(Head(p, sequence, h), run, keeping, scratch);
}

void read(const Pages& p, size_t sequence, size_t h, const Run& run, size_t from, size_t to, float* key, float* value,
          uint8_t* scratch) {
    const Head head(p, sequence, h);
    const AttentionKernels& k = attention_kernels();
    Scratch all(scratch);
    PageBuffer page(p, all);
    const size_t length = head.length();
    for (size_t i = from; i < to; i++, key += p.key_dim, value += p.value_dim) {
        if (i >= length) {
            const size_t at = (h * run.slots + i - length) * itemsize(p.kind);
            k.load(run.keys + at * p.key_dim, p.kind, p.key_dim, key);
            if (!p.shared()) k.load(run.values + at * p.value_dim, p.kind, p.value_dim, value);
            continue;
        }
        if (i == from || i % PAGE == 0) load_page(head, i / PAGE, page);
        std::memcpy(key, page.keys + i % PAGE * p.key_dim, p.key_dim * sizeof(float));
        if (!p.shared()) std::memcpy(value, page.values + i % PAGE * p.value_dim, p.value_dim * sizeof(float));
    }
}

void straighten(const Pages& p, size_t sequence, const int32_t* path, size_t count) {
    for (size_t h = 0; h < p.kv_heads; h++) {
        const Head head(p, sequence, h);
        const auto place = [&](uint8_t* base, size_t dim, size_t order) {
            const size_t i = head.length() + order;
            return head.dense(base, dim, head.table()[i / PAGE]) + i % PAGE * dim * itemsize(p.kind);
        };
        for (size_t i = 0; i < count; i++) {  // a path ascends, so nothing that is still wanted is overwritten
            const auto from = static_cast<size_t>(path[i]);
            if (from == i) continue;
            std::memcpy(place(p.keys, p.key_dim, i), place(p.keys, p.key_dim, from), p.key_dim * itemsize(p.kind));
            if (!p.shared())
                std::memcpy(place(p.values, p.value_dim, i), place(p.values, p.value_dim, from),
                            p.value_dim * itemsize(p.kind));
        }
    }
}

size_t shares_scratch(const Pages& p, size_t heads, size_t threads) {
    const size_t groups = heads / p.kv_heads;
    return std::min(threads, p.kv_heads) * (weigh_floats(p, groups) + groups * p.capacity()) * sizeof(float);
}

void shares(const Pages& p, size_t sequence, Block<const float> q, const Attention& attention, const int32_t* until,
            Rows<float> shares, uint8_t* scratch, size_t threads) {
    const AttentionKernels& k = attention_kernels();
    const size_t groups = attention.heads / p.kv_heads, workers = std::min(threads, p.kv_heads);
    const size_t folding = round_up(fold_scratch(groups, p.key_dim, p.value_dim, true), 16);
    const size_t each = weigh_floats(p, groups) + groups * p.capacity();
    Queries queries{groups, groups, 0, attention.window, 0};
    queries.all = true;
    parallel_for(workers, workers, [&](size_t worker) {
        float* own = reinterpret_cast<float*>(scratch) + worker * each;
        float* query = own + folding;
        float* scores = own + weigh_floats(p, groups);
        for (size_t h = worker; h < p.kv_heads; h += workers) {
            const size_t count = static_cast<size_t>(until[h]);
            float* out = shares[h];
            std::fill(out, out + count, 0.0f);
            Stretches stretches;
            Head(p, sequence, h).add(0, count, {}, queries, q.from(0, h * groups), 0, stretches);
            for (const Stretch& stretch : stretches) {
                load_queries(stretch, groups, attention.scale * LOG2_E, query);
                k.score(stretch.head, stretch.queries, query, stretch.from, stretch.to, own, scores + stretch.from,
                        p.capacity());
            }
            for (size_t g = 0; g < groups; g++) {
                float* row = scores + g * p.capacity();
                const float cap = attention.softcap * LOG2_E;
                for (size_t i = 0; cap != 0.0f && i < count; i++) row[i] = std::tanh(row[i] / cap) * cap;
                k.softmax(row, count);
                for (size_t i = 0; i < count; i++) out[i] += row[i];
            }
        }
    });
}

size_t select_scratch(const Pages& p, size_t threads) {
    Scratch all;
    all.take<float>(p.table_pages), all.take<int32_t>(p.table_pages), all.take<float>(2 * p.key_dim);
    return all.used() * std::min(threads, p.kv_heads);
}

void select(const Pages& p, const Place* places, size_t rows, Block<const float> q, size_t heads, size_t count,
            int32_t* chosen, uint8_t* scratch, size_t threads) {
    const AttentionKernels& k = attention_kernels();
    const size_t groups = heads / p.kv_heads, workers = std::min(threads, p.kv_heads);
    const size_t each = select_scratch(p, threads) / workers;
    parallel_for(workers, workers, [&](size_t worker) {
        Scratch own(scratch + worker * each);
        float* scores = own.take<float>(p.table_pages);
        int32_t* order = own.take<int32_t>(p.table_pages);
        float* bounds = own.take<float>(2 * p.key_dim);
        for (size_t task = worker; task < rows * p.kv_heads; task += workers) {
            const size_t row = task / p.kv_heads, h = task % p.kv_heads;
            const Head head(p, static_cast<size_t>(places[row].sequence), h);
            int32_t* out = chosen + task * count;
            const size_t pages = head.bounded(), taken = std::min(pages, count);
            std::iota(order, order + pages, 0);
            if (taken < pages) {
                for (size_t j = 0; j < pages; j++) {
                    scores[j] = -__builtin_inff();
                    for (size_t part = 0; part < p.bound_parts; part++) {
                        const uint8_t* of_part = head.bounds(j) + part * 2 * p.key_dim * itemsize(p.kind);
                        k.load(of_part, p.kind, 2 * p.key_dim, bounds);
                        for (size_t g = 0; g < groups; g++)
                            scores[j] = std::max(scores[j], k.bound(bounds, q.at(row, h * groups + g), 1, p.key_dim));
                    }
                }
                std::nth_element(order, order + taken, order + pages, [&](int32_t a, int32_t b) {
                    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
                });
                std::sort(order, order + taken);
            }
            std::copy(order, order + taken, out);
            std::fill(out + taken, out + count, -1);
        }
    });
}

size_t rank_scratch(const Pages& p, size_t threads) {
    Scratch all;
    all.take<float>(p.table_pages), all.take<int32_t>(p.table_pages), all.take<float>(PAGE * p.key_dim);
    return all.used() * std::min(threads, p.kv_heads);
}

void rank(const Pages& p, const Place* places, size_t rows, Block<const float> q, size_t heads, const Ranked& ranked,
          uint8_t* scratch, size_t threads) {
    const size_t groups = heads / p.kv_heads, workers = std::min(threads, p.kv_heads);
    const size_t each = rank_scratch(p, threads) / workers;
    parallel_for(workers, workers, [&](size_t worker) {
        Scratch own(scratch + worker * each);
        float* scores = own.take<float>(p.table_pages);
        int32_t* order = own.take<int32_t>(p.table_pages);
        float* keys = own.take<float>(PAGE * p.key_dim);
        const auto put = [](const int32_t* from, size_t count, int32_t* out, size_t room) {
            std::fill(std::copy(from, from + count, out), out + room, -1);
            std::sort(out, out + count);
        };
        for (size_t task = worker; task < rows * p.kv_heads; task += workers) {
            const size_t row = task / p.kv_heads, h = task % p.kv_heads;
            const Head head(p, static_cast<size_t>(places[row].sequence), h);
            const size_t pages = head.coded(), best = std::min(pages, ranked.count);
            const size_t next = std::min(pages - best, ranked.more);
            for (size_t j = 0; j < pages; j++) {
                attention_kernels().decode(p.key_codec, p.kind, head.code(p.coded_keys, p.key_codec, head.table()[j]),
                                           head.key_side(), keys);
                scores[j] = -__builtin_inff();
                for (size_t g = 0; g < groups; g++)
                    for (size_t t = 0; t < PAGE; t++)
                        scores[j] = std::max(scores[j], dot(q.at(row, h * groups + g), keys + t * p.key_dim, p.key_dim));
            }
            std::iota(order, order + pages, 0);
            std::sort(order, order + pages,
                      [&](int32_t a, int32_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
            put(order, best, ranked.chosen + task * ranked.count, ranked.count);
            put(order + best, next, ranked.next + task * ranked.more, ranked.more);
            put(order + best, pages - best, ranked.others + task * p.table_pages, p.table_pages);
        }
    });
}

}  // namespace tightfit
