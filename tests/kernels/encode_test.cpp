// Encoding alone, for the sanitizers (`make sanitize`): every kind of tile, in buffers without a byte to spare, at odd
// shapes. What is decoded must be as far from the numbers as encoding says.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "dispatch.h"
#include "encode.h"
#include "levels.h"

using namespace tightfit;

namespace {

std::mt19937 generator(1);
int failures = 0;

template <class T>
T number_of(float value);
template <>
float number_of(float value) { return value; }
template <>
BF16 number_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return {static_cast<uint16_t>(bits >> 16)};
}
template <>
F16 number_of(float value) {  // of size 1 to 2, or 0
    return {static_cast<uint16_t>(value == 0 ? 0 : 0x3c00 | static_cast<uint16_t>((std::fabs(value) - 1) * 1023))};
}

float value_of(float number) { return number; }
float value_of(BF16 number) {
    const uint32_t bits = uint32_t{number.bits} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
float value_of(F16 number) { return number.bits ? 1 + static_cast<float>(number.bits & 0x3ff) / 1024 : 0; }

template <class T>
void check(Kind kind, size_t group, bool asymmetric, size_t rows, size_t cols) {
    const uint8_t exponent_bits = 3;
    Weight w{kind, group, asymmetric, nullptr, rows, cols, 0, &exponent_bits};
    const size_t nbytes = (rows + TILE_ROWS - 1) / TILE_ROWS * w.tile_row_bytes(), stride = cols + 3;
    std::unique_ptr<uint8_t[]> data(new uint8_t[nbytes]);
    std::unique_ptr<T[]> x(new T[(rows - 1) * stride + cols]);
    std::unique_ptr<float[]> scratch(new float[encode_scratch(group)]), decoded(new float[rows * cols]);
    for (size_t i = 0; i < (rows - 1) * stride + cols; i++)
        x[i] = number_of<T>(generator() % 8 ? 1 + static_cast<float>(generator() % 1000) / 1000 : 0);
    w.data = data.get();
    const double said =
        encode(Tiles{kind, group, asymmetric, exponent_bits, data.get(), rows, cols}, Rows<const T>{x.get(), stride},
               scratch.get());
    decode_block(w, 0, rows, Rows<float>{decoded.get(), cols}, 1);
    double error = 0;
    for (size_t row = 0; row < rows; row++)
        for (size_t col = 0; col < cols; col++) {
            const double d = static_cast<double>(value_of(x[row * stride + col])) - decoded[row * cols + col];
            error += d * d;
        }
    if (!(std::fabs(error - said) <= 1e-5 * error + 1e-9)) {
        failures++;
        std::printf("%s: kind %d, group %zu, %zu x %zu: error %g, said %g\n", name_of(level()), static_cast<int>(kind),
                    group, rows, cols, error, said);
    }
    x[(rows - 1) * stride + cols - 1] = number_of<T>(1);
    std::memset(&x[(rows - 1) * stride], 0xff, sizeof(T));  // NaN in every type
    if (!std::isnan(encode(Tiles{kind, group, asymmetric, exponent_bits, data.get(), rows, cols},
                           Rows<const T>{x.get(), stride}, scratch.get()))) {
        failures++;
        std::printf("%s: kind %d: NaN was not seen\n", name_of(level()), static_cast<int>(kind));
    }
}

// What is pruned is decoded to numbers of x, as many as are kept or all that are not zero.
template <class T>
void check_pruned(size_t rows, size_t cols, size_t kept) {
    Weight w{Kind::pruned, 0, false, nullptr, rows, cols, 0, nullptr, kept};
    const size_t stride = cols + 3;
    std::unique_ptr<uint8_t[]> data(new uint8_t[rows * w.row_bytes()]);
    std::unique_ptr<T[]> x(new T[(rows - 1) * stride + cols]);
    std::unique_ptr<BF16[]> scratch(new BF16[2 * cols]);
    std::unique_ptr<float[]> decoded(new float[rows * cols]);
    for (size_t i = 0; i < (rows - 1) * stride + cols; i++)  // of five bits, which bfloat16 has
        x[i] = number_of<T>(generator() % 3 ? 1 + static_cast<float>(generator() % 32) / 32 : 0);
    w.data = data.get();
    bool right = prune(w, Rows<const T>{x.get(), stride}, data.get(), scratch.get());
    decode_block(w, 0, rows, Rows<float>{decoded.get(), cols}, 1);
    for (size_t row = 0; row < rows; row++) {
        size_t there = 0, found = 0;
        for (size_t col = 0; col < cols; col++) {
            const float number = value_of(x[row * stride + col]), stored = decoded[row * cols + col];
            there += number != 0, found += stored != 0;
            right &= stored == 0 || std::fabs(stored - number) <= number / 256;
        }
        right &= found == std::min(there, kept);
    }
    std::memset(&x[(rows - 1) * stride], 0xff, sizeof(T));
    right &= !prune(w, Rows<const T>{x.get(), stride}, data.get(), scratch.get());
    if (!right) {
        failures++;
        std::printf("%s: pruned, %zu of %zu x %zu\n", name_of(level()), kept, rows, cols);
    }
}

}  // namespace

int main() {
    constexpr struct { size_t rows, cols; } SHAPES[] = {{1, 1}, {16, 48}, {17, 49}, {33, 100}, {5, 500}};
    for (Level level : supported_levels()) {
        choose(name_of(level));
        for (int kind = static_cast<int>(Kind::int8); kind <= static_cast<int>(Kind::ternary); kind++)
            for (size_t group : {48, 96, 528})
                for (bool asymmetric : {false, true}) {
                    if (asymmetric && kind > static_cast<int>(Kind::int2)) continue;
                    for (const auto& shape : SHAPES) {
                        check<float>(static_cast<Kind>(kind), group, asymmetric, shape.rows, shape.cols);
                        check<F16>(static_cast<Kind>(kind), group, asymmetric, shape.rows, shape.cols);
                        check<BF16>(static_cast<Kind>(kind), group, asymmetric, shape.rows, shape.cols);
                    }
                }
        for (const auto& shape : SHAPES)
            for (size_t kept : {size_t{1}, (shape.cols + 1) / 2, shape.cols}) {
                check_pruned<float>(shape.rows, shape.cols, kept);
                check_pruned<F16>(shape.rows, shape.cols, kept);
                check_pruned<BF16>(shape.rows, shape.cols, kept);
            }
    }
    std::printf(failures ? "%d failures\n" : "all encoders agree with what they decode to\n", failures);
    return failures != 0;
}
