// Work that XLA's threads share.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

// How many threads of the pool may work: all, or as many as the container's quota allows.
inline int64_t Threads(const xla::ffi::ThreadPool& pool, int64_t most) {
  const int64_t all = std::max<int64_t>(1, pool.num_threads());
  return most > 0 ? std::min(all, most) : all;
}

// Calls run(0), ..., run(count - 1) in the calling thread and free threads of the pool.
//
// Nobody waits for a part that has not begun, so that a pool full of waiting callers cannot
// block itself.
inline void Share(xla::ffi::ThreadPool& pool, int64_t threads, int64_t count,
                  std::function<void(int64_t)> run) {
  if (count == 1) return run(0);
  struct Work {
    std::function<void(int64_t)> run;
    int64_t count;
    std::atomic<int64_t> begun{0}, ended{0};
    std::mutex mutex;
    std::condition_variable all_ended;
    std::exception_ptr error;

    void Take() {
      for (int64_t part; (part = begun.fetch_add(1)) < count;) {
        try {
          run(part);
        } catch (...) {
          std::lock_guard lock(mutex);
          error = std::current_exception();
        }
        if (ended.fetch_add(1) + 1 == count) {
          std::lock_guard lock(mutex);
          all_ended.notify_all();
        }
      }
    }
  };
  auto work = std::make_shared<Work>();
  work->run = std::move(run);
  work->count = count;
  const int64_t helpers = std::min(threads, count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->Take(); });
  work->Take();
  for (int i = 0; i < 2000 && work->ended != count; ++i) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::unique_lock lock(work->mutex);
  work->all_ended.wait(lock, [&] { return work->ended == count; });
  if (work->error) std::rethrow_exception(work->error);
}
