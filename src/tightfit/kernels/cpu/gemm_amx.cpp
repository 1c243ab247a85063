// Products of tiles of 16 tokens with tiles of 16 rows, two by two, so that each tile that is loaded is used twice.
//
// A task goes through the inputs block by block. Of a block it decodes 32 rows at a time to a panel, which stays in the
// first-level cache while all tokens are multiplied with it; their tiles of the block stay in the second-level cache
// for the next rows, and so do the sums.
#include <algorithm>
#include <type_traits>

#include "codes.h"
#include "gemm.h"
#include "isa_amx.h"

namespace tightfit {
namespace {

// ---- panels: lines of two inputs of 16 rows in bfloat16, the order in which AMX takes its second factor ----

// 16 rows of 32 inputs, `stride` bytes apart, to 16 lines.
inline void transpose(const uint8_t* rows, size_t stride, uint8_t* lines) {
    for (size_t part = 0; part < 4; part++, rows += 16, lines += 4 * LINE) {  // eight inputs
        const auto eight = [&](size_t row) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + row * stride));
        };
        __m512i four[4];
        for (size_t i = 0; i < 4; i++) {
            four[i] = _mm512_castsi128_si512(eight(i));
            four[i] = _mm512_mask_broadcast_i32x4(four[i], 0x00f0, eight(4 + i));
            four[i] = _mm512_mask_broadcast_i32x4(four[i], 0x0f00, eight(8 + i));
            four[i] = _mm512_mask_broadcast_i32x4(four[i], 0xf000, eight(12 + i));
        }
        Avx512::transpose(four);
        for (size_t i = 0; i < 4; i++) _mm512_store_si512(lines + i * LINE, four[i]);
    }
}

// The inputs [start, stop) of a tile row of a matrix that is stored row by row.
template <class T>
void dense_panel(const Weight& w, size_t tile_row, size_t start, size_t stop, uint8_t* lines) {
    const T* data = reinterpret_cast<const T*>(w.data) + tile_row * TILE_ROWS * w.cols;
    const size_t rows = std::min(w.rows - tile_row * TILE_ROWS, TILE_ROWS);
    for (size_t col = start; col < stop; col += GEMM_STEP, lines += GEMM_TILE) {
        const size_t count = w.cols - col;
        if (std::is_same<T, BF16>::value && count >= GEMM_STEP && rows == TILE_ROWS) {
            transpose(reinterpret_cast<const uint8_t*>(data + col), w.cols * sizeof(T), lines);
            continue;
        }
        alignas(64) uint8_t rounded[TILE_ROWS][LINE] = {};
        for (size_t r = 0; r < rows; r++) _mm512_store_si512(rounded[r], load_row(data + r * w.cols + col, count));
        transpose(rounded[0], LINE, lines);
    }
}

// How many of the first `count` inputs of a pruned row have a bit in its bitmap.
inline size_t count_before(const uint8_t* bitmap, size_t count) {
    __m512i sums = _mm512_setzero_si512();
    for (size_t i = 0; i < count; i += 8 * LINE, bitmap += LINE) {
        const size_t words = std::min<size_t>((count - i) / 32, 16);  // a panel begins at a multiple of 32 inputs
        const __m512i bits = _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << words) - 1), bitmap);
        sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(bits));
    }
    return static_cast<size_t>(_mm512_reduce_add_epi64(sums));
}

// Where in the bitmap each of 32 inputs has its bit.
struct Interleaved {
    alignas(64) uint16_t places[32];

    constexpr Interleaved() : places() {
        for (int i = 0; i < 32; i++) places[i] = static_cast<uint16_t>(i % 16 * 2 + i / 16);
    }
};

