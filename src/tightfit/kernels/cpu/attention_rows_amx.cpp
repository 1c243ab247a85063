// Attention of few rows, as decoding has them, on AMX tiles, so that it waits for memory only.
//
// Products have about the accuracy of float32: a float is the sum of three numbers in bfloat16, so queries are multiplied
// in three parts with keys as they lie in the cache. Weights are in two with values, an error of 2^-17 for each weight.
// Of coded pages the codes are multiplied, which bfloat16 holds exactly: scales go to the other side, of keys to the
// queries of each page, here in two parts too, of values to the weights of each group; and minima are added to the sums.
#include "attention_kernels.h"
#include "isa_amx.h"

namespace tightfit {
namespace {

// A tile is 16 rows of 64 bytes, and rows of 32 features or tokens make a step. Rows are folded in sets of WIDTH, 8 or 16:
//   queries  (sets, parts, steps of features, 16 pairs of features, WIDTH, 2)
//   keys     (tokens, features): 16 tokens and a step are a tile, where they lie or packed
//   scores   (sets, tokens, WIDTH) in float32
//   weights  (steps of tokens, parts, WIDTH, 16 pairs of tokens i and 16 + i, 2)
//   values   (steps of tokens, 2, 16 pairs, 16 features, 2), of one step of features
//   outputs  (2, WIDTH, 16) in float32, of one step of features
// Tiles 0 and 1 hold scores, 2 and 3 keys or values, 4 queries, 5 and 6 outputs, 7 weights. What tiles are loaded from is
// written well before: they get nothing from stores that are under way.
constexpr size_t TILE = 16, STEP = 32, HALVES = TILE * STEP, FLOATS = TILE * TILE, STRIDE = 64;
constexpr size_t STEPS = KEY_BLOCK / STEP, KEY_PARTS = 3, PARTS = 2;
static_assert(STEP == PAGE && STEP == CODE_GROUP);

// The compiler does not know that tiles are loaded from memory.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// ---- what is read next ----

// Asked for line by line, between the instructions of all phases: a core's own prefetcher alone reaches half of the
// memory's speed, and many lines at once would let what is computed wait for them.
class Reader {
public:
    void add(const uint8_t* at, size_t bytes) {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(at);
        runs_[count_++] = {begin, begin + bytes};
        if (count_ == 1) next();
    }
    template <size_t LINES>
    void read() {
        if (!at_) return;
        for (size_t i = 0; i < LINES; i++) {
            __builtin_prefetch(reinterpret_cast<const void*>(at_), 0, 2);
            if (__builtin_expect((at_ += 64) >= end_, 0)) next();
        }
    }

private:
    struct Run {
        uintptr_t at, end;
    };
    void next() {
        const Run run = first_ < count_ ? runs_[first_++] : Run{0, 0};
        at_ = run.at, end_ = run.end;
    }

    uintptr_t at_ = 0, end_ = 0;
    size_t count_ = 0, first_ = 0;
    Run runs_[2 * STEPS];
};

// ---- keys and values ----

// Where a feature of a step lies in 32 halves: each is made of 16 bits of codes, first of the lowest code, and so on.
constexpr size_t place(size_t bits, size_t feature) {
    const size_t per_half = 16 / bits;
    return feature % per_half * (STEP / per_half) + feature / per_half;
}

template <size_t BITS>
struct Codes {
    uint16_t shifts[STEP]{}, numbers[STEP]{};  // codes up to 15 in bfloat16, again and again

    constexpr Codes() {
        for (size_t i = 0; i < STEP; i++) {
            const size_t code = i % (1 << BITS);
            size_t exponent = 0;
            while (code >> (exponent + 1)) exponent++;
            shifts[i] = static_cast<uint16_t>(i / (2 * BITS) * BITS);
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
        const auto* from = reinterpret_cast<const __m128i*>(codes);
        const __m512i words = BITS == 4 ? _mm512_broadcast_i32x4(_mm_loadu_si128(from))
                                        : _mm512_broadcastq_epi64(_mm_loadl_epi64(from));
        return _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, shifts), _mm512_load_si512(CODES<BITS>.numbers));
    }
}

// The tokens of a block that are folded, in steps.
struct Range {
    size_t block, from, to, begin, end;

