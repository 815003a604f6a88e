// What the cells share beside their sequence: the device they run on, a plan by order, and the rows that the gradients
// of the weights are taken against.
#include <atomic>

#include "cell_launch.cuh"

namespace fr::cuda {

namespace {

std::atomic<int64_t> wanted_row_tiles{0}, wanted_cluster{-1};

// One thread copies a word: from `steps`, or where `previous`, from the step before.
// Owns:   out.
// Keeps:  nothing.
// Moves:  out and what it is made of, once.
// Syncs:  nothing.
// Limits: none.
template <class Word> __global__ void __launch_bounds__(256) rows_kernel(Rows a, int64_t words, bool previous) {
  const Steps steps{a.T, a.B, words, a.lengths, a.reset, a.reverse};
  const int64_t total = a.T * a.B * words;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / words, t = row / a.B;
    const Place p = steps.place(steps.time(t), row % a.B, i % words, steps.length(row % a.B));
    Word word{};
    if (p.there && !(previous && p.fresh)) {
      if (!previous)
        word = get<Word>(a.steps, i);
      else
        word = p.before < 0 ? get<Word>(a.initial, p.state) : get<Word>(a.steps, p.before * words + p.unit);
    }
    static_cast<Word*>(a.out)[i] = word;
  }
}

const char* run(const Rows& call, bool previous) {
  const int64_t total = call.T * call.B * call.width;
  if (total == 0) return nullptr;
  const dim3 grid = grid_of(std::min<int64_t>((total + 255) / 256, 1 << 16)), block = grid_of(256);
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
