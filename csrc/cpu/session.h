// A generation under way: requests in a queue, rows that run them, tokens out. Everything that does not depend on an
// instruction set; the products are behind decoder.h.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "decoder.h"

namespace fr {

class Lane;

class Session final : public GenerationLoop {
 public:
  // rows: how many requests run at once. windowed: each token runs the last ids again from a zero state.
  Session(std::shared_ptr<const PackedNetwork> net, int64_t rows, bool windowed, int64_t threads);
  ~Session() override;

  void add(GenerationRequest request) override;
  // Looks at the clock between steps.
  void run(int64_t microseconds, int64_t steps, bool more, bool keep_events) override;
  void stop(int64_t index) override;

  std::vector<GenerationResult> take_results() override;
  std::vector<TokenEvent> take_events() override;
  int64_t queued() const override { return static_cast<int64_t>(queue_.size()); }
  int64_t running() const override;
  NetworkShape shape() const override { return {net_->cell, net_->L, net_->H, net_->V}; }
  const PackedNetwork& network() const { return *net_; }
  bool windowed() const override { return windowed_; }
  int64_t team() const { return team_; }  // threads that run a lane together

 private:
  friend class Lane;
  bool next_request(GenerationRequest& request);
  bool queue_is_empty();
  void run_lanes(size_t thread, size_t threads, int64_t steps, std::chrono::steady_clock::time_point deadline);

  std::shared_ptr<const PackedNetwork> net_;
  bool windowed_, more_ = false, keep_events_ = false, broken_ = false;
  int64_t threads_, team_;
  std::mutex queue_guard_;  // lanes on several threads take requests
  std::deque<GenerationRequest> queue_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  size_t first_lane_ = 0;  // which lane runs first, so that a short time does not favour one
};

}  // namespace fr