    Range(size_t from, size_t to)
        : block(from / KEY_BLOCK * KEY_BLOCK), from(from), to(std::min(to, block + KEY_BLOCK)),
          begin((from - block) / STEP), end((this->to - block + STEP - 1) / STEP) {}

    size_t first(size_t step) const { return block + step * STEP; }
    uint32_t seen(size_t step) const {  // tokens of a step, a bit for each
        const size_t start = first(step);
        const uint32_t all = ~0u, low = start < from ? all << (from - start) : all;
        return start + STEP > to ? low & ~(all << (to - start)) : low;
    }
};

// The keys or the values of a head, and of the steps of a block, where they lie.
struct Side {
    const uint8_t* data;
    Codec codec;
    size_t bits, dim, steps, row_bytes;
    const uint8_t* pages[STEPS];     // of codes, or where all of a step's tokens are seen and lie one behind the other
    const uint8_t* rows[KEY_BLOCK];  // of other steps, null for tokens that are not seen

    Side(const HeadCache& head, bool keys)
        : data(keys ? head.keys : head.values), codec(keys || head.shared() ? head.key_codec : head.value_codec),
          bits(head.loaded() ? 16 : std::min<size_t>(codec.bits, 16)), dim(keys ? head.key_dim : head.value_dim),
          steps((dim + STEP - 1) / STEP),
          row_bytes(!head.loaded() ? codec.row_bytes() : (keys ? dim : head.value_stride) * sizeof(BF16)) {}

    bool coded() const { return bits < 16; }
    bool tiles(size_t step) const { return !coded() && pages[step] && dim % STEP == 0; }  // as they lie

    // Finds a step's tokens, which are in `page` unless it is null.
    void find(const HeadCache& head, const uint8_t* page, const Range& range, size_t step) {
        const size_t first = range.first(step);
        const uint32_t seen = range.seen(step);
        if (!page && !head.tokens && !(head.path && first + STEP > head.committed)) {
            if (head.table) page = data + head.page(first / PAGE) * PAGE * row_bytes;
            else if (first % head.slots + STEP <= head.slots) page = data + first % head.slots * row_bytes;
        }
        pages[step] = coded() || seen == ~0u ? page : nullptr;
        for (size_t t = 0; t < STEP && !pages[step]; t++) {
            const bool hidden = !(seen >> t & 1);
            rows[step * STEP + t] =
                hidden ? nullptr : page ? page + t * row_bytes : data + head.slot(first + t) * row_bytes;
        }
    }

    // Calls work(load) with load(token) for a step of the features of a step of tokens.
    template <class Work>
    void with(size_t step, size_t s, Work work) const {
        const uint8_t* page = pages[step] ? pages[step] + s * 4 * bits : nullptr;
        const size_t bytes = row_bytes, left = dim - s * STEP;
        if (bits == 2) return work([=](size_t t) { return load_codes<2>(page + t * bytes); });
        if (bits == 4) return work([=](size_t t) { return load_codes<4>(page + t * bytes); });
        if (bits == 8) return work([=](size_t t) { return load_codes<8>(page + t * bytes); });
        if (page && left >= STEP) return work([=](size_t t) { return _mm512_loadu_si512(page + t * bytes); });
        work([=](size_t t) {
            const uint8_t* row = page ? page + t * bytes : rows[step * STEP + t];
            if (!row) return _mm512_setzero_si512();
            return load_row(reinterpret_cast<const BF16*>(row) + (page ? 0 : s * STEP), left);
        });
    }

