// The draw of csrc/sampling.h on a GPU against the same code on the host, bit for bit.
//
// Compiled by .ci/run for every architecture it names, where a spill or local memory is an error. Run on a machine with
// a GPU it prints how many draws it compared and exits 0 (all equal), 1 (some differ) or 2 (no GPU: nothing compared).
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/sampling.h"

namespace {

using namespace fr::draw;

struct Draw {
  int64_t token;
  uint64_t mass, threshold;
  float margin;
  int32_t status;
  bool operator==(const Draw& other) const {
    return token == other.token && mass == other.mass && threshold == other.threshold && status == other.status &&
           float_bits(margin) == float_bits(other.margin);
  }
};

// The token of one row of V logits at a scale > 0, without filters. `prefix` holds kTile sums of this row alone.
FR_HD Draw draw_row(const float* logits, int64_t V, float scale, uint64_t seed, uint64_t row, uint64_t* prefix) {
  bool bad = !parameters_ok(scale, 0, 0, 0.0f);
  const float largest = tile_largest(logits, V, bad);
  if (bad || !(largest > -INFINITY)) return {-1, 0, 0, 0.0f, bad ? kNan : kEmpty};
  uint64_t total = 0;
  for (int64_t first = 0; first < V; first += kTile) {
    const int64_t n = V - first < kTile ? V - first : kTile;
    const float peak = tile_largest(logits + first, n, bad);
    total += row_mass(tile_sum(logits + first, n, peak, scale), scaled_gap(peak, largest, scale));
  }
  const RandomWords words = random_words(seed, row, 0, 0);
  const uint64_t threshold = mulhi64(words.tile, total);
  uint64_t reached = 0;
  for (int64_t first = 0; first < V; first += kTile) {
    const int64_t n = V - first < kTile ? V - first : kTile;
    const float peak = tile_largest(logits + first, n, bad);
    const uint64_t sum = tile_sum(logits + first, n, peak, scale);
    const uint64_t mass = row_mass(sum, scaled_gap(peak, largest, scale));
    if (threshold < reached + mass) {
      tile_prefix(logits + first, n, peak, scale, prefix);
      const int64_t token = first + pick(prefix, n, mulhi64(words.token, sum));
      const double margin = boundary_distance(reached, reached + mass, threshold, total);
      return {token, total, threshold ^ top_p_target(order_key(peak), total), static_cast<float>(margin), kOk};
    }
    reached += mass;
  }
  return {-1, total, threshold, 0.0f, kParameter};
}

__global__ void draw_rows_kernel(const float* logits, int64_t B, int64_t V, float scale, uint64_t seed,
                                 uint64_t* prefix, Draw* draws) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (row < B) draws[row] = draw_row(logits + row * V, V, scale, seed, row, prefix + row * kTile);
}

void require(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(code));
  std::exit(1);
}

// Rows whose draws differ between the host and the device.
int64_t compare(int64_t B, int64_t V, float temperature, uint64_t seed) {
  std::vector<float> logits(B * V);
  for (int64_t i = 0; i < B * V; ++i) {
    const Words4 r = philox(seed, static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), 0, 1);
    logits[i] = (static_cast<float>(r.w[0] >> 8) * 0x1p-24f - 0.5f) * 24.0f;
  }
  for (int64_t v = 0; v < V; ++v) logits[v] = v == V / 2 ? NAN : logits[v];  // row 0 cannot be sampled
  float* device_logits;
  uint64_t* device_prefix;
  Draw* device_draws;
  require(cudaMalloc(&device_logits, logits.size() * sizeof(float)), "cudaMalloc logits");
  require(cudaMalloc(&device_prefix, B * kTile * sizeof(uint64_t)), "cudaMalloc prefix");
  require(cudaMalloc(&device_draws, B * sizeof(Draw)), "cudaMalloc draws");
  require(cudaMemcpy(device_logits, logits.data(), logits.size() * sizeof(float), cudaMemcpyHostToDevice), "copy in");
  const float scale = kLog2E / temperature;
  draw_rows_kernel<<<(B + 63) / 64, 64>>>(device_logits, B, V, scale, seed, device_prefix, device_draws);
  require(cudaGetLastError(), "draw_rows_kernel");
  std::vector<Draw> draws(B);
  require(cudaMemcpy(draws.data(), device_draws, B * sizeof(Draw), cudaMemcpyDeviceToHost), "copy out");
  cudaFree(device_logits);
  cudaFree(device_prefix);
  cudaFree(device_draws);
  int64_t wrong = 0;
  std::vector<uint64_t> prefix(kTile);
  for (int64_t row = 0; row < B; ++row)
    wrong += draw_row(&logits[row * V], V, scale, seed, row, prefix.data()) == draws[row] ? 0 : 1;
  return wrong;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device: nothing compared\n");
    return 2;
  }
  const int64_t sizes[] = {1, 2, 65, 256, 257, 4097};
  int64_t wrong = 0, rows = 0;
  for (const int64_t V : sizes)
    for (const float temperature : {0.3f, 1.0f, 1.8f}) {
      wrong += compare(1000, V, temperature, 42 + V);
      rows += 1000;
    }
  std::printf("%lld draws compared, %lld differ\n", static_cast<long long>(rows), static_cast<long long>(wrong));
  return wrong == 0 ? 0 : 1;
}
