// Attention alone, for the sanitizers (`make sanitize`): caches, queries, results and scratch in buffers without a byte
// to spare, every instruction set of the processor, rings, odd sizes, and many threads.
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

#include "attention.h"
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

class Scratch {
public:
    explicit Scratch(size_t bytes) : data_(std::aligned_alloc(64, (bytes + 63) / 64 * 64), &std::free) {}
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
    Scratch rows(attend_rows_scratch(cache, c.count, heads, threads));
    attend_rows(cache, &places[c.first], {}, c.count, queries, results, attention, rows.get(), threads);
    compare(1e-5, "attention of rows");
    for (const bool bf16 : {false, true}) {
        Scratch scratch(attend_scratch(cache, c.count, heads, bf16, threads));
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
        for (bool interleaved : {false, true})
            for (size_t half : {1, 7, 32}) check_rotation(3, half, half % 3, interleaved);
        std::printf("%s: checked\n", name_of(level));
    }
    std::printf(failures ? "%d checks failed\n" : "attention passed\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
