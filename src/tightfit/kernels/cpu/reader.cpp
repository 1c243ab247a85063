#include "reader.h"

#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>

namespace tightfit {

void read_now(const Request& request) {
    uint8_t* to = request.to;
    for (size_t left = request.bytes, at = request.at; left > 0;) {
        const ssize_t got = pread(request.file, to, left, static_cast<off_t>(at));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            std::perror("tightfit: the cache cannot be read from the disk");
            std::abort();
        }
        to += got, at += static_cast<size_t>(got), left -= static_cast<size_t>(got);
    }
}

Reader::~Reader() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        ending_ = true;
    }
    asked_.notify_one();
    if (thread_.joinable()) thread_.join();
}

uint64_t Reader::ask(const Request& request) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!thread_.joinable()) thread_ = std::thread(&Reader::run, this);
    waiting_.push_back(request);
    asked_.notify_one();
    return ++asked_for_;
}

uint64_t Reader::wait(uint64_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (done_ >= count) return 0;
    const auto start = std::chrono::steady_clock::now();
    read_.wait(lock, [&] { return done_ >= count; });
    const auto waited = std::chrono::steady_clock::now() - start;
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(waited).count());
}

void Reader::run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        asked_.wait(lock, [&] { return ending_ || !waiting_.empty(); });
        if (waiting_.empty()) return;  // what was asked for is read before the end
        const Request next = waiting_.front();
        waiting_.pop_front();
        lock.unlock();
        read_now(next);
        lock.lock();
        done_++;
        read_.notify_all();
    }
}

}  // namespace tightfit
