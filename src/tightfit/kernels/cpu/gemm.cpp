#include "gemm.h"

#include <algorithm>
#include <atomic>

#include "levels.h"
#include "pool.h"

namespace tightfit {
namespace {

// Of the second-level cache of the processors that have AMX, 2 MiB: what one thread's sums take, half a MiB, and the
// tokens' tiles of one block of inputs, half of that; or, for few tokens, the tiles of all inputs.
constexpr size_t WIDTH = 8, TOKENS = 512;
constexpr size_t FEW_TOKENS_BYTES = 1 << 20;
constexpr size_t PACKED_BYTES = 64 << 10;  // for one task

size_t divide(size_t a, size_t b) { return (a + b - 1) / b; }
size_t round_up(size_t n, size_t to) { return divide(n, to) * to; }
size_t pairs_of(const Weight& w) { return divide(w.row_offset + w.rows, 2 * TILE_ROWS); }

// How a product is shared out: each matrix in runs of `pairs` pairs of tile rows, all tokens in runs of `tokens`.
struct Division {
    size_t block;          // inputs
    size_t width;          // as in GemmTask
    size_t tokens, pairs;  // of a task
    size_t token_runs, tasks = 0;
    size_t packed_bytes, own_bytes;  // scratch of all threads, and of each

    Division(const Joined& matrices, size_t all_tokens, size_t threads) {
        const size_t cols = matrices.cols;
        const auto is_ternary = [](const Weight& w) { return w.kind == Kind::ternary; };
        const bool ternary = std::any_of(matrices.weights.begin(), matrices.weights.end(), is_ternary);
        // Whole units of codes.
        block = round_up(divide(cols, divide(cols, GEMM_BLOCK)), ternary ? GEMM_BLOCK / 3 : GEMM_STEP);
        packed_bytes = round_up(all_tokens, TILE_ROWS) * round_up(cols, GEMM_STEP) * sizeof(BF16);
        width = packed_bytes > FEW_TOKENS_BYTES ? WIDTH : 1;

        size_t all_pairs = 0;
        for (const Weight& w : matrices.weights) all_pairs += pairs_of(w);
        token_runs = std::max(divide(all_tokens, TOKENS), std::min(threads / all_pairs, divide(all_tokens, 32)));
        tokens = round_up(divide(all_tokens, token_runs), 32);
        token_runs = divide(all_tokens, tokens);
        pairs = divide(all_pairs, round_up(divide(all_pairs, WIDTH), threads));
        for (const Weight& w : matrices.weights) tasks += runs_of(w) * token_runs;
        own_bytes = GEMM_PANEL + width * 32 * tokens * sizeof(float);
    }

    size_t runs_of(const Weight& w) const { return divide(pairs_of(w), pairs); }
};

}  // namespace

bool has_gemm() { return level() == Level::amx; }

size_t gemm_scratch_nbytes(const Joined& matrices, size_t tokens, size_t threads) {
    if (matrices.rows == 0 || tokens == 0) return 0;
    const Division division(matrices, tokens, threads);
    return division.packed_bytes + threads * division.own_bytes;
}

#ifdef TIGHTFIT_X86
void gemm(const Joined& matrices, Rows<const float> x, size_t tokens, Rows<float> out, float accumulate,
          uint8_t* scratch, size_t threads) {
    if (matrices.rows == 0 || tokens == 0) return;
    const Division division(matrices, tokens, threads);
    const PackedTokens packed{scratch, tokens, matrices.cols, division.block};
    const size_t lines = round_up(tokens, TILE_ROWS), packing = divide(division.packed_bytes, PACKED_BYTES);
    parallel_for(packing, threads, [&](size_t task) {
        for (size_t token = lines * task / packing; token < lines * (task + 1) / packing; token++)
            amx_pack(x, token, packed);
    });

    const auto multiply = [&](size_t task, uint8_t* own) {
        size_t row = 0;
        for (const Weight& w : matrices.weights) {
            const size_t tasks = division.runs_of(w) * division.token_runs;
            if (task < tasks) {
                const size_t tile_rows = divide(w.row_offset + w.rows, TILE_ROWS);
                const size_t first = task / division.token_runs * division.pairs * 2;
                const size_t begin = task % division.token_runs * division.tokens;
                amx_multiply({w, first, std::min(first + division.pairs * 2, tile_rows), packed, begin,
                              std::min(begin + division.tokens, tokens), {out.data + row, out.stride}, accumulate, own,
                              reinterpret_cast<float*>(own + GEMM_PANEL), division.width});
                return;
            }
            task -= tasks;
            row += w.rows;
        }
    };
    std::atomic<size_t> next{0};
    parallel_for(std::min(threads, division.tasks), threads, [&](size_t thread) {
        uint8_t* own = scratch + division.packed_bytes + thread * division.own_bytes;
        for (size_t task; (task = next.fetch_add(1)) < division.tasks;) multiply(task, own);
    });
}
#endif

}  // namespace tightfit
