// Attention of few rows, as decoding has them, on AMX tiles: it waits for memory only.
//
// Products have the accuracy of float32: a float is the sum of three numbers in bfloat16, so queries are multiplied in
// three parts with keys as they lie in the cache, and weights in three with values. Of coded pages the codes are
// multiplied, which bfloat16 holds exactly: scales go to the other side, of keys to the queries of each page, of values to
// the weights of each group; and minima are added to the sums. There two parts do, whose error of 2^-17 is far below that
// of codes.
#include "attention_kernels.h"
#include "isa_amx.h"

namespace tightfit {
namespace {

// A tile is 16 rows of 64 bytes. With WIDTH columns for queries, 8 or 16 of which are folded at once, a block has
//   queries  (parts, steps of 32 features, 16 pairs of features, WIDTH, 2)
//   keys     (steps of 32 tokens, 32 tokens, steps of 32 features, 32 features), or where they lie
//   scores   (tokens, WIDTH) in float32
//   weights  (steps of 32 tokens, parts, 16 queries, 32 tokens)
//   values   (steps of 32 features, steps of 32 tokens, 2 halves, 16 pairs of tokens, 16 features, 2)
// Tiles 0 and 1 are scores, 2 and 3 keys or values, 4 queries, 5 and 6 outputs, 7 weights.
constexpr size_t TILE = 16, STEP = 32, HALVES = TILE * STEP, FLOATS = TILE * TILE, STRIDE = 64;
constexpr size_t STEPS = KEY_BLOCK / STEP, PARTS = 3, CODED_PARTS = 2;
static_assert(STEP == PAGE && STEP == CODE_GROUP);

template <size_t WIDTH>
struct Buffers {
    size_t sets, key_steps, value_steps;
    float *wide, *scales, *minima, *constants, *scores, *weights, *outputs, *pages;
    BF16 *queries, *keys, *split, *values;

    Buffers(size_t rows, size_t key_dim, size_t value_dim, float* address)
        : sets((rows + WIDTH - 1) / WIDTH),
          key_steps((key_dim + STEP - 1) / STEP),
          value_steps((value_dim + STEP - 1) / STEP) {
        Scratch scratch(reinterpret_cast<uint8_t*>(address));
        const size_t set = key_steps * STEP * WIDTH;
        wide = scratch.take<float>(sets * set), queries = scratch.take<BF16>(sets * PARTS * set);
        scales = scratch.take<float>(key_steps * STEP), minima = scratch.take<float>(key_steps * STEP);
        constants = scratch.take<float>(WIDTH), scores = scratch.take<float>(KEY_BLOCK * WIDTH);
        keys = scratch.take<BF16>(KEY_BLOCK * key_steps * STEP);
        weights = scratch.take<float>(KEY_BLOCK * WIDTH), split = scratch.take<BF16>(STEPS * PARTS * HALVES);
        values = scratch.take<BF16>(KEY_BLOCK * value_steps * STEP), outputs = scratch.take<float>(2 * FLOATS);
        pages = scratch.take<float>(0);
    }
};

// The compiler does not know that tiles are loaded from memory.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// ---- codes as numbers ----

// Where a feature of a step lies in 32 halves: each is 16 bits of codes, first with the first code, then the second, ...
constexpr size_t place(size_t bits, size_t feature) {
    const size_t per_half = 16 / bits;
    return feature % per_half * (STEP / per_half) + feature / per_half;
}

template <size_t BITS>
struct Codes {
    uint16_t shifts[STEP]{}, numbers[STEP]{};  // codes up to 15 in bfloat16, again and again

