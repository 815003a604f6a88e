// A language model's network packed for running, and the two products that run it. Baseline code: the session and the
// orchestration see raw pointers and a table of functions, the kernels behind it are compiled once per instruction set.
//
// Letters as in kernels.h: L layers, H hidden, V vocabulary, E width of the input. W is the width of a vector.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../generation.h"
#include "../kernels.h"

namespace fr {

// Zeroed memory on a cache line, or on a huge page where it is large: weights stream faster through few page entries.
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t bytes);
  // What lies in `whole` from a byte on.
  Memory(const Memory& whole, int64_t from)
      : data_(whole.data_, whole.as<char>() + from), bytes_(whole.bytes_ - from) {}
  void* get() const { return data_.get(); }
  template <class T> T* as() const { return static_cast<T*>(data_.get()); }
  int64_t bytes() const { return bytes_; }  // that were asked for, of a part: from there to the end

 private:
  std::shared_ptr<void> data_;
  int64_t bytes_ = 0;
};

// A matrix in panels of `vectors` vectors (panel.h), K of each row of activations wide.
struct Panels {
  int64_t K = 0, count = 0, vectors = 0;
  Memory weights;  // float, bf16 or int8_t
  Memory scale;    // int8: (count * vectors * W) what a weight's integers are multiplied by
  Memory start;    // int8 multiplied by fours: (count * vectors * W) int32 that the sums begin at
};

struct PackedLayer {
  Panels input, hidden;  // input.K = 0 where layer 0's products are rows of the table
  Memory bias;           // (panels * vectors * W) b_ih + b_hh, but for the GRU's n: b_ih
  Memory bias_q;         // GRU: (panels * W) b_hn
};

struct DecoderKernels;

struct PackedNetwork {
  Cell cell;
  Precision precision;
  int64_t L, H, V;
  int64_t units;    // of a panel
  int64_t padded;   // H rounded up to whole panels
  int64_t row;      // bytes of a row of activations: padded ones, an odd number of cache lines so that rows spread
  bool scaled;      // activations are integers; a float in the last four bytes of their row says what one is worth
  int64_t carried;  // float32 state per row beside the activations: padded for LSTM (c) and GRU (h), else 0
  std::vector<PackedLayer> layers;
  Panels head;
  Memory head_bias;      // (head_columns)
  int64_t head_columns;  // V rounded up to whole panels
  // The head by the tiles and by the groups of a draw, for vocabularies whose logits are not worth keeping; else empty.
  std::vector<Panels> head_tiles, head_groups;
  Memory table;           // (V, padded * gates) the first layer's products and biases, or nothing
  Memory inputs;          // (V, input_row bytes) activations that an id reads, where there is no table
  int64_t input_row = 0;  // bytes
  int64_t weight_bytes = 0;
  const DecoderKernels* kernels;
};

// Throws std::invalid_argument for what a precision cannot hold.
std::unique_ptr<PackedNetwork> pack_network(const NetworkWeights& network, Precision precision);

// What one of the integers of a row of scaled activations, `row` bytes long, is worth.
inline float& row_scale(void* activations, int64_t row) {
  return static_cast<float*>(activations)[row / static_cast<int64_t>(sizeof(float)) - 1];
}
inline float row_scale(const void* activations, int64_t row) {
  return static_cast<const float*>(activations)[row / static_cast<int64_t>(sizeof(float)) - 1];
}

// One step of one layer for rows 0 .. rows: activations, carry <- cell(init + a1 input + a2 hidden).
// Row r of a thing with an index lies at index[r], of one without at r.
struct LayerJob {
  const PackedNetwork* network;
  const PackedLayer* layer;
  int64_t rows;
  const void* a1;        // activations of the layer below, or null: the products are in init
  int64_t row1;          // bytes between its rows
  const void* a2;        // activations of the step before, network->row bytes apart
  const float* init;     // (., padded * gates) rows of the table or stored products; null: the bias
  const int32_t* index;  // of init, or null
  bool table;            // init holds rows of the table, not stored products
  float* carry;          // (panels, carry_rows, W) in place
  int64_t carry_rows;
  void* out;      // activations; scaled ones are the caller's to make, when all of a row's states are known
  float* states;  // (rows, padded) h in float32, where activations are scaled
};

// out[r] (columns) = bias + a[r] panels: logits, or a layer's products with its input.
struct LinearJob {
  const PackedNetwork* network;
  const Panels* panels;
  int64_t rows;
  const void* a;
  int64_t row;  // bytes between rows of a
  const float* bias;
  float* out;
  int64_t out_row;  // elements
  bool backwards;   // walk the panels from the last: what the cache still holds of them is used first
};

// The panels part of `parts` of a job.
struct Part {
  int64_t part, parts;
  int64_t begin(int64_t n) const { return n * part / parts; }
  int64_t end(int64_t n) const { return n * (part + 1) / parts; }
};

struct DecoderKernels {
  int64_t width;       // W
  int64_t activation;  // bytes of one
  int64_t k_multiple;  // K of panels is rounded up to this
  void (*pack)(const float* w, int64_t rows, int64_t K, int64_t unit_gates, Panels& out);
  void (*layer)(const LayerJob& job, Part part);
  void (*linear)(const LinearJob& job, Part part);
  // n numbers of one row of activations, `row` bytes long
  void (*to_activations)(const float* from, int64_t n, void* to, int64_t row);
  void (*from_activations)(const void* from, int64_t row, int64_t n, float* to);
  int64_t head_vectors = 4;  // of a panel of a large vocabulary's head
  int64_t tile_rows = 1;     // so many rows take as long as one
};

// The kernels of a precision on the current instruction set.
const DecoderKernels& decoder_kernels(Precision precision);
// Those of each file: decode.cpp, decode_int8.cpp, decode_tiles.cpp with matrix tiles.
const DecoderKernels& vector_decoder(Precision precision);
const DecoderKernels& int8_decoder();
const DecoderKernels& tile_decoder(Precision precision);

}  // namespace fr