    void ask(const HeadCache& head, const Range& range, Reader& reader) const {
        for (size_t step = range.begin; step < range.end; step++) {
            const size_t first = std::max(range.first(step), range.from);
            if (head.coded) reader.add(data + head.page(first / PAGE) * codec.page_bytes(), codec.page_bytes());
            else reader.add(data + head.slot(first) * row_bytes, STEP * row_bytes);
        }
    }
};

// A step of the features of 32 tokens, whose rows lie `stride` apart; and with tokens i and 16 + i side by side.
template <class Load>
inline void pack_keys(const Load& load, size_t stride, BF16* out) {
#pragma GCC unroll 8
    for (size_t t = 0; t < STEP; t++) _mm512_store_si512(out + t * stride, load(t));
}
template <class Load>
inline void pack_values(const Load& load, BF16* out, Reader& reader) {
#pragma GCC unroll 4
    for (size_t t = 0; t < TILE; t++, out += STEP) {
        reader.read<1>();
        const __m512i a = load(t), b = load(t + TILE);
        _mm512_store_si512(out, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(out + HALVES, _mm512_unpackhi_epi16(a, b));
    }
}

// Where a feature of a step of values is in two outputs.
inline int32_t place_of_output(size_t bits, size_t feature) {
    const size_t at = place(bits, feature);
    return static_cast<int32_t>(at % 8 / 4 * TILE + at / 8 * 4 + at % 4);
}

// ---- numbers in parts ----

// The nearest number in bfloat16.
inline __m512 upper(__m512 x) {
    const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// out = the parts of numbers of two vectors in turn, `distance` apart. The sum of three parts is exact.
template <size_t COUNT>
inline void split(__m512 a, __m512 b, BF16* out, size_t distance) {
    const __m512 upper_a = upper(a), upper_b = upper(b);
    _mm512_store_si512(out, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(upper_a), 16),
                                            _mm512_castps_si512(upper_b)));
    if constexpr (COUNT > 1)
        split<COUNT - 1>(_mm512_sub_ps(a, upper_a), _mm512_sub_ps(b, upper_b), out + distance, distance);
}

// ---- scores ----

// out[four features][4][column] = the features of the queries, in the order of the keys', of four 0, 2, 1, 3.
template <size_t WIDTH>
void widen_queries(const float* q, size_t rows, const Side& keys, float* out) {
    std::fill(out, out + keys.steps * STEP * WIDTH, 0.0f);
    for (size_t d = 0; d < keys.dim; d++) {
        const size_t at = d / STEP * STEP + place(keys.bits, d % STEP);
        float* to = out + (at / 4 * 4 + at % 2 * 2 + at % 4 / 2) * WIDTH;
        for (size_t r = 0; r < rows; r++) to[r] = q[r * keys.dim + d];
    }
}

// Numbers of the channels, in the order of the keys' features.
inline void load_channels(const F16* numbers, const Side& keys, __m512i order, float* out) {
    for (size_t s = 0; s < keys.steps; s++, out += STEP) {
        const BF16* halves = reinterpret_cast<const BF16*>(numbers + s * STEP);
        const __m512i step = _mm512_permutexvar_epi16(order, load_row(halves, keys.dim - s * STEP));
        _mm512_store_ps(out, _mm512_cvtph_ps(_mm512_castsi512_si256(step)));
        _mm512_store_ps(out + TILE, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(step, 1)));
    }
}

// Four rows of columns combined, for each column; with 8 columns, twice.
template <class Combine>
inline __m512 combine_four(const __m512 (&four)[4], Combine combine) {
    return combine(combine(four[0], four[1]), combine(four[2], four[3]));
}
template <class Combine>
inline __m512 combine_four(const __m512 (&four)[2], Combine combine) {
    const auto both = [&](__m512 x) { return combine(x, _mm512_shuffle_f32x4(x, x, 0x4e)); };
    return combine(both(four[0]), both(four[1]));
}

// out = the queries times the scales, in parts; and constants = queries . minima.
template <size_t WIDTH, size_t COUNT>
void scale_queries(const float* wide, size_t steps, const float* scales, const float* minima, BF16* out,
                   float* constants) {
    constexpr size_t VECTORS = WIDTH / 4;  // of four features: first those of features 0 and 2, then of 1 and 3
    const auto spread = [](const float* numbers, size_t v) {
        if constexpr (WIDTH == 16) return _mm512_set1_ps(numbers[v % 2 * 2 + v / 2]);
        return _mm512_mask_broadcastss_ps(_mm512_set1_ps(numbers[v]), 0xff00, _mm_load_ss(numbers + v + 2));
    };
    __m512 sums[VECTORS], scaled[VECTORS];
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    for (size_t at = 0; at < steps * STEP; at += 4, wide += 4 * WIDTH, out += 4 * WIDTH) {
        for (size_t v = 0; v < VECTORS; v++) {
            const __m512 features = _mm512_load_ps(wide + v * TILE);
            sums[v] = _mm512_fmadd_ps(features, spread(minima + at, v), sums[v]);
            scaled[v] = _mm512_mul_ps(features, spread(scales + at, v));
        }
        for (size_t v = 0; v < VECTORS / 2; v++)
            split<COUNT>(scaled[v], scaled[v + VECTORS / 2], out + v * STEP, steps * STEP * WIDTH);
    }
    _mm512_store_ps(constants, combine_four(sums, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); }));
}