    constexpr Codes() {
        for (size_t i = 0; i < STEP; i++) {
            shifts[i] = static_cast<uint16_t>(i / (2 * BITS) * BITS);
            const size_t code = i & ((1 << BITS) - 1);
            size_t exponent = 0;
            while (code >> (exponent + 1)) exponent++;
            if (code) numbers[i] = static_cast<uint16_t>((127 + exponent) << 7 | ((code << 7 >> exponent) & 127));
        }
    }
};
template <size_t BITS>
alignas(64) constexpr Codes<BITS> CODES{};

// The next 32 codes as numbers.
template <size_t BITS>
inline __m512i load_codes(const uint8_t* codes) {
    const __m512i shifts = _mm512_load_si512(CODES<BITS>.shifts);
    if constexpr (BITS == 8) {
        const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
        const __m512i words = _mm512_and_si512(_mm512_srlv_epi16(both, shifts), _mm512_set1_epi16(0xff));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xff)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_srli_epi32(words, 16));
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high));
    } else {
        __m512i words;
        if constexpr (BITS == 4) {
            words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        } else {
            words = _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
        }
        return _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, shifts), _mm512_load_si512(CODES<BITS>.numbers));
    }
}

// The keys or the values of a block: rows of bfloat16, null for tokens that are not seen, or pages of codes.
struct Side {
    size_t bits, dim, row_bytes;
    Codec codec;
    const uint8_t* rows[KEY_BLOCK];
    const uint8_t* pages[STEPS];

    bool coded() const { return bits < 16; }

    // Calls work(load) with load(token, step of features) for a step of tokens.
    template <class Work>
    void with(size_t step, Work work) const {
        const uint8_t* page = coded() ? pages[step] : nullptr;
        const auto codes = [&](auto width) {
            constexpr size_t BITS = decltype(width)::value;
            work([=, bytes = row_bytes](size_t t, size_t s) { return load_codes<BITS>(page + t * bytes + s * 4 * BITS); });
        };
        switch (bits) {
            case 2: return codes(std::integral_constant<size_t, 2>());
            case 4: return codes(std::integral_constant<size_t, 4>());
            case 8: return codes(std::integral_constant<size_t, 8>());
        }
        const uint8_t* const* tokens = rows + step * STEP;
        work([=, count = dim](size_t t, size_t s) {
            if (!tokens[t]) return _mm512_setzero_si512();
            return load_row(reinterpret_cast<const BF16*>(tokens[t]) + s * STEP, count - s * STEP);
        });
    }
};

// What is read next, asked for a little at a time: a core's own prefetcher alone reaches half of the memory's speed.
class Reader {
public:
    void add(const uint8_t* at, size_t bytes) { runs_[count_++] = {at, at + bytes}, lines_ += bytes / 64; }
    // Asks for one of `calls` parts of it all.
    void read(size_t calls) {
        for (size_t i = 0; i < (lines_ + calls - 1) / calls && first_ < count_; i++) {
            Run& run = runs_[first_];
            __builtin_prefetch(run.at, 0, 2);
            if ((run.at += 64) >= run.end) first_++;
        }
    }

private:
    struct Run {
        const uint8_t *at, *end;
    };
    Run runs_[2 * STEPS];
    size_t count_ = 0, first_ = 0, lines_ = 0;
};

template <class Load>
void pack_keys(const Load& load, size_t steps, BF16* out) {
    for (size_t t = 0; t < STEP; t++)
        for (size_t s = 0; s < steps; s++, out += STEP) _mm512_store_si512(out, load(t, s));
}

// Two tokens side by side; the features of a step in the order that place_of_output() tells.
template <class Load>
void pack_values(const Load& load, size_t steps, BF16* out, Reader& reader, size_t calls) {
    for (size_t pair = 0; pair < TILE; pair++) {
        reader.read(calls);
        for (size_t s = 0; s < steps; s++) {
            BF16* row = out + s * STEPS * 2 * HALVES + pair * STEP;
            const __m512i a = load(2 * pair, s), b = load(2 * pair + 1, s);
            _mm512_store_si512(row, _mm512_unpacklo_epi16(a, b));
            _mm512_store_si512(row + HALVES, _mm512_unpackhi_epi16(a, b));
        }
    }
}

inline int32_t place_of_output(size_t bits, size_t feature) {
    const size_t at = place(bits, feature), half = at % 8 / 4;
    return static_cast<int32_t>(half * TILE + at / 8 * 4 + at % 4);
}

