// Threads that reduce and scan together.
#pragma once

#include "portable.h"

namespace fr::cuda {

constexpr unsigned kAllLanes = ~0u;

// A warp, or a block of several.
template <int Warps> struct Team {
  static constexpr int kThreads = 32 * Warps;
  uint64_t* slots;  // shared (Warps,); not used by a single warp

  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  __device__ static int warp() { return Warps == 1 ? 0 : static_cast<int>(threadIdx.x / 32); }
  __device__ static int rank() { return warp() * 32 + lane(); }
  __device__ static void sync() {
    if constexpr (Warps == 1)
      __syncwarp();
    else
      __syncthreads();
  }

  __device__ uint64_t sum(uint64_t v) const {
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
    if constexpr (Warps > 1) {
      if (lane() == 0) slots[warp()] = v;
      __syncthreads();
      v = 0;
      for (int w = 0; w < Warps; ++w) v += slots[w];
      __syncthreads();
    }
    return v;
  }
  __device__ uint32_t most(uint32_t v) const {
    v = warp_max(v);
    if constexpr (Warps > 1) {
      if (lane() == 0) slots[warp()] = v;
      __syncthreads();
      for (int w = 0; w < Warps; ++w) v = slots[w] > v ? static_cast<uint32_t>(slots[w]) : v;
      __syncthreads();
    }
    return v;
  }
  // The sum of the values of this thread and of those before it; the sum of all in `total`.
  __device__ uint64_t through(uint64_t v, uint64_t& total) const {
    for (unsigned step = 1; step < 32; step *= 2) {
      const uint64_t below = __shfl_up_sync(kAllLanes, v, step);
      v += static_cast<unsigned>(lane()) >= step ? below : 0;
    }
    total = __shfl_sync(kAllLanes, v, 31);
    if constexpr (Warps > 1) {
      if (lane() == 31) slots[warp()] = v;
      __syncthreads();
      total = 0;
      for (int w = 0; w < Warps; ++w) {
        v += w < warp() ? slots[w] : 0;
        total += slots[w];
      }
      __syncthreads();
    }
    return v;
  }
};

}  // namespace fr::cuda
