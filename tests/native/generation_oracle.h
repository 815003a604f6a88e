// What the tests of the loops that sum in an order of their own share: the network in double, and requests that are
// soon over.
#pragma once

#include <algorithm>
#include <cmath>

#include "../../csrc/cell_math.h"
#include "cuda_generate_cases.h"

// The network in double, id after id.
class Oracle {
 public:
  explicit Oracle(const fr::NetworkWeights& w) : w_(w), h_(size(w.L * w.H)), c_(h_), logits_(size(w.V)) {}
  void read(int32_t id) {
    std::vector<double> x(size(w_.E));
    for (int64_t e = 0; e < w_.E; ++e) x[size(e)] = w_.inputs ? w_.inputs[id * w_.E + e] : e == id ? 1.0 : 0.0;
    for (int64_t l = 0; l < w_.L; ++l) {
      const std::vector<double> before(h_.begin() + l * w_.H, h_.begin() + (l + 1) * w_.H);
      for (int64_t u = 0; u < w_.H; ++u) step(l, u, x, before);
      x.assign(h_.begin() + l * w_.H, h_.begin() + (l + 1) * w_.H);
    }
    for (int64_t v = 0; v < w_.V; ++v) logits_[size(v)] = w_.head_bias[v] + dot(w_.head + v * w_.H, x);
  }
  double log_probability(int32_t token) const {
    const double most = *std::max_element(logits_.begin(), logits_.end());
    double sum = 0;
    for (const double x : logits_) sum += std::exp(x - most);
    return logits_[size(token)] - most - std::log(sum);
  }

 private:
  static size_t size(int64_t n) { return static_cast<size_t>(n); }
  static double dot(const float* w, const std::vector<double>& x) {
    double sum = 0;
    for (size_t k = 0; k < x.size(); ++k) sum += w[k] * x[k];
    return sum;
  }
  void step(int64_t l, int64_t u, const std::vector<double>& x, const std::vector<double>& before) {
    double from_x[4], from_h[4];
    for (int64_t g = 0; g < fr::gates_of(w_.cell); ++g) {
      const int64_t row = g * w_.H + u;
      const auto of = [&](const float* bias) { return bias ? bias[row] : 0.0; };
      from_x[g] = of(w_.b_ih[size(l)]) + dot(w_.w_ih[size(l)] + row * (l ? w_.H : w_.E), x);
      from_h[g] = of(w_.b_hh[size(l)]) + dot(w_.w_hh[size(l)] + row * w_.H, before);
    }
    double &h = h_[size(l * w_.H + u)], &c = c_[size(l * w_.H + u)];
    const auto both = [&](int g) { return from_x[g] + from_h[g]; };
    if (w_.cell == Cell::lstm) {
      const auto s = fr::lstm_step<double>(both(0), both(1), both(2), both(3), c);
      h = s.m, c = s.c;
    } else if (w_.cell == Cell::gru) {
      h = fr::gru_step<double>(both(0), both(1), from_x[2], from_h[2], h).h;
    } else {
      h = fr::rnn_step<double>(both(0), w_.cell == Cell::rnn_relu);
    }
  }
  const fr::NetworkWeights& w_;
  std::vector<double> h_, c_, logits_;
};

// The largest error of the log-probabilities of what was drawn.
inline double error_of(const Model& model, const Requests& requests, const Results& results) {
  double worst = 0;
  for (const auto& [index, r] : results) {
    Oracle oracle(model.weights);
    for (const int32_t id : requests[static_cast<size_t>(index)].prompt) oracle.read(id);
    for (size_t t = 0; t < r.logprobs.size(); ++t) {
      worst = std::max(worst, std::abs(r.logprobs[t] - oracle.log_probability(r.tokens[t])));
      oracle.read(r.tokens[t]);
    }
  }
  return worst;
}

// The same tokens, and no more than three times the error that the CPU's loop makes in the same precision (and 64
// roundings of float).
inline void check_close(const Model& model, const Requests& requests, const Results& cpu, const Results& cluster) {
  CHECK(cpu.size() == cluster.size());
  for (const auto& [index, x] : cpu) {
    const fr::GenerationResult& y = cluster.at(index);
    CHECK(x.tokens == y.tokens && x.finish == y.finish && x.status == y.status);
  }
  CHECK(error_of(model, requests, cluster) <= 3 * error_of(model, requests, cpu) + 64 * 0x1p-24);
}

struct Shape {
  int64_t L, H, V, E;
};

// Requests of all kinds that are soon over: an emulated step takes tens of milliseconds.
inline Requests short_requests(int64_t count, int64_t V) {
  Requests all = many_requests(count, V, 0);
  for (auto& q : all) {
    q.prompt.resize(std::min<size_t>(q.prompt.size(), q.index == 3 ? 7 : 2));
    q.max_new_tokens = std::min<int64_t>(q.max_new_tokens, 3);
  }
  return all;
}
