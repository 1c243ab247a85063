// Work in the order in which it lies in memory, shared among threads.
#pragma once

#include <atomic>
#include <cstddef>

namespace tightfit {

constexpr size_t MOST_THREADS = 256;  // that share one call's work

// Each thread takes a run of chunks from front to end, and then what is left of the others' runs: memory is read in few
// long streams, and a thread that is held up does not hold up the others.
class Runs {
public:
    // At most MOST_THREADS runs.
    Runs(size_t chunks, size_t runs) : runs_(runs) {
        for (size_t i = 0; i < runs; i++) next_[i].store(chunks * i / runs, std::memory_order_relaxed);
        for (size_t i = 0; i < runs; i++) end_[i] = chunks * (i + 1) / runs;
    }

    template <class Work>
    void take(size_t own, Work work) {
        for (size_t i = 0; i < runs_; i++) {
            const size_t run = (own + i) % runs_;
            for (size_t chunk; (chunk = next_[run].fetch_add(1, std::memory_order_relaxed)) < end_[run];) work(chunk);
        }
    }

private:
    size_t runs_;
    std::atomic<size_t> next_[MOST_THREADS];
    size_t end_[MOST_THREADS];
};

}  // namespace tightfit
