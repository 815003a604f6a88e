// How a step is cut into kernels that each have the whole GPU (generate_steps.cu), where everything lies, and which of
// the three ways a generation runs. Pure functions of sizes, for host and device.
//
// The blob is that of a cluster of one CTA: tiles of 16 units or columns, each with all of its k. A warp multiplies one
// of them with 8 or 32 rows. Few rows: warps of a CTA share a tile and its k, so that more of the GPU reads weights.
// Many rows: each warp has a tile of its own, and takes the parts of its k one after the other, in the order in which
// they are added up where they are shared: a sum is the same however many rows there are.
#pragma once

#include "generate_cluster_plan.h"

namespace fr::cuda {

constexpr int64_t kFillingWarps = 2048;             // that a network's tiles are cut for: they keep any GPU busy
constexpr int64_t kWholeTiles = 2, kWholeRows = 4;  // of a CTA whose warps share none: tiles, and warps for each

// In how many parts the k of a tile is summed, a power of two: a function of the network alone, as is what follows.
FR_PLAN int64_t parts_of_sum(int64_t tiles, int64_t k_tiles) {
  int64_t parts = kClusterWarps;
  while (parts > 1 && (parts > k_tiles || parts * tiles > kFillingWarps)) parts /= 2;
  return parts;
}
FR_PLAN ClusterSplit steps_split(const NetworkSizes& n) {
  ClusterSplit s = cluster_split(n, 1);
  s.unit_parts = parts_of_sum(s.unit_tiles, s.k_tiles), s.column_parts = parts_of_sum(s.column_tiles, s.k_tiles);
  return s;
}

// The grid of a kernel that multiplies `tiles` tiles: CTA i has the tiles of group i % tile_groups and the rows of
// group i / tile_groups.
struct StepGrid {
  int64_t cta_tiles, cta_rows, tile_groups, blocks;
};
FR_PLAN StepGrid step_grid(int64_t tiles, int64_t parts, int64_t rows, int64_t row_tiles, bool whole) {
  StepGrid g{};
  g.cta_tiles = whole ? kWholeTiles : kClusterWarps / parts;
  g.cta_rows = (whole ? kWholeRows : 1) * row_tiles * kTileRows;
  g.tile_groups = ceil_of(tiles, g.cta_tiles);
  g.blocks = g.tile_groups * ceil_of(rows, g.cta_rows);
  return g;
}
FR_PLAN StepGrid layer_grid(const NetworkSizes& n, const GeneratePlan& p) {
  const ClusterSplit s = steps_split(n);
  return step_grid(s.unit_tiles, s.unit_parts, p.rows, p.row_tiles, p.whole_units);
}
FR_PLAN StepGrid head_grid(const NetworkSizes& n, const GeneratePlan& p) {
  const ClusterSplit s = steps_split(n);
  return step_grid(s.column_tiles, s.column_parts, p.rows, p.row_tiles, p.whole_columns);
}

// Byte offsets into a session's scratch, multiples of 16: what the launch is given, the number of the step, what each
// row reads (rows, ids), the logits (rows, columns) and h (2, L, rows, stride), of the step before and of this one in
// turn. Rows are those of whole CTAs.
struct StepsLayout {
  int64_t launch, step, ids, logits, h, end;
  int64_t rows, stride;  // stride: numbers
};
FR_PLAN StepsLayout steps_layout(const NetworkSizes& n, const GeneratePlan& p) {
  const int64_t units = layer_grid(n, p).cta_rows, columns = head_grid(n, p).cta_rows;
  const int64_t cta_rows = units > columns ? units : columns;  // one is a multiple of the other
  StepsLayout s{};
  s.rows = ceil_of(p.rows, cta_rows) * cta_rows;
  s.stride = cluster_split(n, 1).k_tiles * kTileSide;
  s.step = s.launch + kCallBytes;
  s.ids = s.step + 16;
  s.logits = s.ids + to_16(4 * s.rows);
  s.h = s.logits + 4 * p.rows * columns_of(n);
  s.end = s.h + 2 * n.L * s.rows * s.stride * (4 / n.per_word);
  return s;
}

// Rows that a CTA draws, and its memory for that.
FR_PLAN int64_t drawn_by_cta(const NetworkSizes& n) { return n.V > 256 ? 1 : kClusterWarps; }
FR_PLAN DrawLayout steps_draw(const NetworkSizes& n) { return draw_layout(n, 0, drawn_by_cta(n), kClusterWarps); }

// With kernels of the whole GPU. It fits but where a vocabulary's sums do not fit into a CTA.
inline GeneratePlan plan_steps(const NetworkSizes& n, int64_t rows, const GenerateDevice& device) {
  GeneratePlan p{};
  p.way = Way::steps, p.cluster = 1, p.threads = 32 * kClusterWarps;
  p.rows = std::max<int64_t>(rows, 1);
  p.blocks = ceil_of(p.rows, drawn_by_cta(n));
  p.shared_bytes = p.needed_bytes = steps_draw(n).end;
  p.fits = p.shared_bytes <= device.shared_limit;
  const bool many = p.rows > 2 * kTileRows;
  // Float reads its weights anew for every tile of rows, and so has nothing to gain from several at a time.
  p.row_tiles = many && n.per_word == 2 ? kMostRowTiles : 1;
  const auto fills = [&](int64_t tiles) {
    return many && 2 * step_grid(tiles, 1, p.rows, p.row_tiles, true).blocks >= device.multiprocessors;
  };
  const ClusterSplit s = steps_split(n);
  p.whole_units = fills(s.unit_tiles), p.whole_columns = fills(s.column_tiles);
  return p;
}

// How a generation of up to `rows` sequences at once runs: the way in which weights move least that takes the network.
inline GeneratePlan plan_generate(const NetworkSizes& n, int64_t rows, const GenerateDevice& device) {
  if (device.first == Way::cta) {
    const GeneratePlan one = plan_one(n, rows, device);
    if (one.fits) return one;
  }
  if (device.first <= Way::cluster) {
    const GeneratePlan some = plan_cluster(n, rows, device);
    if (some.fits) return some;
  }
  return plan_steps(n, rows, device);
}

// Bytes of GenerateCall::scratch.
inline int64_t scratch_bytes(const NetworkSizes& n, const GeneratePlan& p) {
  if (p.way == Way::steps) return steps_layout(n, p).end;
  return p.way == Way::cluster && !p.logits_on_chip ? p.rows * columns_of(n) * 4 : 0;
}

}  // namespace fr::cuda
