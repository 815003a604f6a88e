// Threads that run the parts of one job together, for a single sequence of a large model.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "decoder.h"

namespace fr {

// Threads that are waited for at the end of the scope, also where starting the next one has failed.
class Threads {
 public:
  Threads() = default;
  ~Threads() { join(); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
  template <class Work> void start(Work work) { running_.emplace_back(work); }
  void join() {
    for (std::thread& thread : running_) thread.join();
    running_.clear();
  }

 private:
  std::vector<std::thread> running_;
};

// A team of `size` threads, the caller's among them; size 1 starts none. Members wait by spinning for a while and then
// by yielding, because on a busy machine a member may not be running.
class Team {
 public:
  explicit Team(int64_t size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Runs every part of the job, one on each thread; returns when all are done.
  template <class Job> void run(void (*kernel)(const Job&, Part), const Job& job) {
    if (size_ == 1) return kernel(job, {0, 1});
    post({[](Kernel any, const void* its, Part part) {
            reinterpret_cast<void (*)(const Job&, Part)>(any)(*static_cast<const Job*>(its), part);
          },
          reinterpret_cast<Kernel>(kernel), &job});
  }
  int64_t size() const { return size_; }

 private:
  using Kernel = void (*)();  // of any job
  struct Task {
    void (*run)(Kernel kernel, const void* job, Part part);
    Kernel kernel;
    const void* job;
  };
  void post(const Task& task);
  void serve(int64_t part);
  void end();

  int64_t size_;
  alignas(64) std::atomic<uint64_t> posted_{0};
  Task task_{};  // what is read once it is posted lies beside it: a cache line more to fetch costs 0.1 to 0.2 us
  std::atomic<bool> ended_{false};
  alignas(64) std::atomic<int64_t> left_{0};
  Threads members_;  // last: they are gone before what they read
};

}  // namespace fr
