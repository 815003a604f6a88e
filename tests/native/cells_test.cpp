// The cells' CUDA kernels on the CPU (cuda_on_cpu.h), for sanitizers: random sizes, every array of its exact length.
//
// What they compute is judged elsewhere, in float64; here all resident plans of a call must give the same bits.
#include <cstring>
#include <type_traits>

#include "check.h"
#include "cuda_on_cpu.h"

#include "../../csrc/cuda/plan.h"

using namespace fr::cuda;

namespace {

template <class E> E number(float v) {
  if constexpr (std::is_same_v<E, float>)
    return v;
  else if constexpr (std::is_same_v<E, __half>)
    return __float2half(v);
  else
    return __float2bfloat16(v);
}

struct Sizes {
  int64_t T, B, I, H, gates;
};

// Everything one call reads and writes. Results begin as what no kernel writes.
template <class E> struct Tensors {
  Sizes z;
  std::vector<E> gx, x, w_ih, b_ih, w_hh, b_hh, h0, c0, dy, dhn, dcn;
  std::vector<int64_t> lengths;
  std::unique_ptr<bool[]> reset;
  std::vector<E> y, hn, cn, saved, cells, dgx, dgh, dh0, dc0;
  std::vector<float> c, dh, dc;

  Tensors(const Sizes& sizes, Random& random, bool masked) : z(sizes) {
    const int64_t steps = z.T * z.B, state = z.B * z.H, pre = z.gates * z.H;
    const auto some = [&](int64_t n, float most) {
      std::vector<E> all(static_cast<size_t>(n));
      for (E& v : all) v = number<E>(random.within(most));
      return all;
    };
    gx = some(z.T > 1 ? steps * pre : 0, 2), x = some(z.T > 1 ? 0 : z.B * z.I, 1), w_ih = some(pre * z.I, 1);
    b_ih = some(pre, 1), w_hh = some(pre * z.H, 0.3f), b_hh = some(pre, 1), h0 = some(state, 1), c0 = some(state, 1);
    dy = some(steps * z.H, 1), dhn = some(state, 1), dcn = some(state, 1);
    if (masked) {
      for (int64_t b = 0; b < z.B; ++b) lengths.push_back(random.below(z.T + 1));
      reset = std::make_unique<bool[]>(static_cast<size_t>(steps));
      for (int64_t i = 0; i < steps; ++i) reset[i] = random.below(4) == 0;
    }
    const auto fresh = [](int64_t n) { return std::vector<E>(static_cast<size_t>(n), number<E>(-7)); };
    y = fresh(steps * z.H), hn = fresh(state), cn = fresh(state), saved = fresh(4 * steps * z.H);
    cells = fresh(steps * z.H), dgx = fresh(steps * pre), dgh = fresh(steps * pre), dh0 = fresh(state);
    dc0 = fresh(state), c.resize(state), dh.resize(state), dc.resize(state);
  }

  void run(Precision p, bool reverse, bool relu) {
    const int64_t* lengths_or_null = lengths.empty() ? nullptr : lengths.data();
    CellForward f{p,
                  z.T,
                  z.B,
                  z.I,
                  z.H,
                  z.T > 1 ? gx.data() : nullptr,
                  x.data(),
                  w_ih.data(),
                  b_ih.data(),
                  w_hh.data(),
                  b_hh.data(),
                  h0.data(),
                  c0.data(),
                  lengths_or_null,
                  reset.get(),
                  reverse,
                  relu,
                  y.data(),
                  hn.data(),
                  cn.data(),
                  saved.data(),
                  cells.data(),
                  c.data(),
                  nullptr};
    CellBackward b{p,
                   z.T,
                   z.B,
                   z.H,
                   w_hh.data(),
                   h0.data(),
                   c0.data(),
                   lengths_or_null,
                   reset.get(),
                   reverse,
                   relu,
                   y.data(),
                   saved.data(),
                   cells.data(),
                   dy.data(),
                   dhn.data(),
                   dcn.data(),
                   dgx.data(),
                   z.gates == 3 ? dgh.data() : nullptr,
                   dh0.data(),
                   dc0.data(),
                   dh.data(),
                   dc.data(),
                   nullptr};
    const auto forward = z.gates == 4 ? lstm_forward : z.gates == 3 ? gru_forward : rnn_forward;
    const auto backward = z.gates == 4 ? lstm_backward : z.gates == 3 ? gru_backward : rnn_backward;
    CHECK(forward(f) == nullptr);
    CHECK(backward(b) == nullptr);
    std::vector<E> rows(y.size());
    const Rows previous{z.T,     z.B,      z.H,       sizeof(E),   lengths_or_null, reset.get(),
                        reverse, y.data(), h0.data(), rows.data(), nullptr};
    CHECK(previous_rows(previous) == nullptr && rows_within_lengths(previous) == nullptr);
  }
};

template <class E> void check_equal(const Tensors<E>& a, const Tensors<E>& b) {
  const auto same = [](const std::vector<E>& x, const std::vector<E>& y) {
    return x.size() == y.size() && (x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(E)) == 0);
  };
  CHECK(same(a.y, b.y) && same(a.hn, b.hn) && same(a.cn, b.cn) && same(a.saved, b.saved) && same(a.cells, b.cells));
  CHECK(same(a.dgx, b.dgx) && same(a.dgh, b.dgh) && same(a.dh0, b.dh0) && same(a.dc0, b.dc0));
}

