// Tokens of rows straight from their states, for large vocabularies: a tile of logits is weighed while a core's cache
// holds it and forgotten, and the few that a row's token is looked up among are computed once more.
#pragma once

#include <cstdint>
#include <vector>

#include "row_states.h"

namespace fr {

class HeadDraw {
 public:
  // Whether a network's vocabulary is large enough to be drawn from this way.
  static bool suits(const PackedNetwork& net) { return !net.head_tiles.empty(); }
  // For up to `capacity` rows and teams of up to `members`; nothing where the network does not suit.
  HeadDraw(const PackedNetwork& net, int64_t capacity, int64_t members);
  // Plain draws of rows 0 .. call.B of the states, with the bits of Drawer::draw on their logits.
  void draw(const RowStates& states, const Sample& call, Drawer& drawer, Team& team);

 private:
  struct Job;
  // What one thread works in.
  struct Bench {
    Memory logits;    // (capacity, kTileRow) of one tile, or of the rows of one group
    Memory gathered;  // (capacity) activations of the rows of one group
    std::vector<int64_t> rows;
  };

  static void weigh(const Job& job, Part part);
  static void pick(const Job& job, Part part);
  void list_by_group(int64_t rows);
  void multiply(const Panels& panels, int64_t column, const void* a, int64_t rows, float* logits) const;

  const PackedNetwork& net_;
  bool turn_ = false;
  std::vector<Bench> benches_;
  std::vector<float> largest_, top_;
  std::vector<uint64_t> sums_, threshold_;
  std::vector<int64_t> group_;
  std::vector<int64_t> first_, next_;  // of each group its first row, of each row the next one of its group; -1: none
};

}  // namespace fr
