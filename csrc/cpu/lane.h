// Rows of a generation that one thread runs together, or one team of threads: few enough that their state stays in a
// core's cache from step to step.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "head_draw.h"
#include "row_states.h"
#include "session.h"

namespace fr {

class Lane {
 public:
  using Clock = std::chrono::steady_clock;

  Lane(Session& session, int64_t capacity);
  // Runs up to `steps` steps, until the deadline, or until rows are idle for want of requests.
  void run(int64_t steps, Clock::time_point deadline, Team& team);
  void stop(int64_t index);
  int64_t rows() const { return rows_; }
  int64_t occupied() const { return rows_ + newcomers_; }

  std::vector<GenerationResult> results;
  std::vector<TokenEvent> events;

 private:
  struct Row {
    GenerationRequest request;
    GenerationResult result;
    bool over = false;          // result is complete; the row is about to be removed
    int64_t since = 0;          // the step of this run whose token is the first that result lacks
    std::vector<int32_t> ids;   // window state: the last ids
    std::vector<uint8_t> seen;  // (V,) with a repetition penalty
  };
  // A prompt, or in window state the last ids of a row, that is being read; it takes several stretches if it is long.
  struct Reading {
    int64_t row, done, length;
    const int32_t* ids;
  };

  bool admit(int64_t step, Clock::time_point deadline, Team& team);
  bool take_newcomers();
  void place(GenerationRequest request, int64_t row);
  void activate(int64_t step);
  void list_windows();
  bool read(Clock::time_point deadline, Team& team);
  void step_rows(int64_t step, Team& team);
  void draw(int64_t begin, int64_t end, float* logits);
  void draw_same(int64_t begin, int64_t end, const float* logits);
  Sample sample_of(int64_t begin, int64_t end);
  bool all_plain() const;
  void draw_penalised(int64_t row, float* logits);
  void record(int64_t row, int64_t step);
  void end_row(int64_t row, int64_t end, Finish finish);
  void flush(int64_t row, int64_t end);
  void remove_finished(int64_t end);

  Session& session_;
  const PackedNetwork& net_;
  int64_t capacity_, rows_ = 0, newcomers_ = 0;  // newcomers: rows after those that run, their prompts being read
  int64_t head_rows_, log_steps_, clock_steps_;
  RowStates states_;
  PromptReader reader_;
  HeadDraw head_draw_;
  std::unique_ptr<Drawer> drawer_;
  int64_t votes_ = 1;  // the most draws of a token that drawer_ is made for
  std::vector<Row> row_;
  std::vector<Reading> reading_;
  std::vector<int32_t> ids_;  // (capacity) the last id of each row
  std::vector<float> scale_, min_p_, logprob_, tempered_, margin_, plain_;
  std::vector<int64_t> top_k_, top_p_, seed_, sequence_, step_, token_, left_;
  std::vector<int32_t> status_;
  std::vector<int32_t> log_tokens_;  // (steps of a run, capacity)
  std::vector<float> log_logprobs_;
  Memory logits_;  // (head_rows, head_columns)
};

}  // namespace fr
