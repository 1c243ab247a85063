// Reads files ahead of their use, on a thread of its own.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>

namespace tightfit {

// `bytes` at `at` of a file, into memory that nobody else touches until they are there. Ends the process if they cannot
// be read: the file is ours and has no name, so nobody else can have cut it.
struct Request {
    int file;
    uint8_t* to;
    size_t bytes, at;
};
void read_now(const Request& request);

// Requests are read one after the other. The thread starts with the first.
class Reader {
public:
    Reader() = default;
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;
    ~Reader();

    // How many requests were asked for so far, this one included: what wait() takes.
    uint64_t ask(const Request& request);
    // Returns when the first `count` requests were read, with the nanoseconds that this took.
    uint64_t wait(uint64_t count);

private:
    void run();

    std::mutex mutex_;
    std::condition_variable asked_, read_;
    std::deque<Request> waiting_;
    uint64_t asked_for_ = 0, done_ = 0;
    bool ending_ = false;
    std::thread thread_;
};

}  // namespace tightfit
