#include "encode.h"

#include <cstring>

#include "isa_portable.h"
#include "levels.h"

namespace tightfit {
namespace {

const EncodeKernels& kernels() {
    switch (level()) {
#ifdef TIGHTFIT_X86
        case Level::amx:
        case Level::avx512vnni:
        case Level::avx512: return avx512_encode_kernels;
        case Level::avxvnni:
        case Level::avx2: return avx2_encode_kernels;
#endif
        default: return portable_encode_kernels;
    }
}

constexpr uint16_t MAGNITUDE = 0x7fff, INFINITE = 0x7f80;

// out = x in bfloat16; whether all are finite.
template <class T>
bool round(const T* x, size_t cols, BF16* out) {
    Portable::Vector differences = Portable::zero();  // of each number and itself, which are NaNs if it is not finite
    for (size_t i = 0; i < cols; i += Portable::LANES) {
        const size_t count = std::min(cols - i, +Portable::LANES);
        const Portable::Vector numbers = Portable::load_part(x + i, count);
        differences = Portable::add(differences, Portable::sub(numbers, numbers));
        Portable::store_part(out + i, numbers, count);
    }
    bool finite = Portable::sum(differences) == 0;
    for (size_t i = 0; i < cols; i++) finite &= (out[i].bits & MAGNITUDE) < INFINITE;
    return finite;
}

// How many magnitudes are `least` or more.
size_t count(const BF16* numbers, size_t cols, uint16_t least) {
    uint32_t found = 0;
    for (size_t i = 0; i < cols; i++) found += (numbers[i].bits & MAGNITUDE) >= least;
    return found;
}

}  // namespace

template <class T>
bool prune(const Weight& w, Rows<const T> x, uint8_t* out, BF16* scratch) {
    for (size_t row = 0; row < w.rows; row++, out += w.row_bytes()) {
        if (!round(x[row], w.cols, scratch)) return false;
        uint16_t least = 0;  // the largest magnitude that as many as are kept reach, bit by bit
        for (uint16_t bit = 0x4000; bit; bit >>= 1)
            if (count(scratch, w.cols, least | bit) >= w.kept) least |= bit;
        size_t equal = least ? w.kept - count(scratch, w.cols, least + 1) : 0;  // that are kept; zeros are not

        for (size_t i = 0; i < w.cols; i++) {
            const uint16_t size = scratch[i].bits & MAGNITUDE;
            const bool stays = size > least || (size == least && equal > 0);
            equal -= stays && size == least;
            scratch[i].bits = stays ? scratch[i].bits : 0;
        }

        std::memset(out, 0, w.row_bytes());
        BF16* values = scratch + w.cols;
        size_t kept = 0;
        for (size_t place = 0; place < w.bitmap_bytes() * 8; place++) {
            const size_t i = place / 32 * 32 + place % 2 * 16 + place % 32 / 2;
            if (i >= w.cols) continue;
            values[kept] = scratch[i];
            kept += scratch[i].bits != 0;
            out[place / 8] |= static_cast<uint8_t>((scratch[i].bits != 0) << place % 8);
        }
        std::memcpy(out + w.bitmap_bytes(), values, kept * sizeof(BF16));
    }
    return true;
}

template bool prune(const Weight&, Rows<const float>, uint8_t*, BF16*);
template bool prune(const Weight&, Rows<const F16>, uint8_t*, BF16*);
template bool prune(const Weight&, Rows<const BF16>, uint8_t*, BF16*);

template <>
double encode(const Tiles& tiles, Rows<const float> x, float* scratch) { return kernels().f32(tiles, x, scratch); }

template <>
double encode(const Tiles& tiles, Rows<const F16> x, float* scratch) { return kernels().f16(tiles, x, scratch); }

template <>
double encode(const Tiles& tiles, Rows<const BF16> x, float* scratch) { return kernels().bf16(tiles, x, scratch); }

}  // namespace tightfit
