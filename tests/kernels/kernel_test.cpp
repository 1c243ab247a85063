// The kernels alone, for the sanitizers (`make sanitize`): every kind of matrix in buffers without a byte to spare, every
// instruction set of the processor, odd shapes and slices, and many threads.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "ggml.h"
#include "levels.h"
#include "pool.h"

using namespace tightfit;

namespace {

const double NF4[] = {-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
                      -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
                      0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                      0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0};

std::mt19937 generator(1);
int failures = 0;

void check(bool condition, const char* what) {
    if (!condition) {
        std::printf("failed: %s\n", what);
        failures++;
    }
}

uint16_t upper_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}

// Half a float's range, without subnormal numbers, infinities or NaNs: enough to tell a wrong place from a right one.
uint16_t random_f16() { return static_cast<uint16_t>((generator() & 0x83ff) | (10 + generator() % 8) << 10); }

struct Matrix {
    std::unique_ptr<uint8_t[]> data;
    Weight weight;
};

const uint8_t EXPONENT_BITS[] = {3};  // of fp8; that of 4 is the same with other shifts

Matrix random_matrix(Kind kind, size_t group, bool asymmetric, size_t rows, size_t cols, bool half_scales = false) {
    Weight w{kind, group, asymmetric, nullptr, rows, cols, 0, EXPONENT_BITS, half_scales};
    const size_t size = w.tiled() ? (rows + 15) / 16 * w.tile_row_bytes() : rows * cols * itemsize(w.kind);
    std::unique_ptr<uint8_t[]> data(new uint8_t[size]);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < size; i++) data[i] = static_cast<uint8_t>(generator());
    if (w.tiled()) {
        if (kind == Kind::ternary)  // the numbers of triples end at 13
            for (size_t i = 0; i < size; i++) data[i] = static_cast<uint8_t>(generator() % 14 << 4 | generator() % 14);
        for (size_t tile = 0; tile < size; tile += w.tile_bytes())
            for (size_t place = tile + w.code_bytes(); place < tile + w.tile_bytes(); place += 2) {
                const uint16_t scale = half_scales ? random_f16() : upper_half(normal(generator));
                std::memcpy(&data[place], &scale, 2);
            }
    } else {
        for (size_t i = 0; i < rows * cols; i++) {
            const float value = normal(generator);
            const uint16_t half = kind == Kind::f16 ? random_f16() : upper_half(value);
            if (kind == Kind::f32)
                std::memcpy(&data[4 * i], &value, 4);
            else
                std::memcpy(&data[2 * i], &half, 2);
        }
    }
    w.data = data.get();
    return {std::move(data), w};
}

