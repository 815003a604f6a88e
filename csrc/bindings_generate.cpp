// Registers the generation loops as torch.ops.fastrnn_cpu.generator_* and, where CUDA is built in, fastrnn_cuda: packed
// networks and sessions live here behind numbers, which fastrnn/native.py owns and frees. All tensors are on the CPU.
#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "registry.h"
#include "cpu/row_states.h"
#include "cpu/session.h"
#ifdef FASTRNN_WITH_CUDA
#include "cuda/generate_session.h"
#endif

namespace {

using fr::MaybeTensor;
using fr::Registry;
using fr::ScalarType;
using fr::Tensor;

constexpr int64_t kMostRows = 1 << 24, kMostThreads = 1 << 12;
constexpr int64_t kMostMicroseconds = int64_t{1} << 50;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("generator: " + what); }

// A session and the lock that keeps two threads from running it at once.
struct Running {
  explicit Running(std::unique_ptr<fr::GenerationLoop> s, int on = -1) : session(std::move(s)), device(on) {}
  std::mutex guard;
  std::unique_ptr<fr::GenerationLoop> session;
  int device;  // the GPU, or -1
};

Registry<fr::PackedNetwork>& networks() {
  static Registry<fr::PackedNetwork> all;
  return all;
}
Registry<Running>& sessions() {
  static Registry<Running> all;
  return all;
}

// The data of a dense CPU tensor of the given type and number of elements (-1: any).
template <class D> const D* dense(const char* name, const Tensor& t, int64_t elements = -1) {
  constexpr ScalarType dtype = std::is_same_v<D, float>     ? ScalarType::Float
                               : std::is_same_v<D, int64_t> ? ScalarType::Long
                                                            : ScalarType::Bool;
  if (t.scalar_type() != dtype || !t.is_cpu() || !t.is_contiguous())
    fail(std::string(name) + " must be a contiguous " + fr::dtype_name(dtype) + " tensor on the CPU, got " +
         fr::shape_of(t) + " " + fr::dtype_name(t.scalar_type()));
  if (elements >= 0 && t.numel() != elements)
    fail(std::string(name) + " must have " + std::to_string(elements) + " elements, got " + std::to_string(t.numel()));
  return static_cast<const D*>(t.data_ptr());
}

fr::Cell cell_of(const std::string& name) {
  if (name == "lstm") return fr::Cell::lstm;
  if (name == "gru") return fr::Cell::gru;
  if (name == "rnn_tanh") return fr::Cell::rnn_tanh;
  if (name == "rnn_relu") return fr::Cell::rnn_relu;
  fail("cell must be lstm, gru, rnn_tanh or rnn_relu, got '" + name + "'");
}

fr::Precision precision_of(const std::string& name) {
  if (name == "float32") return fr::Precision::float32;
  if (name == "bfloat16") return fr::Precision::bfloat16;
  if (name == "int8") return fr::Precision::int8;
  fail("precision must be float32, bfloat16 or int8, got '" + name + "'");
}

// inputs (V, E) or none for one-hot; weights: w_ih, w_hh and, with `bias`, b_ih, b_hh of each layer in turn.
fr::NetworkWeights weights_of(const std::string& cell, const MaybeTensor& inputs, const std::vector<Tensor>& weights,
                              bool bias, const Tensor& head, const MaybeTensor& head_bias) {
  fr::NetworkWeights n{};
  n.cell = cell_of(cell);
  n.V = head.size(0), n.H = head.size(-1);
  if (head.dim() != 2 || n.V < 1 || n.V > fr::kMaxVocabulary || n.H < 1)
    fail("head must be (V, H), V up to " + std::to_string(fr::kMaxVocabulary) + ", got " + fr::shape_of(head));
  if (inputs && inputs->dim() != 2) fail("inputs must be (V, E), got " + fr::shape_of(*inputs));
  const size_t per_layer = bias ? 4 : 2;
  if (weights.empty() || weights.size() % per_layer)
    fail("weights must be " + std::to_string(per_layer) + " tensors of each of one or more layers, got " +
         std::to_string(weights.size()));
  n.E = inputs ? inputs->size(1) : n.V, n.L = static_cast<int64_t>(weights.size() / per_layer);
  const int64_t rows = fr::gates_of(n.cell) * n.H;
  for (size_t at = 0; at < weights.size(); at += per_layer) {
    n.w_ih.push_back(dense<float>("w_ih", weights[at], rows * (at ? n.H : n.E)));
    n.w_hh.push_back(dense<float>("w_hh", weights[at + 1], rows * n.H));
    n.b_ih.push_back(bias ? dense<float>("b_ih", weights[at + 2], rows) : nullptr);
    n.b_hh.push_back(bias ? dense<float>("b_hh", weights[at + 3], rows) : nullptr);
  }
  n.inputs = inputs ? dense<float>("inputs", *inputs, n.V * n.E) : nullptr;
  n.head = dense<float>("head", head);
  n.head_bias = head_bias ? dense<float>("head_bias", *head_bias, n.V) : nullptr;
  return n;
}

