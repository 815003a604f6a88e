// Host code, no kernel: the log of a launch (generate_log.h).
#include "generate_log.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "portable.h"

namespace fr::cuda {

LaunchLog::LaunchLog(int64_t rows, int64_t blocks, int64_t stride)
    : blocks_(blocks), stride_(stride), rows_(static_cast<size_t>(rows)) {
  const int64_t notes = rows * (stride + 1), tokens = rows * stride;
  const auto bytes =
      static_cast<size_t>(notes) * sizeof(Note) + static_cast<size_t>(tokens) * 8 + static_cast<size_t>(blocks) * 4;
  void* p = nullptr;
  const cudaError_t code = cudaHostAlloc(&p, bytes, cudaHostAllocMapped);
  if (code != cudaSuccess)
    throw std::runtime_error("generator: " + std::to_string(bytes) +
                             " bytes of pinned memory: " + cudaGetErrorString(code));
  memory_.reset(p);
  notes_ = static_cast<Note*>(p);
  tokens_ = reinterpret_cast<int32_t*>(notes_ + notes);
  logprobs_ = reinterpret_cast<float*>(tokens_ + tokens);
  published_ = reinterpret_cast<int32_t*>(logprobs_ + tokens);
  std::fill_n(notes_, notes, Note{kNoStep, 0, -1});
}
void LaunchLog::Free::operator()(void* p) const { cudaFreeHost(p); }

Log LaunchLog::begin(bool logprobs) {
  for (Reader& r : rows_) r.steps = r.notes = 0;
  std::fill_n(published_, blocks_, 0);
  return {stride_, tokens_, logprobs ? logprobs_ : nullptr, notes_, published_};
}

int64_t LaunchLog::published() const {
  int32_t least = INT32_MAX;
  for (int64_t i = 0; i < blocks_; ++i) least = std::min(least, __atomic_load_n(published_ + i, __ATOMIC_ACQUIRE));
  return least;
}

}  // namespace fr::cuda