// scores = constants + queries . keys of a step of tokens.
template <size_t WIDTH>
inline void score(const BF16* queries, size_t parts, const uint8_t* keys, size_t stride, size_t steps,
                  const float* constants, float* scores, Reader& reader) {
    settle();
    _tile_loadd(0, constants, 0);
    _tile_loadd(1, constants, 0);
    for (size_t s = 0; s < steps; s++) {
        _tile_loadd(2, keys + s * STRIDE, stride);
        _tile_loadd(3, keys + TILE * stride + s * STRIDE, stride);
        for (size_t part = 0; part < parts; part++) {
            _tile_loadd(4, queries + (part * steps + s) * STEP * WIDTH, 4 * WIDTH);
            reader.read<4>();
            _tile_dpbf16ps(0, 2, 4);
            reader.read<4>();
            _tile_dpbf16ps(1, 3, 4);
        }
    }
    _tile_stored(0, scores, 4 * WIDTH);
    _tile_stored(1, scores + TILE * WIDTH, 4 * WIDTH);
}

// ---- the softmax ----

inline void limit(float* scores, size_t count, float softcap) {
    const __m512 cap = _mm512_set1_ps(softcap);
    for (float* at = scores; at < scores + count; at += TILE)
        _mm512_store_ps(at, _mm512_mul_ps(tanh<Avx512>(_mm512_div_ps(_mm512_load_ps(at), cap)), cap));
}

// Minus infinity where the rows [first, first + count) do not see tokens of the range's steps.
template <size_t WIDTH>
void hide(const Queries& queries, size_t first, size_t count, const Range& range, float* scores) {
    const size_t begin = range.first(range.begin), end = range.first(range.end);
    for (size_t r = 0; r < count;) {
        const size_t row = first + r, next = std::min(count, (row / queries.groups + 1) * queries.groups - first);
        const size_t low = std::max(range.from, queries.lowest(row));
        const size_t high = std::max(low, std::min(range.to, queries.position(row) + 1));
        const auto fill = [&](size_t a, size_t b) {
            for (float* at = scores + (a - range.block) * WIDTH; a < b; a++, at += WIDTH)
                std::fill(at + r, at + next, -__builtin_inff());
        };
        fill(begin, std::min(low, end));
        fill(high, end);
        r = next;
    }
}

// Turns the scores of `count` tokens into weights, adds these up, and gives by how much what was folded before shrinks.
template <size_t WIDTH>
void weigh_columns(float* scores, size_t count, size_t rows, float* tops, float* totals, float* shrinks, Reader& reader) {
    constexpr size_t VECTORS = WIDTH / 4;  // of four tokens
    __m512 largest[VECTORS], sums[VECTORS];
    for (size_t v = 0; v < VECTORS; v++) largest[v] = _mm512_set1_ps(LOWEST), sums[v] = _mm512_setzero_ps();
    for (const float* at = scores; at < scores + count * WIDTH; at += VECTORS * TILE)
        for (size_t v = 0; v < VECTORS; v++) largest[v] = _mm512_max_ps(_mm512_load_ps(at + v * TILE), largest[v]);
    const auto twice = [](__m512 x) { return WIDTH == 16 ? x : _mm512_shuffle_f32x4(x, x, 0x44); };
    const __m512 before = twice(Avx512::load_part(tops, rows));
    const __m512 top =
        _mm512_max_ps(before, combine_four(largest, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); }));
    for (float* at = scores; at < scores + count * WIDTH; at += VECTORS * TILE)
        for (size_t v = 0; v < VECTORS; v++) {
            reader.read<1>();
            const __m512 weight = exp2<Avx512>(_mm512_sub_ps(_mm512_load_ps(at + v * TILE), top));
            _mm512_store_ps(at + v * TILE, weight);
            sums[v] = _mm512_add_ps(sums[v], weight);
        }
    const __m512 sum = combine_four(sums, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
    const __m512 shrink = exp2<Avx512>(_mm512_sub_ps(before, top));
    Avx512::store_part(tops, top, rows);
    Avx512::store_part(totals, _mm512_fmadd_ps(Avx512::load_part(totals, rows), shrink, sum), rows);
    Avx512::store_part(shrinks, shrink, rows);
}