// The inputs [start, stop) of a tile row of a pruned matrix. A row whose bitmap asks for more values than there are is
// damaged, and the rest of it zeros.
void pruned_panel(const Weight& w, size_t tile_row, size_t start, size_t stop, uint8_t* lines) {
    static constexpr Interleaved interleaved;
    const __m512i order = _mm512_load_si512(interleaved.places);
    const size_t rows = std::min(w.rows - tile_row * TILE_ROWS, TILE_ROWS), kept = w.kept;
    alignas(64) uint8_t inputs[GEMM_BLOCK / GEMM_STEP][TILE_ROWS][LINE];
    for (size_t r = 0; r < TILE_ROWS; r++) {
        const uint8_t* bitmap = w.data + (tile_row * TILE_ROWS + std::min(r, rows - 1)) * w.row_bytes();
        const uint8_t* values = bitmap + w.bitmap_bytes();
        size_t place = r < rows ? count_before(bitmap, start) : kept;
        for (size_t col = start; col < stop; col += GEMM_STEP) {
            uint32_t bits;
            std::memcpy(&bits, bitmap + col / 8, sizeof bits);
            const size_t next = place + static_cast<size_t>(_mm_popcnt_u32(bits));
            if (next > kept) bits = 0;
            const __m512i some = _mm512_maskz_expandloadu_epi16(bits, values + place * sizeof(BF16));
            _mm512_store_si512(inputs[(col - start) / GEMM_STEP][r], _mm512_permutexvar_epi16(order, some));
            place = next;
        }
    }
    for (size_t col = start; col < stop; col += GEMM_STEP, lines += GEMM_TILE)
        transpose(inputs[(col - start) / GEMM_STEP][0], LINE, lines);
}

// A scale or an offset of each row, in the order of a line's numbers: `low` for the rows 0 to 7, `high` for 8 to 15.
struct InLine {
    __m512 low, high;

    InLine(const uint8_t* rows, float unit) {
        const __m512i all = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows)));
        const __m512i twice = _mm512_slli_epi32(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), 16);
        const auto floats = [&](__m512i places) {
            const __m512i upper = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, all);
            return _mm512_mul_ps(_mm512_castsi512_ps(upper), _mm512_set1_ps(unit));
        };
        low = floats(twice), high = floats(_mm512_add_epi32(twice, _mm512_set1_epi32(8 << 16)));
    }

    // The same of numbers in float16.
    static InLine halves(const uint8_t* rows) {
        const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows));
        const __m256i twice = _mm256_setr_epi16(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        return {_mm512_cvtph_ps(_mm256_permutexvar_epi16(twice, all)),
                _mm512_cvtph_ps(_mm256_permutexvar_epi16(_mm256_add_epi16(twice, _mm256_set1_epi16(8)), all))};
    }

    InLine operator*(float factor) const {
        return {_mm512_mul_ps(low, _mm512_set1_ps(factor)), _mm512_mul_ps(high, _mm512_set1_ps(factor))};
    }

    InLine(__m512 l, __m512 h) : low(l), high(h) {}
};

struct Places {
    alignas(64) uint8_t bytes[64];

    constexpr Places(int row, int input) : bytes() {
        for (int i = 0; i < 16; i++) bytes[4 * i + 1] = static_cast<uint8_t>(4 * (row + i / 2) + input + i % 2);
    }
};

// Of eight rows from ROW on, the codes of INPUT and the next, plus BASE: as the second lowest byte of that float.
constexpr float BASE = 32768;

template <int ROW, int INPUT>
inline __m512 based_codes(__m512i step) {
    static constexpr Places places(ROW, INPUT);
    const __m512i base = _mm512_castps_si512(_mm512_set1_ps(BASE));
    return _mm512_castsi512_ps(
        _mm512_mask_permutexvar_epi8(base, 0x2222222222222222, _mm512_load_si512(places.bytes), step));
}

template <class Code, class = void>
struct IsTable : std::true_type {};
template <class Code>
struct IsTable<Code, std::void_t<decltype(Code::ZERO)>> : std::false_type {};

