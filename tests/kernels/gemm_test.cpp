// Products with many vectors alone, for the sanitizers (`make sanitize`): every kind of matrix in buffers without a byte
// to spare, odd shapes and slices, and several threads. Nothing is checked where there is no AMX.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "gemm.h"

using namespace tightfit;

namespace {

std::mt19937 generator(1);
int failures = 0;

struct Matrix {
    std::unique_ptr<uint8_t[]> data;
    Weight weight;
};

const uint8_t EXPONENT_BITS[] = {3};

Matrix random_matrix(Kind kind, size_t group, bool asymmetric, size_t rows, size_t cols, bool half_scales = false) {
    Weight w{kind, group, asymmetric, nullptr, rows, cols, 0, EXPONENT_BITS, half_scales};
    const size_t size = w.tiled() ? (rows + 15) / 16 * w.tile_row_bytes() : rows * cols * itemsize(w.kind);
    std::unique_ptr<uint8_t[]> data(new uint8_t[size]);
    // All numbers are of size 1: a byte of 0x3d at their end is an exponent near 0, whatever the kind.
    for (size_t i = 0; i < size; i++) data[i] = static_cast<uint8_t>(generator());
    for (size_t i = 1; !w.tiled() && i < size; i += itemsize(w.kind)) data[i + itemsize(w.kind) - 2] = 0x3d;
    if (kind == Kind::ternary)  // the numbers of triples end at 13
        for (size_t i = 0; i < size; i++) data[i] = static_cast<uint8_t>(generator() % 14 << 4 | generator() % 14);
    for (size_t tile = 0; w.tiled() && tile < size; tile += w.tile_bytes())
        for (size_t i = tile + w.code_bytes() + 1; i < tile + w.tile_bytes(); i += 2) data[i] = 0x3d;
    w.data = data.get();
    return {std::move(data), w};
}

// Bits of any inputs up to `kept`; of the first row those of its first ones, of the last its last ones.
Matrix random_pruned(size_t rows, size_t cols, size_t kept) {
    Weight w{Kind::pruned, 0, false, nullptr, rows, cols, 0, nullptr, kept};
    std::unique_ptr<uint8_t[]> data(new uint8_t[rows * w.row_bytes()]());
    for (size_t row = 0; row < rows; row++) {
        uint8_t* bitmap = &data[row * w.row_bytes()];
        for (size_t i = 0; i < kept; i++) {
            const size_t col = row == 0 ? i : row + 1 == rows ? cols - 1 - i : generator() % cols;
            const size_t place = col / 32 * 32 + col % 16 * 2 + col % 32 / 16;
            bitmap[place / 8] |= static_cast<uint8_t>(1 << place % 8);
        }
        for (size_t i = 0; i < 2 * kept; i += 2) {
            bitmap[w.bitmap_bytes() + i] = static_cast<uint8_t>(generator());
            bitmap[w.bitmap_bytes() + i + 1] = 0x3d;
        }
    }
    w.data = data.get();
    return {std::move(data), w};
}

double rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

// The weights, rounded to bfloat16: exact products with vectors of which one input is 1.
std::vector<double> values_of(const Weight& w) {
    std::vector<double> values(w.rows * w.cols);
    std::vector<float> x(w.cols * w.cols), columns(w.cols * w.rows);
    for (size_t i = 0; i < w.cols; i++) x[i * w.cols + i] = 1;
    matmul(Joined({w}), {x.data(), w.cols}, w.cols, {columns.data(), w.rows}, 0, false, nullptr, 1);
    for (size_t row = 0; row < w.rows; row++)
        for (size_t col = 0; col < w.cols; col++) values[row * w.cols + col] = rounded(columns[col * w.rows + row]);
    return values;
}

void check(const Joined& matrices, size_t tokens, float accumulate, size_t threads) {
    std::normal_distribution<float> normal;
    std::vector<float> x(tokens * matrices.cols), before(tokens * matrices.rows);
    for (float& value : x) value = normal(generator);
    for (float& value : before) value = normal(generator);
    std::vector<float> out = before;
    const std::unique_ptr<uint8_t, void (*)(void*)> scratch(
        static_cast<uint8_t*>(std::aligned_alloc(64, gemm_scratch_nbytes(matrices.cols, tokens, threads))), std::free);
    gemm(matrices, {x.data(), matrices.cols}, tokens, {out.data(), matrices.rows}, accumulate, scratch.get(), threads);
    size_t first = 0;
    for (const Weight& w : matrices.weights) {
        const std::vector<double> values = values_of(w);
        for (size_t t = 0; t < tokens; t++)
            for (size_t row = 0; row < w.rows; row++) {
                double sum = 0, size = 0;
                for (size_t col = 0; col < w.cols; col++) {
                    const double product = rounded(x[t * w.cols + col]) * values[row * w.cols + col];
                    sum += product, size += std::abs(product);
                }
                const size_t place = t * matrices.rows + first + row;
                const double expected = accumulate != 0 ? before[place] + accumulate * sum : sum;
                if (std::abs(out[place] - expected) > 1e-5 * size + 1e-6) {
                    if (failures++ < 10) std::printf("failed: product of kind %d\n", static_cast<int>(w.kind));
                }
            }
        first += w.rows;
    }
}

void check_whole_and_slice(const Weight& w) {
    check(Joined({w}), w.rows == 1 ? 35 : 3, 0, 1);
    if (w.rows < 20) return;
    Weight slice = w;  // the rows 19 to 52
    slice.rows = 34;
    if (slice.tiled())
        slice.data += slice.tile_row_bytes(), slice.row_offset = 3;
    else
        slice.data += 19 * slice.row_bytes();
    check(Joined({slice}), 17, -1.5f, 3);
}

void check_kind(Kind kind, size_t group, bool asymmetric = false, bool half_scales = false) {
    for (size_t rows : {1, 16, 53})
        for (size_t cols : {1, 75, 330})
            check_whole_and_slice(random_matrix(kind, group, asymmetric, rows, cols, half_scales).weight);
}

void check_pruned() {
    for (size_t rows : {1, 16, 53})
        for (size_t cols : {1, 75, 330, 1100}) check_whole_and_slice(random_pruned(rows, cols, (cols + 1) / 2).weight);
}

// Rows and tokens enough for many tasks, and inputs that are gone through block by block.
void check_joined() {
    std::vector<Matrix> matrices;
    matrices.push_back(random_matrix(Kind::int4, 32, false, 290, 1100));
    matrices.push_back(random_matrix(Kind::ternary, 48, false, 37, 1100));
    matrices.push_back(random_matrix(Kind::bf16, 0, false, 3, 1100));
    matrices.push_back(random_pruned(40, 1100, 550));
    std::vector<Weight> weights;
    for (const Matrix& matrix : matrices) weights.push_back(matrix.weight);
    for (size_t tokens : {5, 530}) check(Joined(weights), tokens, 1, 3);
}

}  // namespace

int main() {
    if (!has_gemm()) {
        std::printf("gemm: there is no AMX\n");
        return EXIT_SUCCESS;
    }
    for (Kind kind : {Kind::f32, Kind::f16, Kind::bf16}) check_kind(kind, 0);
    for (Kind kind : {Kind::int8, Kind::int6, Kind::int5, Kind::int4, Kind::int3, Kind::int2})
        for (size_t group : {16, 160})
            for (bool half_scales : {false, true}) check_kind(kind, group, group != 16, half_scales);
    for (Kind kind : {Kind::nf4, Kind::fp4, Kind::fp8})
        for (size_t group : {16, 160}) check_kind(kind, group);
    for (size_t group : {48, 96}) check_kind(Kind::ternary, group);
    check_pruned();
    check_joined();
    std::printf(failures ? "gemm: %d checks failed\n" : "gemm: checked\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
