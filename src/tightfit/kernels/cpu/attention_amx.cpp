#include <algorithm>
#include <cmath>

#include "attention_kernels.h"
#include "isa_amx.h"

namespace tightfit {
namespace {

// A tile is 16 rows of 64 bytes, and a product takes 32 features (or keys) of 16 rows and 16 columns. Everything is kept
// tile by tile:
//   queries  (row tiles, steps of 32 features, 16 rows, 32 features)
//   keys     (key tiles, steps, 16 pairs of features, 16 keys, 2)
//   scores   (key tiles, 16 rows, 16 keys) in float32, of one row tile
//   weights  (steps of 32 keys, 16 rows, 32 keys), in the place of the first of two tiles of scores
//   values   (steps of 32 keys, value tiles, 16 pairs of keys, 16 features, 2)
//   outputs  (row tiles, value tiles, 16 rows, 16 features) in float32
constexpr size_t TILE = 16, STEP = 32, HALVES = TILE * STEP, FLOATS = TILE * TILE;
constexpr size_t KEY_TILES = KEY_BLOCK / TILE, KEY_STEPS = KEY_BLOCK / STEP;
constexpr size_t STRIDE = 64;  // bytes from row to row of a tile
constexpr size_t MOST_ROWS = 1024, MOST_BYTES = 1 << 20;

struct Sizes {
    size_t row_tiles, steps, value_tiles;  // value tiles come in pairs

    Sizes(size_t rows, size_t key_dim, size_t value_dim)
        : row_tiles((rows + TILE - 1) / TILE),
          steps((key_dim + STEP - 1) / STEP),
          value_tiles((value_dim + 2 * TILE - 1) / (2 * TILE) * 2) {}
};

struct Buffers {
    BF16 *queries, *keys, *values;
    float *scores, *outputs, *tops, *totals, *pages;

    Buffers(const Sizes& s, size_t made, Scratch& scratch)
        : queries(scratch.take<BF16>(s.row_tiles * s.steps * HALVES)),
          keys(scratch.take<BF16>(KEY_TILES * s.steps * HALVES)),
          values(scratch.take<BF16>(KEY_STEPS * s.value_tiles * HALVES)),
          scores(scratch.take<float>(KEY_TILES * FLOATS)),
          outputs(scratch.take<float>(s.row_tiles * s.value_tiles * FLOATS)),
          tops(scratch.take<float>(s.row_tiles * TILE)),
          totals(scratch.take<float>(s.row_tiles * TILE)),
          pages(scratch.take<float>(made)) {}
};

// ---- packing ----

// Where the keys of a block lie, or their values: null for those outside of [from, to), which count as zeros.
template <class T>
struct BlockRows {
    const T* rows[KEY_BLOCK];

    BlockRows(const HeadCache& head, const uint8_t* data, size_t stride, size_t block, size_t from, size_t to) {
        size_t slot = head.table ? 0 : block % head.slots;
        for (size_t i = 0; i < KEY_BLOCK; i++) {
            const bool hidden = block + i < from || block + i >= to;
            if (head.table && !hidden) slot = head.slot(block + i);
            rows[i] = hidden ? nullptr : reinterpret_cast<const T*>(data) + slot * stride;
            if (++slot == head.slots) slot = 0;
        }
    }