// The scales (and offsets) of a group of one tile, and the two lines that they make of a step of four inputs.
//
// Whole numbers: (code + BASE) * scale - (ZERO + BASE) * scale is one fused operation, and exact for any scale below
// 2^112, since both factors have at most 24 bits together.
template <class Code, bool ASYMMETRIC, bool HALF_SCALES, bool TABLE = IsTable<Code>::value>
struct Decoded {
    Decoded(const Weight&, const Code& code, const uint8_t* scales)
        : scale(scales, code.unit()), zero(scale * -(BASE + Code::ZERO)),
          offset(scales + TILE_ROWS * 2 * ASYMMETRIC, 1) {}

    void lines(__m512i step, uint8_t* out) const {
        line<0>(step, out);
        line<2>(step, out + LINE);
    }

private:
    template <int INPUT>
    void line(__m512i step, uint8_t* out) const {
        __m512 low = _mm512_fmadd_ps(based_codes<0, INPUT>(step), scale.low, zero.low);
        __m512 high = _mm512_fmadd_ps(based_codes<8, INPUT>(step), scale.high, zero.high);
        if (ASYMMETRIC) low = _mm512_add_ps(low, offset.low), high = _mm512_add_ps(high, offset.high);
        _mm512_store_si512(out, round_both(low, high));
    }

    InLine scale, zero, offset;
};

// Scales in float16 have too many bits for that: first the whole number, exactly, then its product. An offset is that of
// the lowest code.
template <class Code, bool ASYMMETRIC>
struct Decoded<Code, ASYMMETRIC, true, false> {
    Decoded(const Weight& w, const Code&, const uint8_t* scales)
        : scale(InLine::halves(scales)), offset(InLine::halves(scales + TILE_ROWS * 2 * ASYMMETRIC)) {
        if (!ASYMMETRIC) return;
        const __m512 below = _mm512_set1_ps(w.below_zero());
        offset.low = _mm512_fmadd_ps(below, scale.low, offset.low);
        offset.high = _mm512_fmadd_ps(below, scale.high, offset.high);
    }

    void lines(__m512i step, uint8_t* out) const {
        line<0>(step, out);
        line<2>(step, out + LINE);
    }

private:
    template <int INPUT>
    void line(__m512i step, uint8_t* out) const {
        const __m512 zero = _mm512_set1_ps(BASE + Code::ZERO);
        const auto number = [&](__m512 codes, __m512 scales, __m512 offsets) {
            codes = _mm512_sub_ps(codes, zero);
            return ASYMMETRIC ? _mm512_fmadd_ps(codes, scales, offsets) : _mm512_mul_ps(codes, scales);
        };
        _mm512_store_si512(out, round_both(number(based_codes<0, INPUT>(step), scale.low, offset.low),
                                           number(based_codes<8, INPUT>(step), scale.high, offset.high)));
    }

    InLine scale, offset;
};

// Tables of floats.
template <class Code, bool ASYMMETRIC>
struct Decoded<Code, ASYMMETRIC, false, true> {
    Decoded(const Weight&, const Code& c, const uint8_t* scales)
        : code(c), scale(_mm512_mul_ps(rows(scales), _mm512_set1_ps(c.unit()))),
          offset(ASYMMETRIC ? rows(scales + TILE_ROWS * 2) : _mm512_setzero_ps()) {}

    void lines(__m512i step, uint8_t* out) const {
        __m512 inputs[4];
        code.floats(step, inputs);
        for (auto& input : inputs) {
            input = _mm512_mul_ps(input, scale);
            if (ASYMMETRIC) input = _mm512_add_ps(input, offset);
        }
        for (size_t i = 0; i < 2; i++) {
            const __m512i both = round_both(inputs[2 * i], inputs[2 * i + 1]);
            const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const __m512i high = _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16);
            _mm512_store_si512(out + i * LINE, _mm512_permutexvar_epi16(_mm512_or_si512(low, high), both));
        }
    }

private:
    static __m512 rows(const uint8_t* numbers) { return Avx512::load(reinterpret_cast<const BF16*>(numbers)); }

    const Code& code;
    __m512 scale, offset;
};

