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
    run_parts(
        [](const void* context, Part part) {
          const auto& call = *static_cast<const Call<Job>*>(context);
          call.kernel(*call.job, part);
        },
        Call<Job>{kernel, &job});
  }
  int64_t size() const { return size_; }

 private:
  template <class Job> struct Call {
    void (*kernel)(const Job&, Part);
    const Job* job;
  };
  using Task = void (*)(const void* context, Part part);
  template <class C> void run_parts(Task task, const C& context) { post(task, &context); }
  void post(Task task, const void* context);
  void serve(int64_t part);
  void end();

  int64_t size_;
  Task task_ = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> posted_{0};
  alignas(64) std::atomic<int64_t> left_{0};
  std::atomic<bool> ended_{false};
  Threads members_;  // last: they are gone before what they read
};

}  // namespace fr
