// Draws rows by csrc/cuda/sample.cu, on the CPU, and by csrc/cpu, and compares every bit.
#include <cmath>
#include <cstring>
#include <limits>

#include "../../csrc/cuda/sample.cu"
#include "check.h"

namespace {

// Rows with every kind of parameters and of logits, and what a draw makes of them.
struct Rows {
  int64_t B, V, mode_of;
  std::vector<float> logits, scale, min_p;
  std::vector<int64_t> top_k, top_p, seed, sequence, step, token;
  std::vector<float> logprob, tempered, margin;
  std::vector<int32_t> status;
  std::vector<uint8_t> mask;
  int64_t mask_rows;

  Rows(int64_t rows, int64_t width, int64_t votes, int kind, Random& random)
      : B(rows), V(width), mode_of(votes), mask_rows(kind % 3 == 2 ? B : kind % 3) {
    const float spread[] = {0.1f, 4.0f, 30.0f, 1e4f};
    logits = random.floats(B * V, spread[random.below(4)]);
    for (int64_t row = 0; row < B; ++row) {
      float* x = logits.data() + row * V;
      if (random.below(4) == 0)  // ties, and minus zeros
        for (int64_t i = 0; i < V; ++i) x[i] = std::round(x[i]) * 0.5f;
      if (random.below(6) == 0) x[random.below(V)] = -INFINITY;
      if (random.below(12) == 0) x[random.below(V)] = random.below(2) ? NAN : INFINITY;
      if (random.below(20) == 0) std::fill(x, x + V, -INFINITY);
      const bool plain = kind < 3 || random.below(3) == 0;
      const auto chosen = [&] { return !plain && random.below(2) == 0; };
      scale.push_back(chosen() ? 0.0f : 1.4426950f / (0.2f + 2.0f * std::abs(random.within(1.0f))));
      if (random.below(25) == 0) scale.back() = random.below(2) ? -1.0f : NAN;
      top_k.push_back(chosen() ? 1 + random.below(random.below(2) ? 5 : V + 3) : 0);
      top_p.push_back(chosen() ? 1 + (static_cast<int64_t>(random.bits()) << 32 | random.bits()) % INT64_MAX : 0);
      min_p.push_back(chosen() ? std::abs(random.within(12.0f)) : INFINITY);
      seed.push_back(static_cast<int64_t>(random.bits()) << 33 | random.bits());
      sequence.push_back(static_cast<int64_t>(random.bits()) << 20 | random.bits());
      step.push_back(random.bits());
    }
    for (int64_t i = 0; i < mask_rows * V; ++i) mask.push_back(random.below(4) != 0);
  }
  fr::Sample call(bool logprobs) {
    token.assign(size(), -7), status.assign(size(), -7);
    for (auto* floats : {&logprob, &tempered, &margin}) floats->assign(size(), -7.0f);
    fr::Sample a{};
    a.B = B, a.V = V, a.logits = logits.data(), a.logits_stride = V, a.scale = scale.data();
    a.top_k = top_k.data(), a.top_p = top_p.data(), a.min_p = min_p.data();
    a.mask = mask_rows ? reinterpret_cast<const bool*>(mask.data()) : nullptr, a.mask_stride = mask_rows == B ? V : 0;
    a.seed = seed.data(), a.sequence = sequence.data(), a.step = step.data(), a.mode_of = mode_of;
    a.logprobs = logprobs, a.token = token.data(), a.logprob = logprob.data(), a.tempered_logprob = tempered.data();
    a.margin = margin.data(), a.status = status.data();
    a.pool = {1, [](int64_t n, void (*task)(int64_t, int64_t, void*), void* ctx) { task(0, n, ctx); }};
    return a;
  }
  size_t size() const { return static_cast<size_t>(B); }
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0 ||
         std::equal(a.begin(), a.end(), b.begin(), [](float x, float y) { return x == y || (x != x && y != y); });
}

void compare(Rows& rows, bool logprobs) {
  fr::sample(rows.call(logprobs));
  const Rows expected = rows;
  std::vector<unsigned char> scratch(static_cast<size_t>(fr::cuda::sample_scratch_bytes(rows.B, rows.V, rows.mode_of)),
                                     0xff);
  CHECK(fr::cuda::sample(rows.call(logprobs), scratch.data(), nullptr) == 0);
  for (size_t row = 0; row < rows.size(); ++row) {
    at() = "row " + std::to_string(row) + " of " + std::to_string(rows.B) + " x " + std::to_string(rows.V) +
           ", votes " + std::to_string(rows.mode_of);
    CHECK(rows.status[row] == expected.status[row]);
    CHECK(rows.token[row] == expected.token[row]);
  }
  CHECK(same(rows.logprob, expected.logprob));
  CHECK(same(rows.tempered, expected.tempered));
  CHECK(same(rows.margin, expected.margin));
}

}  // namespace

int main(int, char** arguments) {
  const bool few = arguments[1] != nullptr;  // for a sanitizer that is slow
  Random random(11);
  int64_t count = 0;
  for (const int64_t V : {1, 2, 31, 33, 65, 96, 255, 256, 257, 700, 4097})
    for (const int64_t votes : {1, 7, 150})
      for (int kind = 0; kind < 6; ++kind) {
        if ((few && (V > 300 || votes > 7)) || (V > 300 && votes > 7)) continue;
        Rows rows(few || V > 300 || votes > 7 ? 4 : 16, V, votes, kind, random);
        cuda_on_cpu::options.order = static_cast<cuda_on_cpu::Order>(kind % 3);
        compare(rows, kind % 2 == 0);
        count += rows.B;
      }
  if (!few) {
    Rows wide(3, 131072 + 300, 1, 4, random);  // more tiles than shared memory holds
    compare(wide, true);
  }
  std::printf("%lld draws of csrc/cuda: the same bits as csrc/cpu holds\n", static_cast<long long>(count));
}
