// The states of rows of a generation and what moves them: a step of all of them, and the reading of prompts.
#pragma once

#include <cstdint>
#include <vector>

#include "decoder.h"
#include "team.h"

namespace fr {

// State of up to `capacity` rows of a packed network. Rows 0 .. n of it are in use; the owner says which n.
class RowStates {
 public:
  RowStates(const PackedNetwork& net, int64_t capacity);

  // Reads ids (rows,), one a row, into rows 0 .. rows.
  void advance(const int32_t* ids, int64_t rows, Team& team);
  // out (rows, out_row) = logits of rows begin .. begin + rows.
  void logits(int64_t begin, int64_t rows, float* out, int64_t out_row, Team& team);

  // Activations of the last layer from a row on, network.row bytes a row: what the head multiplies.
  const char* outputs(int64_t row) const { return activations(net_.L - 1, row); }

  void clear(int64_t row);
  void copy_row(const RowStates& from, int64_t from_row, int64_t row);
  // h and c (L, H) of a row; c is for the LSTM.
  void set_row(int64_t row, const float* h, const float* c);
  void get_row(int64_t row, float* h, float* c) const;

 private:
  friend class PromptReader;
  char* activations(int64_t layer, int64_t row) const;
  float* carry(int64_t layer) const { return carry_[static_cast<size_t>(layer)].as<float>(); }

  const PackedNetwork& net_;
  int64_t capacity_;
  Memory gathered_;  // what the ids of a step read, where there is no table
  Memory rounding_;  // (capacity, padded) h of a layer, where activations are scaled
  int parity_ = 0;   // which of the two buffers of activations holds the state
  bool turn_ = false;
  std::vector<Memory> activations_[2], carry_;
};

// Reads prompts into rows of a RowStates, layer by layer over a stretch of ids, so that the products with the input are
// one product with many rows. The same bits as `advance` id by id.
class PromptReader {
 public:
  // At most `rows` prompts at once.
  PromptReader(const PackedNetwork& net, int64_t rows);

  struct Prompt {
    int64_t row;         // of the states: where it starts from and where it ends
    const int32_t* ids;  // `length` of them, at least 1
    int64_t length;
  };
  int64_t rows() const { return rows_; }
  // The longest stretch that n prompts may have: a call of `read` is a few milliseconds of work on most networks.
  int64_t stretch(int64_t n) const { return positions_ / n; }
  // 1 .. rows() prompts sorted by falling length, at most stretch() each; a longer one takes several calls.
  void read(RowStates& states, const std::vector<Prompt>& prompts, Team& team);

 private:
  struct Stretch;
  void run_layer(const Stretch& s, int64_t layer, Team& team);

  const PackedNetwork& net_;
  int64_t rows_, positions_;  // ids of all prompts in one stretch
  RowStates states_;          // of the prompts, in their order
  Memory products_;           // (positions, padded * gates), and a block of rows more, as all three
  Memory gathered_;           // (positions) what the ids read, where there is no table
  Memory outputs_[2];         // (positions) rows of activations, of this layer and of the one below
  std::vector<int32_t> ids_;
};

}  // namespace fr