    __m512i load(size_t i, size_t at, size_t count) const {
        return rows[i] ? load_row(rows[i] + at, count) : _mm512_setzero_si512();
    }
};

// The keys of a block as columns.
template <class T>
void pack_keys(const BlockRows<T>& keys, size_t dim, size_t steps, BF16* out) {
    for (size_t tile = 0; tile < KEY_TILES; tile++)
        for (size_t step = 0; step < steps; step++, out += HALVES) {
            alignas(64) BF16 rows[TILE][STEP];
            const uint8_t* places[TILE];
            for (size_t i = 0; i < TILE; i++) {
                _mm512_store_si512(rows[i], keys.load(tile * TILE + i, step * STEP, dim - step * STEP));
                places[i] = reinterpret_cast<const uint8_t*>(rows[i]);
            }
            __m512i pairs[TILE];
            transpose_rows<Avx512>(places, pairs);
            for (size_t i = 0; i < TILE; i++) _mm512_store_si512(out + i * STEP, pairs[i]);
        }
}

// The values of a block, two keys side by side.
template <class T>
void pack_values(const BlockRows<T>& values, size_t dim, size_t value_tiles, BF16* out) {
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (size_t pair = 0; pair < KEY_BLOCK / 2; pair++) {
        BF16* row = out + (pair / TILE * value_tiles * TILE + pair % TILE) * STEP;
        for (size_t at = 0; at < value_tiles * TILE; at += STEP, row += 2 * HALVES) {
            const __m512i a = values.load(2 * pair, at, dim - at), b = values.load(2 * pair + 1, at, dim - at);
            const __m512i even = _mm512_unpacklo_epi16(a, b), odd = _mm512_unpackhi_epi16(a, b);
            _mm512_store_si512(row, _mm512_permutex2var_epi64(even, low, odd));
            _mm512_store_si512(row + HALVES, _mm512_permutex2var_epi64(even, high, odd));
        }
    }
}

void pack_queries(const Prefill& p, const Stretch& stretch, const Sizes& sizes, BF16* out) {
    const __m512 scale = _mm512_set1_ps(p.scale);
    const size_t key_dim = stretch.head.key_dim;
    for (size_t tile = 0; tile < sizes.row_tiles; tile++)
        for (size_t step = 0; step < sizes.steps; step++)
            for (size_t i = 0; i < TILE; i++, out += STEP) {
                const size_t row = tile * TILE + i;
                __m512 low = _mm512_setzero_ps(), high = low;
                if (row < p.rows) {
                    const float* q = stretch.q.at(row / p.groups, row % p.groups);
                    const size_t count = std::min(key_dim - step * STEP, STEP), first = std::min(count, TILE);
                    float chosen[STEP];
                    if (stretch.channels) {
                        for (size_t i = 0; i < count; i++)
                            chosen[i] = q[static_cast<size_t>(stretch.channels[step * STEP + i])];
                        q = chosen;
                    } else {
                        q += step * STEP;
                    }
                    low = Avx512::load_part(q, first), high = Avx512::load_part(q + TILE, count - first);
                }
                _mm512_store_si512(out, round_both(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)));
            }
}

// ---- products of a row tile: all that is used again fits the first cache ----

// scores = queries . keys for the key tiles [begin, end), an even number.
inline void multiply_keys(const BF16* queries, const BF16* keys, size_t steps, size_t begin, size_t end, float* scores) {
    for (size_t tile = begin; tile < end; tile += 2) {
        const BF16* a = keys + tile * steps * HALVES;
        const BF16* b = a + steps * HALVES;
        _tile_zero(0);
        _tile_zero(1);
        for (size_t step = 0; step < steps; step++) {
            _tile_loadd(4, queries + step * HALVES, STRIDE);
            _tile_loadd(5, a + step * HALVES, STRIDE);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, b + step * HALVES, STRIDE);
            _tile_dpbf16ps(1, 4, 6);
        }
        _tile_stored(0, scores + tile * FLOATS, STRIDE);
        _tile_stored(1, scores + (tile + 1) * FLOATS, STRIDE);
    }
}

// outputs += weights . values for the steps [begin, end) of 32 keys.
inline void multiply_values(const BF16* weights, const BF16* values, size_t value_tiles, size_t begin, size_t end,
                            float* outputs) {
    for (size_t tile = 0; tile < value_tiles; tile += 2) {
        _tile_loadd(0, outputs + tile * FLOATS, STRIDE);
        _tile_loadd(1, outputs + (tile + 1) * FLOATS, STRIDE);
        for (size_t step = begin; step < end; step++) {
            const BF16* features = values + (step * value_tiles + tile) * HALVES;
            _tile_loadd(4, weights + 2 * step * HALVES, STRIDE);
            _tile_loadd(5, features, STRIDE);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, features + HALVES, STRIDE);
            _tile_dpbf16ps(1, 4, 6);
        }
        _tile_stored(0, outputs + tile * FLOATS, STRIDE);
        _tile_stored(1, outputs + (tile + 1) * FLOATS, STRIDE);
    }
}

