// A generation on a GPU: what generate.cu, generate_cluster.cu and generate_steps.cu run, in terms of the GPU's memory.
// generate_session.h feeds it.
#pragma once

#include <cstdint>
#include <memory>

#include "generate_steps_plan.h"

namespace fr::cuda {

// A request as the GPU sees it. Pointers are into the GPU's memory.
struct DeviceRequest {
  int32_t slot;  // the host's name for it
  int32_t prompt_count, eos_count;
  int32_t logprobs;
  int64_t max_new_tokens;  // 0: read the prompt, write its logits to read_logits and end
  const int32_t *prompt, *eos;
  const float *start_h, *start_c, *start_logits;  // (L, H), (L, H), (V,); null: from nothing
  const uint8_t* start_seen;                      // (V,) or null
  float* read_logits;                             // (V,) or null
  float scale, min_p, penalty, inverse_penalty;
  int64_t top_k, top_p, seed, sequence, mode_of;
};

// A row of a generation between two steps.
struct DeviceRow {
  DeviceRequest q;
  int32_t active;  // whether q runs
  int32_t id;      // what the next step reads; -1: nothing, and the state stays
  int32_t read;    // ids of the prompt that have been read or are about to be
  int32_t starts;  // the next draw is from start_logits
  int64_t drawn;
  int32_t noted;               // notes of the launch
  int32_t tokens[kPublished];  // of the steps since the last that were published, by their place among so many
  float logprobs[kPublished];
};
static_assert(sizeof(DeviceRow) <= kRowBytes);

// A row changed hands after a step, or before the first one, -1.
struct alignas(16) Note {
  int32_t step;
  int32_t end;   // of what it ran: 0 if it ran nothing, or 1 + fr::Finish + 16 * status
  int32_t slot;  // of what it runs from now on, or -1
};

// What a launch tells the host, in memory of the host, which reads what is published while the launch goes on.
struct Log {
  int64_t stride;      // steps of a launch at most
  int32_t* tokens;     // (plan.rows, stride) of each step: drawn, or -1; of a row that runs nothing anything
  float* logprobs;     // as tokens, or null where nobody asks
  Note* notes;         // (plan.rows, stride + 1) a row's, one after the other
  int32_t* published;  // (plan.blocks,) the steps of which each CTA's rows have told everything
};

enum class CellKind { lstm, gru, rnn };

struct GenerateCall {
  CellKind cell;
  NetworkSizes net;
  GeneratePlan plan;
  bool relu;  // of the RNN; else tanh
  int64_t steps;
  const uint32_t* blob;
  const DeviceRequest* queue;
  int32_t queued;
  int32_t* claimed;        // in out: how many of the queue have a row
  const int32_t* stopped;  // (stopped_count,) slots whose rows end before the first step
  int32_t stopped_count;
  DeviceRow* rows;     // in out (plan.rows,)
  float* state;        // in out (plan.rows, L, 2, H): h and what is carried, of rows that run
  uint8_t* seen;       // in out (plan.rows, V)
  Log log;             // out
  int64_t most_draws;  // of a vote
  double* margins;     // scratch (plan.rows, most_draws) where that is more than kVotesInShared, as is
  int32_t* drawn;      // (plan.rows, most_draws)
  void* scratch;  // scratch_bytes(): of a cluster the logits (plan.rows, columns); of steps zeros at the first launch
};
static_assert(sizeof(GenerateCall) <= kCallBytes);

// The steps of Way::steps as a CUDA graph, which is made when first a launch has as many. What is launched with it has
// the same net, plan, cell, blob, rows, state and scratch.
class StepGraph {
 public:
  // As generate().
  int launch(const GenerateCall& call, void* stream);

 private:
  struct Free {
    void operator()(void* graph) const;
  };
  int record(const GenerateCall& call);
  bool loaded_ = false;  // the kernels are: what is recorded cannot wait for that
  std::unique_ptr<void, Free> recorded_;
};

// Begins `steps` steps of all rows on a stream (a cudaStream_t); the launch's cudaError_t.
int generate(const GenerateCall& call, StepGraph& graph, void* stream);
// The same where the plan's way is a cluster, in generate_cluster.cu.
int generate_clustered(const GenerateCall& call, void* stream);
// How many clusters of so many CTAs, each with so much shared memory, the current device runs at once; 0: none.
int64_t generate_clusters_at_once(int64_t cluster, int64_t shared_bytes);

}  // namespace fr::cuda