int64_t generator_pack(std::string cell, std::string precision, MaybeTensor inputs, std::vector<Tensor> weights,
                       bool bias, Tensor head, MaybeTensor head_bias) {
  const fr::NetworkWeights n = weights_of(cell, inputs, weights, bias, head, head_bias);
  return networks().put(fr::pack_network(n, precision_of(precision)));
}

int64_t weight_bytes(int64_t network) { return networks().get(network)->weight_bytes; }

int64_t generator_start(int64_t network, int64_t rows, bool windowed, int64_t threads) {
  if (rows < 1 || rows > kMostRows) fail("rows must be 1 to " + std::to_string(kMostRows));
  if (threads < 1 || threads > kMostThreads) fail("threads must be 1 to " + std::to_string(kMostThreads));
  return sessions().put(
      std::make_shared<Running>(std::make_unique<fr::Session>(networks().get(network), rows, windowed, threads)));
}

// n ids, each of the vocabulary.
std::vector<int32_t> ids_below(const char* name, const int64_t* id, int64_t n, int64_t V) {
  for (int64_t i = 0; i < n; ++i)
    if (id[i] < 0 || id[i] >= V)
      fail(std::string(name) + " must hold ids in 0 .. " + std::to_string(V - 1) + ", got " + std::to_string(id[i]));
  return std::vector<int32_t>(id, id + n);
}

// The start states of a batch of requests: h, c, logits, tail, seen of each in turn; c is empty where h is all.
std::vector<std::shared_ptr<const fr::StartState>> start_states(const std::vector<Tensor>& parts,
                                                                const fr::NetworkShape& net) {
  if (parts.size() % 5) fail("states must hold five tensors of each state, got " + std::to_string(parts.size()));
  std::vector<std::shared_ptr<const fr::StartState>> states;
  for (size_t i = 0; i + 4 < parts.size(); i += 5) {
    auto state = std::make_shared<fr::StartState>();
    const float* h = dense<float>("h", parts[i], net.L * net.H);
    state->h.assign(h, h + net.L * net.H);
    const float* c = dense<float>("c", parts[i + 1], net.cell == fr::Cell::lstm ? net.L * net.H : 0);
    state->c.assign(c, c + parts[i + 1].numel());
    const float* logits = dense<float>("logits", parts[i + 2], net.V);
    state->logits.assign(logits, logits + net.V);
    state->tail = ids_below("tail", dense<int64_t>("tail", parts[i + 3]), parts[i + 3].numel(), net.V);
    const bool* seen = dense<bool>("seen", parts[i + 4], net.V);
    state->seen.assign(seen, seen + net.V);
    states.push_back(std::move(state));
  }
  return states;
}

enum Column {
  kIndex,
  kPrompt,
  kEos,
  kMaxNew,
  kTopK,
  kTopP,
  kSeed,
  kSequence,
  kModeOf,
  kLogprobs,
  kWindow,
  kState,
  kColumns
};
enum Real { kScale, kMinP, kPenalty, kInversePenalty, kReals };

// What a session relies on.
void check(const fr::GenerationRequest& q, bool windowed) {
  const bool starts = q.start && (!windowed || !q.start->tail.empty());
  if (q.prompt.empty() && !starts) fail("a request needs a prompt or a start state that has read some");
  if (q.max_new_tokens < 1 || q.mode_of < 1) fail("max_new_tokens and mode_of must be at least 1");
  if (windowed && q.window < 1) fail("window must be at least 1");
}