// ---- values ----

// out[column][token] = weights[token][column] of 16 tokens.
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

// Numbers of group g of the tokens in `seen`, of a page that has those of all `groups` token by token.
inline void load_numbers_of_group(const F16* numbers, size_t groups, size_t g, uint32_t seen, float* out) {
    const auto every = [](size_t number) { return _mm512_set1_epi16(static_cast<int16_t>(number)); };
    const __m512i tokens = _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                                                 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29,
                                                                 30, 31));
    __m512i found = _mm512_setzero_si512(), at = _mm512_add_epi16(_mm512_mullo_epi16(tokens, every(groups)), every(g));
    for (size_t v = 0; v < groups; v++) {
        const __mmask32 here = seen & _mm512_cmplt_epu16_mask(at, every(STEP));
        found = _mm512_mask_permutexvar_epi16(found, here, at, _mm512_loadu_si512(numbers + v * STEP));
        at = _mm512_sub_epi16(at, every(STEP));
    }
    _mm512_store_ps(out, _mm512_cvtph_ps(_mm512_castsi512_si256(found)));
    _mm512_store_ps(out + TILE, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(found, 1)));
}

// Adds the products of weights of a step of tokens with a step of their values to the outputs.
template <size_t WIDTH>
inline void multiply_values(const BF16* weights, const BF16* values, Reader& reader) {
    _tile_loadd(2, values, STRIDE);
    _tile_loadd(3, values + HALVES, STRIDE);
    for (size_t part = 0; part < PARTS; part++) {
        _tile_loadd(7, weights + part * WIDTH * STEP, STRIDE);
        reader.read<4>();
        _tile_dpbf16ps(5, 7, 2);
        _tile_dpbf16ps(6, 7, 3);
    }
}

// ---- folding ----

template <size_t WIDTH>
class Fold {
public:
    Fold(const HeadCache& head, const Queries& queries, const float* q, float* address, const Folded& folded)
        : head_(head), queries_(queries), folded_(folded), keys_(head, true), values_(head, false),
          sets_((queries.rows + WIDTH - 1) / WIDTH) {
        Scratch scratch(reinterpret_cast<uint8_t*>(address));
        wide_ = scratch.take<float>(sets_ * set_size());
        split_ = scratch.take<BF16>(std::max<size_t>(sets_, 2) * KEY_PARTS * set_size());
        scales_ = scratch.take<float>(keys_.steps * STEP), minima_ = scratch.take<float>(keys_.steps * STEP);
        constants_ = scratch.take<float>(2 * TILE), scores_ = scratch.take<float>(sets_ * KEY_BLOCK * WIDTH);
        turned_ = scratch.take<float>(WIDTH * KEY_BLOCK), outputs_ = scratch.take<float>(2 * FLOATS);
        weights_ = scratch.take<BF16>(PARTS * WIDTH * KEY_BLOCK);
        packed_keys_ = scratch.take<BF16>(KEY_BLOCK * keys_.steps * STEP);
        packed_values_ = scratch.take<BF16>(KEY_BLOCK * STEP);
        pages_ = scratch.take<uint8_t>(0);
        for (size_t d = 0; d < STEP; d++) {
            key_order_[place(keys_.bits, d)] = static_cast<uint16_t>(d);
            value_places_[d] = place_of_output(values_.bits, d);
        }
        std::fill(scales_, scales_ + keys_.steps * STEP, 1.0f);
        std::fill(minima_, minima_ + keys_.steps * STEP, 0.0f);
        std::fill(constants_, constants_ + 2 * TILE, 0.0f);
        for (size_t set = 0; set < sets_; set++) {
            widen_queries<WIDTH>(q + set * WIDTH * head.key_dim, rows(set), keys_, wide(set));
            if (!keys_.coded())
                scale_queries<WIDTH, KEY_PARTS>(wide(set), keys_.steps, scales_, minima_, split(set), constants(set));
        }
    }

