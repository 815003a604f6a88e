// Networks, requests and comparisons that the tests of the generation loops share.
#pragma once

#include <cmath>
#include <cstring>
#include <map>
#include <memory>

#include "../../csrc/cpu/decoder.h"
#include "../../csrc/generation.h"
#include "check.h"

using fr::Cell;
using fr::Precision;
using Net = std::shared_ptr<const fr::PackedNetwork>;
using Requests = std::vector<fr::GenerationRequest>;
using Results = std::map<int64_t, fr::GenerationResult>;

constexpr const char* kCells[] = {"lstm", "gru", "rnn_tanh", "rnn_relu"};
constexpr const char* kPrecisions[] = {"float32", "bfloat16", "int8"};

// Weights of a network and the memory they lie in.
struct Model {
  fr::NetworkWeights weights{};
  std::vector<std::vector<float>> memory;

  // E = 0: one-hot input.
  Model(Cell cell, int64_t L, int64_t H, int64_t V, int64_t E, uint64_t seed) {
    Random random(seed);
    const int64_t rows = fr::gates_of(cell) * H;
    const float most = 1.5f / std::sqrt(static_cast<float>(H));
    const auto make = [&](int64_t n, float size) { return memory.emplace_back(random.floats(n, size)).data(); };
    memory.reserve(static_cast<size_t>(4 * L + 3));
    weights.cell = cell, weights.L = L, weights.H = H, weights.V = V, weights.E = E ? E : V;
    weights.inputs = E ? make(V * E, 1.0f) : nullptr;
    for (int64_t l = 0; l < L; ++l) {
      weights.w_ih.push_back(make(rows * (l ? H : weights.E), l ? most : 1.0f));
      weights.w_hh.push_back(make(rows * H, most));
      weights.b_ih.push_back(make(rows, most));
      weights.b_hh.push_back(l % 2 ? nullptr : make(rows, most));
    }
    weights.head = make(V * H, 2.0f);
    weights.head_bias = make(V, 0.5f);
  }
  Net pack(Precision precision) const { return fr::pack_network(weights, precision); }
};

// Requests of many kinds: lengths of prompts, options of the draw, ends.
inline Requests many_requests(int64_t n, int64_t V, int64_t window) {
  constexpr int64_t lengths[] = {1, 2, 3, 33, 1, 70, 7, 40, 1, 16};
  Random random(7);
  Requests all;
  for (int64_t i = 0; i < n; ++i) {
    fr::GenerationRequest q{};
    q.index = i, q.max_new_tokens = 1 + i * 5 % 17, q.window = window;
    for (int64_t t = 0; t < lengths[i % 10]; ++t) q.prompt.push_back(static_cast<int32_t>(random.below(V)));
    q.scale = i % 4 ? 1.0f + static_cast<float>(i % 3) : 0.0f;
    q.min_p = i % 5 == 1 ? 4.0f : INFINITY;
    q.top_k = i % 5 == 2 ? 3 : 0, q.top_p = i % 5 == 3 ? int64_t{1} << 62 : 0;
    q.seed = i % 6, q.sequence = i, q.mode_of = i % 7 == 3 ? 1 + i % 5 : 1;
    q.penalty = i % 6 == 5 ? 1.3f : 1.0f, q.inverse_penalty = 1.0f / q.penalty;
    q.logprobs = i % 3 != 0;
    if (i % 4 == 1) q.eos = {static_cast<int32_t>(random.below(V)), static_cast<int32_t>(V - 1)};
    all.push_back(std::move(q));
  }
  return all;
}

inline void check_result(const fr::GenerationRequest& q, const fr::GenerationResult& r) {
  const auto count = static_cast<int64_t>(r.tokens.size());
  CHECK(r.status == 0 ? r.finish != fr::Finish::error : r.finish == fr::Finish::error);
  CHECK(r.logprobs.size() == (q.logprobs ? r.tokens.size() : 0));
  for (const float x : r.logprobs) CHECK(std::isfinite(x) && x < 1e-4f);
  if (r.finish == fr::Finish::length) CHECK(count == q.max_new_tokens);
  if (r.finish == fr::Finish::eos) CHECK(count >= 1 && count <= q.max_new_tokens);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * 4) == 0);
}

inline void check_same(const Results& a, const Results& b) {
  CHECK(a.size() == b.size());
  for (const auto& [index, x] : a) {
    const fr::GenerationResult& y = b.at(index);
    CHECK(x.tokens == y.tokens && same_bits(x.logprobs, y.logprobs));
    CHECK(x.finish == y.finish && x.status == y.status);
  }
}