// ---- the softmax ----

// 2^x for x up to 0, minus infinity included, with a relative error of 7e-5: a fiftieth of what rounding to bfloat16
// does.
inline __m512 power(__m512 x) {
    const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 p = _mm512_set1_ps(7.8024551e-2f);
    p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(2.2606714e-1f));
    p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(6.9583353e-1f));
    p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(9.9992522e-1f));
    return _mm512_scalef_ps(p, x);
}

// Lane r of the result is all lanes of rows[r] combined.
template <class Combine>
inline __m512 combine_lanes(const __m512 (&rows)[TILE], Combine combine) {
    __m512 fours[TILE / 4];
    for (size_t i = 0; i < TILE / 4; i++) {
        __m512d pairs[2];
        for (size_t j = 0; j < 2; j++) {
            const __m512 a = rows[4 * i + 2 * j], b = rows[4 * i + 2 * j + 1];
            pairs[j] = _mm512_castps_pd(combine(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        }
        fours[i] = combine(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1])),
                           _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1])));
    }
    const auto halve = [&](__m512 a, __m512 b) {
        return combine(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return halve(halve(fours[0], fours[1]), halve(fours[2], fours[3]));
}

// Scores of one row tile, limited by `softcap` and minus infinity for keys that a row does not see, and for the key
// tiles outside of [begin, end).
void hide(const Stretch& stretch, size_t first, size_t block, size_t begin, size_t end, float* scores) {
    const Queries& queries = stretch.queries;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 cap = _mm512_set1_ps(queries.softcap), hidden = _mm512_set1_ps(-__builtin_inff());
    for (size_t r = 0; r < TILE; r++) {
        const size_t row = std::min(first + r, queries.rows - 1);  // rows that are no queries see what the last one does
        const auto place = [&](size_t position) {
            return _mm512_set1_epi32(static_cast<int>(std::min(std::max(position, block) - block, KEY_BLOCK)));
        };
        const __m512i low = place(std::max(queries.lowest(row), stretch.from));
        const __m512i high = place(std::min(queries.position(row) + 1, stretch.to));
        for (size_t tile = 0; tile < KEY_TILES; tile++) {
            float* at = scores + tile * FLOATS + r * TILE;
            __m512 score = hidden;
            if (tile >= begin && tile < end) {
                const __m512i keys = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(tile * TILE)));
                const __mmask16 seen = _mm512_cmpge_epi32_mask(keys, low) & _mm512_cmplt_epi32_mask(keys, high);
                __m512 value = _mm512_load_ps(at);
                if (queries.softcap != 0.0f) value = _mm512_mul_ps(tanh<Avx512>(_mm512_div_ps(value, cap)), cap);
                score = _mm512_mask_mov_ps(hidden, seen, value);
            }
            _mm512_store_ps(at, score);
        }
    }
}

