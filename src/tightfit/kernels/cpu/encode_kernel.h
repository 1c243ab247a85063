// The search for the scales of tiles, written once over the vectors of the compiler: a lane is a row of the tile, so
// that nothing is summed across lanes, and a code goes where it belongs in its lane's four bytes. `V` says how wide the
// vectors are, as many lanes as there are numbers in V::Floats, and looks up tables.
//
// Nothing is fused and every sum has the order of kernels/encode_reference.py, so all widths write the same bytes.
//
// Everything is in an unnamed namespace: the same template compiled under other flags must not be merged with it.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "encode.h"

namespace tightfit {
namespace {

template <class V>
constexpr size_t LANES = sizeof(typename V::Floats) / sizeof(float);

// ---- vectors ----

template <class F>
inline F load(const float* address) {
    F value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

template <class F>
inline void store(float* address, F value) { std::memcpy(address, &value, sizeof value); }

template <class F>
inline F smaller(F a, F b) { return a < b ? a : b; }

template <class F>
inline F larger(F a, F b) { return a > b ? a : b; }

template <class V>
struct Bits {
    using F = typename V::Floats;
    using I = typename V::Ints;

    static I of(F value) { return reinterpret_cast<I>(value); }
    static F floats(I bits) { return reinterpret_cast<F>(bits); }
    static F magnitude(F value) { return floats(of(value) & 0x7fffffff); }
    static F with_sign(F magnitude, F value) { return floats(of(magnitude) | (of(value) & INT32_MIN)); }
    // Of numbers that are not negative; -127 for subnormal ones.
    static I exponent(F value) { return (of(value) >> 23) - 127; }
    static F power_of_two(I exponent) { return floats((exponent + 127) << 23); }

    // To the nearest bfloat16, halves to even, and within +-255/64.
    static F rounded(F value) {
        constexpr float LARGEST = 255.0f / 64;  // a bfloat16
        const I bits = of(larger(smaller(value, F{} + LARGEST), F{} - LARGEST));
        return floats((bits + 0x7fff + (bits >> 16 & 1)) & ~0xffff);
    }

    // What is below the smallest normal number becomes +0.
    static F flushed(F value) { return magnitude(value) < 0x1p-126f ? F{} : value; }
};

// Whole numbers up to 2^22 are rounded, halves to even, by adding and subtracting this.
constexpr float ROUNDING = 0x1.8p23f;

// ---- levels: what the codes of a kind stand for ----

// intN and ternary: the whole numbers of a range.
template <class V>
struct WholeLevels {
    using F = typename V::Floats;
    using I = typename V::Ints;

    float lowest, highest;
    int zero;  // the code of 0

    explicit WholeLevels(const Tiles& tiles) {
        const int half = tiles.kind == Kind::int8   ? 128
                         : tiles.kind == Kind::int6 ? 32
                         : tiles.kind == Kind::int5 ? 16
                         : tiles.kind == Kind::int4 ? 8
                         : tiles.kind == Kind::int3 ? 4
                                                    : 2;
        const bool is_signed = tiles.kind == Kind::int8 || tiles.kind == Kind::ternary;
        highest = static_cast<float>(half - 1);
        lowest = is_signed ? -highest : static_cast<float>(-half);
        zero = is_signed ? 0 : half;
    }

    F level(F t) const { return limited(t) + ROUNDING - ROUNDING; }

    // A trit's is the level itself.
    I code(F t) const { return Bits<V>::of(limited(t) + ROUNDING) - Bits<V>::of(F{} + ROUNDING) + zero; }

private:
    F limited(F t) const { return larger(smaller(t, F{} + highest), F{} + lowest); }
};

template <class V>
struct Nf4Levels {
    using F = typename V::Floats;
    using I = typename V::Ints;

    explicit Nf4Levels(const Tiles&) {}

    F level(F t) const { return V::look_up(LEVELS, code(t)); }

    // How many midpoints between levels are below t: a binary search.
    I code(F t) const {
        I found = {};
        for (int step = 8; step > 0; step /= 2) found |= (t > V::look_up(MIDPOINTS, found + (step - 1))) & step;
        return found;
    }

private:
    static constexpr float LEVELS[16] = {
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
        -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
        0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
        0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
    };
    static constexpr float middle(int i) { return (LEVELS[i] + LEVELS[i + 1]) / 2; }
    static constexpr float MIDPOINTS[16] = {
        middle(0), middle(1), middle(2),  middle(3),  middle(4),  middle(5),  middle(6), middle(7),
        middle(8), middle(9), middle(10), middle(11), middle(12), middle(13), middle(14),
    };
};

// fp4 and fp8: floating-point numbers of a few bits.
template <class V>
struct FloatLevels {
    using F = typename V::Floats;
    using I = typename V::Ints;

    int mantissa_bits, lowest_exponent, sign;
    float largest;

    explicit FloatLevels(const Tiles& tiles) {
        const bool fp8 = tiles.kind == Kind::fp8;
        const int exponent_bits = fp8 ? static_cast<int>(tiles.exponent_bits) : 2;
        sign = fp8 ? 128 : 8;
        mantissa_bits = fp8 ? 7 - exponent_bits : 1;
        lowest_exponent = 2 - (1 << (exponent_bits - 1));
        // The codes that float8_e4m3fn and float8_e5m2 have for what is no number are not used.
        const int code = sign - 1 - (fp8 && exponent_bits == 4 ? 1 : fp8 && exponent_bits == 5 ? 4 : 0);
        const int steps = 1 << mantissa_bits, field = code >> mantissa_bits;
        largest = std::ldexp(static_cast<float>(steps + code % steps), field - 1 + lowest_exponent - mantissa_bits);
    }

    F level(F t) const {
        const F a = limited(t);
        const F rounding = Bits<V>::power_of_two(exponent(a) - mantissa_bits + 23) * 1.5f;
        return Bits<V>::with_sign(a + rounding - rounding, t);
    }

    I code(F t) const {
        const F a = limited(t);
        const I e = exponent(a);
        const F steps = a * Bits<V>::power_of_two(mantissa_bits - e) + ROUNDING;
        const I magnitude = Bits<V>::of(steps) - Bits<V>::of(F{} + ROUNDING) + ((e - lowest_exponent) << mantissa_bits);
        return magnitude | ((Bits<V>::of(t) >> 31) & sign);
    }

private:
    F limited(F t) const { return smaller(Bits<V>::magnitude(t), F{} + largest); }
    I exponent(F a) const { return larger(Bits<V>::exponent(a), I{} + lowest_exponent); }
};

// ---- sums over a group ----

// out[n] = the sum of terms[n] over the inputs of a group, of which body(input, terms) gives those of one: eight partial
// sums, of the inputs modulo 8.
template <class F, size_t N, class Body>
inline void sum(size_t width, F (&out)[N], Body body) {
    F parts[N][8] = {};
    size_t i = 0;
    for (; i + 8 <= width; i += 8)
        for (size_t j = 0; j < 8; j++) {
            F terms[N];
            body(i + j, terms);
            for (size_t n = 0; n < N; n++) parts[n][j] += terms[n];
        }
    for (size_t j = 0; i + j < width; j++) {
        F terms[N];
        body(i + j, terms);
        for (size_t n = 0; n < N; n++) parts[n][j] += terms[n];
    }
    for (size_t n = 0; n < N; n++) {
        const F(&p)[8] = parts[n];
        out[n] = ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
    }
}

// ---- the search ----

// What the search tries in 64ths of a base, in this order, until a 0.
struct Factors { int16_t values[11]; };

constexpr Factors factors_of(Kind kind) {
    switch (kind) {
        case Kind::int8: return {{64, 65, 66, 67, 69, 70}};
        case Kind::int6:
        case Kind::int5: return {{64, 54, 68, 63, 66, 62, 73, 47, 60, 70}};
        case Kind::int4:
        case Kind::int3: return {{64, 43, 58, 27, 52, 61, 71, 16, 36, 55}};
        case Kind::int2: return {{64, 39, 23, 51, -50, 31, 16, 57, 45, -34}};
        case Kind::nf4: return {{64, -60, -46, -64, 59, -91, 67, 62, -57, -38}};
        case Kind::fp4: return {{64, 96, 58, 43, 61, 67, 54, 90, 36, 63}};
        case Kind::fp8: return {{64, 90, 66, 76, 74, 65, 99, 71, 86}};
        case Kind::ternary: return {{64, 107, 134, 95, 160, 119}};
        default: return {};
    }
}

// A scale and offset for each row, and the sum of the squared errors with them.
template <class F>
struct Fit {
    F scale, offset, error;

    void keep_better(const Fit& other) {
        const auto better = other.error < error;
        scale = better ? other.scale : scale;
        offset = better ? other.offset : offset;
        error = better ? other.error : error;
    }
};

// A group of as many rows as there are lanes, in units of its largest magnitude: `width` times LANES numbers.
template <class V, class Levels, bool ASYMMETRIC>
struct Group {
    using F = typename V::Floats;
    using I = typename V::Ints;

    const Levels& levels;
    const float* w;
    size_t width;

    F at(size_t input) const { return load<F>(w + input * LANES<V>); }
    F shifted(size_t input, F offset) const { return ASYMMETRIC ? at(input) - offset : at(input); }
    static F inverse(F scale) { return scale == 0.0f ? F{} : 1.0f / scale; }

    Fit<F> fit(F scale, F offset) const {
        const F r = inverse(scale);
        F error[1];
        sum(width, error, [&](size_t input, F(&terms)[1]) {
            const F y = shifted(input, offset);
            const F d = y - levels.level(y * r) * scale;
            terms[0] = d * d;
        });
        return {scale, offset, error[0]};
    }

    Fit<F> best(Kind kind) const {
        F low = at(0), high = at(0);
        for (size_t i = 1; i < width; i++) low = smaller(at(i), low), high = larger(at(i), high);
        F base;
        if constexpr (!ASYMMETRIC) base = base_of(kind, low, high);
        const auto candidate = [&](int factor) {
            const float share = static_cast<float>(factor) / 64;
            if constexpr (ASYMMETRIC) return covering(kind, low, high, share);
            else return fit(Bits<V>::rounded(base * share), F{});
        };
        const Factors factors = factors_of(kind);
        Fit<F> found = candidate(factors.values[0]);
        for (const int16_t* factor = factors.values + 1; *factor; factor++)
            if (!ASYMMETRIC || *factor > 0) found.keep_better(candidate(*factor));
        for (int again = 0; again < 2; again++) found.keep_better(refit(found));
        return found;
    }

private:
    F base_of(Kind kind, F low, F high) const {
        const F amax = larger(high, -low);
        if constexpr (std::is_same_v<Levels, WholeLevels<V>>) {
            if (kind == Kind::ternary) {
                F total[1];
                sum(width, total, [&](size_t input, F(&terms)[1]) { terms[0] = Bits<V>::magnitude(at(input)); });
                return total[0] / static_cast<float>(width);
            }
            if (kind == Kind::int8) return amax / 127.0f;
            return (high == amax ? high : low) / levels.lowest;
        } else if constexpr (std::is_same_v<Levels, FloatLevels<V>>) {
            return amax / levels.largest;
        } else {
            return amax;
        }
    }

    // The range from `low` to `high`, or a share of it. Covers it although the offset is rounded.
    Fit<F> covering(Kind kind, F low, F high, float share) const {
        const float lowest = levels.lowest, highest = levels.highest;
        const F low_half = low / 2.0f, high_half = high / 2.0f, middle = low_half + high_half;
        const F half = (high_half - low_half) * share;
        const F offset = Bits<V>::rounded(kind == Kind::int8 ? middle : middle + half / (highest - lowest));
        const F above = middle + half - offset, below = middle - half - offset;
        return fit(Bits<V>::rounded(larger(above / highest, below / lowest)), offset);
    }

    // The scale, and the offset if there is one, that fit the levels of `found` best.
    Fit<F> refit(const Fit<F>& found) const {
        const F r = inverse(found.scale);
        if constexpr (ASYMMETRIC) {
            F sums[4];
            sum(width, sums, [&](size_t input, F(&terms)[4]) {
                const F y = shifted(input, found.offset), q = levels.level(y * r);
                terms[0] = q, terms[1] = q * q, terms[2] = y, terms[3] = y * q;
            });
            const auto [q, qq, y, yq] = sums;
            const float count = static_cast<float>(width);
            const F divisor = qq * count - q * q;
            const F scale = Bits<V>::rounded((yq * count - q * y) / divisor);
            const F offset = Bits<V>::rounded(found.offset + (y - scale * q) / count);
            return fit(divisor == 0.0f ? found.scale : scale, divisor == 0.0f ? found.offset : offset);
        } else {
            F sums[2];
            sum(width, sums, [&](size_t input, F(&terms)[2]) {
                const F y = at(input), q = levels.level(y * r);
                terms[0] = q * q, terms[1] = y * q;
            });
            const F scale = Bits<V>::rounded(sums[1] / sums[0]);
            return fit(sums[0] == 0.0f ? found.scale : scale, F{});
        }
    }
};

// ---- codes to planes; a lane of a line holds the codes k = 0..3 of its row in its four bytes ----

template <class V>
struct Packer {
    using I = typename V::Ints;

    size_t span;  // which LANES rows of the tile

    void line(uint8_t* plane, size_t index, I bytes) const {
        std::memcpy(plane + index * LINE + span * sizeof(I), &bytes, sizeof bytes);
    }

    // `bits` bits of each code, from bit `shift` on; code(i) gives the codes of input i, for `count` inputs.
    template <int BITS, class Code>
    void fields(uint8_t* plane, size_t count, int shift, Code code) const {
        constexpr size_t PER_BYTE = 8 / BITS;
        for (size_t i = 0; i < count / (4 * PER_BYTE); i++) {
            I bytes = {};
            for (size_t place = 0; place < PER_BYTE; place++)
                for (size_t k = 0; k < 4; k++)
                    bytes |= (code(4 * (i * PER_BYTE + place) + k) >> shift & ((1 << BITS) - 1))
                             << static_cast<int>(8 * k + BITS * place);
            line(plane, i, bytes);
        }
    }

    template <class Code>
    void bits(uint8_t* plane, size_t count, int shift, Code code) const {
        for (size_t i = 0; i < count / 4; i++) {
            I four = {};
            for (size_t k = 0; k < 4; k++) four |= (code(4 * i + k) >> shift & 1) << static_cast<int>(k);
            for (size_t lane = 0; lane < LANES<V>; lane += 2)
                plane[i * 8 + (span * LANES<V> + lane) / 2] = static_cast<uint8_t>(four[lane] | four[lane + 1] << 4);
        }
    }

    template <class Code>
    void pack(uint8_t* tile, Kind kind, size_t group, Code code) const {
        switch (kind) {
            case Kind::int8:
            case Kind::fp8: return fields<8>(tile, group, 0, code);
            case Kind::int6: fields<4>(tile, group, 0, code); return fields<2>(tile + 8 * group, group, 4, code);
            case Kind::int5: fields<4>(tile, group, 0, code); return bits(tile + 8 * group, group, 4, code);
            case Kind::int3: fields<2>(tile, group, 0, code); return bits(tile + 4 * group, group, 2, code);
            case Kind::int2: return fields<2>(tile, group, 0, code);
            case Kind::ternary: return triples(tile, group, code);
            default: return fields<4>(tile, group, 0, code);
        }
    }

    // Runs of 24 inputs: 8 numbers of three trits, their magnitudes in a line and their signs in two words.
    template <class Code>
    void triples(uint8_t* tile, size_t group, Code code) const {
        for (size_t run = 0; run < group / 24; run++, tile += 80) {
            const auto number = [&](size_t i) {
                const size_t first = run * 24 + i / 4 * 12 + i % 4;
                const I v = code(first) * 9 + code(first + 4) * 3 + code(first + 8);
                return (v < 0 ? -v : v) | ((v < 0) & 16);
            };
            fields<4>(tile, 8, 0, number);
            bits(tile + LINE, 8, 4, number);
        }
    }
};

// ---- tiles ----

template <class V>
inline typename V::Floats widened(const float* x) { return load<typename V::Floats>(x); }

template <class V>
inline typename V::Unsigned widened_bits(const void* x) {
    typename V::Halves halves;
    std::memcpy(&halves, x, sizeof halves);
    return __builtin_convertvector(halves, typename V::Unsigned);
}

template <class V>
inline typename V::Floats widened(const BF16* x) {
    return reinterpret_cast<typename V::Floats>(widened_bits<V>(x) << 16);
}

// Shifting a half's exponent and fraction into a float's leaves an exponent that is too small by 112, which a
// multiplication mends, subnormal numbers included; infinities and NaNs get their exponent set.
template <class V>
inline typename V::Floats widened(const F16* x) {
    using F = typename V::Floats;
    using U = typename V::Unsigned;
    const U half = widened_bits<V>(x), bits = (half & 0x7fff) << 13;
    const U special = reinterpret_cast<U>(bits >= 0x0f800000) & 0x7f800000;
    return reinterpret_cast<F>(reinterpret_cast<U>(reinterpret_cast<F>(bits) * 0x1p112f) | special |
                               (half & 0x8000) << 16);
}

template <class V, class T>
inline typename V::Floats widened_part(const T* x, size_t count) {
    T padded[LANES<V>] = {};
    std::memcpy(padded, x, count * sizeof(T));
    return widened<V>(padded);
}

// The lanes of a and b in turn: of their lower halves, or from lane FROM = LANES / 2 on of their upper ones.
template <class V, size_t FROM, size_t... I>
inline typename V::Floats interleaved(typename V::Floats a, typename V::Floats b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, (FROM + I / 2 + I % 2 * LANES<V>)...);
}

// A square of vectors, so that lane i of vector j becomes lane j of vector i.
template <class V, size_t ROUNDS = LANES<V>>
inline void transpose(typename V::Floats (&square)[LANES<V>]) {
    constexpr size_t N = LANES<V>;
    if constexpr (ROUNDS > 1) {
        typename V::Floats next[N];
        for (size_t i = 0; i < N / 2; i++) {
            next[2 * i] = interleaved<V, 0>(square[i], square[i + N / 2], std::make_index_sequence<N>());
            next[2 * i + 1] = interleaved<V, N / 2>(square[i], square[i + N / 2], std::make_index_sequence<N>());
        }
        transpose<V, ROUNDS / 2>(next);
        for (size_t i = 0; i < N; i++) square[i] = next[i];
    }
}

// Rows of numbers of whatever type: load() fills out[input * LANES + lane] with the inputs [col, col + width) of LANES
// rows from `row` on; what is beyond `rows` is 0.
struct Source {
    const void* x;
    size_t stride, rows;
    void (*load)(const Source&, size_t row, size_t col, size_t width, float* out);
};

template <class V, class T>
void load_group(const Source& source, size_t row, size_t col, size_t width, float* out) {
    constexpr size_t N = LANES<V>;
    const size_t left = row < source.rows ? source.rows - row : 0, rows = left < N ? left : N;
    const Rows<const T> x{static_cast<const T*>(source.x) + row * source.stride + col, source.stride};
    for (size_t i = 0; i < width; i += N) {
        typename V::Floats square[N] = {};
        const size_t count = width - i < N ? width - i : N;
        if (count == N)
            for (size_t r = 0; r < rows; r++) square[r] = widened<V>(x[r] + i);
        else
            for (size_t r = 0; r < rows; r++) square[r] = widened_part<V>(x[r] + i, count);
        transpose<V>(square);
        for (size_t j = 0; j < count; j++) store(out + (i + j) * N, square[j]);
    }
}

// What encoding has met: squared errors, and whether numbers are not finite.
template <class V>
struct Met {
    typename V::Doubles error = {};
    typename V::Ints largest = {};  // of all magnitudes as bits: they have their order, what is not finite is above all

