// Attention alone, for the sanitizers (`make sanitize`): caches, queries, results and scratch in buffers without a byte
// to spare, every instruction set of the processor, rings, odd sizes, pages that are coded or in a file, and many threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <unistd.h>

#include "attention.h"
#include "attention_tasks.h"
#include "levels.h"

using namespace tightfit;

namespace {

std::mt19937 generator(1);
std::normal_distribution<float> normal;
int failures = 0;

void check(bool condition, const char* what) {
    if (!condition) {
        std::printf("failed: %s\n", what);
        failures++;
    }
}

struct Case {
    Kind kind;
    size_t kv_heads, groups, key_dim, value_dim, first, count, window;
    bool shared, sinks;
    float softcap;
};

// What appended numbers can hold in every kind: a few bits.
float coarse() { return std::round(normal(generator) * 8) / 8; }

std::vector<float> random(size_t count, float (*number)()) {
    std::vector<float> numbers(count);
    for (float& value : numbers) value = number();
    return numbers;
}

class Memory {
public:
    explicit Memory(size_t bytes) : data_(std::aligned_alloc(64, (bytes + 63) / 64 * 64), &std::free) {}
    uint8_t* get() { return static_cast<uint8_t*>(data_.get()); }

private:
    std::unique_ptr<void, void (*)(void*)> data_;
};

void check_case(const Case& c, size_t threads) {
    const size_t stop = c.first + c.count, heads = c.kv_heads * c.groups, sequences = 2;
    const size_t slots = std::min(stop, c.window - 1 + c.count), itemsize = c.kind == Kind::f32 ? 4 : 2;
    const size_t key_bytes = sequences * c.kv_heads * slots * c.key_dim * itemsize;
    const size_t value_bytes = sequences * c.kv_heads * slots * c.value_dim * itemsize;
    const std::unique_ptr<uint8_t[]> keys(new uint8_t[key_bytes]()), values(new uint8_t[c.shared ? 0 : value_bytes]());
    const KeysValues cache{c.kind, keys.get(), c.shared ? keys.get() : values.get(), sequences, c.kv_heads, slots,
                           c.key_dim, c.value_dim};

    // All tokens are appended in turn, as a ring is filled.
    const std::vector<float> k = random(stop * c.kv_heads * c.key_dim, coarse);
    const std::vector<float> v = random(stop * c.kv_heads * c.value_dim, coarse);
    std::vector<Place> places;
    for (size_t p = 0; p < stop; p++) places.push_back({1, static_cast<int32_t>(p)});
    for (size_t p = 0; p < stop; p += c.count)
        append(cache, &places[p], std::min(c.count, stop - p),
               {&k[p * c.kv_heads * c.key_dim], c.kv_heads * c.key_dim, c.key_dim},
               {&v[p * c.kv_heads * c.value_dim], c.kv_heads * c.value_dim, c.value_dim}, threads);

    const std::vector<float> q = random(c.count * heads * c.key_dim, coarse), sinks = random(heads, coarse);
    const Attention attention{heads, 1 / std::sqrt(static_cast<float>(c.key_dim)), c.window, c.softcap,
                              c.sinks ? sinks.data() : nullptr};
    std::vector<double> expected(c.count * heads * c.value_dim);
    for (size_t n = 0; n < c.count; n++)
        for (size_t h = 0; h < heads; h++) {
            const size_t position = c.first + n, low = position < c.window ? 0 : position - c.window + 1;
            double* out = &expected[(n * heads + h) * c.value_dim];
            double total = c.sinks ? std::exp(sinks[h]) : 0;
            for (size_t p = low; p <= position; p++) {
                const float* key = &k[(p * c.kv_heads + h / c.groups) * c.key_dim];
                double score = 0;
                for (size_t d = 0; d < c.key_dim; d++) score += q[(n * heads + h) * c.key_dim + d] * key[d];
                score *= attention.scale;
                if (c.softcap != 0) score = c.softcap * std::tanh(score / c.softcap);
                total += std::exp(score);
                const float* value = c.shared ? key : &v[(p * c.kv_heads + h / c.groups) * c.value_dim];
                for (size_t d = 0; d < c.value_dim; d++) out[d] += std::exp(score) * value[d];
            }
            for (size_t d = 0; d < c.value_dim; d++) out[d] /= total;
        }

    std::vector<float> out(expected.size());
    const auto compare = [&](double tolerance, const char* what) {
        bool close = true;
        for (size_t i = 0; i < out.size(); i++) close = close && std::abs(out[i] - expected[i]) <= tolerance;
        check(close, what);
        std::fill(out.begin(), out.end(), std::numeric_limits<float>::quiet_NaN());
    };
    const Block<const float> queries{q.data(), heads * c.key_dim, c.key_dim};
    const Block<float> results{out.data(), heads * c.value_dim, c.value_dim};
    Memory rows(attend_rows_scratch(cache, c.count, heads, threads));
    attend_rows(cache, &places[c.first], {}, c.count, queries, results, attention, rows.get(), threads);
    compare(1e-5, "attention of rows");
    for (const bool bf16 : {false, true}) {
        Memory scratch(attend_scratch(cache, c.count, heads, bf16, threads));
        attend(cache, 1, c.first, c.count, queries, results, attention, bf16, scratch.get(), threads);
        // Queries and weights are rounded by 2^-9, which moves scores of up to 8 by 2^-6, and values reach 4.
        compare(bf16 ? 4.0 / 64 : 1e-5, bf16 ? "attention in bfloat16" : "attention");
    }
}

void check_rotation(size_t heads, size_t half, size_t rest, bool interleaved) {
    const size_t tokens = 3, features = 2 * half + rest;
    std::vector<float> x = random(tokens * heads * features, coarse), before = x;
    const std::vector<float> angles = random(tokens * half, coarse);
    std::vector<float> cos, sin;
    for (float angle : angles) cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
    rotate({x.data(), heads * features, features}, tokens, heads, {{cos.data(), half}, {sin.data(), half}, half, interleaved},
           2);
    for (size_t t = 0; t < tokens; t++)
        for (size_t h = 0; h < heads; h++) {
            const float *was = &before[(t * heads + h) * features], *is = &x[(t * heads + h) * features];
            for (size_t i = 0; i < half; i++) {
                const size_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : half + i;
                const float c = cos[t * half + i], s = sin[t * half + i];
                check(std::abs(is[a] - (was[a] * c - was[b] * s)) < 1e-6, "rotation");
                check(std::abs(is[b] - (was[b] * c + was[a] * s)) < 1e-6, "rotation");
            }
            check(std::equal(is + 2 * half, is + features, was + 2 * half), "features that are not rotated");
        }
}

// Pages of one head that `rows` of two tokens fold: where they lie, and in how many bits, 16 for bfloat16.
struct Listed {
    size_t rows, key_dim, value_dim, tokens, from, key_bits, value_bits;
    bool in_file, shared;
};

// Pages in the order of `table`, and what they hold.
struct Stored {
    Codec codec;
    std::unique_ptr<uint8_t[]> pages;
    size_t bytes;
    std::vector<float> numbers;

