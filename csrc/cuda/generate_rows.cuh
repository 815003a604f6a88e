// What a row of a generation does between two steps, whatever computes its logits: the draw and what follows from it,
// what the host is told of it, the end of its request and the next one of the queue. A team of warps does it; all of
// its threads call these functions together.
#pragma once

#include "draw.cuh"
#include "generate.h"
#include "../cell_math.h"

namespace fr::cuda {

enum EndOf : int32_t { kLength = 1, kEos = 2, kError = 3 };  // 1 + fr::Finish

constexpr int32_t kNoRequest = -1;
constexpr int32_t kIdleRow = -2;  // DeviceRow::id where the queue had nothing left: it does not grow within a launch

// Row `number` of the call: what it runs, and the logits that it draws from.
struct RowSeat {
  DeviceRow& row;
  int64_t number;
  float* logits;
  __device__ uint8_t* seen(const GenerateCall& c) const { return c.seen + number * c.net.V; }
};

// The state of one unit of a row from its pre-activations; `carried` is updated.
template <CellKind C, int Gates>
__device__ __forceinline__ float new_state(const float (&p)[Gates], float xn, bool relu, float& carried) {
  if constexpr (C == CellKind::lstm) {
    const LstmStep<float> s = lstm_step(p[0], p[1], p[2], p[3], carried);
    carried = s.c;
    return s.m;
  } else if constexpr (C == CellKind::gru) {
    carried = gru_step(p[0], p[1], xn, p[2], carried).h;
    return carried;
  } else {
    return rnn_step(p[0], relu);
  }
}

// The memory of team `n` of those that `at` is laid out for.
__device__ __forceinline__ DrawScratch scratch_of(unsigned char* memory, const DrawLayout& at, const NetworkSizes& net,
                                                  int64_t n) {
  const int64_t tiles = tiles_of_row(net);
  return {reinterpret_cast<uint32_t*>(memory + at.largest) + n * tiles,
          reinterpret_cast<uint64_t*>(memory + at.mass) + n * tiles,
          reinterpret_cast<int32_t*>(memory + at.drawn) + n * kVotesInShared,
          reinterpret_cast<double*>(memory + at.margins) + n * kVotesInShared};
}

// One thread readies a row for a launch: it has no notes yet, and runs no request that was stopped.
__device__ inline void open_row(const GenerateCall& c, DeviceRow& row) {
  row.noted = 0;
  for (int32_t i = 0; i < c.stopped_count; ++i)
    if (row.active && row.q.slot == c.stopped[i]) row.active = 0;
  if (!row.active) row.id = kNoRequest;
}

// One thread brings row `number` to the chip, or one that does nothing where the call has no such row.
__device__ inline void fetch_row(const GenerateCall& c, int64_t number, DeviceRow& to) {
  DeviceRow none{};
  none.id = kNoRequest;
  to = number < c.plan.rows ? c.rows[number] : none;
  open_row(c, to);
}

// One thread notes that a row changed hands.
__device__ inline void note(const GenerateCall& c, const RowSeat& seat, int64_t step, int32_t end, int32_t slot) {
  c.log.notes[seat.number * (c.log.stride + 1) + seat.row.noted++] = {static_cast<int32_t>(step), end, slot};
}

// After a step, or before the first one, -1, in which what the row ran came to `end`, gives the row the next request of
// the queue and returns its place there; below 0 where there is none. The state that it starts from is the caller's to
// load.
template <int Warps>
__device__ int32_t claim(const GenerateCall& c, const Team<Warps>& team, const RowSeat& seat, int64_t step,
                         int32_t end) {
  const bool first = team.rank() == 0;
  DeviceRow& row = seat.row;
  uint32_t ticket = 0;  // 1 + the place
  if (first && row.id != kIdleRow) ticket = static_cast<uint32_t>(atomicAdd(c.claimed, 1)) + 1;
  const auto at = static_cast<int32_t>(team.most(ticket)) - 1;
  if (at < 0 || at >= c.queued) {
    if (first && end != 0) note(c, seat, step, end, kNoRequest);
    if (first) row.active = 0, row.id = kIdleRow;
    team.sync();
    return kNoRequest;
  }
  const DeviceRequest& q = c.queue[at];
  if (first) {
    note(c, seat, step, end, q.slot);
    row.q = q, row.active = 1, row.drawn = 0;
    row.starts = q.prompt_count == 0, row.read = q.prompt_count == 0 ? 0 : 1;
    row.id = q.prompt_count == 0 ? -1 : q.prompt[0];
  }
  if (q.penalty != 1.0f) {
    uint8_t* const seen = seat.seen(c);
    for (int64_t v = team.rank(); v < c.net.V; v += Team<Warps>::kThreads)
      seen[v] = q.start_seen == nullptr ? 0 : q.start_seen[v];
    team.sync();
    for (int32_t i = team.rank(); i < q.prompt_count; i += Team<Warps>::kThreads) seen[q.prompt[i]] = 1;
  }
  team.sync();
  return at;
}

// Whether the host is told of the steps up to this one.
__device__ __forceinline__ bool publishes(const GenerateCall& c, int64_t step) {
  return (step + 1) % kPublished == 0 || step + 1 == c.steps;
}

// Writes a row's tokens of a step and of those before it that have not been published.
template <int Warps>
__device__ void write_tokens(const GenerateCall& c, const Team<Warps>& team, const RowSeat& seat, int64_t step) {
  const int64_t at = seat.number * c.log.stride;
  for (int64_t i = step / kPublished * kPublished + team.rank(); i <= step; i += Team<Warps>::kThreads) {
    c.log.tokens[at + i] = seat.row.tokens[i % kPublished];
    if (c.log.logprobs != nullptr) c.log.logprobs[at + i] = seat.row.logprobs[i % kPublished];
  }
}

// All threads of a CTA: its rows have written all that they have to tell of `steps` steps.
__device__ inline void publish(const GenerateCall& c, int64_t steps) {
  __syncthreads();
  if (threadIdx.x == 0) store_release_system(c.log.published + blockIdx.x, static_cast<int32_t>(steps));
}

// A row draws its next token, which the next step reads. Returns the end that its request comes to, or 0.
template <int Warps>
__device__ int32_t draw_token(const GenerateCall& c, const Team<Warps>& team, const RowSeat& seat,
                              const DrawScratch& scratch, int64_t step) {
  DeviceRow& row = seat.row;
  const DeviceRequest& q = row.q;
  Logits x{};
  x.x = seat.logits, x.V = c.net.V;
  x.seen = q.penalty == 1.0f ? nullptr : seat.seen(c), x.penalty = q.penalty, x.inverse_penalty = q.inverse_penalty;
  const DrawNumbers numbers{q.scale,
                            q.min_p,
                            q.top_k,
                            q.top_p,
                            static_cast<uint64_t>(q.seed),
                            static_cast<uint64_t>(q.sequence),
                            static_cast<uint32_t>(row.drawn),
                            q.mode_of,
                            q.logprobs != 0};
  const Drawn d = draw_row(team, x, numbers, scratch);
  const auto token = static_cast<int32_t>(d.token);
  bool is_eos = false;
  for (int32_t i = 0; i < q.eos_count; ++i) is_eos = is_eos || q.eos[i] == token;
  const bool last = row.drawn + 1 >= q.max_new_tokens, drawn = d.status == draw::kOk;
  const int32_t end = !drawn ? kError + 16 * d.status : is_eos ? kEos : last ? kLength : 0;
  team.sync();
  if (team.rank() == 0) {
    row.id = token;
    row.tokens[step % kPublished] = drawn ? token : -1, row.logprobs[step % kPublished] = d.logprob;
    ++row.drawn;
    if (x.seen != nullptr && drawn) seat.seen(c)[token] = 1;
  }
  team.sync();
  return end;
}

// What a row does when the logits of a step are there. Returns the end that its request comes to, or 0.
template <int Warps>
__device__ int32_t finish_row(const GenerateCall& c, const Team<Warps>& team, const RowSeat& seat,
                              const DrawScratch& scratch, int64_t step) {
  DeviceRow& row = seat.row;
  const bool first = team.rank() == 0;
  int32_t end = 0;
  if (row.active) {
    const bool starts = row.starts != 0, reads = !starts && row.read < row.q.prompt_count;
    team.sync();
    if (starts) {
      for (int64_t v = team.rank(); v < c.net.V; v += Team<Warps>::kThreads) seat.logits[v] = row.q.start_logits[v];
      if (first) row.starts = 0;
      team.sync();
    }
    if (reads) {
      if (first) row.id = row.q.prompt[row.read++], row.tokens[step % kPublished] = -1;
    } else if (row.q.max_new_tokens == 0) {
      for (int64_t v = team.rank(); v < c.net.V; v += Team<Warps>::kThreads) row.q.read_logits[v] = seat.logits[v];
      if (first) row.tokens[step % kPublished] = -1;
      end = kLength;
    } else {
      DrawScratch own = scratch;
      if (row.q.mode_of > kVotesInShared)
        own.margins = c.margins + seat.number * c.most_draws, own.drawn = c.drawn + seat.number * c.most_draws;
      end = draw_token(c, team, seat, own, step);
    }
    team.sync();
    if (end != 0 && first) row.active = 0, row.id = kNoRequest;
    team.sync();
    if (end != 0 || publishes(c, step)) write_tokens(c, team, seat, step);
  }
  return end;
}

}  // namespace fr::cuda