template <class E> void check_sizes(Precision p, const Sizes& z, uint64_t seed, bool wide) {
  const bool masked = seed % 2, reverse = seed / 2 % 2;
  const auto run = [&](int64_t row_tiles, int64_t cluster) {
    Random random(seed);
    Tensors<E> t(z, random, masked);
    at() = "precision " + std::to_string(static_cast<int>(p)) + " gates " + std::to_string(z.gates) + " T " +
           std::to_string(z.T) + " B " + std::to_string(z.B) + " H " + std::to_string(z.H) + " plan " +
           std::to_string(row_tiles) + " " + std::to_string(cluster);
    want_plan(row_tiles, cluster);
    t.run(p, reverse, seed % 3 == 0);
    return t;
  };
  run(1, 0);
  if (z.T == 1) return;
  const Tensors<E> one = run(1, 1);
  // A launch a step, which a plan that does not fit becomes, adds up in an order of its own.
  const auto check_plan = [&](int64_t row_tiles, int64_t cluster) {
    const Device device{cuda_on_cpu::kSharedBytes, 132, 16, row_tiles, cluster};
    const Tensors<E> other = run(row_tiles, cluster);
    for (bool backward : {false, true})
      if (!sequence_plan(static_cast<int>(z.gates), backward, p, z.H, z.B, device).resident) return;
    check_equal(one, other);
  };
  if (wide) run(4, 0), check_plan(4, 1);
  if (z.H > 16) check_plan(1, 2);
  if (z.H > 48 && wide) check_plan(4, 4);
}

// Float32 and TF32 are stored alike, and float16 and bfloat16: of each two, a size takes one with 4 gates and 1 gate,
// the other with 3.
void check_all(bool few) {
  uint64_t seed = 0;
  bool other = false;
  const std::vector<Sizes> all = {
      {1, 3, 5, 7, 0}, {3, 9, 1, 21, 0}, {4, 2, 1, 33, 0}, {2, 34, 1, 49, 0}, {2, 1, 1, 100, 0}};
  const std::vector<Sizes> small = {{1, 1, 2, 5, 0}, {3, 2, 1, 18, 0}};
  for (const int64_t gates : {4, 3, 1})
    for (Sizes z : few ? small : all) {
      z.gates = gates, seed += few ? 2 : 4, other = !other;
      if (few || other) check_sizes<float>(Precision::f32, z, seed + 1, !few);
      if (few || !other) check_sizes<__nv_bfloat16>(Precision::bf16, z, seed + 2, !few);
      if (few) continue;
      if (!other) check_sizes<float>(Precision::tf32, z, seed + 3, true);
      if (other) check_sizes<__half>(Precision::f16, z, seed + 4, true);
    }
}

}  // namespace

// An argument: fewer and smaller calls, for ThreadSanitizer.
int main(int count, char**) {
  check_all(count > 1);
  std::puts("cells on a GPU: hold");
}