// The inputs [start, stop) of a tile row of a tiled matrix. In a block that is not a whole one the last unit of ternary
// codes may end after `stop`, for which a panel has room.
template <class Code, bool ASYMMETRIC, bool HALF_SCALES>
void tile_panel(const Weight& w, size_t tile_row, size_t start, size_t stop, uint8_t* lines) {
    const Code code(w);
    const uint8_t* row = w.data + tile_row * w.tile_row_bytes();
    const size_t stored = std::min(stop, w.groups() * w.group);
    for (size_t col = start; col < stored;) {
        const size_t group = col / w.group, first = group * w.group, end = std::min(stored, first + w.group);
        const uint8_t* tile = row + group * w.tile_bytes();
        const Decoded<Code, ASYMMETRIC, HALF_SCALES> decoded(w, code, tile + w.code_bytes());
        for (; col < end; col += Code::INPUTS) {
            __m512i steps[Code::STEPS];
            code.unpack(tile, (col - first) / Code::INPUTS, 0, steps);
            for (const __m512i step : steps) {
                decoded.lines(step, lines);
                lines += 2 * LINE;
            }
        }
    }
    for (size_t col = stored; col < stop; col += 2, lines += LINE) _mm512_store_si512(lines, _mm512_setzero_si512());
}

using Panel = void (*)(const Weight&, size_t tile_row, size_t start, size_t stop, uint8_t* lines);

Panel panel_of(const Weight& w) {
    Panel panel = nullptr;
    switch (w.kind) {
        case Kind::f32: return dense_panel<float>;
        case Kind::f16: return dense_panel<F16>;
        case Kind::bf16: return dense_panel<BF16>;
        case Kind::pruned: return pruned_panel;
        default: break;
    }
    with_code<Avx512>(w, [&](const auto& code) {
        using Code = std::decay_t<decltype(code)>;
        if constexpr (!IsTable<Code>::value)
            if (w.half_scales) {
                panel = w.asymmetric ? tile_panel<Code, true, true> : tile_panel<Code, false, true>;
                return;
            }
        panel = w.asymmetric ? tile_panel<Code, true, false> : tile_panel<Code, false, false>;
    });
    return panel;
}

// ---- memory that will be needed soon, asked for a few lines at a time while something else is computed ----

class Ahead {
public:
    // `runs` runs of `bytes`, `stride` apart, in `times` requests.
    Ahead(const uint8_t* data, size_t bytes, size_t stride, size_t runs, size_t times)
        : data_(reinterpret_cast<const char*>(data)), lines_((bytes + 2 * LINE - 1) / LINE), stride_(stride),
          runs_(runs), each_((lines_ * runs + times - 1) / times) {}

    void ask() {
        for (size_t i = 0; i < each_ && runs_ > 0; i++) {
            _mm_prefetch(data_ + line_ * LINE, _MM_HINT_T1);
            if (++line_ == lines_) line_ = 0, data_ += stride_, runs_--;
        }
    }

private:
    const char* data_;
    size_t lines_, stride_, runs_, each_, line_ = 0;
};

// The stored inputs [start, stop) of `count` tile rows.
Ahead stored(const Weight& w, size_t tile_row, size_t count, size_t start, size_t stop, size_t times) {
    if (w.kind == Kind::pruned) {  // about where their values are
        const size_t row = tile_row * TILE_ROWS, rows = std::min(w.rows - row, count * TILE_ROWS);
        const size_t values = w.row_bytes() - w.bitmap_bytes(), width = std::min(stop, w.cols) - start;
        const uint8_t* data = w.data + row * w.row_bytes() + w.bitmap_bytes() + values * start / w.cols;
        return {data, values * width / w.cols, w.row_bytes(), rows, times};
    }
    if (!w.tiled()) {
        const size_t row = tile_row * TILE_ROWS, rows = std::min(w.rows - row, count * TILE_ROWS);
        const size_t bytes = (std::min(stop, w.cols) - start) * itemsize(w.kind);
        return {w.data + (row * w.cols + start) * itemsize(w.kind), bytes, w.cols * itemsize(w.kind), rows, times};
    }
    const size_t first = start / w.group, last = std::min((stop + w.group - 1) / w.group, w.groups());
    const uint8_t* data = w.data + tile_row * w.tile_row_bytes() + first * w.tile_bytes();
    return {data, (last - first) * w.tile_bytes(), w.tile_row_bytes(), count, times};
}