// ---- numbers in parts ----

// out = the parts of two vectors, `distance` apart: their sum, of three parts, is exact.
template <size_t COUNT>
inline void split(__m512 a, __m512 b, BF16* out, size_t distance) {
    if constexpr (COUNT > 1) {
        const auto upper = [](__m512 x) {
            const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
            return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
        };
        const __m512 high_a = upper(a), high_b = upper(b);
        _mm512_store_si512(out, round_both(high_a, high_b));
        split<COUNT - 1>(_mm512_sub_ps(a, high_a), _mm512_sub_ps(b, high_b), out + distance, distance);
    } else {
        _mm512_store_si512(out, round_both(a, b));
    }
}

// ---- scores ----

// out[step][pair][column][2] = the features of the queries, in the order of the keys'.
template <size_t WIDTH>
void widen_queries(const float* q, size_t rows, const Side& keys, size_t steps, float* out) {
    std::fill(out, out + steps * STEP * WIDTH, 0.0f);
    for (size_t r = 0; r < rows; r++)
        for (size_t d = 0; d < keys.dim; d++) {
            const size_t at = d / STEP * STEP + place(keys.bits, d % STEP);
            out[(at / 2 * WIDTH + r) * 2 + at % 2] = q[r * keys.dim + d];
        }
}

// Numbers of the channels, in the order of the keys' features.
inline void load_channels(const F16* numbers, const Side& keys, size_t steps, __m512i order, float* out) {
    for (size_t s = 0; s < steps; s++, out += STEP) {
        const BF16* halves = reinterpret_cast<const BF16*>(numbers + s * STEP);
        const __m512i step = _mm512_permutexvar_epi16(order, load_row(halves, keys.dim - s * STEP));
        _mm512_store_ps(out, _mm512_cvtph_ps(_mm512_castsi512_si256(step)));
        _mm512_store_ps(out + TILE, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(step, 1)));
    }
}

// The queries times the scales, in parts; and constants = queries . minima.
template <size_t WIDTH, size_t COUNT>
void scale_queries(const float* wide, size_t steps, const float* scales, const float* minima, BF16* out,
                   float* constants) {
    constexpr size_t VECTORS = WIDTH / 8;  // of a pair of features
    const auto pair_of = [](const float* numbers, size_t pair) {
        double two;
        std::memcpy(&two, numbers + 2 * pair, sizeof two);
        return _mm512_castpd_ps(_mm512_set1_pd(two));
    };
    __m512 sums[4][VECTORS];
    for (auto& sum : sums)
        for (__m512& vector : sum) vector = _mm512_setzero_ps();
    for (size_t pair = 0; pair < steps * TILE; pair += 4) {
        __m512 q[4][VECTORS];
        for (size_t i = 0; i < 4; i++)
            for (size_t v = 0; v < VECTORS; v++) {
                const __m512 feature = _mm512_load_ps(wide + ((pair + i) * VECTORS + v) * TILE);
                sums[i][v] = _mm512_fmadd_ps(feature, pair_of(minima, pair + i), sums[i][v]);
                q[i][v] = _mm512_mul_ps(feature, pair_of(scales, pair + i));
            }
        const __m512* list = &q[0][0];
        for (size_t i = 0; i < 4 * VECTORS; i += 2)
            split<COUNT>(list[i], list[i + 1], out + (pair * VECTORS + i) * TILE, steps * STEP * WIDTH);
    }
    for (size_t v = 0; v < VECTORS; v++) {
        alignas(64) float both[TILE];
        _mm512_store_ps(both, _mm512_add_ps(_mm512_add_ps(sums[0][v], sums[1][v]), _mm512_add_ps(sums[2][v], sums[3][v])));
        for (size_t i = 0; i < 8; i++) constants[v * 8 + i] = both[2 * i] + both[2 * i + 1];
    }
}