    // As AttentionKernels' `weigh`.
    void give(size_t from, size_t to, const float* lse, Giving giving, float* mass) {
        configure();
        for (const size_t first = from; from < to;) {
            const Range range(from, to);
            from = range.to;
            BlockPages pages{};
            if (!head_.loaded()) pages = find_pages(head_, range.block, range.block + range.begin * PAGE, range.to, pages_);
            for (size_t step = range.begin; step < range.end; step++)
                keys_.find(head_, head_.loaded() ? nullptr : pages.keys[step], range, step);
            Reader reader;
            if (from < to && head_.file < 0) keys_.ask(head_, {from, to}, reader);
            for (size_t set = 0; set < sets_; set++) {
                score_tokens(set, range, reader);
                see(set, range);
                alignas(64) float sums[TILE];
                std::fill(sums, sums + TILE, __builtin_inff());  // rows that there are not give nothing
                std::copy(lse + set * WIDTH, lse + set * WIDTH + rows(set), sums);
                for (size_t token = range.from; token < range.to; token++) {
                    const float* at = scores(set) + (token - range.block) * WIDTH;
                    const __m512 score = Avx512::load_part(at, WIDTH);
                    const __m512 weights = exp2<Avx512>(_mm512_sub_ps(score, _mm512_load_ps(sums)));
                    float& to_token = mass[token - first];
                    if (giving == Giving::sum) to_token += Avx512::sum(weights);
                    else if (giving == Giving::most) to_token = std::max(to_token, _mm512_reduce_max_ps(weights));
                    else to_token += static_cast<float>(
                        __builtin_popcount(_mm512_cmp_ps_mask(weights, _mm512_set1_ps(1.0f), _CMP_GE_OQ)));
                }
            }
        }
        _tile_release();
    }

    void run(size_t from, size_t to, const uint8_t* next) {
        configure();
        while (from < to) {
            const Range range(from, to);
            from = range.to;
            Reader reader;
            if (from == to) {
                if (next) reader.add(next, KEY_BLOCK * keys_.row_bytes);
            } else if (head_.file < 0) {
                keys_.ask(head_, {from, to}, reader);
                if (!head_.shared()) values_.ask(head_, {from, to}, reader);
            }
            fold(range, reader);
        }
        _tile_release();
    }

private:
    void configure() const {
        TileConfig config;
        for (size_t tile : {0, 1, 4}) config.row_bytes[tile] = 4 * WIDTH;
        for (size_t tile : {5, 6, 7}) config.rows[tile] = static_cast<uint8_t>(rows(0));
        _tile_loadconfig(&config);
    }
    size_t set_size() const { return keys_.steps * STEP * WIDTH; }
    size_t rows(size_t set) const { return std::min(WIDTH, queries_.rows - set * WIDTH); }
    float* wide(size_t set) const { return wide_ + set * set_size(); }
    BF16* split(size_t set) const { return split_ + set * KEY_PARTS * set_size(); }
    // Of coded keys, of two pages in turn.
    BF16* scaled(size_t step) const { return split_ + step % 2 * KEY_PARTS * set_size(); }
    float* constants(size_t step) const { return constants_ + step % 2 * TILE; }
    float* scores(size_t set) const { return scores_ + set * KEY_BLOCK * WIDTH; }

    void fold(const Range& range, Reader& reader) {
        const bool paged = !head_.loaded();
        BlockPages pages{};
        if (paged) pages = find_pages(head_, range.block, range.block + range.begin * PAGE, range.to, pages_);
        for (size_t step = range.begin; step < range.end; step++) {
            keys_.find(head_, paged ? pages.keys[step] : nullptr, range, step);
            values_.find(head_, paged ? pages.values[step] : nullptr, range, step);
        }
        for (size_t set = 0; set < sets_; set++) score_tokens(set, range, reader);
        for (size_t set = 0; set < sets_; set++) {
            weigh(set, range, reader);
            for (size_t s = 0; s < values_.steps; s++) add_values(set, s, range, reader);
        }
    }

