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
#include "generate_log.h"
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
  ~Session() override;

  void add(GenerationRequest request) override;
  // Reads the log while a launch goes on, and may return in the middle of one, which the next call goes on with; stop()
  // and add() count from the launch after it.
  void run(int64_t microseconds, int64_t steps, bool more, bool keep_events) override;
  void stop(int64_t index) override;
  std::vector<GenerationResult> take_results() override { return std::exchange(results_, {}); }
  std::vector<TokenEvent> take_events() override { return std::exchange(events_, {}); }
  int64_t queued() const override { return waiting_count_; }
  int64_t running() const override { return static_cast<int64_t>(live_.size()) - waiting_count_; }
  NetworkShape shape() const override { return net_->shape(); }
  bool windowed() const override { return false; }

 private:
  using Clock = std::chrono::steady_clock;
  // A request that is not over.
  struct Live {
    GenerationRequest request;
    GenerationResult result;
    DeviceRequest device;
    bool waits = true;                     // for a row
    std::shared_ptr<DeviceMemory> memory;  // what `device` points at
  };

  void upload();
  void launch(int64_t steps);
  bool follow(Clock::time_point deadline, bool keep_events);
  void read_log(int64_t steps, bool keep_events);
  void finish(std::map<int32_t, Live>::iterator at, Finish how, int32_t status);

  std::shared_ptr<const PackedNetwork> net_;
  GeneratePlan plan_;
  void* stream_;
  bool broken_ = false;
  int32_t next_slot_ = 0;
  int64_t most_draws_ = 1, most_steps_, slice_;  // of a launch: at most, and as it suits
  int64_t launched_ = 0, read_ = 0;              // steps of the launch that is under way, 0: none, and of its log
  Clock::time_point begun_;
  std::map<int32_t, Live> live_;
  int64_t waiting_count_ = 0;
  std::deque<int32_t> waiting_, fresh_;  // slots that had no row before the launch; those that the GPU does not know
  std::vector<int32_t> stopped_;         // slots whose rows are to end
  std::vector<GenerationResult> results_;
  std::vector<TokenEvent> events_;
  std::vector<std::shared_ptr<DeviceMemory>> retired_;  // of requests that the launch may still read
  LaunchLog log_;
  DeviceMemory rows_, state_, seen_, queue_, claimed_, stop_list_, margins_, drawn_, scratch_;
  StepGraph graph_;
};

}  // namespace fr::cuda