// numbers (n, kColumns), reals (n, kReals); ids: each request's prompt, then its eos ids, in turn. Adds all or none.
void generator_add(int64_t session, Tensor numbers, Tensor reals, Tensor ids, std::vector<Tensor> states) {
  const auto running = sessions().get(session);
  const std::lock_guard<std::mutex> guard(running->guard);
  const int64_t n = numbers.size(0);
  const int64_t* number = dense<int64_t>("numbers", numbers, n * kColumns);
  const float* real = dense<float>("reals", reals, n * kReals);
  const int64_t *id = dense<int64_t>("ids", ids), *end = id + ids.numel();
  const fr::NetworkShape net = running->session->shape();
  const auto starts = start_states(states, net);
  std::vector<fr::GenerationRequest> requests(static_cast<size_t>(n));
  for (fr::GenerationRequest& q : requests) {
    if (number[kPrompt] < 0 || number[kPrompt] > end - id || number[kEos] < 0 ||
        number[kEos] > end - id - number[kPrompt])
      fail("ids must hold every prompt and eos");
    if (number[kState] >= static_cast<int64_t>(starts.size())) fail("states must hold every state");
    q.index = number[kIndex];
    q.prompt = ids_below("a prompt", id, number[kPrompt], net.V), id += number[kPrompt];
    for (const int64_t* eos_end = id + number[kEos]; id < eos_end; ++id)
      if (*id >= 0 && *id < net.V) q.eos.push_back(static_cast<int32_t>(*id));  // no other is ever drawn
    if (number[kState] >= 0) q.start = starts[static_cast<size_t>(number[kState])];
    q.max_new_tokens = number[kMaxNew], q.top_k = number[kTopK], q.top_p = number[kTopP];
    q.seed = number[kSeed], q.sequence = number[kSequence], q.mode_of = number[kModeOf];
    q.logprobs = number[kLogprobs] != 0, q.window = number[kWindow];
    q.scale = real[kScale], q.min_p = real[kMinP], q.penalty = real[kPenalty];
    q.inverse_penalty = real[kInversePenalty];
    check(q, running->session->windowed());
    number += kColumns, real += kReals;
  }
  for (fr::GenerationRequest& q : requests) running->session->add(std::move(q));
}

Tensor vector_of(const Tensor& like, int64_t n, ScalarType dtype) {
  return torch::stable::new_empty(like, {&n, 1}, dtype);
}

// results: (index, finish, status, tokens) of each; tokens and logprobs of all of them in turn; events: (index, token);
// waiting: (queued, running). `like` is any CPU tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> generator_run(Tensor like, int64_t session, int64_t microseconds,
                                                                 int64_t steps, bool more, bool keep_events) {
  const auto running = sessions().get(session);
  const std::lock_guard<std::mutex> guard(running->guard);
  if (microseconds < 0 || microseconds > kMostMicroseconds || steps < 0)
    fail("microseconds and steps must not be negative, microseconds at most 2^50");
  fr::GenerationLoop& s = *running->session;
  s.run(microseconds, steps, more, keep_events);
  const std::vector<fr::GenerationResult> results = s.take_results();
  const std::vector<fr::TokenEvent> events = s.take_events();
  int64_t tokens = 0, logprobs = 0;
  for (const auto& r : results) {
    tokens += static_cast<int64_t>(r.tokens.size());
    logprobs += static_cast<int64_t>(r.logprobs.size());
  }
  Tensor result = vector_of(like, static_cast<int64_t>(results.size()) * 4, ScalarType::Long);
  Tensor token = vector_of(like, tokens, ScalarType::Long), logprob = vector_of(like, logprobs, ScalarType::Float);
  Tensor event = vector_of(like, static_cast<int64_t>(events.size()) * 2, ScalarType::Long);
  Tensor waiting = vector_of(like, 2, ScalarType::Long);
  auto *r = static_cast<int64_t*>(result.data_ptr()), *t = static_cast<int64_t*>(token.data_ptr());
  auto* p = static_cast<float*>(logprob.data_ptr());
  for (const auto& done : results) {
    *r++ = done.index, *r++ = static_cast<int64_t>(done.finish), *r++ = done.status;
    *r++ = static_cast<int64_t>(done.tokens.size());
    t = std::copy(done.tokens.begin(), done.tokens.end(), t);
    p = std::copy(done.logprobs.begin(), done.logprobs.end(), p);
  }
  auto* e = static_cast<int64_t*>(event.data_ptr());
  for (const auto& one : events) *e++ = one.index, *e++ = one.token;
  auto* w = static_cast<int64_t*>(waiting.data_ptr());
  w[0] = s.queued(), w[1] = s.running();
  return {result, token, logprob, event, waiting};
}

void generator_stop(int64_t session, int64_t index) {
  const auto running = sessions().get(session);
  const std::lock_guard<std::mutex> guard(running->guard);
  running->session->stop(index);
}

