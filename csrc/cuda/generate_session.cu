// Host code, no kernel: the queue, the log and the memory of the loop on a GPU (generate_session.h).
#include "generate_session.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "portable.h"

namespace fr::cuda {
namespace {

constexpr int64_t kLogTokens = 1 << 18;                 // of a launch
constexpr int64_t kFirstSlice = 16, kMostSlice = 1024;  // steps
constexpr int64_t kReadSlice = 4096;                    // ids of a prompt that one launch reads
constexpr auto kSliceTime = std::chrono::milliseconds(10);

void require(cudaError_t code, const char* what) {
  if (code != cudaSuccess)
    throw std::runtime_error(std::string("generator: ") + what + ": " + cudaGetErrorString(code));
}

void to_device(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  if (bytes) require(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream), "copy");
}
void to_host(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  if (bytes) require(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream), "copy");
}
void clear(const DeviceMemory& memory, cudaStream_t stream) {
  require(cudaMemsetAsync(memory.get(), 0, static_cast<size_t>(memory.bytes()), stream), "clear");
}

CellKind kind_of(Cell cell) {
  return cell == Cell::lstm ? CellKind::lstm : cell == Cell::gru ? CellKind::gru : CellKind::rnn;
}

// The arrays that requests point at, side by side.
class Arrays {
 public:
  template <class T> int64_t put(const std::vector<T>& values) {
    const int64_t at = to_16(static_cast<int64_t>(bytes_.size()));
    bytes_.resize(static_cast<size_t>(at) + values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(bytes_.data() + at, values.data(), values.size() * sizeof(T));
    return at;
  }
  std::shared_ptr<DeviceMemory> upload(cudaStream_t stream) const {
    auto memory = std::make_shared<DeviceMemory>(static_cast<int64_t>(bytes_.size()));
    to_device(memory->get(), bytes_.data(), static_cast<int64_t>(bytes_.size()), stream);
    require(cudaStreamSynchronize(stream), "upload");  // the host's copy goes away
    return memory;
  }

 private:
  std::vector<char> bytes_;
};

DeviceRequest numbers_of(const GenerationRequest& q, int32_t slot) {
  DeviceRequest d{};
  d.slot = slot, d.logprobs = q.logprobs, d.max_new_tokens = q.max_new_tokens;
  d.prompt_count = static_cast<int32_t>(q.prompt.size()), d.eos_count = static_cast<int32_t>(q.eos.size());
  d.scale = q.scale, d.min_p = q.min_p, d.penalty = q.penalty, d.inverse_penalty = q.inverse_penalty;
  d.top_k = q.top_k, d.top_p = q.top_p, d.seed = q.seed, d.sequence = q.sequence, d.mode_of = q.mode_of;
  return d;
}

template <class T> void upload(void* to, const std::vector<T>& from) {
  require(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
}

// The table of a blob whose other floats are there.
void fill_table(const NetworkWeights& from, const NetworkSizes& n, float* floats) {
  const std::vector<float> first = pack_first(from, n);
  const DeviceMemory weights(static_cast<int64_t>(first.size()) * 4), inputs(from.inputs ? n.V * from.E * 4 : 0);
  upload(weights.get(), first);
  if (from.inputs) upload(inputs.get(), std::vector<float>(from.inputs, from.inputs + n.V * from.E));
  const TableCall call{n.V,
                       from.E,
                       n.gates * units_of(n),
                       from.inputs ? inputs.as<float>() : nullptr,
                       weights.as<float>(),
                       floats + bias_in(n, 0),
                       floats + table_in(n)};
  require(static_cast<cudaError_t>(make_table(call, nullptr)), "table");
  require(cudaStreamSynchronize(nullptr), "table");
}

template <class T> const T* moved(const DeviceMemory& memory, int64_t at) {
  return reinterpret_cast<const T*>(memory.as<char>() + at);
}

}  // namespace

DeviceMemory::DeviceMemory(int64_t bytes) : bytes_(to_16(std::max<int64_t>(bytes, 1))) {
  void* p = nullptr;
  require(cudaMalloc(&p, static_cast<size_t>(bytes_)), "memory");
  data_.reset(p);
}
void DeviceMemory::Free::operator()(void* p) const { cudaFree(p); }
void DeviceMemory::reserve(int64_t bytes) {
  if (bytes > bytes_) *this = DeviceMemory(bytes);
}

std::unique_ptr<PackedNetwork> pack_network(const NetworkWeights& from, Precision precision, int device) {
  return pack_network(from, precision, device, generate_device(device));
}

std::unique_ptr<PackedNetwork> pack_network(const NetworkWeights& from, Precision precision, int device,
                                            const GenerateDevice& has) {
  auto net = std::make_unique<PackedNetwork>();
  net->cell = from.cell, net->precision = precision, net->device = device, net->has = has;
  net->sizes = sizes_of(from.cell, from.L, from.H, from.V, precision);
  const std::string refusal = refuse_network(net->sizes, has);
  if (!refusal.empty()) throw std::invalid_argument(refusal);
  const std::vector<uint32_t> blob = pack_blob(from, precision, plan_generate(net->sizes, 1, has).cluster);
  const auto table = static_cast<int64_t>(blob.size()), floats = table - table_in(net->sizes);
  net->weight_bytes = 4 * table;
  net->blob = DeviceMemory(4 * (floats + float_words(net->sizes)));
  upload(net->blob.get(), blob);
  fill_table(from, net->sizes, net->blob.as<float>() + floats);
  return net;
}

Session::Session(std::shared_ptr<const PackedNetwork> net, int64_t rows, void* stream)
    : net_(std::move(net)),
      plan_(plan_generate(net_->sizes, rows, net_->has)),
      stream_(stream),
      most_steps_(std::clamp<int64_t>(kLogTokens / plan_.rows, 1, kMostSlice)),
      slice_(std::min(kFirstSlice, most_steps_)),
      log_(plan_.rows, plan_.blocks, most_steps_),
      rows_(plan_.rows * static_cast<int64_t>(sizeof(DeviceRow))),
      state_(plan_.rows * net_->sizes.L * 2 * net_->sizes.H * 4),
      seen_(plan_.rows * net_->sizes.V),
      claimed_(4),
      scratch_(scratch_bytes(net_->sizes, plan_)) {
  clear(rows_, static_cast<cudaStream_t>(stream_));
  clear(state_, static_cast<cudaStream_t>(stream_));
  clear(scratch_, static_cast<cudaStream_t>(stream_));
}

Session::~Session() {
  if (launched_ > 0) cudaStreamSynchronize(static_cast<cudaStream_t>(stream_));  // it writes to memory that goes away
}

void Session::add(GenerationRequest request) {
  const int32_t slot = next_slot_;
  next_slot_ = next_slot_ == INT32_MAX ? 0 : next_slot_ + 1;
  Live live{};
  live.device = numbers_of(request, slot), live.result.index = request.index;
  most_draws_ = std::max(most_draws_, request.mode_of);
  live.request = std::move(request);
  live_.emplace(slot, std::move(live));
  waiting_.push_back(slot), fresh_.push_back(slot), ++waiting_count_;
}

// Puts what the fresh requests point at into the GPU's memory; neighbours that share a start state share it there.
void Session::upload() {
  if (fresh_.empty()) return;
  struct Places {
    int64_t prompt, eos, h, c, logits, seen;
  };
  Arrays arrays;
  std::vector<Places> places;
  const StartState* known = nullptr;
  for (const int32_t slot : fresh_) {
    const GenerationRequest& q = live_.at(slot).request;
    Places at = places.empty() ? Places{} : places.back();
    at.prompt = arrays.put(q.prompt), at.eos = arrays.put(q.eos);
    if (q.start && q.start.get() != known)
      at.h = arrays.put(q.start->h), at.c = arrays.put(q.start->c), at.logits = arrays.put(q.start->logits),
      at.seen = arrays.put(q.start->seen);
    if (q.start) known = q.start.get();
    places.push_back(at);
  }
  const auto memory = arrays.upload(static_cast<cudaStream_t>(stream_));
  for (size_t i = 0; i < fresh_.size(); ++i) {
    Live& live = live_.at(fresh_[i]);
    const Places& at = places[i];
    DeviceRequest& d = live.device;
    live.memory = memory;
    d.prompt = moved<int32_t>(*memory, at.prompt), d.eos = moved<int32_t>(*memory, at.eos);
    if (!live.request.start) continue;
    d.start_h = moved<float>(*memory, at.h), d.start_logits = moved<float>(*memory, at.logits);
    if (net_->cell == Cell::lstm) d.start_c = moved<float>(*memory, at.c);
    if (!live.request.start->seen.empty()) d.start_seen = moved<uint8_t>(*memory, at.seen);
  }
  fresh_.clear();
}

void Session::launch(int64_t steps) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  std::vector<DeviceRequest> queue;
  for (const int32_t slot : waiting_) queue.push_back(live_.at(slot).device);
  bool logprobs = false;
  for (const auto& [slot, live] : live_) logprobs = logprobs || live.request.logprobs;
  queue_.reserve(static_cast<int64_t>(queue.size() * sizeof(DeviceRequest)));
  stop_list_.reserve(static_cast<int64_t>(stopped_.size() * 4));
  if (most_draws_ > kVotesInShared) margins_.reserve(plan_.rows * most_draws_ * 8);
  if (most_draws_ > kVotesInShared) drawn_.reserve(plan_.rows * most_draws_ * 4);
  to_device(queue_.get(), queue.data(), static_cast<int64_t>(queue.size() * sizeof(DeviceRequest)), stream);
  to_device(stop_list_.get(), stopped_.data(), static_cast<int64_t>(stopped_.size() * 4), stream);
  clear(claimed_, stream);
  require(cudaStreamSynchronize(stream), "upload");  // the host's copies go away
  GenerateCall call{};
  call.net = net_->sizes, call.plan = plan_, call.cell = kind_of(net_->cell), call.relu = net_->cell == Cell::rnn_relu,
  call.steps = steps;
  call.blob = net_->blob.as<uint32_t>(), call.queue = queue_.as<DeviceRequest>();
  call.queued = static_cast<int32_t>(queue.size()), call.claimed = claimed_.as<int32_t>();
  call.stopped = stop_list_.as<int32_t>(), call.stopped_count = static_cast<int32_t>(stopped_.size());
  call.rows = rows_.as<DeviceRow>(), call.state = state_.as<float>(), call.seen = seen_.as<uint8_t>();
  call.log = log_.begin(logprobs), call.most_draws = most_draws_;
  call.margins = margins_.as<double>(), call.drawn = drawn_.as<int32_t>();
  call.scratch = scratch_.get();
  require(static_cast<cudaError_t>(generate(call, graph_, stream_)), "launch");
  stopped_.clear();
  launched_ = steps, read_ = 0, begun_ = Clock::now();
}