// scores = constants + queries . keys of a step of tokens, whose keys are `stride` bytes apart.
template <size_t WIDTH>
inline void score(const BF16* queries, size_t parts, const uint8_t* keys, size_t stride, size_t steps,
                  const float* constants, float* scores) {
    settle();
    _tile_loadd(0, constants, 0);
    _tile_loadd(1, constants, 0);
    for (size_t s = 0; s < steps; s++) {
        _tile_loadd(2, keys + s * STRIDE, stride);
        _tile_loadd(3, keys + TILE * stride + s * STRIDE, stride);
        for (size_t part = 0; part < parts; part++) {
            _tile_loadd(4, queries + (part * steps + s) * STEP * WIDTH, 4 * WIDTH);
            _tile_dpbf16ps(0, 2, 4);
            _tile_dpbf16ps(1, 3, 4);
        }
    }
    _tile_stored(0, scores, 4 * WIDTH);
    _tile_stored(1, scores + TILE * WIDTH, 4 * WIDTH);
}

// ---- the softmax: vectors of scores are those of 16 / WIDTH tokens, four tokens after the other ----

template <size_t WIDTH>
constexpr size_t FOUR = WIDTH / 4;  // vectors of four tokens

// All vectors of `four` tokens combined, for each column; with 8 columns, twice.
template <size_t WIDTH, class Combine>
inline __m512 combine_four(const __m512 (&four)[FOUR<WIDTH>], Combine combine) {
    if constexpr (WIDTH == 16) {
        return combine(combine(four[0], four[1]), combine(four[2], four[3]));
    } else {
        const auto both = [&](__m512 x) { return combine(x, _mm512_shuffle_f32x4(x, x, 0x4e)); };
        return combine(both(four[0]), both(four[1]));
    }
}

inline void limit(float* scores, size_t count, float softcap) {
    const __m512 cap = _mm512_set1_ps(softcap);
    for (float* at = scores; at < scores + count; at += TILE)
        _mm512_store_ps(at, _mm512_mul_ps(tanh<Avx512>(_mm512_div_ps(_mm512_load_ps(at), cap)), cap));
}

// Minus infinity where the rows [first, first + count) do not see tokens of the steps [begin, end) of the block.
template <size_t WIDTH>
void hide(const Queries& queries, size_t first, size_t count, size_t block, size_t from, size_t to, size_t begin,
          size_t end, float* scores) {
    for (size_t r = 0; r < count;) {
        const size_t row = first + r, next = std::min(count, (row / queries.groups + 1) * queries.groups - first);
        const size_t low = std::max(from, queries.lowest(row)), high = std::min(to, queries.position(row) + 1);
        const auto fill = [&](size_t a, size_t b) {
            for (size_t token = a; token < b; token++)
                std::fill(scores + token * WIDTH + r, scores + token * WIDTH + next, -__builtin_inff());
        };
        const size_t last = end * STEP;
        fill(begin * STEP, std::min(last, std::max(low, block) - block));
        fill(std::max(begin * STEP, std::max(high, block) - block), last);
        r = next;
    }
}

// Turns the scores of `count` tokens into weights, adds these up, and gives by how much what was folded before shrinks.
template <size_t WIDTH>
void weigh_columns(float* scores, size_t count, size_t rows, float* tops, float* totals, float* shrinks) {
    constexpr size_t VECTORS = FOUR<WIDTH>;
    const size_t vectors = count * WIDTH / TILE;
    __m512 largest[VECTORS], sums[VECTORS];
    for (size_t v = 0; v < VECTORS; v++) largest[v] = _mm512_set1_ps(LOWEST), sums[v] = _mm512_setzero_ps();
    for (size_t i = 0; i < vectors; i += VECTORS)
        for (size_t v = 0; v < VECTORS; v++) largest[v] = _mm512_max_ps(_mm512_load_ps(scores + (i + v) * TILE), largest[v]);
    const auto twice = [](__m512 x) { return WIDTH == 16 ? x : _mm512_shuffle_f32x4(x, x, 0x44); };
    const __m512 before = twice(Avx512::load_part(tops, rows));
    const __m512 top = _mm512_max_ps(
        before, combine_four<WIDTH>(largest, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); }));
    for (size_t i = 0; i < vectors; i += VECTORS)
        for (size_t v = 0; v < VECTORS; v++) {
            float* at = scores + (i + v) * TILE;
            const __m512 weight = exp2<Avx512>(_mm512_sub_ps(_mm512_load_ps(at), top));
            _mm512_store_ps(at, weight);
            sums[v] = _mm512_add_ps(sums[v], weight);
        }
    const __m512 sum = combine_four<WIDTH>(sums, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
    const __m512 shrink = exp2<Avx512>(_mm512_sub_ps(before, top));
    Avx512::store_part(tops, top, rows);
    Avx512::store_part(totals, _mm512_fmadd_ps(Avx512::load_part(totals, rows), shrink, sum), rows);
    Avx512::store_part(shrinks, shrink, rows);
}

