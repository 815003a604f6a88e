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
  void* get() const { return data_.get(); }
  template <class T> T* as() const { return static_cast<T*>(data_.get()); }

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> data_;
};

// A matrix in panels of `vectors` vectors (panel.h), K of each row of activations wide.
struct Panels {
  int64_t K = 0, count = 0, vectors = 0;
  Memory weights;  // float, bf16 or int8_t
  Memory scale;    // int8: (count * vectors * W) what a sum of products is multiplied by
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
  int64_t carried;  // float32 state per row beside the activations: padded for LSTM (c) and GRU (h), else 0
  std::vector<PackedLayer> layers;
  Panels head;
  Memory head_bias;       // (head_columns)
  int64_t head_columns;   // V rounded up to whole panels
  Memory table;           // (V, padded * gates) the first layer's products and biases, or nothing
  Memory inputs;          // (V, input_row bytes) activations that an id reads, where there is no table
  int64_t input_row = 0;  // bytes
  int64_t weight_bytes = 0;
  const DecoderKernels* kernels;
};

// Throws std::invalid_argument for what a precision cannot hold.
std::unique_ptr<PackedNetwork> pack_network(const NetworkWeights& network, Precision precision);

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
  void* out;  // activations
};

// out[r] (columns) = bias + a[r] panels: logits, or a layer's products with its input.
struct LinearJob {
  const PackedNetwork* network;
  const Panels* panels;
  int64_t rows;
  const void* a;
  int64_t row;  // bytes between rows of a
  const float* bias;
  bool stored;  // out is init of a LayerJob, which continues the sums: an int8 kernel keeps them whole
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
  // largest: of each row of w, its largest magnitude; read by int8 only, null elsewhere.
  void (*pack)(const float* w, int64_t rows, int64_t K, int64_t unit_gates, const float* largest, Panels& out);
  void (*layer)(const LayerJob& job, Part part);
  void (*linear)(const LinearJob& job, Part part);
  void (*to_activations)(const float* from, int64_t n, void* to);
  void (*from_activations)(const void* from, int64_t n, float* to);
};

// The kernels of a precision on the current instruction set.
const DecoderKernels& decoder_kernels(Precision precision);
// Those of each file: decode.cpp with float activations, decode_int8.cpp, decode_tiles.cpp with matrix tiles.
const DecoderKernels& float_decoder(Precision precision);
const DecoderKernels& int8_decoder();
const DecoderKernels& tile_decoder(Precision precision);

}  // namespace fr
