#include "gemm.h"

#include <algorithm>
#include <atomic>

#include "levels.h"
#include "pool.h"

namespace tightfit {

bool has_gemm() { return level() == Level::amx; }

#ifdef TIGHTFIT_X86
namespace {

// What stays in a core's second-level cache, 2 MiB where there is AMX: the sums of WIDTH pairs of tile rows and at most
// MOST_TOKENS tokens, half a MiB, and the tiles of these tokens and one block of inputs. Where the tiles of all inputs
// fit, one pair is enough at a time, and weights are read in the order in which they lie.
constexpr size_t WIDTH = 8, MOST_TOKENS = 512;
constexpr size_t ALL_INPUTS_BYTES = 1 << 20;
constexpr size_t PACKING_BYTES = 64 << 10;  // of tiles, for one task

size_t divide(size_t a, size_t b) { return (a + b - 1) / b; }
size_t round_up(size_t n, size_t to) { return divide(n, to) * to; }
size_t pairs_of(const Weight& w) { return divide(w.row_offset + w.rows, 2 * TILE_ROWS); }

// Scratch: packed tokens, and of each thread a panel and sums. It never shrinks when tokens are added.
struct Scratch {
    size_t packed, width, own;

    Scratch(size_t cols, size_t tokens)
        : packed(round_up(tokens, GEMM_TOKENS) * round_up(cols, GEMM_STEP) * sizeof(BF16)),
          width(packed > ALL_INPUTS_BYTES ? WIDTH : 1),
          own(GEMM_PANEL + width * 2 * TILE_ROWS * summed(tokens) * sizeof(float)) {}

    static size_t summed(size_t tokens) { return std::min(round_up(tokens, 2 * GEMM_TOKENS), MOST_TOKENS); }
};

// How the work is shared out: each matrix in runs of `pairs` pairs of tile rows, the tokens in runs of `tokens`.
struct Division {
    size_t pairs, tokens, token_runs, tasks = 0;

    Division(const Joined& matrices, size_t all_tokens, size_t threads) {
        size_t all_pairs = 0;
        for (const Weight& w : matrices.weights) all_pairs += pairs_of(w);
        pairs = divide(all_pairs, round_up(divide(all_pairs, WIDTH), threads));
        const size_t runs = std::max(divide(all_tokens, MOST_TOKENS), threads / all_pairs);
        tokens = round_up(divide(all_tokens, runs), 2 * GEMM_TOKENS);
        token_runs = divide(all_tokens, tokens);
        for (const Weight& w : matrices.weights) tasks += tasks_of(w);
    }

    size_t tasks_of(const Weight& w) const { return divide(pairs_of(w), pairs) * token_runs; }
};

// Inputs of a block: whole units of codes.
size_t block_of(const Joined& matrices) {
    const auto is_ternary = [](const Weight& w) { return w.kind == Kind::ternary; };
    const bool ternary = std::any_of(matrices.weights.begin(), matrices.weights.end(), is_ternary);
    const size_t blocks = divide(matrices.cols, GEMM_BLOCK);
    return round_up(divide(matrices.cols, blocks), ternary ? GEMM_BLOCK / 3 : GEMM_STEP);
}

}  // namespace

size_t gemm_scratch_nbytes(size_t cols, size_t tokens, size_t threads) {
    const Scratch sizes(cols, tokens);
    return sizes.packed + threads * sizes.own;
}

void gemm(const Joined& matrices, Rows<const float> x, size_t tokens, Rows<float> out, float accumulate,
          uint8_t* scratch, size_t threads) {
    if (matrices.rows == 0 || tokens == 0) return;
    const Scratch sizes(matrices.cols, tokens);
    const PackedTokens packed{scratch, tokens, matrices.cols, block_of(matrices)};
    const size_t lines = packed.tiles() * GEMM_TOKENS, packing = divide(sizes.packed, PACKING_BYTES);
    parallel_for(packing, threads, [&](size_t task) {
        for (size_t token = lines * task / packing; token < lines * (task + 1) / packing; token++)
            amx_pack(x, token, packed);
    });

    const Division division(matrices, tokens, threads);
    const auto multiply = [&](size_t task, uint8_t* own) {
        const Weight* w = matrices.weights.data();
        float* columns = out.data;
        for (; task >= division.tasks_of(*w); columns += w->rows, w++) task -= division.tasks_of(*w);
        const size_t first = task / division.token_runs * division.pairs * 2;
        const size_t last = std::min(first + division.pairs * 2, divide(w->row_offset + w->rows, TILE_ROWS));
        const size_t begin = task % division.token_runs * division.tokens;
        const size_t end = std::min(begin + division.tokens, tokens);
        float* sums = reinterpret_cast<float*>(own + GEMM_PANEL);
        amx_multiply({*w, first, last, packed, begin, end, {columns, out.stride}, accumulate, own, sums, sizes.width});
    };
    std::atomic<size_t> next{0};
    parallel_for(std::min(threads, division.tasks), threads, [&](size_t thread) {
        uint8_t* own = scratch + sizes.packed + thread * sizes.own;
        for (size_t task; (task = next.fetch_add(1)) < division.tasks;) multiply(task, own);
    });
}
#endif

}  // namespace tightfit