// out[column][token] = weights[token][column] for 16 tokens.
template <size_t WIDTH>
inline void turn(const float* weights, float* out) {
    const uint8_t* tokens[TILE];
    for (size_t t = 0; t < TILE; t++) tokens[t] = reinterpret_cast<const uint8_t*>(weights + t * WIDTH);
    for (size_t r = 0; r < WIDTH; r += 4) {
        __m512i four[4];
        for (size_t i = 0; i < 4; i++) four[i] = Avx512::load_quarters(tokens + i, 4 * r);
        Avx512::transpose(four);
        for (size_t i = 0; i < 4; i++) _mm512_store_si512(out + (r + i) * KEY_BLOCK, four[i]);
    }
}

// ---- values ----

// Numbers of group g of the tokens in `seen`, of a page that has those of all `groups` token by token.
inline void load_group(const F16* numbers, size_t groups, size_t g, uint32_t seen, float* out) {
    alignas(64) uint16_t places[STEP];
    for (size_t t = 0; t < STEP; t++) places[t] = static_cast<uint16_t>(t * groups + g);
    __m512i at = _mm512_load_si512(places), found = _mm512_setzero_si512();
    for (size_t v = 0; v < groups; v++) {
        const __mmask32 here = seen & _mm512_cmplt_epu16_mask(at, _mm512_set1_epi16(STEP));
        found = _mm512_mask_permutexvar_epi16(found, here, at, _mm512_loadu_si512(numbers + v * STEP));
        at = _mm512_sub_epi16(at, _mm512_set1_epi16(STEP));
    }
    _mm512_store_ps(out, _mm512_cvtph_ps(_mm512_castsi512_si256(found)));
    _mm512_store_ps(out + TILE, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(found, 1)));
}

// outputs (2, 16, 16) = weights . values of a step of features, over the steps [begin, end) of tokens.
inline void multiply_values(const BF16* weights, size_t parts, const BF16* values, size_t begin, size_t end,
                            float* outputs) {
    settle();
    _tile_zero(5);
    _tile_zero(6);
    for (size_t step = begin; step < end; step++) {
        _tile_loadd(2, values + 2 * step * HALVES, STRIDE);
        _tile_loadd(3, values + (2 * step + 1) * HALVES, STRIDE);
        for (size_t part = 0; part < parts; part++) {
            _tile_loadd(7, weights + (step * PARTS + part) * HALVES, STRIDE);
            _tile_dpbf16ps(5, 7, 2);
            _tile_dpbf16ps(6, 7, 3);
        }
    }
    _tile_stored(5, outputs, STRIDE);
    _tile_stored(6, outputs + FLOATS, STRIDE);
}

// ---- folding ----

// The tokens of a block that are folded, in steps.
struct Range {
    size_t block, from, to, begin, end;

    Range(size_t from, size_t to)
        : block(from / KEY_BLOCK * KEY_BLOCK), from(from), to(std::min(to, block + KEY_BLOCK)),
          begin((from - block) / STEP), end((this->to - block + STEP - 1) / STEP) {}

    size_t first(size_t step) const { return block + step * STEP; }
    uint32_t seen(size_t step) const {  // tokens of a step, a bit for each
        const size_t start = first(step);
        const uint32_t low = start < from ? ~0u << (from - start) : ~0u;
        return start + STEP > to ? low & ~(~0u << (to - start)) : low;
    }
};