// ---- products ----

// Sums of M by N tiles lie at places of their own of a block of 2 by 2.
constexpr size_t SUMS = GEMM_TOKENS * TILE_ROWS;

// sums = or, unless `first`, += the products of M token tiles at `a` and N row tiles at `b`, of `steps` steps each.
// With each step it asks for SHARE bytes of `later`.
constexpr size_t SHARE = 4 * LINE;

template <int M, int N>
void multiply_tiles(const uint8_t* a, const uint8_t* b, size_t steps, float* sums, bool first, const uint8_t* later,
                    Ahead& weights) {
    if (first) {
        _tile_zero(0);
        if (N > 1) _tile_zero(1);
        if (M > 1) _tile_zero(2);
        if (M > 1 && N > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, LINE);
        if (N > 1) _tile_loadd(1, sums + SUMS, LINE);
        if (M > 1) _tile_loadd(2, sums + 2 * SUMS, LINE);
        if (M > 1 && N > 1) _tile_loadd(3, sums + 3 * SUMS, LINE);
    }
    const size_t next = steps * GEMM_TILE;
    for (size_t step = 0; step < steps; step++, a += GEMM_TILE, b += GEMM_TILE, later += SHARE) {
        for (size_t i = 0; i < SHARE; i += LINE) _mm_prefetch(reinterpret_cast<const char*>(later + i), _MM_HINT_T1);
        weights.ask();
        _tile_loadd(6, b, LINE);
        _tile_loadd(4, a, LINE);
        _tile_dpbf16ps(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, b + next, LINE);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (M > 1) {
            _tile_loadd(5, a + next, LINE);
            _tile_dpbf16ps(2, 5, 6);
            if (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, LINE);
    if (N > 1) _tile_stored(1, sums + SUMS, LINE);
    if (M > 1) _tile_stored(2, sums + 2 * SUMS, LINE);
    if (M > 1 && N > 1) _tile_stored(3, sums + 3 * SUMS, LINE);
}

using Multiply = void (*)(const uint8_t*, const uint8_t*, size_t, float*, bool, const uint8_t*, Ahead&);
constexpr Multiply MULTIPLY[2][2] = {{multiply_tiles<1, 1>, multiply_tiles<1, 2>},
                                     {multiply_tiles<2, 1>, multiply_tiles<2, 2>}};

// A pair of tile rows and a block of inputs; [first, last) are the tile rows whose sums are kept.
struct Place {
    size_t first, last, block, tile_row;

    size_t count() const { return std::min<size_t>(last - tile_row, 2); }
    size_t pair() const { return (tile_row - first) / 2; }
    size_t pairs() const { return (last - first + 1) / 2; }
};

Place begin_at(const GemmTask& t, size_t first) { return {first, std::min(first + 2 * t.width, t.last), 0, first}; }

Place after(const GemmTask& t, Place p) {
    p.tile_row += 2;
    if (p.tile_row < p.last) return p;
    p.tile_row = p.first;
    return ++p.block < t.x.blocks() ? p : begin_at(t, p.last);
}

// The sums of a pair of tile rows and 32 tokens after the other.
float* sums_of(const GemmTask& t, size_t pair) { return t.sums + pair * t.token_pairs() * 4 * SUMS; }

// Adds the products of a place to the sums.
void multiply(const GemmTask& t, const Place& p, const Place& next, Panel panel) {
    const size_t steps = t.x.steps_of(p.block), start = t.x.first_step(p.block) * GEMM_STEP;
    const size_t next_start = t.x.first_step(next.block) * GEMM_STEP;
    const size_t next_stop = next_start + t.x.steps_of(next.block) * GEMM_STEP;
    const size_t times = t.token_pairs() * steps;
    Ahead weights = stored(t.w, next.tile_row, next.tile_row < t.last ? next.count() : 0, next_start, next_stop, times);
    // Of the next block's tokens, as much with each pair as all pairs together need; past the end it does no harm.
    const size_t begin = t.begin / GEMM_TOKENS, end = (t.end + GEMM_TOKENS - 1) / GEMM_TOKENS;
    const uint8_t* tokens = t.x.tile((p.block + 1) % t.x.blocks(), begin) + p.pair() * times * SHARE;

    for (size_t i = 0; i < p.count(); i++)
        panel(t.w, p.tile_row + i, start, start + steps * GEMM_STEP, t.panel + i * steps * GEMM_TILE);
    float* sums = sums_of(t, p.pair());
    for (size_t tile = begin; tile < end; tile += 2, sums += 4 * SUMS, tokens += steps * SHARE) {
        const auto kernel = MULTIPLY[std::min<size_t>(end - tile, 2) - 1][p.count() - 1];
        kernel(t.x.tile(p.block, tile), t.panel, steps, sums, p.block == 0, tokens, weights);
    }
}

// The sums of the tile rows [first, last) to where the task wants them.
void give(const GemmTask& t, size_t first, size_t last) {
    const auto rows_of = [&](size_t tile_row) {  // which of its 16 rows the matrix has
        const size_t row = tile_row * TILE_ROWS, offset = t.w.row_offset;
        const size_t skip = row < offset ? offset - row : 0, end = std::min(offset + t.w.rows - row, TILE_ROWS);
        return static_cast<__mmask16>((1u << end) - (1u << skip));
    };
    const __m512 accumulate = _mm512_set1_ps(t.accumulate);
    for (size_t token = t.begin; token < t.end; token++) {
        const size_t i = token - t.begin;
        const float* sums = sums_of(t, 0) + i / GEMM_TOKENS * 2 * SUMS + i % GEMM_TOKENS * TILE_ROWS;
        float* out = t.out[token] + first * TILE_ROWS - t.w.row_offset;
        const auto give_tile = [&](size_t tile_row, size_t half) {
            const bool edge = tile_row == 0 || tile_row + 1 == t.last;
            const __mmask16 rows = edge ? rows_of(tile_row) : 0xffff;
            __m512 sum = _mm512_load_ps(sums + half * SUMS);
            if (t.accumulate != 0) sum = _mm512_fmadd_ps(accumulate, sum, _mm512_maskz_loadu_ps(rows, out));
            _mm512_mask_storeu_ps(out, rows, sum);
            out += TILE_ROWS;
        };
        for (size_t tile_row = first; tile_row < last; tile_row += 2, sums += t.token_pairs() * 4 * SUMS) {
            give_tile(tile_row, 0);
            if (tile_row + 1 < last) give_tile(tile_row + 1, 1);
        }
    }
}

}  // namespace

void amx_pack(Rows<const float> x, size_t token, const PackedTokens& packed) {
    for (size_t b = 0; b < packed.blocks(); b++) {
        uint8_t* line = packed.tile(b, token / GEMM_TOKENS) + token % GEMM_TOKENS * LINE;
        for (size_t step = 0; step < packed.steps_of(b); step++, line += GEMM_TILE) {
            const size_t col = (packed.first_step(b) + step) * GEMM_STEP;
            const bool real = token < packed.tokens;
            _mm512_store_si512(line, real ? load_row(x[token] + col, packed.cols - col) : _mm512_setzero_si512());
        }
    }
}

void amx_multiply(const GemmTask& task) {
    const TileConfig config;
    const Panel panel = panel_of(task.w);
    _tile_loadconfig(&config);
    for (Place place = begin_at(task, task.first), next; place.tile_row < task.last; place = next) {
        next = after(task, place);
        multiply(task, place, next, panel);
        if (next.first != place.first) give(task, place.first, place.last);
    }
    _tile_release();
}

}  // namespace tightfit
