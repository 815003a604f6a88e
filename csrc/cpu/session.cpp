#include "session.h"

#include <algorithm>
#include <exception>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "lane.h"

namespace fr {
namespace {

constexpr int64_t kLaneRows = 256;  // beyond that, state and products of a lane leave a core's cache
// Bytes of weights times rows of a lane: a step of it is at most some 50 ms of work, so that a call soon returns.
constexpr int64_t kLaneWork = int64_t{1} << 33;
// From this many weight bytes on a step is long enough for threads to meet in each layer of it: of one row, of several.
constexpr int64_t kTeamBytes = 3 << 19, kTeamBytesOfSome = 1 << 19;
// Below this many rows a thread, a panel of them, threads share the weights of a lane rather than its rows: half a
// panel takes nearly as long as a whole one, and reading the weights as long. Of matrix tiles one a thread is enough.
constexpr int64_t kTeamRows = 16;
constexpr int64_t kUnlimited = INT64_MAX;

}  // namespace

Session::Session(std::shared_ptr<const PackedNetwork> net, int64_t rows, bool windowed, int64_t threads)
    : net_(std::move(net)), windowed_(windowed), threads_(threads), team_(1) {
  const int64_t tile = net_->kernels->tile_rows;
  const bool few = tile > 1 ? rows <= tile * (threads - 1) : rows < kTeamRows * threads;
  if (threads > 1 && few && net_->weight_bytes >= (rows > 1 ? kTeamBytesOfSome : kTeamBytes)) {
    team_ = threads;
    lanes_.push_back(std::make_unique<Lane>(*this, rows));
    return;
  }
  if (rows <= tile / 2) threads = 1;  // parts of a tile gain less than it costs to wake a thread
  const int64_t most = std::clamp<int64_t>(kLaneWork / net_->weight_bytes, 16, kLaneRows);
  int64_t count = std::max(std::min(threads, rows), (rows + most - 1) / most);
  if (threads > 1 && count > threads) count = (count + threads - 1) / threads * threads;
  for (int64_t i = 0; i < count; ++i)
    lanes_.push_back(std::make_unique<Lane>(*this, rows * (i + 1) / count - rows * i / count));
}

Session::~Session() = default;

void Session::add(GenerationRequest request) { queue_.push_back(std::move(request)); }

bool Session::next_request(GenerationRequest& request) {
  const std::lock_guard<std::mutex> guard(queue_guard_);
  if (queue_.empty()) return false;
  request = std::move(queue_.front());
  queue_.pop_front();
  return true;
}

bool Session::queue_is_empty() {
  const std::lock_guard<std::mutex> guard(queue_guard_);
  return queue_.empty();
}

// Runs the lanes thread, thread + threads, ... in turn.
void Session::run_lanes(size_t thread, size_t threads, int64_t steps, Lane::Clock::time_point deadline) {
  Team team(team_);
  const size_t mine = (lanes_.size() - thread + threads - 1) / threads;
  while (true) {
    bool busy = false;
    for (size_t i = 0; i < mine; ++i) {
      Lane& lane = *lanes_[thread + (first_lane_ + i) % mine * threads];
      lane.run(steps ? steps : kUnlimited, deadline, team);
      busy = busy || lane.occupied() > 0;
      if (!steps && Lane::Clock::now() >= deadline) return;
    }
    if (steps || (queue_is_empty() && (more_ || !busy))) return;
  }
}

void Session::run(int64_t microseconds, int64_t steps, bool more, bool keep_events) {
  if (broken_) throw std::runtime_error("this generation has failed before and cannot go on");
  broken_ = true;  // until the end: an exception leaves rows half done
  more_ = more, keep_events_ = keep_events;
  const auto deadline = Lane::Clock::now() + std::chrono::microseconds(microseconds);
  const size_t threads = std::min(static_cast<size_t>(threads_), lanes_.size());
  std::vector<std::exception_ptr> failures(threads);
  const auto work = [&](size_t thread) {
    try {
      run_lanes(thread, threads, steps, deadline);
    } catch (...) {
      failures[thread] = std::current_exception();
    }
  };
  Threads others;
  for (size_t thread = 1; thread < threads; ++thread) others.start([&work, thread] { work(thread); });
  work(0);
  others.join();
  ++first_lane_;
  for (const std::exception_ptr& failure : failures)
    if (failure) std::rethrow_exception(failure);
  broken_ = false;
}

void Session::stop(int64_t index) {
  for (const auto& lane : lanes_) lane->stop(index);
}

std::vector<GenerationResult> Session::take_results() {
  std::vector<GenerationResult> all;
  for (const auto& lane : lanes_) {
    std::move(lane->results.begin(), lane->results.end(), std::back_inserter(all));
    lane->results.clear();
  }
  return all;
}

std::vector<TokenEvent> Session::take_events() {
  std::vector<TokenEvent> all;
  for (const auto& lane : lanes_) {
    all.insert(all.end(), lane->events.begin(), lane->events.end());
    lane->events.clear();
  }
  return all;
}

int64_t Session::running() const {
  int64_t rows = 0;
  for (const auto& lane : lanes_) rows += lane->occupied();
  return rows;
}

}  // namespace fr
