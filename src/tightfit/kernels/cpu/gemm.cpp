#include "gemm.h"

#include <algorithm>
#include <atomic>

#include "levels.h"
#include "pool.h"

namespace tightfit {
size_t W_ = 8, TP_ = 8;
namespace {

constexpr size_t WIDTH = 8;      // pairs of tile rows whose sums are kept: they
constexpr size_t TOKENS = 512;   // of at most so many tokens fit into the second-level cache, beside the tokens' tiles

size_t divide(size_t a, size_t b) { return (a + b - 1) / b; }
size_t up(size_t n, size_t to) { return divide(n, to) * to; }

size_t packed_bytes(size_t cols, size_t tokens) { return up(tokens, 16) * up(cols, GEMM_STEP) * sizeof(BF16); }
size_t own_bytes(size_t tokens) { return GEMM_PANEL + WIDTH * 32 * std::min(up(tokens, 32), TOKENS) * sizeof(float); }

}  // namespace

bool has_gemm() { return level() == Level::amx; }

size_t gemm_scratch(size_t cols, size_t tokens, size_t threads) {
    return packed_bytes(cols, tokens) + threads * own_bytes(tokens);
}

void gemm(const Weight* const* weights, size_t count, Rows<const float> x, size_t tokens, Rows<float> out,
          float accumulate, uint8_t* scratch, size_t threads) {
#ifdef TIGHTFIT_X86
    const size_t cols = weights[0]->cols;
    const bool ternary = std::any_of(weights, weights + count, [](const Weight* w) { return w->kind == Kind::ternary; });
    const size_t block = up(divide(cols, divide(cols, GEMM_BLOCK)), ternary ? 96 : GEMM_STEP);
    const PackedTokens packed{scratch, tokens, cols, block};
    const size_t lines = packed.tiles() * 16;
    const size_t packing = std::min(divide(lines * cols, 32<<10), 4 * threads);
    parallel_for(packing, threads, [&](size_t task) {
        for (size_t token = lines * task / packing; token < lines * (task + 1) / packing; token++)
            amx_pack(x, token, packed);
    });
    uint8_t* own = scratch + packed_bytes(cols, tokens);
    std::atomic<size_t> next{0};
    const size_t pairs = TP_;
    const size_t token_blocks = (tokens + TOKENS - 1) / TOKENS;
    parallel_for(threads, threads, [&](size_t slot) {
        for (;;) {
            size_t task = next.fetch_add(1);
            size_t i = 0, row = 0;
            for (; i < count; i++) {
                const Weight& w = *weights[i];
                const size_t tiles = (w.row_offset + w.rows + 15) / 16, row_blocks = (tiles + 2 * pairs - 1) / (2 * pairs);
                if (task < row_blocks * token_blocks) {
                    const size_t rb = task / token_blocks, tb = task % token_blocks;
                    uint8_t*o = own + slot * own_bytes(tokens);
                    amx_multiply(GemmTask{w, rb * 2 * pairs, std::min((rb + 1) * 2 * pairs, tiles), packed,
                                          tb * TOKENS, std::min(tokens, (tb + 1) * TOKENS),
                                          Rows<float>{out.data + row, out.stride}, accumulate, o, reinterpret_cast<float*>(o+GEMM_PANEL), W_});
                    break;
                }
                task -= row_blocks * token_blocks;
                row += w.rows;
            }
            if (i == count) return;
        }
    });
#endif
}

}  // namespace tightfit
