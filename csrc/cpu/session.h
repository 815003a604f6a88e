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

// Where a request starts from instead of from nothing.
struct StartState {
  std::vector<float> h, c;    // (L, H); c for the LSTM
  std::vector<float> logits;  // (V,) of the next token, for a request without a prompt
  std::vector<int32_t> tail;  // window state: the last ids, below V
  std::vector<uint8_t> seen;  // (V,) for the repetition penalty
};

struct GenerationRequest {
  int64_t index;
  std::vector<int32_t> prompt;              // ids below V, at least one, or a start with logits (window: with a tail)
  std::shared_ptr<const StartState> start;  // or null
  int64_t max_new_tokens;                   // at least 1
  float scale, min_p;                       // the draw's parameters, as in fr::Sample
  int64_t top_k, top_p, seed, sequence, mode_of;
  float penalty, inverse_penalty;  // repetition penalty: 1 is off
  bool logprobs;
  std::vector<int32_t> eos;
  int64_t window;  // window state: how many ids are run for a token, at least 1
};

enum class Finish : int64_t { length = 0, eos = 1, error = 2, stop = 3 };

struct GenerationResult {
  int64_t index;
  Finish finish;
  int32_t status;  // fr::draw::Status of the draw that failed
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;  // of each token where the request asked for them
};

struct TokenEvent {
  int64_t index, token;
};

class Lane;

class Session {
 public:
  // rows: how many requests run at once. windowed: each token runs the last ids again from a zero state.
  Session(std::shared_ptr<const PackedNetwork> net, int64_t rows, bool windowed, int64_t threads);
  ~Session();

  void add(GenerationRequest request);
  // Runs until `microseconds` have passed (looking at the clock between steps), every row has made `steps` steps, all
  // is done, or rows are idle while `more` requests could be added. keep_events: remember each token. After an
  // exception the session only holds what it has finished.
  void run(int64_t microseconds, int64_t steps, bool more, bool keep_events);
  // Ends request `index` if it runs; its result holds what it has drawn.
  void stop(int64_t index);

  std::vector<GenerationResult> take_results();
  std::vector<TokenEvent> take_events();
  int64_t queued() const { return static_cast<int64_t>(queue_.size()); }
  int64_t running() const;
  const PackedNetwork& network() const { return *net_; }
  bool windowed() const { return windowed_; }
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
