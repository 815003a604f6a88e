#include "team.h"

namespace fr {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Returns when ready() is true.
template <class Ready> void wait(const Ready& ready) {
  constexpr int spins = 2000;  // about 20 us: longer than a layer of most models
  for (int i = 0; !ready(); ++i) {
    if (i < spins)
      pause();
    else
      std::this_thread::yield();
  }
}

}  // namespace

Team::Team(int64_t size) : size_(size) {
  try {
    for (int64_t part = 1; part < size; ++part) members_.start([this, part] { serve(part); });
  } catch (...) {
    end();  // those that have started would wait for ever
    throw;
  }
}

Team::~Team() { end(); }

void Team::end() {
  ended_.store(true, std::memory_order_relaxed);
  posted_.fetch_add(1, std::memory_order_release);
}

void Team::post(const Task& task) {
  task_ = task;
  left_.store(size_ - 1, std::memory_order_relaxed);
  posted_.fetch_add(1, std::memory_order_release);
  task.run(task.kernel, task.job, {0, size_});
  wait([this] { return left_.load(std::memory_order_acquire) == 0; });
}

void Team::serve(int64_t part) {
  for (uint64_t seen = 0;;) {
    wait([&] { return posted_.load(std::memory_order_acquire) != seen; });
    ++seen;
    if (ended_.load(std::memory_order_relaxed)) return;
    task_.run(task_.kernel, task_.job, {part, size_});
    left_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace fr
