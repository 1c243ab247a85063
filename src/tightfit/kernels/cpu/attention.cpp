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

const AttentionKernels& kernels() {
    switch (level()) {
#ifdef TIGHTFIT_X86
        case Level::amx:
        case Level::avx512vnni:
        case Level::avx512: return avx512_attention_kernels;
        case Level::avxvnni:
        case Level::avx2: return avx2_attention_kernels;
#endif
        default: return portable_attention_kernels;
    }
}

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

HeadCache head_of(const KeysValues& cache, size_t sequence, size_t head) {
    const size_t first = (sequence * cache.kv_heads + head) * cache.slots * itemsize(cache.kind);
    return {cache.kind, cache.keys + first * cache.key_dim, cache.values + first * cache.value_stride(),
            cache.slots, cache.key_dim, cache.value_dim, cache.value_stride()};
}

void load_queries(Block<const float> q, size_t rows, size_t groups, size_t dim, float scale, float* out) {
    for (size_t r = 0; r < rows; r++, out += dim) {
        const float* from = q.at(r / groups, r % groups);
        for (size_t d = 0; d < dim; d++) out[d] = from[d] * scale;
    }
}

void begin(const Folded& folded, size_t rows) {
    std::fill(folded.top, folded.top + rows, LOWEST);
    std::fill(folded.total, folded.total + rows, 0.0f);
    std::fill(folded.acc, folded.acc + rows * folded.stride, 0.0f);
}

Folded part_of(const Folded& folded, size_t row) {
    return {folded.top + row, folded.total + row, folded.acc + row * folded.stride, folded.stride};
}