double float_of(uint16_t half, Kind kind) {
    if (kind == Kind::f16) {
        const double value = std::ldexp(1024 + (half & 0x3ff), (half >> 10 & 31) - 25);
        return half & 0x8000 ? -value : value;
    }
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// What a code stands for before its scale: input i of row r in a tile, as the documentation of the layout has it.
double number_at(const Weight& w, const uint8_t* tile, size_t r, size_t i) {
    const size_t byte = r * 4 + i % 4, group = w.group;
    const auto four_bits = [&] { return tile[i / 8 * 64 + byte] >> i / 4 % 2 * 4 & 15; };
    const auto two_bits = [&](const uint8_t* plane) { return plane[i / 16 * 64 + byte] >> i / 4 % 4 * 2 & 3; };
    const auto one_bit = [&](const uint8_t* plane) { return plane[i / 4 * 8 + byte / 8] >> byte % 8 & 1; };
    switch (w.kind) {
        case Kind::int8: return static_cast<int8_t>(tile[i / 4 * 64 + byte]);
        case Kind::int6: return four_bits() + 16 * two_bits(tile + 8 * group) - 32;
        case Kind::int5: return four_bits() + 16 * one_bit(tile + 8 * group) - 16;
        case Kind::int4: return four_bits() - 8;
        case Kind::int3: return two_bits(tile) + 4 * one_bit(tile + 4 * group) - 4;
        case Kind::int2: return two_bits(tile) - 2;
        case Kind::nf4: return NF4[four_bits()];
        case Kind::fp4: {
            const double values[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
            return four_bits() & 8 ? -values[four_bits() & 7] : values[four_bits()];
        }
        case Kind::fp8: {
            const int code = tile[i / 4 * 64 + byte], mantissa_bits = 7 - *w.settings, ones = 1 << mantissa_bits;
            const int exponent = (code & 127) >> mantissa_bits, bias = (1 << (*w.settings - 1)) - 1;
            const double fraction = (code & (ones - 1)) + (exponent ? ones : 0);
            const double value = std::ldexp(fraction, std::max(exponent, 1) - bias - mantissa_bits);
            return code & 128 ? -value : value;
        }
        case Kind::ternary: {
            const uint8_t* run = tile + i / 24 * 80;
            const size_t half = i % 24 / 12, digit = i % 12 / 4;
            const int size = run[byte] >> 4 * half & 15, sign = run[64 + 8 * half + byte / 8] >> byte % 8 & 1;
            const int above[] = {4, 1, 0}, base[] = {9, 3, 1};  // the largest number that the lower digits can be
            int rest = sign ? -size : size, trit = 0;
            for (size_t d = 0; d <= digit; d++) {
                trit = rest > above[d] ? 1 : rest < -above[d] ? -1 : 0;
                rest -= trit * base[d];
            }
            return trit;
        }
        default: return 0;
    }
}

// Rows of which every third keeps fewer values than there is room for. A word of the first may have all of them.
Matrix random_pruned(size_t rows, size_t cols, size_t kept) {
    Weight w{Kind::pruned, 0, false, nullptr, rows, cols, 0, nullptr, kept};
    std::unique_ptr<uint8_t[]> data(new uint8_t[rows * w.row_bytes()]());
    std::normal_distribution<float> normal;
    std::vector<size_t> places(cols);
    for (size_t row = 0; row < rows; row++) {
        uint8_t* bitmap = &data[row * w.row_bytes()];
        for (size_t i = 0; i < cols; i++) places[i] = i / 32 * 32 + i % 16 * 2 + i % 32 / 16;
        if (row) std::shuffle(places.begin(), places.end(), generator);
        const size_t count = row % 3 == 2 ? kept / 2 : kept;
        for (size_t i = 0; i < count; i++) {
            bitmap[places[i] / 8] |= static_cast<uint8_t>(1 << places[i] % 8);
            const uint16_t value = upper_half(normal(generator));
            std::memcpy(bitmap + w.bitmap_bytes() + 2 * i, &value, 2);
        }
    }
    w.data = data.get();
    return {std::move(data), w};
}

double pruned_at(const Weight& w, size_t row, size_t col) {
    const uint8_t* bitmap = w.data + row * w.row_bytes();
    const size_t place = col / 32 * 32 + col % 16 * 2 + col % 32 / 16;
    size_t before = 0;
    for (size_t i = 0; i < place; i++) before += bitmap[i / 8] >> i % 8 & 1;
    uint16_t value = 0;
    if (bitmap[place / 8] >> place % 8 & 1) std::memcpy(&value, bitmap + w.bitmap_bytes() + 2 * before, 2);
    return float_of(value, Kind::bf16);
}

struct Value {
    double product, offset, scale;
    double sum() const { return product + offset; }
};

Value weight_at(const Weight& w, size_t row, size_t col) {
    if (w.kind == Kind::pruned) return {pruned_at(w, row, col), 0, 1};
    if (!w.tiled()) {
        const uint8_t* address = w.data + (row * w.cols + col) * itemsize(w.kind);
        float value;
        uint16_t half;
        std::memcpy(&half, address, 2);
        if (w.kind == Kind::f32) std::memcpy(&value, address, 4);
        return {w.kind == Kind::f32 ? value : float_of(half, w.kind), 0, 1};
    }
    const size_t place = w.row_offset + row, r = place % 16, i = col % w.group;
    const uint8_t* tile = w.data + place / 16 * w.tile_row_bytes() + col / w.group * w.tile_bytes();
    uint16_t scale, offset = 0;
    std::memcpy(&scale, tile + w.code_bytes() + 2 * r, 2);
    if (w.asymmetric) std::memcpy(&offset, tile + w.code_bytes() + 2 * (16 + r), 2);
    const Kind type = w.half_scales ? Kind::f16 : Kind::bf16;
    const double factor = float_of(scale, type), product = number_at(w, tile, r, i) * factor;
    if (!w.asymmetric) return {product, 0, factor};
    // With scales in float16 an offset is that of the lowest code; what 0 stands for is a float32.
    const double lowest = w.half_scales ? w.below_zero() * factor : 0;
    return {product, static_cast<float>(float_of(offset, type) + lowest), factor};
}

// What activations are after they were rounded to int8.
std::vector<double> rounded(const Weight& w, const std::vector<float>& x) {
    const size_t block = w.kind == Kind::ternary ? 48 : w.group % 32 ? 16 : 32;
    std::vector<double> result(x.begin(), x.end());
    for (size_t row = 0; row < x.size(); row += w.cols)
        for (size_t start = 0; start < w.cols; start += block) {
            const size_t first = row + start, last = row + std::min(start + block, w.cols);
            float amax = 0;
            for (size_t i = first; i < last; i++) amax = std::max(amax, std::abs(x[i]));
            for (size_t i = first; i < last; i++) result[i] = std::nearbyint(x[i] * (127 / amax)) * (amax / 127);
        }
    return result;
}

void check_product(const Joined& matrices, size_t tokens, bool int8, float accumulate) {
    std::normal_distribution<float> normal;
    std::vector<float> x(tokens * matrices.cols), before(tokens * matrices.rows), out;
    for (float& value : x) value = normal(generator);
    for (float& value : before) value = normal(generator);
    std::vector<uint8_t> scratch(matrices.scratch_nbytes(tokens));
    for (size_t threads : {1, 3}) {
        out = before;
        matmul(matrices, {x.data(), matrices.cols}, tokens, {out.data(), matrices.rows}, accumulate, int8,
               scratch.data(), threads);
        size_t first = 0;
        for (const Weight& w : matrices.weights) {
            const bool exact = !int8 || !w.tiled() || w.kind == Kind::fp8;
            const std::vector<double> inputs = exact ? std::vector<double>(x.begin(), x.end()) : rounded(w, x);
            const double table_error = !exact && w.kind == Kind::nf4 ? 0.5 / (127 * 128) : 0;  // in fixed point
            for (size_t t = 0; t < tokens; t++)
                for (size_t row = 0; row < w.rows; row++) {
                    double sum = 0, size = 0, error = 0;
                    for (size_t col = 0; col < w.cols; col++) {
                        const double input = inputs[t * w.cols + col];
                        const Value weight = weight_at(w, row, col);
                        sum += input * weight.sum();
                        size += std::abs(input) * (std::abs(weight.product) + std::abs(weight.offset));
                        error += std::abs(input * weight.scale) * table_error;
                    }
                    const size_t place = t * matrices.rows + first + row;
                    if (accumulate != 0) {
                        sum = before[place] + accumulate * sum;
                        size = std::abs(before[place]) + std::abs(accumulate) * size, error *= std::abs(accumulate);
                    }
                    check(std::abs(out[place] - sum) <= 1e-5 * size + error + 1e-30, "product");
                }
            first += w.rows;
        }
    }
}

void check_weight(const Weight& w, size_t tokens) {
    for (bool int8 : {false, true})
        for (float accumulate : {0.0f, -1.5f}) check_product(Joined({w}), tokens, int8, accumulate);
    if (w.kind <= Kind::bf16) return;

    std::vector<float> rows(w.rows * w.cols);
    std::vector<BF16> halves(w.rows * w.cols);
    std::vector<int64_t> indices(w.rows);
    decode_block(w, 0, w.rows, Rows<float>{rows.data(), w.cols}, 3);
    decode_block(w, 0, w.rows, Rows<BF16>{halves.data(), w.cols}, 3);
    for (size_t row = 0; row < w.rows; row++)
        for (size_t col = 0; col < w.cols; col++) {
            const float expected = static_cast<float>(weight_at(w, row, col).sum());
            check(rows[row * w.cols + col] == expected, "decoded block");
            const double rounded = float_of(halves[row * w.cols + col].bits, Kind::bf16);
            check(std::abs(rounded - expected) <= std::abs(expected) / 256, "decoded block in bfloat16");
        }
    for (size_t i = 0; i < w.rows; i++) indices[i] = static_cast<int64_t>(w.rows - 1 - i);
    std::vector<float> reversed(w.rows * w.cols);
    decode_rows(w, indices.data(), w.rows, {reversed.data(), w.cols}, 3);
    for (size_t i = 0; i < w.rows; i++)
        check(!std::memcmp(&reversed[i * w.cols], &rows[(w.rows - 1 - i) * w.cols], w.cols * sizeof(float)), "rows");
}

void check_whole_and_slice(const Weight& w) {
    check_weight(w, w.rows == 1 ? 15 : 3);
    if (w.rows < 20) return;
    Weight slice = w;  // the rows 19 to 36
    slice.rows = 17;
    if (slice.tiled())
        slice.data += slice.tile_row_bytes(), slice.row_offset = 3;
    else
        slice.data += 19 * slice.row_bytes();
    check_weight(slice, 3);
}

void check_kind(Kind kind, size_t group, bool asymmetric = false, bool half_scales = false) {
    for (size_t rows : {1, 16, 37})
        for (size_t cols : {1, 16, 75, 128})
            check_whole_and_slice(random_matrix(kind, group, asymmetric, rows, cols, half_scales).weight);
}

void check_pruned() {
    for (size_t rows : {1, 37})
        for (size_t cols : {1, 16, 75, 128, 321})
            for (size_t kept : {size_t{1}, (cols + 1) / 2, cols})
                check_whole_and_slice(random_pruned(rows, cols, kept).weight);
}

// A bitmap that asks for more values than there are must not be followed out of the matrix.
void check_damaged() {
    const Matrix matrix = random_pruned(5, 321, 100);
    const Weight& w = matrix.weight;
    for (size_t row = 0; row < w.rows; row++) std::memset(&matrix.data[row * w.row_bytes()], 0xff, w.bitmap_bytes());
    std::vector<float> x(3 * w.cols, 1), out(3 * w.rows), rows(w.rows * w.cols);
    matmul(Joined({w}), {x.data(), w.cols}, 3, {out.data(), w.rows}, 0, false, nullptr, 1);
    decode_block(w, 0, w.rows, Rows<float>{rows.data(), w.cols}, 1);
    check(rows.back() == 0 && std::isfinite(out.back()), "zeros behind the last value");
}

// Of every way to round the activations, and rows enough for many tasks.
void check_joined() {
    std::vector<Matrix> matrices;
    matrices.push_back(random_matrix(Kind::int4, 32, false, 100, 3000));
    matrices.push_back(random_matrix(Kind::ternary, 48, false, 37, 3000));
    matrices.push_back(random_matrix(Kind::bf16, 0, false, 3, 3000));
    matrices.push_back(random_matrix(Kind::int2, 16, true, 70, 3000));
    matrices.push_back(random_pruned(20, 3000, 1500));
    std::vector<Weight> weights;
    for (const Matrix& matrix : matrices) weights.push_back(matrix.weight);
    for (size_t tokens : {1, 3, 11}) check_product(Joined(weights), tokens, true, 0);
}

// Blocks of every type of GGUF files, to tiles without a byte to spare.
void check_repacking() {
    for (int i = 0; i < 9; i++) {
        const GgmlType& type = ggml_type(static_cast<Ggml>(i));
        for (size_t rows : {1, 16, 37}) {
            const size_t blocks = 2, size = rows * blocks * type.nbytes;
            const size_t tiles = (rows + 15) / 16 * blocks * (type.inputs / type.group) * type.tile_bytes();
            std::unique_ptr<uint8_t[]> stored(new uint8_t[size]), out(new uint8_t[tiles]);
            for (size_t byte = 0; byte < size; byte++) stored[byte] = static_cast<uint8_t>(generator());
            for (size_t block = 0; block < size; block += type.nbytes) {  // numbers of size 1
                stored[block] = 0, stored[block + 1] = 0x3c;
                if (type.asymmetric) stored[block + 3] = 0x3c;
                stored[block + type.nbytes - 1] = 0x3c;  // of Q6_K
            }
            check(repack(static_cast<Ggml>(i), stored.get(), rows, blocks, out.get()), "scales that fit");
        }
    }
}

void check_threads() {
    const auto call = [] {
        for (int i = 0; i < 300; i++) {
            std::vector<int> done(50);
            parallel_for(done.size(), 4, [&](size_t task) { done[task]++; });
            for (int count : done) check(count == 1, "each task is done once");
            if (i % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    };
    std::thread other(call);
    call();
    other.join();
}

}  // namespace

int main() {
    for (const Level level : supported_levels()) {
        const std::string name = name_of(level);
        check(choose(name), "choice of kernels");
        for (Kind kind : {Kind::f32, Kind::f16, Kind::bf16}) check_kind(kind, 0);
        for (Kind kind : {Kind::int8, Kind::int6, Kind::int5, Kind::int4, Kind::int3, Kind::int2})
            for (size_t group : {16, 32, 128, 160}) {
                check_kind(kind, group, group != 32);
                check_kind(kind, group, group != 16, true);
            }
        for (Kind kind : {Kind::nf4, Kind::fp4, Kind::fp8})
            for (size_t group : {16, 32, 128}) check_kind(kind, group);
        for (size_t group : {48, 96}) check_kind(Kind::ternary, group);
        check_pruned();
        check_damaged();
        check_joined();
        std::printf("%s: checked\n", name.c_str());
    }
    check(!choose("sse9"), "refusal of unknown kernels");
    check_repacking();
    check_threads();
    std::printf(failures ? "%d checks failed\n" : "all kernels passed\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
