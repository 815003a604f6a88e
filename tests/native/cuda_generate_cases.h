// What the tests of the loops on a GPU share: a loop run to its end, and requests that begin with a state that was
// read.
#pragma once

#include "../../csrc/cuda/generate_session.h"
#include "cuda_on_cpu.h"
#include "generation_cases.h"

// Runs all requests, `feed` of them waiting at a time, `steps` in a launch (0: as it suits the loop).
inline Results run(fr::GenerationLoop& loop, const Requests& requests, int64_t steps, size_t feed) {
  Results results;
  size_t added = 0;
  for (int turns = 0; results.size() < requests.size(); ++turns) {
    CHECK(turns < 100000);
    while (added < requests.size() && loop.queued() < static_cast<int64_t>(feed)) loop.add(requests[added++]);
    loop.run(60'000'000, steps, added < requests.size(), turns % 2 == 0);
    for (const fr::TokenEvent& e : loop.take_events()) CHECK(e.token >= 0 && e.token < loop.shape().V);
    for (fr::GenerationResult& r : loop.take_results()) {
      CHECK(!results.count(r.index));
      check_result(requests[static_cast<size_t>(r.index)], r);
      results.emplace(r.index, std::move(r));
    }
  }
  CHECK(loop.running() == 0 && loop.queued() == 0);
  return results;
}

// Requests that begin with the same ids, and requests that begin with the state after them: what they give is equal.
struct FromState {
  Requests ids, state;
  FromState(const fr::cuda::PackedNetwork& net, int64_t count) : ids(many_requests(count, net.sizes.V, 0)), state(ids) {
    const auto [L, H, V, gates, per_word, carries] = net.sizes;
    std::vector<int32_t> read;
    for (int32_t i = 0; i < 23; ++i) read.push_back(i * 5 % static_cast<int32_t>(V));
    auto start = std::make_shared<fr::StartState>();
    start->h.assign(static_cast<size_t>(L * H), 0.0f), start->c = start->h;
    start->logits.assign(static_cast<size_t>(V), NAN), start->seen.assign(static_cast<size_t>(V), 0);
    for (const int32_t id : read) start->seen[static_cast<size_t>(id)] = 1;
    fr::cuda::read(net, read, start->h.data(), start->c.data(), start->logits.data(), nullptr);
    for (size_t i = 0; i < ids.size(); ++i) {
      std::vector<int32_t>& more = state[i].prompt;
      if (i % 3) more.clear();
      ids[i].prompt = read;
      ids[i].prompt.insert(ids[i].prompt.end(), more.begin(), more.end());
      state[i].start = start;
    }
  }
};