// out = the output of `count` folded parts of one row, which lie `distance` rows apart.
void finish(const Folded& folded, size_t row, size_t count, size_t distance, const float* sink, float* out, size_t dim) {
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

// The keys that a query sees, in parts of `step` from `first` on, which are the same whatever else is computed.
struct Partition {
    size_t first, end, step, count;

    Partition(size_t position, size_t window) {
        const size_t low = position < window ? 0 : position - window + 1;
        first = low / KEY_BLOCK * KEY_BLOCK, end = position + 1;
        step = std::max(SMALLEST_PART, round_up((end - first + PARTS - 1) / PARTS, KEY_BLOCK));
        count = (end - first + step - 1) / step;
    }
};

// A part of the keys of one key-value head that one row sees; `slot` counts rows and heads.
struct RowsTask {
    Queries queries;
    HeadCache head;
    size_t row, slot, first_head, part;
    Partition seen = Partition(queries.first, queries.window);

    size_t from() const { return std::max(seen.first + part * seen.step, queries.lowest(0)); }
    size_t to() const { return std::min(seen.first + (part + 1) * seen.step, seen.end); }
    const uint8_t* first_key() const { return head.keys + from() % head.slots * head.key_dim * itemsize(head.kind); }
};

// Where attend_rows keeps what: for each worker its queries and scores, for each part of each row its running softmax.
struct RowsScratch {
    size_t groups, parts, stride, rows_at_once, worker_bytes;
    Folded folded;
    std::atomic<uint32_t>* done;  // parts of (row, key-value head)
    uint8_t* workers;
    size_t bytes;

    RowsScratch(const KeysValues& cache, size_t rows, size_t heads, size_t threads, uint8_t* address = nullptr) {
        groups = heads / cache.kv_heads;
        parts = std::min(PARTS, (cache.slots + KEY_BLOCK) / SMALLEST_PART + 1);
        stride = round_up(cache.value_dim, 16);
        rows_at_once = std::min(rows, std::max<size_t>(PARTIAL_BYTES / (heads * parts * stride * sizeof(float)), 1));
        worker_bytes = (round_up(groups * cache.key_dim, 16) + groups * KEY_BLOCK) * sizeof(float);
        Scratch all(address);
        const size_t states = rows_at_once * heads * parts;
        folded = {all.take<float>(states), all.take<float>(states), all.take<float>(states * stride), stride};
        done = all.take<std::atomic<uint32_t>>(rows_at_once * cache.kv_heads);
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

    PrefillScratch(size_t rows, size_t key_dim, size_t value_dim, uint8_t* address = nullptr) {
        const size_t stride = round_up(value_dim, 16);
        Scratch all(address);
        q = all.take<float>(rows * key_dim), scores = all.take<float>(rows * KEY_BLOCK);
        folded = {all.take<float>(rows), all.take<float>(rows), all.take<float>(rows * stride), stride};
        bytes = all.used();
    }
};

void prefill(const Prefill& p, uint8_t* address) {
    const size_t rows = p.queries.rows, groups = p.queries.groups, to = p.queries.position(rows - 1) + 1;
    const PrefillScratch s(rows, p.head.key_dim, p.head.value_dim, address);
    load_queries(p.q, rows, groups, p.head.key_dim, p.scale, s.q);
    begin(s.folded, rows);
    kernels().fold(p.head, p.queries, s.q, p.queries.lowest(0), to, nullptr, s.scores, s.folded);
    for (size_t r = 0; r < rows; r++)
        finish(s.folded, r, 1, 0, p.sinks ? p.sinks + r % groups : nullptr, p.out.at(r / groups, r % groups),
               p.head.value_dim);
}

// How many queries a task has: as many as fit the scratch of a thread, fewer where there would be too few tasks.
struct PrefillTasks {
    size_t queries, tasks_per_head, worker_bytes;

    PrefillTasks(const KeysValues& cache, size_t count, size_t heads, bool bf16, size_t threads) {
        const size_t groups = heads / cache.kv_heads;
        size_t rows = PREFILL_ROWS;
#ifdef TIGHTFIT_X86
        if (bf16) rows = amx_prefill_rows(cache.key_dim, cache.value_dim);
#endif
        const size_t share = (count * cache.kv_heads + 2 * threads - 1) / (2 * threads);
        queries = std::min({std::max<size_t>(rows / groups, 1), share, count});
        tasks_per_head = (count + queries - 1) / queries;
        worker_bytes = PrefillScratch(queries * groups, cache.key_dim, cache.value_dim).bytes;
#ifdef TIGHTFIT_X86
        if (bf16) worker_bytes = amx_prefill_scratch(queries * groups, cache.key_dim, cache.value_dim);
#endif
    }
};

}  // namespace

void rotate(Block<float> x, size_t tokens, size_t heads, const Rotation& rotation, size_t threads) {
    const AttentionKernels& k = kernels();
    for_tokens(tokens, heads * rotation.half, threads, [&](size_t t) { turn(k, x, heads, rotation, t); });
}

void append(const KeysValues& cache, const Place* places, size_t tokens, Block<const float> k, Block<const float> v,
            size_t threads) {
    const AttentionKernels& kern = kernels();
    const size_t numbers = cache.kv_heads * (cache.key_dim + cache.value_dim);
    for_tokens(tokens, numbers, threads, [&](size_t t) { keep(kern, cache, places[t], k, v, t); });
}

void rotate_append(const KeysValues& cache, const Place* places, size_t tokens, Block<float> q, size_t heads,
                   Block<float> k, Block<const float> v, const Rotation& rotation, size_t threads) {
    const AttentionKernels& kern = kernels();
    const size_t numbers = heads * rotation.half + cache.kv_heads * (cache.key_dim + cache.value_dim);
    for_tokens(tokens, numbers, threads, [&](size_t t) {
        turn(kern, q, heads, rotation, t);
        turn(kern, k, cache.kv_heads, rotation, t);
        keep(kern, cache, places[t], {k.data, k.outer_stride, k.inner_stride}, v, t);
    });
}

size_t attend_rows_scratch(const KeysValues& cache, size_t rows, size_t heads, size_t threads) {
    return RowsScratch(cache, rows, heads, threads).bytes;
}

void attend_rows(const KeysValues& cache, const Place* places, size_t rows, Block<const float> q, Block<float> out,
                 const Attention& attention, uint8_t* scratch, size_t threads) {
    const AttentionKernels& k = kernels();
    const RowsScratch s(cache, rows, attention.heads, threads, scratch);
    const float scale = attention.scale * LOG2_E, softcap = attention.softcap * LOG2_E;
    for (size_t at = 0; at < rows; at += s.rows_at_once) {
        const size_t count = std::min(rows - at, s.rows_at_once);
        size_t parts = 0, keys = 0;
        for (size_t r = 0; r < count; r++) {
            const Partition seen(static_cast<size_t>(places[at + r].position), attention.window);
            parts = std::max(parts, seen.count);
            keys += seen.end - seen.first;
        }
        for (size_t i = 0; i < count * cache.kv_heads; i++) new (s.done + i) std::atomic<uint32_t>(0);
        const size_t bytes = keys * cache.kv_heads * (cache.key_dim + cache.value_stride()) * itemsize(cache.kind);
        const auto task_of = [&](size_t task) {
            const size_t part = task % parts, slot = task / parts, row = at + slot / cache.kv_heads;
            const auto head = slot % cache.kv_heads, sequence = static_cast<size_t>(places[row].sequence);
            const auto position = static_cast<size_t>(places[row].position);
            const Queries queries{s.groups, s.groups, position, attention.window, softcap};
            return RowsTask{queries, head_of(cache, sequence, head), row, slot, head * s.groups, part};
        };
        const size_t tasks = count * cache.kv_heads * parts;
        const size_t workers = bytes < TASK_BYTES ? 1 : std::min({tasks, threads, MOST_THREADS});
        Runs runs(tasks, workers);
        parallel_for(workers, workers, [&](size_t worker) {
            float* query = reinterpret_cast<float*>(s.workers + worker * s.worker_bytes);
            float* scores = query + round_up(s.groups * cache.key_dim, 16);
            runs.take(worker, [&](size_t index) {
                const RowsTask task = task_of(index);
                if (task.part >= task.seen.count) return;
                const Block<const float> of_task = q.from(task.row, task.first_head);
                load_queries(of_task, s.groups, s.groups, cache.key_dim, scale, query);
                const size_t state = task.slot * s.parts * s.groups;
                const Folded folded = part_of(s.folded, state + task.part * s.groups);
                begin(folded, s.groups);
                const uint8_t* next = index + 1 < tasks ? task_of(index + 1).first_key() : nullptr;
                k.fold(task.head, task.queries, query, task.from(), task.to(), next, scores, folded);
                if (s.done[task.slot].fetch_add(1, std::memory_order_acq_rel) + 1 < task.seen.count) return;
                for (size_t g = 0; g < s.groups; g++)
                    finish(s.folded, state + g, task.seen.count, s.groups,
                           attention.sinks ? attention.sinks + task.first_head + g : nullptr,
                           out.at(task.row, task.first_head + g), cache.value_dim);
            });
        });
    }
}

size_t attend_scratch(const KeysValues& cache, size_t count, size_t heads, bool bf16, size_t threads) {
    return threads * PrefillTasks(cache, count, heads, bf16 && has_bf16(), threads).worker_bytes;
}

void attend(const KeysValues& cache, size_t sequence, size_t first, size_t count, Block<const float> q,
            Block<float> out, const Attention& attention, bool bf16, uint8_t* scratch, size_t threads) {
    bf16 = bf16 && has_bf16();
    const PrefillTasks t(cache, count, attention.heads, bf16, threads);
    const size_t groups = attention.heads / cache.kv_heads;
    for_tasks(cache.kv_heads * t.tasks_per_head, threads, [&](size_t task, size_t worker) {
        const size_t head = task % cache.kv_heads, first_head = head * groups;
        const size_t start = (t.tasks_per_head - 1 - task / cache.kv_heads) * t.queries;  // the longest first
        const size_t rows = std::min(t.queries, count - start) * groups;
        const Prefill p{head_of(cache, sequence, head),
                        {rows, groups, first + start, attention.window, attention.softcap * LOG2_E},
                        q.from(start, first_head),
                        out.from(start, first_head),
                        attention.scale * LOG2_E,
                        attention.sinks ? attention.sinks + first_head : nullptr};
        uint8_t* address = scratch + worker * t.worker_bytes;
#ifdef TIGHTFIT_X86
        if (bf16) return amx_prefill(p, address);
#endif
        prefill(p, address);
    });
}

}  // namespace tightfit