    void score_tokens(size_t set, const Range& range, Reader& reader) {
        prepare(set, range.begin);
        for (size_t step = range.begin; step < range.end; step++) {
            if (step + 1 < range.end) prepare(set, step + 1);
            multiply_keys(set, step, reader);
        }
    }

    // Limits scores, and makes those minus infinity that a row does not see.
    void see(size_t set, const Range& range) {
        const size_t begin = range.begin * STEP, count = range.end * STEP - begin;
        if (queries_.softcap != 0.0f) limit(scores(set) + begin * WIDTH, count * WIDTH, queries_.softcap);
        hide<WIDTH>(queries_, set * WIDTH, rows(set), range, scores(set));
    }

    // What the scores of a set with a step of tokens are computed from.
    void prepare(size_t set, size_t step) {
        const size_t stride = keys_.steps * STEP;
        for (size_t s = 0; s < keys_.steps && set == 0 && !keys_.tiles(step); s++)
            keys_.with(step, s, [&](const auto& load) {
                pack_keys(load, stride, packed_keys_ + step * STEP * stride + s * STEP);
            });
        if (!keys_.coded()) return;
        const __m512i order = _mm512_load_si512(key_order_);
        load_channels(keys_.codec.scales_of(keys_.pages[step]), keys_, order, scales_);
        load_channels(keys_.codec.minima_of(keys_.pages[step]), keys_, order, minima_);
        scale_queries<WIDTH, PARTS>(wide(set), keys_.steps, scales_, minima_, scaled(step), constants(step));
    }

    void multiply_keys(size_t set, size_t step, Reader& reader) const {
        const bool tiles = keys_.tiles(step), coded = keys_.coded();
        const auto* packed = reinterpret_cast<const uint8_t*>(packed_keys_ + step * STEP * keys_.steps * STEP);
        score<WIDTH>(coded ? scaled(step) : split(set), coded ? PARTS : KEY_PARTS, tiles ? keys_.pages[step] : packed,
                     tiles ? keys_.row_bytes : keys_.steps * STRIDE, keys_.steps, constants(step),
                     scores(set) + step * STEP * WIDTH, reader);
    }

    // Turns scores into weights.
    void weigh(size_t set, const Range& range, Reader& reader) {
        const size_t begin = range.begin * STEP, count = range.end * STEP - begin, first = set * WIDTH;
        float* scores = this->scores(set);
        see(set, range);
        weigh_columns<WIDTH>(scores + begin * WIDTH, count, rows(set), folded_.top + first, folded_.total + first, shrinks_,
                             reader);
        for (size_t token = begin; token < begin + count; token += TILE)
            turn<WIDTH>(scores + token * WIDTH, turned_ + token);
    }

    // acc = acc * shrinks + weights . values of the features of step s.
    void add_values(size_t set, size_t s, const Range& range, Reader& reader) {
        const bool coded = values_.coded();
        __m512 sums[WIDTH];
        for (size_t r = 0; r < rows(set); r++) sums[r] = _mm512_setzero_ps();
        for (size_t step = range.begin; step < range.end; step++) {
            if (coded) {
                load_group(range, step, s);
                split_weights(set, step, reader, [&](size_t r, __m512& weights, size_t half) {
                    sums[r] = _mm512_fmadd_ps(weights, _mm512_load_ps(value_minima_ + half * TILE), sums[r]);
                    weights = _mm512_mul_ps(weights, _mm512_load_ps(value_scales_ + half * TILE));
                });
            } else if (s == 0) {
                split_weights(set, step, reader, [](size_t, __m512&, size_t) {});
            }
            BF16* packed = packed_values_ + step * STEP * STEP;
            values_.with(step, s, [&](const auto& load) { pack_values(load, packed, reader); });
        }
        settle();
        _tile_zero(5);
        _tile_zero(6);
        for (size_t step = range.begin; step < range.end; step++)
            multiply_values<WIDTH>(weights_ + step * PARTS * WIDTH * STEP, packed_values_ + step * STEP * STEP, reader);
        _tile_stored(5, outputs_, STRIDE);
        _tile_stored(6, outputs_ + FLOATS, STRIDE);
        add_outputs(set, s, sums);
    }