void Session::finish(std::map<int32_t, Live>::iterator at, Finish how, int32_t status) {
  at->second.result.finish = how, at->second.result.status = status;
  results_.push_back(std::move(at->second.result));
  retired_.push_back(std::move(at->second.memory));
  live_.erase(at);
}

void Session::read_log(int64_t steps, bool keep_events) {
  std::vector<std::pair<int64_t, TokenEvent>> events;
  std::vector<std::pair<int32_t, Note>> ends;
  log_.read(
      steps,
      [&](const Piece& p) {
        const auto at = live_.find(p.slot);
        if (at == live_.end()) return;  // it has been stopped
        GenerationResult& result = at->second.result;
        result.tokens.insert(result.tokens.end(), p.tokens, p.tokens + p.count);
        if (at->second.request.logprobs)
          result.logprobs.insert(result.logprobs.end(), p.logprobs, p.logprobs + p.count);
        for (int64_t i = 0; keep_events && i < p.count; ++i)
          events.push_back({p.step + i, {result.index, p.tokens[i]}});
      },
      [&](int32_t slot, const Note& note) {
        if (note.end != 0) ends.push_back({slot, note});
        if (note.slot >= 0) live_.at(note.slot).waits = false, --waiting_count_;
      });
  const auto first = [](const auto& a, const auto& b) { return a.first < b.first; };
  std::stable_sort(events.begin(), events.end(), first);
  for (const auto& [step, event] : events) events_.push_back(event);
  std::stable_sort(ends.begin(), ends.end(),
                   [](const auto& a, const auto& b) { return a.second.step < b.second.step; });
  for (const auto& [slot, note] : ends)
    if (const auto at = live_.find(slot); at != live_.end())
      finish(at, static_cast<Finish>(note.end % 16 - 1), note.end / 16);
  read_ = steps;
}

