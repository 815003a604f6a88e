// Which kernel runs a sequence, and how it is cut: pure functions of sizes and of the device, so that they can be
// tested over all sizes without one.
//
// A warp owns 16 units and 8 rows of the batch (a tile), or four times those rows; a CTA is up to 8 warps. W_hh is cut
// into fragments of 16 x 16 numbers, which stay in registers and in shared memory for the whole sequence. Where one CTA
// cannot hold them, the units are spread over the CTAs of a cluster.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cells.h"

namespace fr::cuda {

constexpr int kUnits = 16, kRows = 8, kMaxWarps = 8;

struct Device {
  int64_t shared_bytes;  // what one CTA may have
  int64_t processors;
  int64_t cluster;  // the largest cluster of CTAs that can run, 1 where there are none
  // Asked for by want_plan: row tiles, or 0; CTAs of a cluster, 0 for a launch a step, or -1. What does not fit is a
  // launch a step.
  int64_t wanted_row_tiles = 0, wanted_cluster = -1;
};

struct Plan {
  bool resident;         // else a launch a step
  int64_t row_tiles;     // tiles of 8 rows that a warp owns: 1 or 4
  int64_t cluster;       // CTAs that share a slice of the batch
  int64_t warps;         // of a CTA, 16 units each
  int64_t unit_tiles;    // H / 16, rounded up
  int64_t stride;        // numbers between the rows of h (forward) or of dp (backward) in shared memory
  int64_t weight_bytes;  // of shared memory, before the rows
  int64_t shared_bytes;
  int64_t slices;  // of the batch
};

constexpr int64_t element_bytes(Precision p) { return p == Precision::f16 || p == Precision::bf16 ? 2 : 4; }
constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// How many of a warp's tiles of W_hh along k lie in registers: as many as leave room in a thread's 255 for all else, as
// the compiler tells. A fragment takes a thread 4 registers of 16-bit numbers or 8 of float; sums of float products in
// full precision take 16 a gate, and four tiles of rows leave no room.
constexpr int kept_tiles(Precision p, int gates, int row_tiles) {
  if (row_tiles > 1) return 0;
  const int fragments = p == Precision::f32 ? 4 : p == Precision::tf32 ? 10 : 28;
  return std::min(fragments / gates, 16);
}

// The row tiles of a launch a step where the batch fills them. Float reads its weights anew for every tile, and so has
// nothing to gain from more than one.
constexpr int step_tiles(Precision p) { return p == Precision::f32 ? 1 : 4; }

// A row is padded so that the threads of one load meet different banks: rows 32 bytes (16-bit) or 64 bytes (float)
// apart from a multiple of 128.
constexpr int64_t operand_stride(Precision p, int64_t columns) {
  const int64_t bytes = columns * element_bytes(p), apart = element_bytes(p) == 2 ? 32 : 64;
  return (ceil_div(bytes - apart, 128) * 128 + apart) / element_bytes(p);
}

// The cut with that many row tiles and CTAs; resident says whether it fits.
constexpr Plan cut(int gates, bool backward, Precision p, int64_t H, int64_t B, int64_t row_tiles, int64_t cluster,
                   int64_t shared_limit) {
  Plan plan{};
  plan.row_tiles = row_tiles, plan.cluster = cluster;
  plan.unit_tiles = ceil_div(H, kUnits), plan.warps = ceil_div(plan.unit_tiles, cluster);
  plan.slices = ceil_div(B, kRows * row_tiles);
  const int64_t in_shared = std::max<int64_t>(plan.unit_tiles - kept_tiles(p, gates, static_cast<int>(row_tiles)), 0);
  plan.stride = operand_stride(p, plan.unit_tiles * kUnits * (backward ? gates : 1));
  plan.weight_bytes = plan.warps * in_shared * gates * kUnits * kUnits * element_bytes(p);
  plan.shared_bytes = plan.weight_bytes + 2 * kRows * row_tiles * plan.stride * element_bytes(p);
  plan.resident = plan.warps <= kMaxWarps && plan.shared_bytes <= shared_limit;
  return plan;
}

// Estimated cycles of one step for the whole batch. A product waits about 33 cycles; shared memory gives 128 bytes a
// cycle; a processor multiplies 1024 pairs of 16-bit numbers a cycle by mma.sync, half of that in tf32, 128 in float;
// gates and the loads about them take some 300 cycles, meeting the CTA's warps 50, those of a cluster 1000 (published
// figures of the H100; only their proportions matter here).
constexpr int64_t step_cycles(const Plan& plan, int gates, Precision p, const Device& device) {
  const int64_t products = plan.warps * plan.unit_tiles * gates * kUnits * kUnits * kRows * plan.row_tiles;
  const int64_t speed = p == Precision::f32 ? 128 : p == Precision::tf32 ? 1024 : 2048;
  const int64_t work = std::max({plan.unit_tiles * 33, plan.weight_bytes / 128, products / speed});
  const int64_t meeting = plan.cluster == 1 ? 50 : 1000 + 20 * plan.cluster;
  const int64_t at_once = std::max<int64_t>(device.processors / plan.cluster, 1);
  return ceil_div(plan.slices, at_once) * (work + meeting + 300 * plan.row_tiles);
}

// How a sequence runs: the resident cut that is estimated to be the fastest, or a launch a step where none fits.
constexpr Plan sequence_plan(int gates, bool backward, Precision p, int64_t H, int64_t B, const Device& device) {
  Plan best{};
  int64_t least = 0;
  for (int64_t row_tiles : {1, 4}) {
    for (int64_t cluster = 1; cluster <= device.cluster; cluster *= 2) {
      if (device.wanted_row_tiles > 0 && row_tiles != device.wanted_row_tiles) continue;
      if (device.wanted_cluster >= 0 && cluster != device.wanted_cluster) continue;
      const Plan plan = cut(gates, backward, p, H, B, row_tiles, cluster, device.shared_bytes);
      if (!plan.resident) continue;
      const int64_t cycles = step_cycles(plan, gates, p, device);
      if (!best.resident || cycles < least) best = plan, least = cycles;
    }
  }
  if (best.resident) return best;
  best.row_tiles = std::min<int64_t>(step_tiles(p), device.wanted_row_tiles > 0 ? device.wanted_row_tiles
                                                    : B <= 2 * kRows            ? 1
                                                                                : 4);
  best.cluster = 1, best.warps = kMaxWarps;
  best.unit_tiles = ceil_div(H, kUnits), best.slices = ceil_div(B, kRows * best.row_tiles);
  return best;
}

}  // namespace fr::cuda
