// The cells, forward and backward, and the draw on odd shapes: every output is written, and the threads make no
// difference. A sanitizer sees what they touch beside it.
#include <cmath>
#include <cstring>
#include <thread>

#include "check.h"

namespace {

void run_on_threads(int64_t n, void (*task)(int64_t, int64_t, void*), void* ctx) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n; ++i) threads.emplace_back([=] { task(i, i + 1, ctx); });
  for (std::thread& thread : threads) thread.join();
}

template <class F> F number(float x) { return static_cast<F>(x); }
template <> fr::bf16 number(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {static_cast<uint16_t>(bits >> 16)};
}
bool finite(float x) { return std::isfinite(x); }
bool finite(double x) { return std::isfinite(x); }
bool finite(fr::bf16 x) { return (x.bits >> 7 & 255) != 255; }

struct Shape {
  int64_t T, B, I, H, P;
  bool bias, lengths, reset, reverse;
};

// One call of one cell: memory of exactly the sizes of the contract, outputs that begin as NaN.
template <class F> class Call {
 public:
  Call(const Shape& s, int64_t gates, int64_t threads) : random_(5), s_(s) {
    in.T = s.T, in.B = s.B, in.I = s.I, in.H = s.H, in.P = s.P, in.reverse = s.reverse;
    const int64_t rows = gates * s.H;
    in.x = given(s.T * s.B * s.I), in.h0 = given(s.B * s.P);
    in.w_ih = given(rows * s.I), in.w_hh = given(rows * s.P);
    in.b_ih = s.bias ? given(rows) : nullptr, in.b_hh = s.bias ? given(rows) : nullptr;
    for (int64_t b = 0; b < s.B; ++b) lengths_.push_back(b % 3 ? random_.below(s.T + 1) : s.T);
    in.lengths = s.lengths ? lengths_.data() : nullptr;
    reset_ = std::make_unique<bool[]>(static_cast<size_t>(s.T * s.B));
    for (int64_t i = 0; i < s.T * s.B; ++i) reset_[static_cast<size_t>(i)] = random_.below(4) == 0;
    in.reset = s.reset ? reset_.get() : nullptr;
    in.pool = {threads, run_on_threads};
  }
  const F* given(int64_t n) {
    auto& all = memory_.emplace_back(static_cast<size_t>(n));
    for (F& x : all) x = number<F>(random_.within(0.5f));
    return all.data();
  }
  F* result(int64_t n) {
    results_.push_back(memory_.size());
    return memory_.emplace_back(static_cast<size_t>(n), number<F>(NAN)).data();
  }
  // The bits of all results, once they are finite.
  std::string bits() const {
    std::string all;
    for (const size_t at : results_) {
      for (const F x : memory_[at]) CHECK(finite(x));
      all.append(reinterpret_cast<const char*>(memory_[at].data()), memory_[at].size() * sizeof(F));
    }
    return all;
  }
  fr::Sequence<F> in{};

 private:
  Random random_;
  Shape s_;
  std::vector<std::vector<F>> memory_;
  std::vector<size_t> results_;
  std::vector<int64_t> lengths_;
  std::unique_ptr<bool[]> reset_;
};

template <class F> std::string lstm(const Shape& s, int64_t threads) {
  Call<F> c(s, 4, threads);
  const int64_t TB = s.T * s.B, P = s.P, H = s.H;
  const F* w_hr = P == H ? nullptr : c.given(P * H);
  const F* c0 = c.given(s.B * H);
  F *y = c.result(TB * P), *hn = c.result(s.B * P), *cn = c.result(s.B * H);
  F *gates = c.result(TB * 4 * H), *cells = c.result(TB * H);
  fr::lstm_forward<F>({c.in, c0, w_hr, y, hn, cn, gates, cells});
  const F *dy = c.given(TB * P), *dhn = c.given(s.B * P), *dcn = c.given(s.B * H);
  F *dx = c.result(TB * s.I), *dh0 = c.result(s.B * P), *dc0 = c.result(s.B * H), *dw_ih = c.result(4 * H * s.I);
  F *dw_hh = c.result(4 * H * P), *db = s.bias ? c.result(4 * H) : nullptr, *dw_hr = w_hr ? c.result(P * H) : nullptr;
  fr::lstm_backward<F>({c.in, c0, w_hr, y, gates, cells, dy, dhn, dcn, dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr});
  return c.bits();
}

template <class F> std::string gru(const Shape& s, int64_t threads) {
  Call<F> c(s, 3, threads);
  const int64_t TB = s.T * s.B, H = s.H;
  F *y = c.result(TB * H), *hn = c.result(s.B * H), *gates = c.result(TB * 4 * H);
  fr::gru_forward<F>({c.in, y, hn, gates});
  const F *dy = c.given(TB * H), *dhn = c.given(s.B * H);
  F *dx = c.result(TB * s.I), *dh0 = c.result(s.B * H), *dw_ih = c.result(3 * H * s.I), *dw_hh = c.result(3 * H * H);
  F *db_ih = s.bias ? c.result(3 * H) : nullptr, *db_hh = s.bias ? c.result(3 * H) : nullptr;
  fr::gru_backward<F>({c.in, y, gates, dy, dhn, dx, dh0, dw_ih, dw_hh, db_ih, db_hh});
  return c.bits();
}

