// Runs tests/device/portable_kernels.cu on the CPU and checks what it computes against plain loops.
#include <cmath>

#include "../device/portable_kernels.cu"
#include "check.h"

namespace {

float from_bf16(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

void check_sums() {
  std::vector<float> x(1000), out(1);
  float expected = 0.0f;
  for (size_t i = 0; i < x.size(); ++i) expected += x[i] = static_cast<float>(i % 64);
  CHECK(sums(x.data(), out.data(), 1000) == cudaSuccess);
  CHECK(out[0] == expected);
  std::vector<int> ints(64), counts(64);
  for (int i = 0; i < 64; ++i) ints[static_cast<size_t>(i)] = i * i;
  CHECK(halves(ints.data(), counts.data()) == cudaSuccess);
  for (int i = 0; i < 64; ++i) {
    int sum = i / 16 % 2 ? 8 : 0;
    for (int k = i / 16 * 16; k < i / 16 * 16 + 16; ++k) sum += k * k;
    CHECK(counts[static_cast<size_t>(i)] == sum + (i % 32 ? i % 32 - 1 : 0));
  }
}

void check_blocks_together() {
  std::vector<float> x(128), y(128, NAN);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  CHECK(turns(x.data(), y.data()) == cudaSuccess);
  for (size_t i = 0; i < x.size(); ++i) CHECK(x[i] == 16.0f * static_cast<float>(i));
  std::vector<int> ranks(8 * 32);
  CHECK(cluster(ranks.data()) == cudaSuccess);
  for (int b = 0; b < 8; ++b) {
    const int before = b / 4 * 4 + (b + 3) % 4;
    for (int t = 0; t < 32; ++t) CHECK(ranks[static_cast<size_t>(b * 32 + t)] == 100 * before + before % 4);
  }
  std::vector<int> fronts_of(96);
  CHECK(fronts(fronts_of.data()) == cudaSuccess);
  for (int i = 0; i < 96; ++i) CHECK(fronts_of[static_cast<size_t>(i)] == (i < 64 ? i ^ 32 : i - 64));
  unsigned flag = 0;
  std::vector<float> data(32, NAN), out(32, NAN);
  CHECK(flags(&flag, data.data(), out.data()) == cudaSuccess);
  for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == static_cast<float>(i));
}

void check_product() {
  Random random(7);
  std::vector<uint16_t> a(256), b(128);
  for (auto* all : {&a, &b})
    for (uint16_t& v : *all) v = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, random.within(2.0f)) >> 16);
  std::vector<float> c(128, NAN);
  CHECK(product(a.data(), b.data(), c.data()) == cudaSuccess);
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 8; ++j) {
      float sum = 0.0f;
      for (size_t k = 0; k < 16; ++k) sum += from_bf16(a[i * 16 + k]) * from_bf16(b[j * 16 + k]);
      CHECK(c[i * 8 + j] == sum);
    }
}

}  // namespace

int main() {
  for (const auto order : {cuda_on_cpu::Order::backward, cuda_on_cpu::Order::forward, cuda_on_cpu::Order::shuffled}) {
    cuda_on_cpu::options.order = order;
    check_sums();
    check_blocks_together();
    check_product();
  }
  std::printf("CUDA on the CPU holds\n");
}