Side side_of(const HeadCache& head, bool of_keys) {
    const Codec codec = of_keys || head.shared() ? head.key_codec : head.value_codec;
    Side side{};
    side.dim = of_keys ? head.key_dim : head.value_dim, side.codec = codec;
    side.bits = head.loaded() ? 16 : std::min<size_t>(codec.bits, 16);
    side.row_bytes = !head.loaded() ? codec.row_bytes() : (of_keys ? head.key_dim : head.value_stride) * sizeof(BF16);
    return side;
}

// Finds the tokens of a step at `data`, unless they lie at `page`.
void find_rows(const HeadCache& head, const uint8_t* data, const uint8_t* page, const Range& range, size_t step,
               Side& side) {
    const size_t first = range.first(step), bytes = side.row_bytes;
    if (!page && !(head.path && first + STEP > head.committed)) {
        if (head.table) page = data + head.page(first / PAGE) * PAGE * bytes;
        else if (first % head.slots + STEP <= head.slots) page = data + first % head.slots * bytes;
    }
    side.pages[step] = page;
    if (side.coded()) return;
    const uint32_t seen = range.seen(step);
    const uint8_t** rows = side.rows + step * STEP;
    if (page && seen == ~0u) {
        for (size_t t = 0; t < STEP; t++) rows[t] = page + t * bytes;
        return;
    }
    for (size_t t = 0; t < STEP; t++)
        rows[t] = !(seen >> t & 1) ? nullptr : page ? page + t * bytes : data + head.slot(first + t) * bytes;
}

template <size_t WIDTH>
class Fold {
public:
    Fold(const HeadCache& head, const Queries& queries, const float* q, float* scratch, const Folded& folded)
        : head_(head), queries_(queries), folded_(folded), keys_(side_of(head, true)), values_(side_of(head, false)),
          s_(queries.rows, head.key_dim, head.value_dim, scratch) {
        alignas(64) uint16_t order[STEP];
        for (size_t d = 0; d < STEP; d++) {
            order[place(keys_.bits, d)] = static_cast<uint16_t>(d);
            places_[d] = place_of_output(values_.bits, d);
        }
        order_ = _mm512_load_si512(order);
        std::fill(s_.scales, s_.scales + s_.key_steps * STEP, 1.0f);
        std::fill(s_.minima, s_.minima + s_.key_steps * STEP, 0.0f);
        for (size_t set = 0; set < s_.sets; set++) {
            const size_t first = set * WIDTH;
            widen_queries<WIDTH>(q + first * head.key_dim, std::min(WIDTH, queries.rows - first), keys_, s_.key_steps,
                                 wide(set));
            if (!keys_.coded())
                scale_queries<WIDTH, PARTS>(wide(set), s_.key_steps, s_.scales, s_.minima, parts(set), s_.constants);
        }
    }

    void run(size_t from, size_t to, const uint8_t* next) {
        TileConfig config;
        for (size_t tile : {0, 1, 4}) config.row_bytes[tile] = 4 * WIDTH;
        for (size_t tile : {5, 6, 7}) config.rows[tile] = static_cast<uint8_t>(std::min(WIDTH, queries_.rows));
        _tile_loadconfig(&config);
        while (from < to) {
            const Range range(from, to);
            Reader reader;
            from = range.to;
            if (from < to) ask(Range(from, to), reader);
            else if (next) reader.add(next, KEY_BLOCK * keys_.row_bytes);
            load(range, reader);
            for (size_t set = 0; set < s_.sets; set++) fold(range, set);
        }
        _tile_release();
    }

private:
    float* wide(size_t set) const { return s_.wide + set * s_.key_steps * STEP * WIDTH; }
    BF16* parts(size_t set) const { return s_.queries + set * PARTS * s_.key_steps * STEP * WIDTH; }
    const F16* numbers_of(const Side& side, size_t step, bool minima) const {
        return minima ? side.codec.minima_of(side.pages[step]) : side.codec.scales_of(side.pages[step]);
    }