// Reads what is published until the launch is over or the time has come; whether it is over.
bool Session::follow(Clock::time_point deadline, bool keep_events) {
  for (;; std::this_thread::yield()) {
    // The stream first: when it is done, all that the launch has written is there to be read.
    const cudaError_t state = cudaStreamQuery(static_cast<cudaStream_t>(stream_));
    if (state != cudaErrorNotReady) require(state, "generation");
    const int64_t there = log_.published();
    if (there > read_) read_log(there, keep_events);
    if (state == cudaSuccess) break;
    if (Clock::now() >= deadline) return false;
  }
  if (read_ < launched_) throw std::runtime_error("generator: a launch ended before its last step");
  launched_ = 0;
  retired_.clear();
  std::erase_if(waiting_, [&](int32_t slot) {
    const auto at = live_.find(slot);
    return at == live_.end() || !at->second.waits;
  });
  return true;
}

void Session::run(int64_t microseconds, int64_t steps, bool more, bool keep_events) {
  if (broken_) throw std::runtime_error("this generation has failed before and cannot go on");
  broken_ = true;  // until the end: an exception leaves rows half done
  const auto deadline = Clock::now() + std::chrono::microseconds(microseconds);
  for (int64_t done = 0; !live_.empty() && (steps == 0 || done < steps);) {
    if (launched_ == 0) {
      upload();
      launch(std::min(most_steps_, steps ? steps - done : slice_));
    }
    const int64_t now = launched_;
    if (!follow(deadline, keep_events)) break;
    done += now;
    const auto took = Clock::now() - begun_;
    if (!steps && took < kSliceTime / 2) slice_ = std::min(2 * slice_, most_steps_);
    if (!steps && took > 2 * kSliceTime) slice_ = std::max<int64_t>(slice_ / 2, 1);
    if (Clock::now() >= deadline) break;
    if (more && waiting_count_ == 0 && running() < plan_.rows - plan_.rows / 8) break;
  }
  broken_ = false;
}