// h, c (L, H) and logits (V,) after ids (T,) from h, c; c is empty where h is all.
std::tuple<Tensor, Tensor, Tensor> generator_read(int64_t network, Tensor ids, Tensor h, Tensor c, int64_t threads) {
  const auto net = networks().get(network);
  if (threads < 1 || threads > kMostThreads) fail("threads must be 1 to " + std::to_string(kMostThreads));
  const int64_t size = net->L * net->H;
  const std::vector<int32_t> narrow = ids_below("ids", dense<int64_t>("ids", ids), ids.numel(), net->V);
  fr::RowStates states(*net, 1);
  states.set_row(0, dense<float>("h", h, size), dense<float>("c", c, net->cell == fr::Cell::lstm ? size : 0));
  fr::PromptReader reader(*net, 1);
  fr::Team team(threads);
  const auto length = static_cast<int64_t>(narrow.size());
  for (int64_t at = 0; at < length; at += reader.stretch(1))
    reader.read(states, {{0, narrow.data() + at, std::min(length - at, reader.stretch(1))}}, team);
  Tensor hn = torch::stable::new_empty(h, h.sizes()), cn = torch::stable::new_empty(c, c.sizes());
  Tensor padded = vector_of(h, net->head_columns, ScalarType::Float);
  states.get_row(0, static_cast<float*>(hn.data_ptr()), static_cast<float*>(cn.data_ptr()));
  states.logits(0, 1, static_cast<float*>(padded.data_ptr()), net->head_columns, team);
  return {hn, cn, torch::stable::narrow(padded, 0, 0, net->V)};
}

void free_network(int64_t network) { networks().erase(network); }
void free_session(int64_t session) { sessions().erase(session); }

#ifdef FASTRNN_WITH_CUDA
using torch::stable::accelerator::DeviceGuard;

Registry<fr::cuda::PackedNetwork>& gpu_networks() {
  static Registry<fr::cuda::PackedNetwork> all;
  return all;
}

int64_t gpu_pack(std::string cell, std::string precision, MaybeTensor inputs, std::vector<Tensor> weights, bool bias,
                 Tensor head, MaybeTensor head_bias, int64_t device) {
  const fr::NetworkWeights n = weights_of(cell, inputs, weights, bias, head, head_bias);
  const DeviceGuard guard(static_cast<int32_t>(device));
  return gpu_networks().put(fr::cuda::pack_network(n, precision_of(precision), static_cast<int>(device)));
}

int64_t gpu_weight_bytes(int64_t network) { return gpu_networks().get(network)->weight_bytes; }

// On multiprocessors of `shared_bytes` of shared memory, up to `cluster` of them together: why a network does not run,
// or nothing; and what runs it.
std::string gpu_refusal(std::string cell, std::string precision, int64_t L, int64_t H, int64_t V, int64_t shared_bytes,
                        int64_t cluster) {
  return fr::cuda::refuse_network(fr::cuda::sizes_of(cell_of(cell), L, H, V, precision_of(precision)),
                                  fr::cuda::device_with(shared_bytes, cluster));
}
std::string gpu_way(std::string cell, std::string precision, int64_t L, int64_t H, int64_t V, int64_t shared_bytes,
                    int64_t cluster) {
  return fr::cuda::way_of(fr::cuda::sizes_of(cell_of(cell), L, H, V, precision_of(precision)),
                          fr::cuda::device_with(shared_bytes, cluster));
}

// How many multiprocessors a GPU can run together, each with all of its shared memory.
int64_t gpu_largest_cluster(int64_t device) {
  const DeviceGuard guard(static_cast<int32_t>(device));
  return fr::cuda::largest_cluster(fr::cuda::generate_device(static_cast<int>(device)));
}