    void ask(const Range& range, Reader& reader) const {
        if (head_.file >= 0) return;
        for (const Side* side : {&keys_, &values_}) {
            if (side == &values_ && head_.shared()) continue;
            const uint8_t* data = side == &keys_ ? head_.keys : head_.values;
            for (size_t step = range.begin; step < range.end; step++) {
                const size_t first = range.first(step);
                if (head_.coded) reader.add(data + head_.page(first / PAGE) * side->codec.page_bytes(), side->codec.page_bytes());
                else reader.add(data + head_.slot(std::max(first, range.from)) * side->row_bytes, STEP * side->row_bytes);
            }
        }
    }

    void load(const Range& range, Reader& reader) {
        const bool paged = !head_.loaded();
        BlockPages pages{};
        if (paged) pages = find_pages(head_, range.block, range.block + range.begin * PAGE, range.to, reinterpret_cast<uint8_t*>(s_.pages));
        for (size_t step = range.begin; step < range.end; step++) {
            find_rows(head_, head_.keys, paged ? pages.keys[step] : nullptr, range, step, keys_);
            find_rows(head_, head_.values, paged ? pages.values[step] : nullptr, range, step, values_);
            keys_at_[step] = keys_.pages[step], stride_[step] = keys_.row_bytes;
            if (keys_.coded() || !keys_at_[step] || range.seen(step) != ~0u || head_.key_dim % STEP) {
                BF16* packed = s_.keys + step * STEP * s_.key_steps * STEP;
                keys_.with(step, [&](const auto& load) { pack_keys(load, s_.key_steps, packed); });
                keys_at_[step] = reinterpret_cast<const uint8_t*>(packed), stride_[step] = s_.key_steps * STRIDE;
            }
            values_.with(step, [&](const auto& load) {
                pack_values(load, s_.value_steps, s_.values + step * 2 * HALVES, reader, (range.end - range.begin) * TILE);
            });
        }
    }

    void fold(const Range& range, size_t set) {
        const size_t first = set * WIDTH, rows = std::min(WIDTH, queries_.rows - first);
        const size_t parts = keys_.coded() ? CODED_PARTS : PARTS;
        float shrinks[WIDTH];
        for (size_t step = range.begin; step < range.end; step++) {
            if (keys_.coded()) {
                load_channels(numbers_of(keys_, step, false), keys_, s_.key_steps, order_, s_.scales);
                load_channels(numbers_of(keys_, step, true), keys_, s_.key_steps, order_, s_.minima);
                scale_queries<WIDTH, CODED_PARTS>(wide(set), s_.key_steps, s_.scales, s_.minima, this->parts(set),
                                                  s_.constants);
            }
            score<WIDTH>(this->parts(set), parts, keys_at_[step], stride_[step], s_.key_steps, s_.constants,
                         s_.scores + step * STEP * WIDTH);
        }
        const size_t begin = range.begin * STEP, count = (range.end - range.begin) * STEP;
        if (queries_.softcap != 0.0f) limit(s_.scores + begin * WIDTH, count * WIDTH, queries_.softcap);
        hide<WIDTH>(queries_, first, rows, range.block, range.from, range.to, range.begin, range.end, s_.scores);
        weigh_columns<WIDTH>(s_.scores + begin * WIDTH, count, rows, folded_.top + first, folded_.total + first,
                             shrinks);
        for (size_t token = begin; token < begin + count; token += TILE)
            turn<WIDTH>(s_.scores + token * WIDTH, s_.weights + token);
        for (size_t s = 0; s < s_.value_steps; s++) add_values(range, s, rows, first, shrinks);
    }

