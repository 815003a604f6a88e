// What a generation loop takes and gives back, whatever runs it: the CPU (cpu/session.h) or a GPU
// (cuda/generate_session.h).
//
// Letters as in kernels.h: L layers, H hidden, V vocabulary, E width of the input.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace fr {

enum class Cell { lstm, gru, rnn_tanh, rnn_relu };
enum class Precision { float32, bfloat16, int8 };  // of the weights; accumulators and state are float32

inline int64_t gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// The network as PyTorch holds it: float32, dense.
struct NetworkWeights {
  Cell cell;
  int64_t L, H, V, E;
  const float* inputs;                               // (V, E) what an id reads, or null for one-hot: then E = V
  std::vector<const float*> w_ih, w_hh, b_ih, b_hh;  // of each layer; the biases may be null
  const float* head;                                 // (V, H)
  const float* head_bias;                            // (V,) or null
};

// Where a request starts from instead of from nothing.
struct StartState {
  std::vector<float> h, c;    // (L, H); c for the LSTM
  std::vector<float> logits;  // (V,) of the next token, for a request without a prompt
  std::vector<int32_t> tail;  // window state: the last ids, below V
  std::vector<uint8_t> seen;  // (V,) for the repetition penalty
};

struct GenerationRequest {
  int64_t index;
  std::vector<int32_t> prompt;              // ids below V, at least one, or a start with logits (window: with a tail)
  std::shared_ptr<const StartState> start;  // or null
  int64_t max_new_tokens;                   // at least 1
  float scale, min_p;                       // the draw's parameters, as in fr::Sample
  int64_t top_k, top_p, seed, sequence, mode_of;
  float penalty, inverse_penalty;  // repetition penalty: 1 is off
  bool logprobs;
  std::vector<int32_t> eos;
  int64_t window;  // window state: how many ids are run for a token, at least 1
};

enum class Finish : int64_t { length = 0, eos = 1, error = 2, stop = 3 };

struct GenerationResult {
  int64_t index;
  Finish finish;
  int32_t status;  // fr::draw::Status of the draw that failed
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;  // of each token where the request asked for them
};

struct TokenEvent {
  int64_t index, token;
};

struct NetworkShape {
  Cell cell;
  int64_t L, H, V;
};

// Requests in a queue, rows that run them, tokens out.
class GenerationLoop {
 public:
  virtual ~GenerationLoop() = default;

  virtual void add(GenerationRequest request) = 0;
  // Runs until `microseconds` have passed, every row has made `steps` steps, all is done, or rows are idle while `more`
  // requests could be added. keep_events: remember each token. After an exception the loop only holds what it has
  // finished.
  virtual void run(int64_t microseconds, int64_t steps, bool more, bool keep_events) = 0;
  // Ends request `index` if it runs; its result holds what it has drawn.
  virtual void stop(int64_t index) = 0;

  virtual std::vector<GenerationResult> take_results() = 0;
  virtual std::vector<TokenEvent> take_events() = 0;
  virtual int64_t queued() const = 0;
  virtual int64_t running() const = 0;
  virtual NetworkShape shape() const = 0;
  virtual bool windowed() const = 0;
};

}  // namespace fr
