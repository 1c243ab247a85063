#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>

#include "attention_tasks.h"
#include "levels.h"
#include "pool.h"
#include "runs.h"

namespace tightfit {
namespace {

constexpr float LOG2_E = 1.44269504f;
constexpr size_t TASK_NUMBERS = 32 << 10;  // copied or turned: some microseconds, well above what starting a task costs
constexpr size_t TASK_BYTES = 64 << 10;    // of keys and values, likewise
constexpr size_t PARTS = 16;               // of the keys that a decoding row sees, at most: they are shared among threads
constexpr size_t SMALLEST_PART = 256;      // keys
constexpr size_t PARTIAL_BYTES = 4 << 20;  // of unfinished parts that are kept at once, if one row's take no more
constexpr size_t PREFILL_ROWS = 128;       // queries times heads that are folded at once in float32

bool has_bf16() {
#ifdef TIGHTFIT_X86
    return level() == Level::amx;
#else
    return false;
#endif
}

// work(task, worker) for all tasks; no two at once have the same worker, of which there are at most `threads`.
template <class Work>
void for_tasks(size_t tasks, size_t threads, Work work) {
    std::atomic<size_t> next{0};
    const size_t workers = std::min(tasks, threads);
    parallel_for(workers, workers, [&](size_t worker) {
        for (size_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(task, worker);
    });
}

void begin(const Folded& folded, size_t rows) {
    std::fill(folded.top, folded.top + rows, LOWEST);
    std::fill(folded.total, folded.total + rows, 0.0f);
    std::fill(folded.acc, folded.acc + rows * folded.stride, 0.0f);
}

Folded part_of(const Folded& folded, size_t row) {
    return {folded.top + row, folded.total + row, folded.acc + row * folded.stride, folded.stride};
}

// out = the output of `count` folded parts of one row, which lie `distance` rows apart; and what they add up to.
void finish(const Folded& folded, size_t row, size_t count, size_t distance, const float* sink, float* out, size_t dim,
            float* lse) {
    float top = sink ? *sink * LOG2_E : LOWEST;
    for (size_t i = 0; i < count; i++) top = std::max(top, folded.top[row + i * distance]);
    float total = sink ? std::exp2(*sink * LOG2_E - top) : 0.0f;
    std::fill(out, out + dim, 0.0f);
    for (size_t i = 0; i < count; i++) {
        const size_t part = row + i * distance;
        const float weight = std::exp2(folded.top[part] - top);
        const float* acc = folded.acc + part * folded.stride;
        total += folded.total[part] * weight;
        for (size_t d = 0; d < dim; d++) out[d] += acc[d] * weight;
    }
    if (lse) *lse = top + std::log2(total);
    const float scale = 1.0f / total;
    for (size_t d = 0; d < dim; d++) out[d] *= scale;
}

// ---- writing ----

// work(token) for all tokens, of which each writes `numbers`.
template <class Work>
void for_tokens(size_t tokens, size_t numbers, size_t threads, Work work) {
    const size_t tasks = std::max<size_t>(std::min(tokens, tokens * numbers / TASK_NUMBERS), 1);
    parallel_for(tasks, threads, [&](size_t task) {
        for (size_t t = tokens * task / tasks; t < tokens * (task + 1) / tasks; t++) work(t);
    });
}

void turn(const AttentionKernels& kernels, Block<float> x, size_t heads, const Rotation& rotation, size_t t) {
    for (size_t h = 0; h < heads; h++)
        kernels.rotate(x.at(t, h), rotation.cos[t], rotation.sin[t], rotation.half, rotation.interleaved);
}

void keep(const AttentionKernels& kernels, const KeysValues& cache, Place place, Block<const float> k,
          Block<const float> v, size_t t) {
    const size_t slot = static_cast<size_t>(place.position) % cache.slots;
    for (size_t h = 0; h < cache.kv_heads; h++) {
        const size_t row = (static_cast<size_t>(place.sequence) * cache.kv_heads + h) * cache.slots + slot;
        kernels.store(k.at(t, h), cache.key_dim, cache.kind, cache.keys + row * cache.key_dim * itemsize(cache.kind));
        if (!cache.shared())
            kernels.store(v.at(t, h), cache.value_dim, cache.kind,
                          cache.values + row * cache.value_dim * itemsize(cache.kind));
    }
}

// ---- decoding rows ----

// The tokens that a row sees, in parts of `step` from `first` on, which are the same whatever else is computed.
struct Partition {
    size_t low, first, end, step, count;

    explicit Partition(Source::Seen seen) : low(seen.low), end(seen.end) {
        first = low / KEY_BLOCK * KEY_BLOCK;
        step = std::max(SMALLEST_PART, round_up((end - first + PARTS - 1) / PARTS, KEY_BLOCK));
        count = (end - first + step - 1) / step;
    }
    size_t from(size_t part) const { return std::max(first + part * step, low); }
    size_t to(size_t part) const { return std::min(first + (part + 1) * step, end); }
};

// Where attend_rows keeps what: for each worker its queries and scores, for each part of each row its running softmax.
struct RowsScratch {
    size_t groups, parts, stride, rows_at_once, worker_bytes;
    Folded folded;
    std::atomic<uint32_t>* done;  // parts of (row, key-value head)
    uint8_t* workers;
    size_t bytes;

    RowsScratch(const Source& source, size_t rows, size_t heads, size_t threads, uint8_t* address = nullptr) {
        groups = heads / source.kv_heads;
        parts = std::min(PARTS, (source.longest + KEY_BLOCK) / SMALLEST_PART + 1);
        stride = round_up(source.value_dim, 16);
        rows_at_once = std::min(rows, std::max<size_t>(PARTIAL_BYTES / (heads * parts * stride * sizeof(float)), 1));
        worker_bytes = round_up((round_up(groups * source.key_dim, 16) +
                                 fold_scratch(groups, source.key_dim, source.value_dim, source.made)) * sizeof(float), 64);
        Scratch all(address);
        const size_t states = rows_at_once * heads * parts;
        folded = {all.take<float>(states), all.take<float>(states), all.take<float>(states * stride), stride};
        done = all.take<std::atomic<uint32_t>>(rows_at_once * source.kv_heads);
        workers = all.take<uint8_t>(worker_bytes * threads);
        bytes = all.used();
    }
};

// ---- prefill ----

// What a task keeps: its queries and scores, and their running softmax.
struct PrefillScratch {
    float *q, *scores;
    Folded folded;
    size_t bytes;

    PrefillScratch(size_t rows, size_t key_dim, size_t value_dim, bool made, uint8_t* address = nullptr) {
        const size_t stride = round_up(value_dim, 16);
        Scratch all(address);
        q = all.take<float>(rows * key_dim), scores = all.take<float>(fold_scratch(rows, key_dim, value_dim, made));
        folded = {all.take<float>(rows), all.take<float>(rows), all.take<float>(rows * stride), stride};
        bytes = all.used();
    }
};

void prefill(const Prefill& p, bool made, uint8_t* address) {
    const PrefillScratch s(p.rows, p.key_dim, p.value_dim, made, address);
    begin(s.folded, p.rows);
    for (const Stretch& stretch : p.seen) {
        load_queries(stretch, p.rows, p.scale, s.q);
        attention_kernels().fold(stretch.head, stretch.queries, s.q, stretch.from, stretch.to, nullptr, s.scores, s.folded);
    }
    for (size_t r = 0; r < p.rows; r++) {
        const size_t token = r / p.groups, head = r % p.groups;
        finish(s.folded, r, 1, 0, p.sinks ? p.sinks + head : nullptr, p.out.at(token, head), p.value_dim,
               p.lse.data ? p.lse[token] + head : nullptr);
    }
}

// How many queries a task has: as many as fit the scratch of a thread, fewer where there would be too few tasks.
struct PrefillTasks {
    size_t queries, tasks_per_head, lows_bytes, worker_bytes;

    PrefillTasks(const PrefillSource& source, size_t count, size_t heads, bool bf16, size_t threads) {
        const size_t groups = heads / source.kv_heads;
        size_t rows = PREFILL_ROWS;
#ifdef TIGHTFIT_X86
        if (bf16) rows = amx_prefill_rows(source.key_dim, source.value_dim);
#endif
        const size_t share = (count * source.kv_heads + 2 * threads - 1) / (2 * threads);
        queries = std::min({std::max<size_t>(rows / groups, 1), share, count});
        tasks_per_head = (count + queries - 1) / queries;
        lows_bytes = round_up(queries * sizeof(int32_t), 64);
        worker_bytes = PrefillScratch(queries * groups, source.key_dim, source.value_dim, source.made).bytes;
#ifdef TIGHTFIT_X86
        if (bf16) worker_bytes = amx_prefill_scratch(queries * groups, source.key_dim, source.value_dim, source.made);
#endif
        worker_bytes = round_up(worker_bytes + lows_bytes, 64);
    }
};

// ---- keys and values as they are, in slots ----

HeadCache head_of(const KeysValues& cache, size_t sequence, size_t head) {
    const size_t first = (sequence * cache.kv_heads + head) * cache.slots * itemsize(cache.kind);
    return {cache.kind, cache.keys + first * cache.key_dim, cache.values + first * cache.value_stride(),
            cache.slots, cache.key_dim, cache.value_dim, cache.value_stride()};
}

struct SlotRows final : Source {
    const KeysValues& cache;
    const Place* places;
    const Paths paths;
    Block<const float> q;
    size_t groups, window;

    SlotRows(const KeysValues& cache, const Place* places, const Paths& paths, Block<const float> q, size_t heads,
             size_t window)
        : Source(cache.kv_heads, cache.key_dim, cache.value_dim, cache.slots), cache(cache), places(places), paths(paths),
          q(q), groups(heads / cache.kv_heads), window(window) {}

    size_t end(size_t row) const {
        return paths.list ? paths.committed[row] + paths.length(row) : static_cast<size_t>(places[row].position) + 1;
    }
    Seen seen(size_t row, size_t) const override {
        const size_t end = this->end(row);
        return {end <= window ? 0 : end - window, end};
    }
    void stretches(size_t row, size_t head, size_t from, size_t to, const Queries& queries,
                   Stretches& out) const override {
        HeadCache keys = head_of(cache, static_cast<size_t>(places[row].sequence), head);
        if (paths.list) keys.path = paths[row], keys.committed = paths.committed[row];
        Queries own = queries;
        own.first = end(row) - 1, own.window = window;
        out.add({keys, own, from, to, q.from(row, head * groups)});
    }
    const uint8_t* first_key(size_t row, size_t head, size_t token) const override {
        const HeadCache keys = head_of(cache, static_cast<size_t>(places[row].sequence), head);
        return keys.keys + token % keys.slots * keys.key_dim * itemsize(keys.kind);
    }
};

struct SlotPrefill final : PrefillSource {
    const KeysValues& cache;
    size_t sequence, first, groups, window;
    Block<const float> q;

    SlotPrefill(const KeysValues& cache, size_t sequence, size_t first, Block<const float> q, size_t heads, size_t window)
        : PrefillSource(cache.kv_heads, cache.key_dim, cache.value_dim), cache(cache), sequence(sequence), first(first),
          groups(heads / cache.kv_heads), window(window), q(q) {}

    void stretches(size_t start, size_t head, const Queries& queries, int32_t*, Stretches& out) const override {
        Queries own = queries;
        own.first = first + start, own.window = window;
        const size_t last = own.position(own.rows - 1);
        out.add({head_of(cache, sequence, head), own, own.lowest(0), last + 1, q.from(start, head * groups)});
    }
};

}  // namespace

const AttentionKernels& attention_kernels() {
    switch (level()) {
#ifdef TIGHTFIT_X86
        case Level::amx: return amx_attention_kernels;
        case Level::avx512vnni:
        case Level::avx512: return avx512_attention_kernels;
        case Level::avxvnni:
        case Level::avx2: return avx2_attention_kernels;
#endif
        default: return portable_attention_kernels;
    }
}

void rotate(Block<float> x, size_t tokens, size_t heads, const Rotation& rotation, size_t threads) {
    const AttentionKernels& k = attention_kernels();
    for_tokens(tokens, heads * rotation.half, threads, [&](size_t t) { turn(k, x, heads, rotation, t); });
}

void append(const KeysValues& cache, const Place* places, size_t tokens, Block<const float> k, Block<const float> v,
            size_t threads) {
    const AttentionKernels& kern = attention_kernels();
    const size_t numbers = cache.kv_heads * (cache.key_dim + cache.value_dim);
    for_tokens(tokens, numbers, threads, [&](size_t t) { keep(kern, cache, places[t], k, v, t); });
}

void rotate_append(const KeysValues& cache, const Place* places, size_t tokens, Block<float> q, size_t heads,
                   Block<float> k, Block<const float> v, const Rotation& rotation, size_t threads) {
    const AttentionKernels& kern = attention_kernels();
    const size_t numbers = heads * rotation.half + cache.kv_heads * (cache.key_dim + cache.value_dim);
    for_tokens(tokens, numbers, threads, [&](size_t t) {
        turn(kern, q, heads, rotation, t);
        turn(kern, k, cache.kv_heads, rotation, t);
        keep(kern, cache, places[t], {k.data, k.outer_stride, k.inner_stride}, v, t);
    });
}

void move(const KeysValues& cache, size_t sequence, size_t from, size_t to) {
    if (from == to) return;
    for (size_t h = 0; h < cache.kv_heads; h++) {
        const size_t row = (sequence * cache.kv_heads + h) * cache.slots;
        const auto copy = [&](uint8_t* data, size_t bytes) {
            std::memmove(data + (row + to % cache.slots) * bytes, data + (row + from % cache.slots) * bytes, bytes);
        };
        copy(cache.keys, cache.key_dim * itemsize(cache.kind));
        if (!cache.shared()) copy(cache.values, cache.value_dim * itemsize(cache.kind));
    }
}

size_t attend_rows_scratch(const Source& source, size_t rows, size_t heads, size_t threads) {
    return RowsScratch(source, rows, heads, threads).bytes;
}

void attend_rows(const Source& source, size_t rows, Block<float> out, Rows<float> lse, const Attention& attention,
                 uint8_t* scratch, size_t threads) {
    const AttentionKernels& k = attention_kernels();
    const RowsScratch s(source, rows, attention.heads, threads, scratch);
    const float scale = attention.scale * LOG2_E, softcap = attention.softcap * LOG2_E;
    const Queries queries{s.groups, s.groups, 0, attention.window, softcap};
    for (size_t at = 0; at < rows; at += s.rows_at_once) {
        const size_t count = std::min(rows - at, s.rows_at_once);
        size_t parts = 0, tokens = 0;
        for (size_t slot = 0; slot < count * source.kv_heads; slot++) {
            const size_t row = at + slot / source.kv_heads, first = slot % source.kv_heads * s.groups;
            const Partition seen(source.seen(row, slot % source.kv_heads));
            for (size_t g = first; seen.count == 0 && g < first + s.groups; g++) {  // no task will come here
                std::fill(out.at(row, g), out.at(row, g) + source.value_dim, 0.0f);
                if (lse.data) lse[row][g] = -__builtin_inff();
            }
            parts = std::max(parts, seen.count);
            tokens += seen.end - seen.first;
        }
        for (size_t i = 0; i < count * source.kv_heads; i++) new (s.done + i) std::atomic<uint32_t>(0);
        const size_t bytes = tokens * (source.key_dim + source.value_dim) * sizeof(BF16);
        const size_t tasks = count * source.kv_heads * parts;
        const size_t workers = bytes < TASK_BYTES ? 1 : std::min({tasks, threads, MOST_THREADS});
        Runs runs(tasks, workers);
        parallel_for(workers, workers, [&](size_t worker) {
            float* query = reinterpret_cast<float*>(s.workers + worker * s.worker_bytes);
            float* scores = query + round_up(s.groups * source.key_dim, 16);
            runs.take(worker, [&](size_t index) {
                const size_t part = index % parts, slot = index / parts;
                const size_t row = at + slot / source.kv_heads, head = slot % source.kv_heads;
                const Partition seen(source.seen(row, head));
                if (part >= seen.count) return;
                const size_t state = slot * s.parts * s.groups;
                const Folded folded = part_of(s.folded, state + part * s.groups);
                begin(folded, s.groups);
                const uint8_t* next = nullptr;
                if (index + 1 < tasks) {
                    const size_t then = (index + 1) / parts, r = at + then / source.kv_heads, h = then % source.kv_heads;
                    next = source.first_key(r, h, Partition(source.seen(r, h)).from((index + 1) % parts));
                }
                Stretches stretches;
                source.stretches(row, head, seen.from(part), seen.to(part), queries, stretches);
                for (const Stretch& stretch : stretches) {
                    load_queries(stretch, s.groups, scale, query);
                    k.fold(stretch.head, stretch.queries, query, stretch.from, stretch.to, next, scores, folded);
                }
                if (s.done[slot].fetch_add(1, std::memory_order_acq_rel) + 1 < seen.count) return;
                for (size_t g = 0; g < s.groups; g++) {
                    const size_t of_all = head * s.groups + g;
                    finish(s.folded, state + g, seen.count, s.groups,
                           attention.sinks ? attention.sinks + of_all : nullptr, out.at(row, of_all), source.value_dim,
                           lse.data ? lse[row] + of_all : nullptr);
                }
            });
        });
    }
}

size_t attend_scratch(const PrefillSource& source, size_t count, size_t heads, bool bf16, size_t threads) {
    return threads * PrefillTasks(source, count, heads, bf16 && has_bf16(), threads).worker_bytes;
}

void attend(const PrefillSource& source, size_t count, Block<float> out, Rows<float> lse, const Attention& attention,
            bool bf16, uint8_t* scratch, size_t threads) {
    bf16 = bf16 && has_bf16();
    const PrefillTasks t(source, count, attention.heads, bf16, threads);
    const size_t groups = attention.heads / source.kv_heads;
    for_tasks(source.kv_heads * t.tasks_per_head, threads, [&](size_t task, size_t worker) {
        const size_t head = task % source.kv_heads, first_head = head * groups;
        const size_t start = (t.tasks_per_head - 1 - task / source.kv_heads) * t.queries;  // the longest first
        const size_t rows = std::min(t.queries, count - start) * groups;
        uint8_t* address = scratch + worker * t.worker_bytes;
        Stretches stretches;
        source.stretches(start, head, {rows, groups, 0, attention.window, attention.softcap * LOG2_E},
                         reinterpret_cast<int32_t*>(address), stretches);
        address += t.lows_bytes;
        const Rows<float> sums{lse.data ? lse[start] + first_head : nullptr, lse.stride};
        const Prefill p{stretches, rows, groups, source.key_dim, source.value_dim, out.from(start, first_head),
                        attention.scale * LOG2_E, attention.sinks ? attention.sinks + first_head : nullptr, sums};
#ifdef TIGHTFIT_X86
        if (bf16) return amx_prefill(p, source.made, address);
#endif
        prefill(p, source.made, address);
    });
}

size_t attend_rows_scratch(const KeysValues& cache, size_t rows, size_t heads, size_t threads) {
    return attend_rows_scratch(SlotRows(cache, nullptr, {}, {}, heads, 0), rows, heads, threads);
}

void attend_rows(const KeysValues& cache, const Place* places, const Paths& paths, size_t rows, Block<const float> q,
                 Block<float> out, const Attention& attention, uint8_t* scratch, size_t threads) {
    const SlotRows source(cache, places, paths, q, attention.heads, attention.window);
    attend_rows(source, rows, out, {}, attention, scratch, threads);
}

size_t attend_scratch(const KeysValues& cache, size_t count, size_t heads, bool bf16, size_t threads) {
    return attend_scratch(SlotPrefill(cache, 0, 0, {}, heads, 0), count, heads, bf16, threads);
}

void attend(const KeysValues& cache, size_t sequence, size_t first, size_t count, Block<const float> q,
            Block<float> out, const Attention& attention, bool bf16, uint8_t* scratch, size_t threads) {
    const SlotPrefill source(cache, sequence, first, q, attention.heads, attention.window);
    attend(source, count, out, {}, attention, bf16, scratch, threads);
}

}  // namespace tightfit