    // acc = acc * shrinks + weights . values of the features of step s.
    void add_values(const Range& range, size_t s, size_t rows, size_t first, const float* shrinks) {
        const bool coded = values_.coded();
        float sums[WIDTH]{};
        if (coded) split_scaled(range, s, rows, sums);
        else if (s == 0) split_weights(range, rows);
        multiply_values(s_.split, coded ? CODED_PARTS : PARTS, s_.values + s * STEPS * 2 * HALVES, range.begin, range.end,
                        s_.outputs);
        const __m512i low = _mm512_load_si512(places_), high = _mm512_load_si512(places_ + TILE);
        for (size_t r = 0; r < rows; r++) {
            float* acc = folded_.acc + (first + r) * folded_.stride + s * STEP;
            const __m512 a = _mm512_load_ps(s_.outputs + r * TILE), b = _mm512_load_ps(s_.outputs + FLOATS + r * TILE);
            const __m512 shrink = _mm512_set1_ps(shrinks[r]), sum = _mm512_set1_ps(sums[r]);
            const auto add = [&](float* to, __m512i places) {
                const __m512 more = _mm512_add_ps(_mm512_permutex2var_ps(a, places, b), sum);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), shrink, more));
            };
            add(acc, low);
            if (s * STEP + TILE < folded_.stride) add(acc + TILE, high);
        }
    }

    void split_weights(const Range& range, size_t rows) {
        for (size_t step = range.begin; step < range.end; step++)
            for (size_t r = 0; r < rows; r++) {
                const float* at = s_.weights + r * KEY_BLOCK + step * STEP;
                split<PARTS>(_mm512_load_ps(at), _mm512_load_ps(at + TILE), s_.split + step * PARTS * HALVES + r * STEP,
                             HALVES);
            }
    }

    // The weights times the scales of group g; and sums = weights . minima.
    void split_scaled(const Range& range, size_t g, size_t rows, float* sums) {
        alignas(64) float scales[KEY_BLOCK], minima[KEY_BLOCK];
        const size_t groups = values_.codec.groups();
        for (size_t step = range.begin; step < range.end; step++) {
            load_group(numbers_of(values_, step, false), groups, g, range.seen(step), scales + step * STEP);
            load_group(numbers_of(values_, step, true), groups, g, range.seen(step), minima + step * STEP);
        }
        for (size_t r = 0; r < rows; r++) {
            __m512 sum = _mm512_setzero_ps();
            for (size_t step = range.begin; step < range.end; step++) {
                const auto load = [&](const float* from, size_t i) { return _mm512_load_ps(from + step * STEP + i); };
                const float* weights = s_.weights + r * KEY_BLOCK;
                const __m512 a = load(weights, 0), b = load(weights, TILE);
                sum = _mm512_fmadd_ps(a, load(minima, 0), _mm512_fmadd_ps(b, load(minima, TILE), sum));
                split<CODED_PARTS>(_mm512_mul_ps(a, load(scales, 0)), _mm512_mul_ps(b, load(scales, TILE)),
                                   s_.split + step * PARTS * HALVES + r * STEP, HALVES);
            }
            sums[r] = _mm512_reduce_add_ps(sum);
        }
    }

    const HeadCache& head_;
    const Queries& queries_;
    const Folded& folded_;
    Side keys_, values_;
    const Buffers<WIDTH> s_;
    __m512i order_;
    alignas(64) int32_t places_[STEP];
    const uint8_t* keys_at_[STEPS];
    size_t stride_[STEPS];
};

bool multiplies(const HeadCache& head) {
    if (head.loaded()) return head.kind == Kind::bf16;
    const bool dense_keys = head.key_codec.dense(), dense_values = head.shared() ? dense_keys : head.value_codec.dense();
    if ((dense_keys || dense_values) && head.kind != Kind::bf16) return false;
    return (dense_keys || head.key_codec.per_channel) && (dense_values || (!head.shared() && !head.value_codec.per_channel));
}

}  // namespace

void amx_fold(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to,
               const uint8_t* next, float* scratch, const Folded& folded) {
    if (!multiplies(head)) return avx512_attention_kernels.fold(head, queries, q, from, to, next, scratch, folded);
    if (queries.rows <= 8) Fold<8>(head, queries, q, scratch, folded).run(from, to, next);
    else Fold<16>(head, queries, q, scratch, folded).run(from, to, next);
}

}  // namespace tightfit
