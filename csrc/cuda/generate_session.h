// A generation on a GPU as the bindings see it: a packed network in the GPU's memory, and a loop that feeds it requests
// and reads its log. Launches are sliced, so a call returns soon; between them everything a row needs is in memory.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "../generation.h"
#include "generate_pack.h"

namespace fr::cuda {

// Memory of the GPU. Throws std::runtime_error where there is not enough, as everything here does when CUDA fails.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(int64_t bytes);
  void* get() const { return data_.get(); }
  template <class T> T* as() const { return static_cast<T*>(data_.get()); }
  int64_t bytes() const { return bytes_; }
  // At least `bytes`; what it held is lost when it grows.
  void reserve(int64_t bytes);

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> data_;
  int64_t bytes_ = 0;
};

struct PackedNetwork {
  Cell cell;
  Precision precision;
  int device;
  NetworkSizes sizes;
  GenerateDevice has;
  DeviceMemory blob;
  int64_t weight_bytes;
  NetworkShape shape() const { return {cell, sizes.L, sizes.H, sizes.V}; }
};

// Weights are on the host. Throws std::invalid_argument for what refuse_network refuses. has: what the device has, for
// tests.
std::unique_ptr<PackedNetwork> pack_network(const NetworkWeights& from, Precision precision, int device);
std::unique_ptr<PackedNetwork> pack_network(const NetworkWeights& from, Precision precision, int device,
                                            const GenerateDevice& has);

// h, c (L, H) and logits (V,), all on the host, after `ids` from h, c; c is not used by cells without one.
void read(const PackedNetwork& net, const std::vector<int32_t>& ids, float* h, float* c, float* logits, void* stream);

class Session final : public GenerationLoop {
 public:
  // stream: a cudaStream_t of net->device, on which everything happens.
  Session(std::shared_ptr<const PackedNetwork> net, int64_t rows, void* stream);

  void add(GenerationRequest request) override;
  // Looks at the clock between launches.
  void run(int64_t microseconds, int64_t steps, bool more, bool keep_events) override;
  void stop(int64_t index) override;
  std::vector<GenerationResult> take_results() override { return std::exchange(results_, {}); }
  std::vector<TokenEvent> take_events() override { return std::exchange(events_, {}); }
  int64_t queued() const override { return static_cast<int64_t>(waiting_.size()); }
  int64_t running() const override { return static_cast<int64_t>(live_.size() - waiting_.size()); }
  NetworkShape shape() const override { return net_->shape(); }
  bool windowed() const override { return false; }

 private:
  // A request that is not over.
  struct Live {
    GenerationRequest request;
    GenerationResult result;
    DeviceRequest device;
    std::shared_ptr<DeviceMemory> memory;  // what `device` points at
  };

  void upload();
  void launch(int64_t steps);
  void read_log(int64_t steps, bool keep_events);
  void finish(std::map<int32_t, Live>::iterator at, Finish how, int32_t status);

  std::shared_ptr<const PackedNetwork> net_;
  GeneratePlan plan_;
  void* stream_;
  bool broken_ = false;
  int32_t next_slot_ = 0;
  int64_t most_draws_ = 1, slice_;  // steps of a launch
  std::map<int32_t, Live> live_;
  std::deque<int32_t> waiting_, fresh_;  // slots without a row; those of them that are not in the GPU's memory
  std::vector<int32_t> stopped_;         // slots whose rows are to end
  std::vector<GenerationResult> results_;
  std::vector<TokenEvent> events_;
  DeviceMemory rows_, state_, seen_, queue_, claimed_, stop_list_, log_, margins_, drawn_, logits_;
  std::vector<LogEntry> host_log_;
  int32_t host_claimed_ = 0;
};

}  // namespace fr::cuda
