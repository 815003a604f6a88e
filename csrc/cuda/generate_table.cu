// The first layer's products with what each id reads, which every loop looks up (generate_plan.h says where).
#include "generate_pack.h"
#include "portable.h"
#include "../sampling.h"

namespace fr::cuda {
namespace {

constexpr int kTableThreads = 128, kTableIds = 8;

// Owns:   a gate of a unit for each thread, of kTableIds ids.
// Keeps:  their sums.
// Moves:  the weights once for so many ids, what these read from the nearest cache.
// Syncs:  nothing.
// Limits: none.
__global__ void __launch_bounds__(kTableThreads) table_kernel(TableCall t) {
  const int64_t blocks = (t.columns + kTableThreads - 1) / kTableThreads;
  const int64_t column = blockIdx.x % blocks * kTableThreads + threadIdx.x, first = blockIdx.x / blocks * kTableIds;
  if (column >= t.columns) return;
  const auto id = [&](int i) { return first + i < t.V ? first + i : t.V - 1; };
  float sum[kTableIds];
#pragma unroll
  for (int i = 0; i < kTableIds; ++i) {
    sum[i] = t.bias[column];
    if (t.inputs == nullptr) sum[i] += t.weights[id(i) * t.columns + column];
  }
  for (int64_t e = 0; e < t.E && t.inputs != nullptr; ++e) {
    const float weight = t.weights[e * t.columns + column];
#pragma unroll
    for (int i = 0; i < kTableIds; ++i) sum[i] = draw::fma_rn(t.inputs[id(i) * t.E + e], weight, sum[i]);
  }
#pragma unroll
  for (int i = 0; i < kTableIds; ++i)
    if (first + i < t.V) t.table[(first + i) * t.columns + column] = sum[i];
}

}  // namespace

int make_table(const TableCall& t, void* stream) {
  const int64_t blocks = (t.columns + kTableThreads - 1) / kTableThreads * ((t.V + kTableIds - 1) / kTableIds);
  return FR_LAUNCH(table_kernel, static_cast<unsigned>(blocks), kTableThreads, 0, static_cast<cudaStream_t>(stream), t);
}

}  // namespace fr::cuda
