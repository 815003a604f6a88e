// How a network is cut over a cluster of CTAs, where everything lies, and whether it fits. Pure functions of sizes, for
// host and device.
//
// Units and columns of the head are cut into tiles of 16, which the CTAs share in order; k is cut so too. The matrices
// of the blob are, CTA after CTA, fragments of 16 x 16 weights as the lanes of a warp hold them (cell_tile.cuh): of the
// layers' inputs (but the first's), of the head, of the hidden states, each (tiles of the CTA, tiles of k, gates). A
// CTA keeps the first ones in shared memory and reads the rest each step. Those are the hidden states' where it can be:
// their products are made while the cluster meets.
#pragma once

#include "generate_plan.h"

namespace fr::cuda {

constexpr int64_t kTileSide = 16, kTileRows = 8, kMostRowTiles = 4;
constexpr int64_t kClusterWarps = 8, kMostCluster = 16;
constexpr int64_t kStreamedBytes = 64 << 10;  // at most that a CTA reads again each step, for each tile of rows

FR_PLAN int64_t ceil_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

// What a CTA has of the network; the last ones may have less.
struct ClusterSplit {
  int64_t unit_tiles, column_tiles, k_tiles;
  int64_t unit_parts, column_parts;  // warps that share a tile, each with some of its k
  // Fragments of its weights: of a layer's matrix, where the head's and the hidden states' begin, and of all.
  int64_t matrix, head, hidden, all;
};

// As many warps to a tile as there are idle: a power of two.
FR_PLAN int64_t parts_of_tile(int64_t tiles) {
  int64_t parts = kClusterWarps;
  while (parts > 1 && parts * tiles > kClusterWarps) parts /= 2;
  return parts;
}
FR_PLAN ClusterSplit cluster_split(const NetworkSizes& n, int64_t cluster) {
  ClusterSplit s{};
  s.k_tiles = ceil_of(n.H, kTileSide);
  s.unit_tiles = ceil_of(s.k_tiles, cluster);
  s.column_tiles = ceil_of(ceil_of(n.V, kTileSide), cluster);
  s.unit_parts = parts_of_tile(s.unit_tiles), s.column_parts = parts_of_tile(s.column_tiles);
  s.matrix = s.unit_tiles * s.k_tiles * n.gates;
  s.head = (n.L - 1) * s.matrix, s.hidden = s.head + s.column_tiles * s.k_tiles;
  s.all = s.hidden + n.L * s.matrix;
  return s;
}

FR_PLAN int64_t input_fragment(const ClusterSplit& s, int64_t layer) { return (layer - 1) * s.matrix; }
FR_PLAN int64_t hidden_fragment(const ClusterSplit& s, int64_t layer) { return s.hidden + layer * s.matrix; }
FR_PLAN int64_t fragment_words(const NetworkSizes& n) { return kTileSide * kTileSide / n.per_word; }
// Of the blob: where its floats begin.
FR_PLAN int64_t cluster_floats_at(const NetworkSizes& n, int64_t cluster) {
  return cluster * cluster_split(n, cluster).all * fragment_words(n);
}

constexpr int64_t kSumsOfUnit = 4;  // generate_tile.cuh says which

// Byte offsets into the dynamic shared memory of a CTA of a cluster, multiples of 16; weights to the end.
struct ClusterLayout {
  int64_t h, carry, partial, logits, rows, orders, weights;
  DrawLayout draw;
  int64_t stride;      // numbers between the rows of h
  int64_t slot;        // numbers of a layer's h
  int64_t logits_row;  // floats
  int64_t cta_words;   // of the blob, a CTA's
};

FR_PLAN ClusterLayout cluster_layout(const NetworkSizes& n, int64_t cluster, int64_t block_rows, bool logits_on_chip) {
  const ClusterSplit split = cluster_split(n, cluster);
  const int64_t number = 4 / n.per_word, tiles = block_rows / kTileRows, own_rows = ceil_of(block_rows, cluster);
  ClusterLayout s{};
  // Rows 32 or, of floats, 64 bytes apart from a multiple of 128, so that the threads of one load meet different banks.
  const int64_t bytes = split.k_tiles * kTileSide * number, apart = 16 * number;
  s.stride = (ceil_of(bytes - apart, 128) * 128 + apart) / number;
  s.slot = block_rows * s.stride;
  s.logits_row = columns_of(n);
  s.cta_words = split.all * fragment_words(n);
  s.carry = s.h + (n.L + 1) * s.slot * number;
  s.partial = s.carry + (n.carries ? 4 * n.L * split.unit_tiles * kTileSide * block_rows : 0);
  s.logits = s.partial + (tiles > 1 ? 2 : 1) * kClusterWarps * kSumsOfUnit * kTileSide * kTileRows * 4;
  s.rows = s.logits + (logits_on_chip ? 4 * own_rows * s.logits_row : 0);
  s.orders = s.rows + kRowBytes * own_rows;
  const int64_t teams = n.V > 256 || own_rows == 1 ? 1 : own_rows < kClusterWarps ? own_rows : kClusterWarps;
  s.draw = draw_layout(n, s.orders + 8 * block_rows, teams, kClusterWarps);
  s.weights = (s.draw.end + 127) / 128 * 128;
  return s;
}

// The cut for so many CTAs and rows; it fits where no more is read again each step than may be.
inline GeneratePlan cut_cluster(const NetworkSizes& n, int64_t cluster, int64_t row_tiles, int64_t shared_limit) {
  const int64_t all = cluster_split(n, cluster).all, bytes = 4 * fragment_words(n);
  GeneratePlan p{};
  p.way = Way::cluster, p.cluster = cluster, p.block_rows = row_tiles * kTileRows, p.threads = 32 * kClusterWarps;
  for (const bool on_chip : {true, false}) {
    const int64_t front = cluster_layout(n, cluster, p.block_rows, on_chip).weights;
    p.needed_bytes = front + all * bytes;
    p.logits_on_chip = on_chip;
    p.resident = std::clamp<int64_t>((shared_limit - front) / bytes, 0, all);
    p.shared_bytes = front + p.resident * bytes;
    p.fits = front <= shared_limit && (all - p.resident) * bytes <= kStreamedBytes * row_tiles;
    const bool worth_it = n.V <= 256;  // more logits than a tile's take more room than they save time
    if (p.resident == all || (p.fits && worth_it)) break;
  }
  return p;
}

// With the smallest cluster that keeps the whole network, else with the largest. The numbers of CTAs do not depend on
// the rows, on which the order of a sum must not depend.
inline GeneratePlan plan_cluster(const NetworkSizes& n, int64_t rows, const GenerateDevice& device) {
  GeneratePlan best{};
  int64_t at_once = 0;
  for (int64_t i = 0; i < 5; ++i) {
    const int64_t cluster = int64_t{1} << i;
    if (device.at_once[i] == 0 || (device.wanted_cluster != 0 && cluster != device.wanted_cluster)) continue;
    best = cut_cluster(n, cluster, 1, device.shared_limit);
    at_once = device.at_once[i];
    const bool has_warps = cluster_split(n, cluster).unit_tiles <= kClusterWarps;
    best.fits = best.fits && has_warps;
    if (has_warps && best.resident == cluster_split(n, cluster).all) break;
  }
  best.rows = std::max<int64_t>(rows, 1);
  if (!best.fits) return best;
  if (best.rows > 2 * at_once * kTileRows) {  // a step of more tiles is estimated to take two of one
    const GeneratePlan wide = cut_cluster(n, best.cluster, kMostRowTiles, device.shared_limit);
    if (wide.fits) best = wide, best.rows = rows;
  }
  best.rows = std::min(best.rows, at_once * best.block_rows);
  best.blocks = ceil_of(best.rows, best.block_rows) * best.cluster;
  return best;
}

}  // namespace fr::cuda