    // The weights of a step of tokens in parts, after change(row, weights of 16 tokens, which).
    template <class Change>
    void split_weights(size_t set, size_t step, Reader& reader, Change change) {
        BF16* out = weights_ + step * PARTS * WIDTH * STEP;
        for (size_t r = 0; r < rows(set); r++, out += STEP) {
            reader.read<2>();
            const float* at = turned_ + r * KEY_BLOCK + step * STEP;
            __m512 a = _mm512_load_ps(at), b = _mm512_load_ps(at + TILE);
            change(r, a, 0), change(r, b, 1);
            tightfit::split<PARTS>(a, b, out, WIDTH * STEP);
        }
    }

    // What the values of a step of tokens and a group are made of.
    void load_group(const Range& range, size_t step, size_t g) {
        const size_t groups = values_.codec.groups();
        load_numbers_of_group(values_.codec.scales_of(values_.pages[step]), groups, g, range.seen(step), value_scales_);
        load_numbers_of_group(values_.codec.minima_of(values_.pages[step]), groups, g, range.seen(step), value_minima_);
    }

    // acc = acc * shrinks + outputs + sums, of the features of step s.
    void add_outputs(size_t set, size_t s, const __m512* sums) {
        for (size_t r = 0; r < rows(set); r++) {
            float* acc = folded_.acc + (set * WIDTH + r) * folded_.stride;
            const __m512 low = _mm512_load_ps(outputs_ + r * TILE), high = _mm512_load_ps(outputs_ + FLOATS + r * TILE);
            const __m512 shrink = _mm512_set1_ps(shrinks_[r]), sum = _mm512_set1_ps(_mm512_reduce_add_ps(sums[r]));
            for (size_t d = 0; d < STEP && s * STEP + d < folded_.stride; d += TILE) {
                float* at = acc + s * STEP + d;
                const __m512 output = _mm512_permutex2var_ps(low, _mm512_load_si512(value_places_ + d), high);
                _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_loadu_ps(at), shrink, _mm512_add_ps(output, sum)));
            }
        }
    }

    const HeadCache& head_;
    const Queries& queries_;
    const Folded& folded_;
    Side keys_, values_;
    size_t sets_;
    float *wide_, *scales_, *minima_, *constants_, *scores_, *turned_, *outputs_;
    BF16 *split_, *weights_, *packed_keys_, *packed_values_;
    uint8_t* pages_;
    alignas(64) float value_scales_[STEP], value_minima_[STEP], shrinks_[WIDTH];
    alignas(64) uint16_t key_order_[STEP];
    alignas(64) int32_t value_places_[STEP];
};

// Whether keys and values are codes as this multiplies them, or bfloat16.
bool multiplies(const HeadCache& head) {
    if (head.loaded()) return head.kind == Kind::bf16;
    if (head.tokens) return false;  // of pages a few tokens each are decoded
    const auto fits = [&](const Codec& codec, bool per_channel) {
        return codec.dense() ? head.kind == Kind::bf16 : codec.plain() && codec.per_channel == per_channel;
    };
    return fits(head.key_codec, true) && fits(head.shared() ? head.key_codec : head.value_codec, false);
}

}  // namespace

void amx_fold(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to,
              const uint8_t* next, float* scratch, const Folded& folded) {
    if (!multiplies(head)) return avx512_attention_kernels.fold(head, queries, q, from, to, next, scratch, folded);
    if (queries.rows <= 8) Fold<8>(head, queries, q, scratch, folded).run(from, to, next);
    else Fold<16>(head, queries, q, scratch, folded).run(from, to, next);
}

void amx_weigh(const HeadCache& head, const Queries& queries, const float* q, size_t from, size_t to, const float* lse,
               Giving giving, float* scratch, float* mass) {
    if (!multiplies(head)) return avx512_attention_kernels.weigh(head, queries, q, from, to, lse, giving, scratch, mass);
    if (queries.rows <= 8) Fold<8>(head, queries, q, scratch, Folded{}).give(from, to, lse, giving, mass);
    else Fold<16>(head, queries, q, scratch, Folded{}).give(from, to, lse, giving, mass);
}

}  // namespace tightfit