void Session::stop(int64_t index) {
  for (auto at = live_.begin(); at != live_.end(); ++at) {
    if (at->second.result.index != index || at->second.waits) continue;
    stopped_.push_back(at->first);
    return finish(at, Finish::stop, 0);
  }
}

void read(const PackedNetwork& net, const std::vector<int32_t>& ids, float* h, float* c, float* logits, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const NetworkSizes& n = net.sizes;
  const int64_t size = n.L * n.H, count = static_cast<int64_t>(ids.size());
  const bool has_c = net.cell == Cell::lstm;
  Arrays arrays;
  const int64_t at_ids = arrays.put(ids), at_h = arrays.put(std::vector<float>(h, h + size));
  const int64_t at_c = arrays.put(has_c ? std::vector<float>(c, c + size) : std::vector<float>());
  const auto memory = arrays.upload(on);
  DeviceRequest q{};
  q.prompt = moved<int32_t>(*memory, at_ids), q.prompt_count = static_cast<int32_t>(count), q.penalty = 1.0f;
  q.start_h = moved<float>(*memory, at_h), q.start_c = has_c ? moved<float>(*memory, at_c) : nullptr;
  DeviceMemory out(n.V * 4), queue(sizeof q), claimed(4), rows(sizeof(DeviceRow)), state(2 * size * 4), seen(n.V);
  const GeneratePlan plan = plan_generate(n, 1, net.has);
  DeviceMemory scratch(scratch_bytes(n, plan));
  StepGraph graph;
  LaunchLog log(1, plan.blocks, kReadSlice);
  q.read_logits = out.as<float>();
  to_device(queue.get(), &q, sizeof q, on);
  for (const DeviceMemory* each : {&claimed, &rows, &state, &scratch}) clear(*each, on);
  GenerateCall call{};
  call.net = n, call.plan = plan, call.scratch = scratch.get();
  call.cell = kind_of(net.cell), call.relu = net.cell == Cell::rnn_relu, call.blob = net.blob.as<uint32_t>();
  call.queue = queue.as<DeviceRequest>(), call.queued = 1, call.claimed = claimed.as<int32_t>();
  call.rows = rows.as<DeviceRow>(), call.state = state.as<float>(), call.seen = seen.as<uint8_t>();
  call.most_draws = 1;
  for (int64_t done = 0; done < count; done += kReadSlice) {
    call.steps = std::min(kReadSlice, count - done), call.log = log.begin(false);
    require(static_cast<cudaError_t>(generate(call, graph, stream)), "launch");
    require(cudaStreamSynchronize(on), "reading");
  }
  std::vector<float> both(static_cast<size_t>(2 * size));
  to_host(both.data(), state.get(), 2 * size * 4, on);
  to_host(logits, out.get(), n.V * 4, on);
  require(cudaStreamSynchronize(on), "reading");
  for (int64_t l = 0; l < n.L; ++l) {
    const float* layer = both.data() + l * 2 * n.H;
    std::copy_n(net.cell == Cell::gru ? layer + n.H : layer, n.H, h + l * n.H);
    if (has_c) std::copy_n(layer + n.H, n.H, c + l * n.H);
  }
}

}  // namespace fr::cuda
