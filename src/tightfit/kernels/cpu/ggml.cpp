#include "ggml.h"

#include <algorithm>
#include <cstring>

namespace tightfit {
namespace {

constexpr size_t MOST_INPUTS = 256;

// What one block holds. Codes are what tiles have, a byte each; scales and offsets are one for each group.
struct Block {
    uint8_t codes[MOST_INPUTS];
    uint16_t scales[MOST_INPUTS / 16], offsets[MOST_INPUTS / 32];
};

template <class T>
inline T load(const void* address) {
    T value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

inline float float_of(uint32_t bits) { return load<float>(&bits); }
inline uint32_t bits_of(float value) { return load<uint32_t>(&value); }

// ---- float16; what is not finite becomes a number that no product makes finite again ----

inline float from_half(uint16_t half) {
    const uint32_t size = half & 0x7fff, sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const float number = float_of(size << 13) * 0x1p112f;  // subnormal ones too
    return float_of((size < 0x7c00 ? bits_of(number) : 0x7f800000) | sign);
}

// To nearest, halves to even.
inline uint16_t to_half(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
    const float size = float_of(bits & 0x7fffffff);
    uint32_t half;
    if (size < 0x1p-14f) {
        half = bits_of(size * 0x1p24f + 0x1p23f) - bits_of(0x1p23f);
    } else if (size < 65520.0f) {
        const uint32_t rounded = bits_of(size) + 0xfff + (bits_of(size) >> 13 & 1);
        half = (rounded >> 13) - (112 << 10);
    } else {
        half = 0x7c00;
    }
    return static_cast<uint16_t>(half | sign);
}

// ---- blocks ----

// Halves of bytes: of each RUN bytes first the low ones, then the high ones.
template <size_t RUN>
inline void halves(const uint8_t* stored, size_t count, uint8_t* codes) {
    for (size_t start = 0; start < count; start += RUN, codes += 2 * RUN)
        for (size_t i = 0; i < RUN; i++) {
            codes[i] = stored[start + i] & 15;
            codes[RUN + i] = stored[start + i] >> 4;
        }
}

// Bit i of the next four bits becomes bit 4 of byte i: their product has them 7 places apart.
inline void fifth_bits(uint32_t bits, uint8_t (&codes)[MOST_INPUTS]) {
    for (size_t i = 0; i < 32; i += 4) {
        const uint32_t four = load<uint32_t>(codes + i) | ((bits >> i & 15) * 0x00204081 & 0x01010101) << 4;
        std::memcpy(codes + i, &four, sizeof four);
    }
}

// Eight scales and offsets of six bits each in 12 bytes, times those of the block.
inline void six_bits(const uint8_t* stored, Block& out) {
    const float scale = from_half(load<uint16_t>(stored)), offset = -from_half(load<uint16_t>(stored + 2));
    const uint8_t* bits = stored + 4;
    for (size_t i = 0; i < 4; i++) {
        out.scales[i] = to_half(scale * static_cast<float>(bits[i] & 63));
        out.offsets[i] = to_half(offset * static_cast<float>(bits[4 + i] & 63));
        out.scales[4 + i] = to_half(scale * static_cast<float>((bits[8 + i] & 15) | bits[i] >> 6 << 4));
        out.offsets[4 + i] = to_half(offset * static_cast<float>(bits[8 + i] >> 4 | bits[4 + i] >> 6 << 4));
    }
}

void unpack(Ggml type, const uint8_t* stored, Block& out) {
    switch (type) {
        case Ggml::q8_0:
            out.scales[0] = load<uint16_t>(stored);
            std::memcpy(out.codes, stored + 2, 32);
            break;
        case Ggml::q4_0:
            out.scales[0] = load<uint16_t>(stored);
            halves<16>(stored + 2, 16, out.codes);
            break;
        case Ggml::q4_1:
            out.scales[0] = load<uint16_t>(stored), out.offsets[0] = load<uint16_t>(stored + 2);
            halves<16>(stored + 4, 16, out.codes);
            break;
        case Ggml::q5_0:
            out.scales[0] = load<uint16_t>(stored);
            halves<16>(stored + 6, 16, out.codes);
            fifth_bits(load<uint32_t>(stored + 2), out.codes);
            break;
        case Ggml::q5_1:
            out.scales[0] = load<uint16_t>(stored), out.offsets[0] = load<uint16_t>(stored + 2);
            halves<16>(stored + 8, 16, out.codes);
            fifth_bits(load<uint32_t>(stored + 4), out.codes);
            break;
        case Ggml::q4_k:
            six_bits(stored, out);
            halves<32>(stored + 16, 128, out.codes);
            break;
        case Ggml::q5_k:
            six_bits(stored, out);
            halves<32>(stored + 48, 128, out.codes);
            for (size_t bit = 0; bit < 8; bit++)
                for (size_t i = 0; i < 32; i++)
                    out.codes[32 * bit + i] |= static_cast<uint8_t>((stored[16 + i] >> bit & 1) << 4);
            break;
        case Ggml::q6_k: {
            const float scale = from_half(load<uint16_t>(stored + 208));
            for (size_t i = 0; i < 16; i++)
                out.scales[i] = to_half(scale * static_cast<float>(static_cast<int8_t>(stored[192 + i])));
            halves<64>(stored, 128, out.codes);
            for (size_t part = 0; part < 8; part++)  // 32 inputs
                for (size_t i = 0; i < 32; i++)
                    out.codes[32 * part + i] |=
                        static_cast<uint8_t>((stored[128 + part / 4 * 32 + i] >> part % 4 * 2 & 3) << 4);
            break;
        }
        case Ggml::mxfp4:
            out.scales[0] = static_cast<uint16_t>(stored[0] > 0 ? stored[0] << 7 : 0x40);  // 2^(e - 127) in bfloat16
            halves<16>(stored + 1, 16, out.codes);
            break;
    }
}

// ---- tiles: the planes of kernels/layout.py, four codes of a row at a time ----

inline uint32_t four(const Block& row, size_t at) { return load<uint32_t>(row.codes + at); }
inline void put(uint8_t* plane, size_t line, size_t row, uint32_t codes) {
    std::memcpy(plane + line * LINE + 4 * row, &codes, sizeof codes);
}

void four_bits(const Block (&rows)[TILE_ROWS], size_t from, size_t group, uint8_t* plane) {
    constexpr uint32_t LOW = 0x0f0f0f0f;
    for (size_t i = 0; i < group; i += 8)
        for (size_t r = 0; r < TILE_ROWS; r++)
            put(plane, i / 8, r, (four(rows[r], from + i) & LOW) | (four(rows[r], from + i + 4) & LOW) << 4);
}

void pack(Kind kind, const Block (&rows)[TILE_ROWS], size_t from, size_t group, uint8_t* tile) {
    if (kind == Kind::int8) {
        for (size_t i = 0; i < group; i += 4)
            for (size_t r = 0; r < TILE_ROWS; r++) put(tile, i / 4, r, four(rows[r], from + i));
        return;
    }
    four_bits(rows, from, group, tile);
    uint8_t* plane = tile + 8 * group;
    if (kind == Kind::int6)
        for (size_t i = 0; i < group; i += 16)
            for (size_t r = 0; r < TILE_ROWS; r++) {
                uint32_t line = 0;
                for (size_t j = 0; j < 4; j++) line |= (four(rows[r], from + i + 4 * j) >> 4 & 0x03030303) << 2 * j;
                put(plane, i / 16, r, line);
            }
    if (kind == Kind::int5)
        for (size_t i = 0; i < group; i += 4)
            for (size_t r = 0; r < TILE_ROWS; r += 2) {
                // The product moves bit 0 of the four bytes to the bits 24 to 27.
                const auto bits = [&](size_t row) {
                    return (four(rows[row], from + i) >> 4 & 0x01010101) * 0x01020408u >> 24 & 15;
                };
                plane[i / 4 * 8 + r / 2] = static_cast<uint8_t>(bits(r) | bits(r + 1) << 4);
            }
}

}  // namespace

const GgmlType& ggml_type(Ggml type) {
    static constexpr GgmlType types[] = {
        {32, 34, 32, Kind::int8, false},   {32, 18, 32, Kind::int4, false},  {32, 20, 32, Kind::int4, true},
        {32, 22, 32, Kind::int5, false},   {32, 24, 32, Kind::int5, true},   {256, 144, 32, Kind::int4, true},
        {256, 176, 32, Kind::int5, true},  {256, 210, 16, Kind::int6, false}, {32, 17, 32, Kind::fp4, false},
    };
    return types[static_cast<size_t>(type)];
}

bool repack(Ggml type, const uint8_t* stored, size_t rows, size_t blocks, uint8_t* tiles) {
    const GgmlType& t = ggml_type(type);
    const size_t code_bytes = Weight::code_bytes_of(t.kind, t.group);
    const uint16_t infinite = type == Ggml::mxfp4 ? 0x7f80 : 0x7c00;
    bool finite = true;
    Block block[TILE_ROWS];
    for (size_t first = 0; first < rows; first += TILE_ROWS) {
        const size_t count = std::min(rows - first, TILE_ROWS);
        for (size_t r = count; r < TILE_ROWS; r++) block[r] = {};  // with scales of 0
        for (size_t b = 0; b < blocks; b++) {
            for (size_t r = 0; r < count; r++) unpack(type, stored + ((first + r) * blocks + b) * t.nbytes, block[r]);
            for (size_t g = 0; g < t.inputs / t.group; g++, tiles += t.tile_bytes()) {
                pack(t.kind, block, g * t.group, t.group, tiles);
                uint16_t numbers[2][TILE_ROWS];
                for (size_t r = 0; r < TILE_ROWS; r++) {
                    numbers[0][r] = block[r].scales[g], numbers[1][r] = t.asymmetric ? block[r].offsets[g] : 0;
                    finite &= (numbers[0][r] & infinite) != infinite && (numbers[1][r] & infinite) != infinite;
                }
                std::memcpy(tiles + code_bytes, numbers, t.tile_bytes() - code_bytes);
            }
        }
    }
    return finite;
}

}  // namespace tightfit