// Turns the scores of one row tile into weights, adds these up, and shrinks what was folded before.
void weigh(float* scores, float* tops, float* totals, float* outputs, size_t value_tiles) {
    __m512 rows[TILE];
    for (size_t r = 0; r < TILE; r++) {
        rows[r] = _mm512_load_ps(scores + r * TILE);
        for (size_t tile = 1; tile < KEY_TILES; tile++)
            rows[r] = _mm512_max_ps(rows[r], _mm512_load_ps(scores + tile * FLOATS + r * TILE));
    }
    const __m512 before = _mm512_load_ps(tops);
    const __m512 top =
        _mm512_max_ps(before, combine_lanes(rows, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); }));
    __m512 total = _mm512_load_ps(totals);
    const __mmask16 changed = _mm512_cmp_ps_mask(before, top, _CMP_NEQ_UQ);
    if (changed) {
        alignas(64) float shrink[TILE];
        const __m512 ones = _mm512_set1_ps(1.0f);  // exactly: the others' bits do not depend on those that changed
        _mm512_store_ps(shrink, _mm512_mask_mov_ps(ones, changed, exp2<Avx512>(_mm512_sub_ps(before, top))));
        total = _mm512_mul_ps(total, _mm512_load_ps(shrink));
        for (size_t r = 0; r < TILE; r++) {
            if (!(changed >> r & 1)) continue;
            const __m512 factor = _mm512_set1_ps(shrink[r]);
            for (size_t tile = 0; tile < value_tiles; tile++) {
                float* output = outputs + tile * FLOATS + r * TILE;
                _mm512_store_ps(output, _mm512_mul_ps(_mm512_load_ps(output), factor));
            }
        }
        _mm512_store_ps(tops, top);
    }
    for (size_t r = 0; r < TILE; r++) {
        const __m512 base = _mm512_set1_ps(tops[r]);
        rows[r] = _mm512_setzero_ps();
        for (size_t step = 0; step < KEY_STEPS; step++) {
            float* at = scores + 2 * step * FLOATS + r * TILE;
            const __m512 a = power(_mm512_sub_ps(_mm512_load_ps(at), base));
            const __m512 b = power(_mm512_sub_ps(_mm512_load_ps(at + FLOATS), base));
            rows[r] = _mm512_add_ps(rows[r], _mm512_add_ps(a, b));
            _mm512_store_si512(at, round_both(a, b));
        }
    }
    const __m512 sum = combine_lanes(rows, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
    _mm512_store_ps(totals, _mm512_add_ps(total, sum));
}

void fold_block(const Stretch& stretch, const Sizes& sizes, const Buffers& s, size_t block) {
    const Queries& queries = stretch.queries;
    for (size_t tile = 0; tile < sizes.row_tiles; tile++) {
        const size_t first = tile * TILE, last = std::min(first + TILE, queries.rows) - 1;
        const size_t low = std::max({queries.lowest(first), stretch.from, block});
        const size_t high = std::min({queries.position(last) + 1, stretch.to, block + KEY_BLOCK});
        if (low >= high) continue;
        const size_t begin = (low - block) / STEP * 2, end = (high - block + STEP - 1) / STEP * 2;
        float* outputs = s.outputs + tile * sizes.value_tiles * FLOATS;
        multiply_keys(s.queries + tile * sizes.steps * HALVES, s.keys, sizes.steps, begin, end, s.scores);
        const bool all_seen = block + KEY_BLOCK <= std::min(queries.position(first) + 1, stretch.to) &&
                              block >= std::max(queries.lowest(last), stretch.from);
        if (!all_seen || queries.softcap != 0.0f) hide(stretch, first, block, begin, end, s.scores);
        weigh(s.scores, s.tops + first, s.totals + first, outputs, sizes.value_tiles);
        multiply_values(reinterpret_cast<const BF16*>(s.scores), s.values, sizes.value_tiles, begin / 2, end / 2, outputs);
    }
}

void write(const Prefill& p, const Sizes& sizes, const Buffers& s) {
    const size_t dim = p.value_dim;
    for (size_t row = 0; row < p.rows; row++) {
        const size_t token = row / p.groups, head = row % p.groups;
        float top = s.tops[row], total = s.totals[row], shrink = 1.0f;
        if (p.sinks) {
            const float sink = p.sinks[head] * 1.44269504f, before = top;
            top = std::max(before, sink), shrink = std::exp2(before - top);
            total = total * shrink + std::exp2(sink - top);
        }
        const __m512 scale = _mm512_set1_ps(shrink / total);
        const float* from = s.outputs + (row / TILE * sizes.value_tiles * TILE + row % TILE) * TILE;
        if (p.lse.data) p.lse[token][head] = top + std::log2(total);
        float* out = p.out.at(token, head);
        for (size_t d = 0; d < dim; d += TILE, from += FLOATS)
            Avx512::store_part(out + d, _mm512_mul_ps(_mm512_load_ps(from), scale), std::min(TILE, dim - d));
    }
}