int64_t gpu_start(int64_t network, int64_t rows, bool windowed, int64_t) {
  if (rows < 1 || rows > kMostRows) fail("rows must be 1 to " + std::to_string(kMostRows));
  if (windowed) fail("the loop on the GPU carries its state from token to token");
  const auto net = gpu_networks().get(network);
  const DeviceGuard guard(net->device);
  return sessions().put(std::make_shared<Running>(
      std::make_unique<fr::cuda::Session>(net, rows, fr::current_stream(net->device)), net->device));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gpu_run(Tensor like, int64_t session, int64_t microseconds,
                                                           int64_t steps, bool more, bool keep_events) {
  const DeviceGuard guard(sessions().get(session)->device);
  return generator_run(like, session, microseconds, steps, more, keep_events);
}

std::tuple<Tensor, Tensor, Tensor> gpu_read(int64_t network, Tensor ids, Tensor h, Tensor c, int64_t) {
  const auto net = gpu_networks().get(network);
  const DeviceGuard guard(net->device);
  const int64_t size = net->sizes.L * net->sizes.H;
  const bool has_c = net->cell == fr::Cell::lstm;
  const float *from_h = dense<float>("h", h, size), *from_c = dense<float>("c", c, has_c ? size : 0);
  Tensor hn = torch::stable::new_empty(h, h.sizes()), cn = torch::stable::new_empty(c, c.sizes());
  Tensor logits = vector_of(h, net->sizes.V, ScalarType::Float);
  auto *to_h = static_cast<float*>(hn.data_ptr()), *to_c = static_cast<float*>(cn.data_ptr());
  std::copy_n(from_h, size, to_h);
  std::copy_n(from_c, has_c ? size : 0, to_c);
  fr::cuda::read(*net, ids_below("ids", dense<int64_t>("ids", ids), ids.numel(), net->sizes.V), to_h, to_c,
                 static_cast<float*>(logits.data_ptr()), fr::current_stream(net->device));
  return {hn, cn, logits};
}

void gpu_free_network(int64_t network) { gpu_networks().erase(network); }
#endif

}  // namespace

#define FR_WEIGHTS \
  "str cell, str precision, Tensor? inputs, Tensor[] weights, bool bias, Tensor head, Tensor? head_bias"
#define FR_SHARED_SCHEMAS(m)                                                                                     \
  m.def("generator_weight_bytes(int network) -> int");                                                           \
  m.def("generator_start(int network, int rows, bool windowed, int threads) -> int");                            \
  m.def("generator_add(int session, Tensor numbers, Tensor reals, Tensor ids, Tensor[] states) -> ()");          \
  m.def(                                                                                                         \
      "generator_run(Tensor like, int session, int microseconds, int steps, bool more, bool keep_events)"        \
      " -> (Tensor results, Tensor tokens, Tensor logprobs, Tensor events, Tensor waiting)");                    \
  m.def("generator_stop(int session, int index) -> ()");                                                         \
  m.def("generator_read(int network, Tensor ids, Tensor h, Tensor c, int threads) -> (Tensor, Tensor, Tensor)"); \
  m.def("generator_free_network(int network) -> ()");                                                            \
  m.def("generator_free_session(int session) -> ()")

STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_cpu, m) {
  m.def("generator_pack(" FR_WEIGHTS ") -> int");
  FR_SHARED_SCHEMAS(m);
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_cpu, CompositeExplicitAutograd, m) {
  m.impl("generator_pack", TORCH_BOX(&generator_pack));
  m.impl("generator_weight_bytes", TORCH_BOX(&weight_bytes));
  m.impl("generator_start", TORCH_BOX(&generator_start));
  m.impl("generator_add", TORCH_BOX(&generator_add));
  m.impl("generator_run", TORCH_BOX(&generator_run));
  m.impl("generator_stop", TORCH_BOX(&generator_stop));
  m.impl("generator_read", TORCH_BOX(&generator_read));
  m.impl("generator_free_network", TORCH_BOX(&free_network));
  m.impl("generator_free_session", TORCH_BOX(&free_session));
}

#ifdef FASTRNN_WITH_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_cuda, m) {
  m.def("generator_pack(" FR_WEIGHTS ", int device) -> int");
  m.def("generator_refusal(str cell, str precision, int L, int H, int V, int shared_bytes, int cluster) -> str");
  m.def("generator_way(str cell, str precision, int L, int H, int V, int shared_bytes, int cluster) -> str");
  m.def("generator_largest_cluster(int device) -> int");
  FR_SHARED_SCHEMAS(m);
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_cuda, CompositeExplicitAutograd, m) {
  m.impl("generator_pack", TORCH_BOX(&gpu_pack));
  m.impl("generator_refusal", TORCH_BOX(&gpu_refusal));
  m.impl("generator_way", TORCH_BOX(&gpu_way));
  m.impl("generator_largest_cluster", TORCH_BOX(&gpu_largest_cluster));
  m.impl("generator_weight_bytes", TORCH_BOX(&gpu_weight_bytes));
  m.impl("generator_start", TORCH_BOX(&gpu_start));
  m.impl("generator_add", TORCH_BOX(&generator_add));
  m.impl("generator_run", TORCH_BOX(&gpu_run));
  m.impl("generator_stop", TORCH_BOX(&generator_stop));
  m.impl("generator_read", TORCH_BOX(&gpu_read));
  m.impl("generator_free_network", TORCH_BOX(&gpu_free_network));
  m.impl("generator_free_session", TORCH_BOX(&free_session));
}
#endif