    Stored(const Codec& codec, const std::vector<int32_t>& table)
        : codec(codec), bytes(table.size() * codec.page_bytes()), numbers(table.size() * PAGE * codec.dim) {
        pages.reset(new uint8_t[bytes]());
        for (size_t i = 0; i < table.size(); i++) {
            uint8_t* page = pages.get() + static_cast<size_t>(table[i]) * codec.page_bytes();
            const std::vector<float> original = random(PAGE * codec.dim, coarse);
            attention_kernels().encode(codec, Kind::bf16, original.data(), nullptr, page);
            attention_kernels().decode(codec, Kind::bf16, page, nullptr, &numbers[i * PAGE * codec.dim]);
        }
    }
};

void check_pages(const Listed& c) {
    std::vector<int32_t> table;
    for (size_t i = 0; i < (c.tokens + PAGE - 1) / PAGE; i++) table.push_back(static_cast<int32_t>(i));
    std::shuffle(table.begin(), table.end(), generator);
    const Stored keys({c.key_bits, c.key_dim, true}, table);
    const Stored values({c.value_bits, c.value_dim, false}, table);
    const bool coded = c.key_bits < 16 || c.value_bits < 16;

    // Seven tokens of the last page are in another order, as those that are not committed yet; codes are always whole.
    std::vector<int32_t> path{3, 1, 2, 0, 5, 4, 6};
    const auto token_of = [&](size_t i) {
        const size_t committed = c.tokens - path.size();
        return coded || c.in_file || i < committed ? i : committed + static_cast<size_t>(path[i - committed]);
    };
    HeadCache head{Kind::bf16, keys.pages.get(), c.shared ? keys.pages.get() : values.pages.get(), table.size() * PAGE,
                   c.key_dim, c.value_dim, c.shared ? c.key_dim : c.value_dim};
    head.table = table.data(), head.coded = coded;
    head.key_codec = keys.codec, head.value_codec = values.codec;
    FILE* file = nullptr;
    if (c.in_file) {
        file = std::tmpfile();
        head.chosen = table.data(), head.file = fileno(file), head.values_at = keys.bytes;
        check(std::fwrite(keys.pages.get(), 1, keys.bytes, file) == keys.bytes, "writing");
        check(std::fwrite(values.pages.get(), 1, values.bytes, file) == values.bytes, "writing");
        std::fflush(file);
        head.keys = nullptr, head.values = c.shared ? nullptr : reinterpret_cast<const uint8_t*>(1);
    } else if (!coded) {
        head.path = path.data(), head.committed = c.tokens - path.size();
    }

    // The second half of the rows sees less.
    const size_t groups = (c.rows + 1) / 2, stride = (c.value_dim + 15) / 16 * 16;
    const std::vector<int32_t> lows{0, static_cast<int32_t>(c.from + 37)};
    const Queries queries{c.rows, groups, 0, 0, 0, true, lows.data()};
    std::vector<float> q = random(c.rows * c.key_dim, coarse), top(c.rows, LOWEST), total(c.rows), acc(c.rows * stride);
    for (float& number : q) number /= std::sqrt(static_cast<float>(c.key_dim));
    Memory scratch(fold_scratch(c.rows, c.key_dim, c.value_dim, !head.loaded()) * sizeof(float));
    const size_t middle = (c.from + c.tokens) / 2;
    for (const auto& [from, to] : {std::pair{c.from, middle}, std::pair{middle, c.tokens}})
        attention_kernels().fold(head, queries, q.data(), from, to, nullptr, reinterpret_cast<float*>(scratch.get()),
                                 {top.data(), total.data(), acc.data(), stride});
    if (file) std::fclose(file);

    for (size_t r = 0; r < c.rows; r++) {
        std::vector<double> expected(c.value_dim);
        double sum = 0;
        for (size_t i = std::max(c.from, static_cast<size_t>(lows[r / groups])); i < c.tokens; i++) {
            const float* key = &keys.numbers[token_of(i) * c.key_dim];
            const float* value = c.shared ? key : &values.numbers[token_of(i) * c.value_dim];
            double score = 0;
            for (size_t d = 0; d < c.key_dim; d++) score += q[r * c.key_dim + d] * key[d];
            sum += std::exp2(score);
            for (size_t d = 0; d < c.value_dim; d++) expected[d] += std::exp2(score) * value[d];
        }
        // Float32, and where codes are multiplied, numbers of 16 bits: queries, and weights of values of up to 4.
        const double tolerance = coded ? 4e-5 : 1e-5;
        bool close = true;
        for (size_t d = 0; d < c.value_dim; d++)
            close = close && std::abs(acc[r * stride + d] / total[r] - expected[d] / sum) <= tolerance;
        check(close, "attention over pages");
        check(std::abs(top[r] + std::log2(total[r]) - std::log2(sum)) <= tolerance, "the sum of a softmax over pages");
    }
}

}  // namespace