template <class F> std::string rnn(const Shape& s, int64_t threads) {
  Call<F> c(s, 1, threads);
  const int64_t TB = s.T * s.B, H = s.H;
  const bool relu = s.reverse;
  F *y = c.result(TB * H), *hn = c.result(s.B * H);
  fr::rnn_forward<F>({c.in, relu, y, hn});
  const F *dy = c.given(TB * H), *dhn = c.given(s.B * H);
  F *dx = c.result(TB * s.I), *dh0 = c.result(s.B * H), *dw_ih = c.result(H * s.I), *dw_hh = c.result(H * H);
  F* db = s.bias ? c.result(H) : nullptr;
  fr::rnn_backward<F>({c.in, relu, y, dy, dhn, dx, dh0, dw_ih, dw_hh, db});
  return c.bits();
}

template <class F> void test_cells(const char* name) {
  constexpr Shape shapes[] = {
      {1, 1, 1, 1, 1, false, false, false, false}, {5, 3, 7, 9, 9, true, true, false, true},
      {4, 9, 3, 33, 33, true, false, true, false}, {7, 33, 17, 5, 5, true, true, true, false},
      {0, 2, 3, 4, 4, true, false, false, false},  {3, 0, 3, 4, 4, true, false, false, true},
      {9, 6, 0, 65, 65, false, true, true, true},  {16, 40, 30, 48, 48, true, true, true, true}};
  for (const Shape& s : shapes) {
    at() = std::string(name) + " H=" + std::to_string(s.H) + " T=" + std::to_string(s.T);
    CHECK(lstm<F>(s, 1) == lstm<F>(s, 3));
    CHECK(gru<F>(s, 1) == gru<F>(s, 3));
    CHECK(rnn<F>(s, 1) == rnn<F>(s, 3));
    Shape projected = s;
    projected.P = (s.H + 1) / 2;
    if (projected.P != s.H) CHECK(lstm<F>(projected, 1) == lstm<F>(projected, 3));
  }
}

// Tokens of B rows of V logits with every kind of option, on so many threads.
std::vector<int64_t> draw(int64_t B, int64_t V, int64_t mode_of, bool logprobs, bool masked, int64_t threads) {
  Random random(static_cast<uint64_t>(V));
  const auto n = static_cast<size_t>(B);
  std::vector<float> logits = random.floats(B * V, 6.0f), scale(n), min_p(n), floats[3];
  std::vector<int64_t> top_k(n), top_p(n), seed(n), sequence(n), step(n), token(n, -1);
  std::vector<int32_t> status(n, -1);
  const auto mask = std::make_unique<bool[]>(static_cast<size_t>(V));
  for (int64_t v = 0; v < V; ++v) mask[static_cast<size_t>(v)] = v % 3 == 0;
  for (size_t i = 0; i < n; ++i) {
    scale[i] = i % 5 ? 1.0f : 0.0f, min_p[i] = i % 4 == 1 ? 3.0f : INFINITY, top_k[i] = i % 4 == 2 ? 5 : 0;
    top_p[i] = i % 4 == 3 ? int64_t{1} << 61 : 0, seed[i] = -1, sequence[i] = static_cast<int64_t>(i), step[i] = 3;
  }
  for (auto& column : floats) column.resize(logprobs ? n : 0);
  if (B > 2) logits[static_cast<size_t>(2 * V)] = NAN;
  fr::Sample s{};
  s.B = B, s.V = V, s.logits = logits.data(), s.logits_stride = V, s.mask = masked ? mask.get() : nullptr;
  s.scale = scale.data(), s.min_p = min_p.data(), s.top_k = top_k.data(), s.top_p = top_p.data();
  s.seed = seed.data(), s.sequence = sequence.data(), s.step = step.data(), s.mode_of = mode_of;
  s.logprobs = logprobs, s.token = token.data(), s.status = status.data(), s.pool = {threads, run_on_threads};
  s.logprob = floats[0].data(), s.tempered_logprob = floats[1].data(), s.margin = floats[2].data();
  fr::sample(s);
  for (size_t i = 0; i < n; ++i) {
    CHECK(i == 2 ? status[i] == 1 && token[i] == 0 : status[i] == 0 && token[i] >= 0 && token[i] < V);
    if (logprobs && i != 2) CHECK(floats[0][i] <= 1e-5f && floats[1][i] <= 1e-5f && floats[2][i] >= 0);
    if (masked && status[i] == 0) CHECK(token[i] % 3 == 0);
  }
  return token;
}

void test_draw() {
  for (const int64_t V : {1, 5, 255, 256, 257, 1000, 4099})
    for (const int64_t B : {0, 1, 19})
      for (const int64_t mode_of : {1, 11})
        for (const bool masked : {false, true}) {
          at() = "draw V=" + std::to_string(V) + " B=" + std::to_string(B) + " mode_of=" + std::to_string(mode_of);
          const std::vector<int64_t> tokens = draw(B, V, mode_of, false, masked, 1);
          CHECK(tokens == draw(B, V, mode_of, false, masked, 3));
          CHECK(tokens == draw(B, V, mode_of, true, masked, 1));
        }
}

}  // namespace

// Runs on each of the named instruction sets that this processor has.
int main(int count, char** names) {
  on_each({names + 1, names + count}, "kernels", [] {
    test_cells<float>("float32");
    test_cells<double>("float64");
    test_cells<fr::bf16>("bfloat16");
    test_draw();
  });
  return 0;
}