// While it lives, numbers too small to be normal are zeros, as they are in tile products: vscalefps takes 200 cycles to
// make one.
class WithoutSubnormals {
public:
    WithoutSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | 0x40); }
    ~WithoutSubnormals() { _mm_setcsr(before_); }

private:
    unsigned before_;
};

template <class T>
void fold_loaded(const Stretch& stretch, const HeadCache& head, const Sizes& sizes, const Buffers& s, size_t block) {
    const auto rows = [&](const uint8_t* data, size_t stride) {
        return BlockRows<T>(head, data, stride, block, stretch.from, stretch.to);
    };
    pack_keys(rows(head.keys, head.key_dim), head.key_dim, sizes.steps, s.keys);
    pack_values(rows(head.values, head.value_stride), head.value_dim, sizes.value_tiles, s.values);
    fold_block(stretch, sizes, s, block);
}

void fold_stretch(const Prefill& p, const Stretch& stretch, const Buffers& s) {
    const Sizes sizes(p.rows, stretch.head.key_dim, p.value_dim);
    pack_queries(p, stretch, sizes, s.queries);
    const size_t last = std::min(stretch.to, stretch.queries.position(p.rows - 1) + 1);
    const size_t from = std::max(stretch.from, stretch.queries.lowest(0));
    for (size_t block = from / KEY_BLOCK * KEY_BLOCK; block < last; block += KEY_BLOCK) {
        const size_t first = std::max(block, stretch.from), end = std::min(block + KEY_BLOCK, stretch.to);
        const HeadCache head =
            stretch.head.loaded() ? stretch.head : load_block<Avx512>(stretch.head, block, first, end, s.pages);
        switch (head.kind) {
            case Kind::f16: fold_loaded<F16>(stretch, head, sizes, s, block); break;
            case Kind::bf16: fold_loaded<BF16>(stretch, head, sizes, s, block); break;
            default: fold_loaded<float>(stretch, head, sizes, s, block);
        }
    }
}

}  // namespace

size_t amx_prefill_rows(size_t key_dim, size_t value_dim) {
    const Sizes sizes(2 * TILE, key_dim, value_dim);
    const size_t row_bytes = sizes.steps * STEP * sizeof(BF16) + sizes.value_tiles * TILE * sizeof(float);
    return std::min(MOST_ROWS, std::max(MOST_BYTES / row_bytes, 2 * TILE));
}

size_t amx_prefill_scratch(size_t rows, size_t key_dim, size_t value_dim, bool made) {
    Scratch scratch;
    Buffers(Sizes(rows, key_dim, value_dim), page_scratch(key_dim, value_dim, made), scratch);
    return scratch.used();
}

void amx_prefill(const Prefill& p, bool made, uint8_t* address) {
    const Sizes sizes(p.rows, p.key_dim, p.value_dim);
    Scratch scratch(address);
    const Buffers s(sizes, page_scratch(p.key_dim, p.value_dim, made), scratch);
    std::fill(s.tops, s.tops + sizes.row_tiles * TILE, LOWEST);
    std::fill(s.totals, s.totals + sizes.row_tiles * TILE, 0.0f);
    std::fill(s.outputs, s.outputs + sizes.row_tiles * sizes.value_tiles * FLOATS, 0.0f);
    const WithoutSubnormals mode;
    const TileConfig config;
    _tile_loadconfig(&config);
    for (const Stretch& stretch : p.seen) fold_stretch(p, stretch, s);
    _tile_release();
    write(p, sizes, s);
}

}  // namespace tightfit