int main() {
    constexpr size_t ALL = std::numeric_limits<size_t>::max() / 2;
    for (Level level : supported_levels()) {
        check(choose(name_of(level)), "choice of kernels");
        for (Kind kind : {Kind::f32, Kind::f16, Kind::bf16})
            for (const Case& c : {Case{kind, 2, 1, 1, 1, 0, 1, ALL, false, false, 0},
                                  Case{kind, 1, 3, 33, 17, 120, 19, ALL, false, true, 0},
                                  Case{kind, 2, 8, 64, 64, 300, 40, ALL, false, false, 2},
                                  Case{kind, 1, 5, 72, 40, 390, 7, 130, false, false, 0},
                                  Case{kind, 3, 2, 16, 16, 200, 33, 50, false, true, 0},
                                  Case{kind, 1, 16, 130, 96, 140, 5, ALL, true, false, 0}})
                for (size_t threads : {1, 3}) check_case(c, threads);
        for (bool in_file : {false, true})
            for (const Listed& c : {Listed{1, 64, 64, 160, 0, 16, 16, in_file, false},
                                   Listed{20, 72, 40, 333, 5, 16, 16, in_file, false},
                                   Listed{4, 96, 64, 333, 40, 16, 16, in_file, true},
                                   Listed{8, 64, 64, 384, 0, 4, 4, in_file, false},
                                   Listed{7, 33, 17, 256, 35, 4, 4, in_file, false},
                                   Listed{16, 1, 1, 128, 0, 2, 2, in_file, false},
                                   Listed{2, 130, 200, 160, 1, 2, 2, in_file, false},
                                   Listed{5, 5, 70, 192, 0, 8, 8, in_file, false},
                                   Listed{35, 64, 96, 160, 33, 8, 2, in_file, false},
                                   Listed{6, 128, 128, 288, 0, 2, 8, in_file, false},
                                   Listed{4, 64, 64, 160, 0, 16, 4, in_file, false},
                                   Listed{9, 40, 64, 160, 0, 4, 16, in_file, false},
                                   Listed{4, 64, 32, 160, 0, 4, 4, in_file, true}})
                check_pages(c);
        for (bool interleaved : {false, true})
            for (size_t half : {1, 7, 32}) check_rotation(3, half, half % 3, interleaved);
        std::printf("%s: checked\n", name_of(level));
    }
    std::printf(failures ? "%d checks failed\n" : "attention passed\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
