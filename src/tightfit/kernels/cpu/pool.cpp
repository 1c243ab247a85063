#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

namespace tightfit {
namespace {

constexpr auto SPIN = std::chrono::microseconds(100);
constexpr int PAUSES = 64;  // between looks at the clock

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The state of the current job in one word, so that joining it and closing it cannot cross: whether it is open, how
// many workers are in it, and the number of the job.
constexpr uint64_t WORKER = 1, WORKERS = 0xffff, OPEN = 1 << 16, JOB = 1 << 17;

class Pool {
public:
    void run(size_t tasks, size_t threads, void (*work)(void*, size_t), void* context) {
        std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        if (tasks < 2 || threads < 2 || !busy.owns_lock() || !start_workers(threads - 1)) {
            for (size_t task = 0; task < tasks; task++) work(context, task);
            return;
        }
        tasks_ = tasks, helpers_ = threads - 1, work_ = work, context_ = context;
        next_.store(0, std::memory_order_relaxed);
        state_.store((state_.load() / JOB + 1) * JOB | OPEN);
        if (sleeping_.load() > 0) {
            { std::lock_guard<std::mutex> lock(sleep_); }
            wake_.notify_all();
        }
        take_tasks();
        state_.fetch_and(~OPEN);
        wait_for_workers();
    }

private:
    void take_tasks() {
        for (size_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) work_(context_, task);
    }

    // On a busy machine a worker may have been put aside in the middle of a task: spinning until it is back would take
    // the very time that it needs.
    void wait_for_workers() {
        const auto done = [&] { return !(state_.load() & WORKERS); };
        if (spin_until(done)) return;
        std::unique_lock<std::mutex> lock(done_);
        waiting_.store(true);
        finished_.wait(lock, done);
        waiting_.store(false);
    }

    template <class Condition>
    static bool spin_until(Condition condition) {
        const auto end = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < PAUSES; i++) {
                if (condition()) return true;
                pause();
            }
        } while (std::chrono::steady_clock::now() < end);
        return false;
    }

    // Whether there is at least one worker. Fewer than asked for are enough: the tasks are shared by those there are.
    bool start_workers(size_t count) {
        for (; workers_ < count; workers_++) {
            try {
                std::thread(&Pool::worker, this, workers_).detach();
            } catch (const std::system_error&) {
                break;
            }
        }
        return workers_ > 0;
    }

    void worker(size_t index) {
        for (uint64_t seen = 0;;) {
            uint64_t state = wait_for_job(seen);
            while (state & OPEN && !state_.compare_exchange_weak(state, state + WORKER)) {
            }
            if (state & OPEN) {
                if (index < helpers_) take_tasks();
                state_.fetch_sub(WORKER);
                if (waiting_.load()) {
                    { std::lock_guard<std::mutex> lock(done_); }
                    finished_.notify_one();
                }
            }
            seen = state / JOB;
        }
    }

    // The state once an open job other than number `seen` is there.
    uint64_t wait_for_job(uint64_t seen) {
        const auto is_new = [&](uint64_t state) { return state & OPEN && state / JOB != seen; };
        uint64_t state = 0;
        const auto look = [&] { return is_new(state = state_.load()); };
        if (spin_until(look)) return state;
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_++;
        wake_.wait(lock, look);
        sleeping_--;
        return state;
    }

    std::mutex busy_;  // held by the thread whose job is running
    std::mutex sleep_, done_;
    std::condition_variable wake_, finished_;
    std::atomic<bool> waiting_{false};  // the caller, asleep until no worker is in its job
    std::atomic<int> sleeping_{0};
    std::atomic<uint64_t> state_{0};
    std::atomic<size_t> next_{0};
    size_t workers_ = 0;

    // The job; written only while no worker is in one.
    size_t tasks_ = 0, helpers_ = 0;
    void (*work_)(void*, size_t) = nullptr;
    void* context_ = nullptr;
};

// Never destroyed: workers may be asleep on it when the process ends. A forked child has no workers and a mutex that
// may be locked for ever, so it makes a pool of its own.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
    Pool* current = pool.load();
    if (current) return *current;
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    (void)registered;
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(current, made)) return *made;
    delete made;
    return *current;
}

}  // namespace

void parallel(size_t tasks, size_t threads, void (*work)(void*, size_t), void* context) {
    the_pool().run(tasks, threads, work, context);
}

}  // namespace tightfit
