// What the cells share beside their sequence: the device they run on, a plan by order, and the rows that the gradients
// of the weights are taken against.
#include <atomic>

#include "cell_launch.cuh"

namespace fr::cuda {

namespace {

std::atomic<int64_t> wanted_row_tiles{0}, wanted_cluster{-1};

// Rows of `steps`, or where `previous`, of the steps before them; a CTA goes through row after row.
// Owns:   out.
// Keeps:  nothing.
// Moves:  out and what it is made of, once.
// Syncs:  nothing.
// Limits: none.
template <class Word> __global__ void __launch_bounds__(128) rows_kernel(Rows a, int64_t words, bool previous) {
  const Steps steps{a.T, a.B, words, a.lengths, a.reset, a.reverse};
  for (int64_t row = blockIdx.x; row < a.T * a.B; row += gridDim.x) {
    const int64_t t = row / a.B, b = row % a.B;
    const Place p = steps.place(steps.time(t), b, 0, steps.length(b));
    const Word* from = nullptr;  // zeros
    if (!previous)
      from = p.there ? static_cast<const Word*>(a.steps) + row * words : nullptr;
    else if (p.there && !p.fresh)
      from = p.before < 0 ? static_cast<const Word*>(a.initial) + b * words
                          : static_cast<const Word*>(a.steps) + p.before * words;
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x)
      static_cast<Word*>(a.out)[row * words + i] = from ? from[i] : Word{};
  }
}

const char* run(const Rows& call, bool previous) {
  const int64_t rows = call.T * call.B;
  if (rows * call.width == 0) return nullptr;
  const dim3 grid = grid_of(std::min<int64_t>(rows, 1 << 16)), block = grid_of(128);
  const auto stream = static_cast<cudaStream_t>(call.stream);
  if (call.element_bytes == 2)
    return told(FR_LAUNCH(rows_kernel<uint16_t>, grid, block, 0, stream, call, call.width, previous));
  return told(FR_LAUNCH(rows_kernel<uint32_t>, grid, block, 0, stream, call, call.width, previous));
}

}  // namespace

const char* previous_rows(const Rows& call) { return run(call, true); }
const char* rows_within_lengths(const Rows& call) { return run(call, false); }

void want_plan(int64_t row_tiles, int64_t cluster) { wanted_row_tiles = row_tiles, wanted_cluster = cluster; }

#ifdef FR_CUDA_ON_CPU

Device current_device() { return {cuda_on_cpu::kSharedBytes, 132, 16, wanted_row_tiles, wanted_cluster}; }
const char* told(cudaError_t error) { return error == cudaSuccess ? nullptr : "the emulated launch failed"; }

#else

Device current_device() {
  int id = 0, shared = 0, processors = 0, major = 0;
  cudaGetDevice(&id);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, id);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  // Clusters came with 9.0; the consumer GPUs of 12 take 8 CTAs at most. More than 8 is asked for launch by launch.
  return {shared, processors, major < 9 ? 1 : major < 12 ? 16 : 8, wanted_row_tiles, wanted_cluster};
}
const char* told(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

#endif

}  // namespace fr::cuda
