// Kernels that use each thing of csrc/cuda/portable.h, for tests/native/shim_test.cpp, which runs them on the CPU.
// FR_PLANT makes one of them wrong in a way that a run must notice: 1 a missing barrier, 2 an index past a shared
// array, 3 one past an output, 4 a barrier that one thread does not reach, 5 a copy that is not waited for, 6 a grid
// that does not meet.
#include "../../csrc/cuda/portable.h"

#ifndef FR_PLANT
#define FR_PLANT 0
#endif

namespace {

constexpr int kThreads = 96;

// out[0] += the sum of x: shuffles, a shared array, one atomic a block.
__global__ void sum_kernel(const float* x, float* out, int n) {
  FR_SHARED(float, parts, 3);
  float sum = 0.0f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 31) parts[threadIdx.x / 32 + (FR_PLANT == 2 ? 1 : 0)] = sum;
  if (FR_PLANT != 1 && !(FR_PLANT == 4 && threadIdx.x == 40)) __syncthreads();
  if (threadIdx.x == 0) atomicAdd(out, parts[0] + parts[1] + parts[2]);
}

// out[i] = x[i] of the neighbouring half warp's sum and this lane's rank in it.
__global__ void halves_kernel(const int* x, int* out) {
  const unsigned lane = threadIdx.x % 32, half = lane / 16;
  int sum = x[threadIdx.x];
  if (half == 0) {
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0x0000ffffu, sum, step, 16);
  } else {
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xffff0000u, sum, step, 16);
    sum += __popc(__ballot_sync(0xffff0000u, lane % 2));
  }
  __syncwarp();
  out[threadIdx.x + (FR_PLANT == 3 ? 1 : 0)] = sum + __shfl_up_sync(~0u, static_cast<int>(lane), 1);
}

// out[i] = i ^ 32 from the two warps at the front, which meet without the third: it waits for them at the end alone.
__global__ void front_kernel(int* out) {
  FR_SHARED(int, given, kThreads);
  const unsigned i = threadIdx.x;
  if (i < 64) {
    given[i] = static_cast<int>(i);
    fr::front_sync(64);
    out[i] = given[i ^ 32];
  }
  __syncthreads();
  if (i >= 64) out[i] = given[i - 64];
}

// x doubled `rounds` times by all blocks in turn: each reads what its neighbour has written.
__global__ void turns_kernel(float* x, float* y, int rounds) {
  const int n = gridDim.x * blockDim.x, at = blockIdx.x * blockDim.x + threadIdx.x;
  for (int r = 0; r < rounds; ++r) {
    float *from = r % 2 ? y : x, *to = r % 2 ? x : y;
    to[at] = 2.0f * from[(at + static_cast<int>(blockDim.x)) % n];
    if (FR_PLANT == 6)
      __syncthreads();
    else
      fr::grid_sync();
  }
}

// Blocks of a cluster give their rank to the next one's shared memory.
__global__ void cluster_kernel(int* out) {
  FR_SHARED(int, got, 1);
  const unsigned rank = fr::cluster_rank();
  fr::cluster_sync();  // a block's shared memory exists from its start on
  if (threadIdx.x == 0) *fr::cluster_map(got, (rank + 1) % 4) = static_cast<int>(100 * blockIdx.x + rank);
  fr::cluster_sync();
  out[blockIdx.x * blockDim.x + threadIdx.x] = got[0];
  fr::cluster_sync();
}

// c (16, 8) = a (16, 16) b (8, 16)^T in bf16, operands through asynchronous copies.
__global__ void product_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  FR_DYNAMIC_SHARED(uint16_t, tile);  // a, then b
  const unsigned lane = threadIdx.x;
  fr::copy_async<16>(tile + lane * 8, a + lane * 8);
  if (lane < 16) fr::copy_async<16>(tile + 256 + lane * 8, b + lane * 8);
  fr::copy_async_commit();
  if (FR_PLANT != 5) fr::copy_async_wait<0>();
  __syncwarp();
  uint32_t left[4], right[4];
  fr::load_matrix_x4(left, tile + (lane % 16) * 16 + lane / 16 * 8);
  fr::load_matrix_x4(right, tile + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
  float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const uint32_t columns[2] = {right[0], right[1]};
  fr::mma_bf16(d, left, columns);
  for (unsigned e = 0; e < 4; ++e) c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = d[e];
}

// Block 1 waits for what block 0 writes.
__global__ void flag_kernel(unsigned* flag, float* data, float* out) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = static_cast<float>(threadIdx.x);
    __syncthreads();
    if (threadIdx.x == 0) fr::store_release(flag, 1u);
  } else {
    while (fr::load_acquire(flag) == 0) {
    }
    out[threadIdx.x] = data[threadIdx.x];
  }
}

}  // namespace

cudaError_t sums(const float* x, float* out, int n) {
  return FR_LAUNCH(sum_kernel, 5, kThreads, 0, nullptr, x, out, n);
}
cudaError_t halves(const int* x, int* out) { return FR_LAUNCH(halves_kernel, 1, 64, 0, nullptr, x, out); }
cudaError_t fronts(int* out) { return FR_LAUNCH(front_kernel, 1, kThreads, 0, nullptr, out); }
cudaError_t turns(float* x, float* y) { return FR_LAUNCH_COOP(turns_kernel, 4, 32, 0, nullptr, x, y, 4); }
cudaError_t cluster(int* out) { return FR_LAUNCH_CLUSTER(cluster_kernel, 4, 8, 32, 0, nullptr, out); }
cudaError_t product(const uint16_t* a, const uint16_t* b, float* c) {
  return FR_LAUNCH(product_kernel, 1, 32, 768, nullptr, a, b, c);
}
cudaError_t flags(unsigned* flag, float* data, float* out) {
  return FR_LAUNCH_COOP(flag_kernel, 2, 32, 0, nullptr, flag, data, out);
}