    double total() const {
        double sum = 0;
        for (size_t lane = 0; lane < LANES<V>; lane++) sum += largest[lane] < 0x7f800000 ? error[lane] : NAN;
        return sum;
    }
};

// One group of LANES rows, of which w holds the numbers, becomes span `span` of `tile`.
template <class V, class Levels, bool ASYMMETRIC>
inline void encode_span(const Tiles& tiles, const Levels& levels, float* w, size_t width, size_t span, uint8_t* tile,
                        Met<V>& met) {
    using F = typename V::Floats;
    using I = typename V::Ints;
    using B = Bits<V>;
    constexpr size_t N = LANES<V>;
    I largest = {};
    for (size_t i = 0; i < width; i++) largest = larger(B::of(load<F>(w + i * N)) & 0x7fffffff, largest);
    met.largest = larger(largest, met.largest);

    const I exponent = larger(smaller(B::exponent(B::floats(largest)), I{} + 126), I{} - 126);
    const F down = B::power_of_two(-exponent), up = B::power_of_two(exponent);
    for (size_t i = 0; i < width; i++) store(w + i * N, load<F>(w + i * N) * down);
    const Group<V, Levels, ASYMMETRIC> group{levels, w, width};
    const Fit<F> found = group.best(tiles.kind);

    const F scale = B::flushed(found.scale * up), offset = B::flushed(found.offset * up);
    const F r = group.inverse(scale == 0.0f ? F{} : found.scale);
    Packer<V>{span}.pack(tile, tiles.kind, tiles.group, [&](size_t input) {
        return levels.code(input < width ? group.shifted(input, found.offset) * r : F{});
    });
    const auto put = [&](size_t at, F numbers) {
        const auto halves = __builtin_convertvector(B::of(numbers) >> 16, typename V::Halves);
        std::memcpy(tile + Weight::code_bytes_of(tiles.kind, tiles.group) + (at + span * N) * 2, &halves, sizeof halves);
    };
    put(0, scale);
    if (ASYMMETRIC) put(TILE_ROWS, offset);
    const auto unit = __builtin_convertvector(up, typename V::Doubles);
    met.error += __builtin_convertvector(found.error, typename V::Doubles) * unit * unit;
}

template <class V, class Levels, bool ASYMMETRIC>
double encode_tiles(const Tiles& tiles, const Source& source, float* w) {
    const Levels levels(tiles);
    const size_t tile_bytes = Weight::code_bytes_of(tiles.kind, tiles.group) + TILE_ROWS * 2 * (ASYMMETRIC ? 2 : 1);
    uint8_t* tile = tiles.data;
    Met<V> met;
    for (size_t row = 0; row < tiles.rows; row += TILE_ROWS)
        for (size_t col = 0; col < tiles.cols; col += tiles.group, tile += tile_bytes)
            for (size_t span = 0; span < TILE_ROWS / LANES<V>; span++) {
                const size_t width = tiles.cols - col < tiles.group ? tiles.cols - col : tiles.group;
                source.load(source, row + span * LANES<V>, col, width, w);
                encode_span<V, Levels, ASYMMETRIC>(tiles, levels, w, width, span, tile, met);
            }
    return met.total();
}

template <class V, class T>
double encode_from(const Tiles& tiles, Rows<const T> x, float* scratch) {
    const Source source{x.data, x.stride, tiles.rows, load_group<V, T>};
    switch (tiles.kind) {
        case Kind::nf4: return encode_tiles<V, Nf4Levels<V>, false>(tiles, source, scratch);
        case Kind::fp4:
        case Kind::fp8: return encode_tiles<V, FloatLevels<V>, false>(tiles, source, scratch);
        default:
            return tiles.asymmetric ? encode_tiles<V, WholeLevels<V>, true>(tiles, source, scratch)
                                    : encode_tiles<V, WholeLevels<V>, false>(tiles, source, scratch);
    }
}

template <class V>
constexpr EncodeKernels encode_kernels_of() {
    return {encode_from<V, float>, encode_from<V, F16>, encode_from<V, BF16>};
}

}  // namespace
}  // namespace tightfit
