// Where everything of a generation lies that has one CTA to itself, and whether it fits; generate_cluster_plan.h is
// about clusters, generate_steps_plan.h about kernels of the whole GPU and says which of the three runs. Pure functions
// of sizes, for host and device.
//
// The weights of a network are one blob of 32-bit words: matrices, then floats. Floats: for every layer bias (gates,
// units) and bias_q (units,), the head's bias (columns,), and the table (V, gates, units) of the first layer's
// products. Units are H rounded up to whole warps, columns V so; what is beyond is 0. Matrices, for one CTA: a word is
// a float or two bf16 (of neighbouring k, the lower one in the lower half); for every layer its input's matrix (but the
// first's) and its hidden one, (words of k, gates, units); the head's (words of k, columns).
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__CUDACC__)
#define FR_PLAN __host__ __device__ inline
#else
#define FR_PLAN inline
#endif

namespace fr::cuda {

struct NetworkSizes {
  int64_t L, H, V;
  int64_t gates;     // LSTM 4, GRU 3, RNN 1
  int64_t per_word;  // weights in a word: 1 float or 2 bf16
  bool carries;      // float32 state beside the activations: c of the LSTM, h of the GRU
};

FR_PLAN int64_t whole_warps(int64_t n) { return (n + 31) / 32 * 32; }
FR_PLAN int64_t units_of(const NetworkSizes& n) { return whole_warps(n.H); }
FR_PLAN int64_t columns_of(const NetworkSizes& n) { return whole_warps(n.V); }
FR_PLAN int64_t k_words(const NetworkSizes& n) { return (n.H + n.per_word - 1) / n.per_word; }
FR_PLAN int64_t matrix_words(const NetworkSizes& n) { return k_words(n) * n.gates * units_of(n); }

// Word offsets into the floats.
FR_PLAN int64_t bias_in(const NetworkSizes& n, int64_t layer) { return layer * (n.gates + 1) * units_of(n); }
FR_PLAN int64_t bias_q_in(const NetworkSizes& n, int64_t layer) { return bias_in(n, layer) + n.gates * units_of(n); }
FR_PLAN int64_t head_bias_in(const NetworkSizes& n) { return bias_in(n, n.L); }
FR_PLAN int64_t table_in(const NetworkSizes& n) { return head_bias_in(n) + columns_of(n); }
FR_PLAN int64_t float_words(const NetworkSizes& n) { return table_in(n) + n.V * n.gates * units_of(n); }

// Word offsets into the blob of one CTA.
FR_PLAN int64_t input_at(const NetworkSizes& n, int64_t layer) {
  return (2 * layer - 1) * matrix_words(n);
}  // layer > 0
FR_PLAN int64_t hidden_at(const NetworkSizes& n, int64_t layer) { return 2 * layer * matrix_words(n); }
FR_PLAN int64_t head_at(const NetworkSizes& n) { return (2 * n.L - 1) * matrix_words(n); }
FR_PLAN int64_t floats_at(const NetworkSizes& n) { return head_at(n) + k_words(n) * columns_of(n); }
FR_PLAN int64_t table_at(const NetworkSizes& n) { return floats_at(n) + table_in(n); }
FR_PLAN int64_t blob_words(const NetworkSizes& n) { return floats_at(n) + float_words(n); }

constexpr int64_t kMostThreads = 256, kMostRowsOfBlock = 64;
constexpr int64_t kVotesInShared = 128;  // draws of a vote that are kept on the chip
constexpr int64_t kPublished = 32;       // steps after which the host is told what rows have done
constexpr int64_t kRowBytes = 512;       // of what a CTA keeps of a row beside its state
constexpr int64_t kCallBytes = 512;      // of what a launch is given

// What runs a network: a CTA all of it (generate.cu), a cluster of CTAs (generate_cluster.cu), or the whole GPU, with
// kernels one after the other (generate_steps.cu).
enum class Way { cta, cluster, steps };

// How a generation of `rows` sequences runs, at once as many of them.
struct GeneratePlan {
  Way way;
  bool fits;
  int64_t needed_bytes;  // of shared memory in a CTA with the fewest rows
  int64_t rows, blocks, threads, shared_bytes;
  int64_t cluster;     // CTAs for which the blob is cut; 0: the matrices of one CTA that has all
  int64_t block_rows;  // sequences of a CTA, or of a cluster
  // Of a CTA that has all: each thread has a unit of `tile` sequences.
  int64_t tile;
  bool table_on_chip;
  bool begins;  // tile 1: the products of a step with the hidden states are made beside the draw before it
  // Of a cluster: the fragments of weights that a CTA keeps, where the others are read again each step.
  int64_t resident;
  bool logits_on_chip;
  // Of the whole GPU: tiles of rows that a warp multiplies at a time, and whether it has a tile of units or of columns
  // to itself.
  int64_t row_tiles;
  bool whole_units, whole_columns;
};

FR_PLAN int64_t to_16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// The memory of `teams` teams that draw, `warps` in all, as byte offsets from `at` on.
struct DrawLayout {
  int64_t mass, margins, slots, largest, drawn, end;
};
FR_PLAN int64_t tiles_of_row(const NetworkSizes& n) { return (n.V + 255) / 256; }
FR_PLAN DrawLayout draw_layout(const NetworkSizes& n, int64_t at, int64_t teams, int64_t warps) {
  DrawLayout d{};
  d.mass = at;
  d.margins = d.mass + to_16(8 * teams * tiles_of_row(n));
  d.slots = d.margins + 8 * kVotesInShared * teams;
  d.largest = d.slots + to_16(8 * warps);
  d.drawn = d.largest + to_16(4 * teams * tiles_of_row(n));
  d.end = d.drawn + 4 * kVotesInShared * teams;
  return d;
}

// Byte offsets into the dynamic shared memory of a CTA that has all, multiples of 16.
struct SharedLayout {
  int64_t weights, h, carry, begun, logits, rows, total;
  DrawLayout draw;
  int64_t pitch;       // floats between the values that two units have for a row
  int64_t logits_row;  // floats
};

FR_PLAN SharedLayout shared_layout(const NetworkSizes& n, int64_t block_rows, int64_t tile, int64_t threads,
                                   bool table_on_chip, bool begins) {
  SharedLayout s{};
  s.pitch = tile == 1 ? block_rows : block_rows + 4;  // the rows of a thread's unit are read 16 bytes at a time
  s.logits_row = columns_of(n);
  s.h = to_16(4 * (table_on_chip ? blob_words(n) : table_at(n)));
  s.carry = s.h + to_16(4 * n.L * 2 * k_words(n) * n.per_word * s.pitch);
  s.begun = s.carry + to_16(4 * (n.carries ? n.L * units_of(n) * block_rows : 0));
  s.logits = s.begun + (begins ? 4 * n.L * n.gates * units_of(n) : 0);
  s.rows = s.logits + to_16(4 * block_rows * s.logits_row);
  const int64_t warps = threads / 32, teams = block_rows < warps ? block_rows : warps;
  s.draw = draw_layout(n, s.rows + kRowBytes * block_rows, teams, warps);
  s.total = s.draw.end;
  return s;
}

// A thread for each unit or column of a tile of rows, and a warp for the draw of each row; where a step is begun beside
// the head and the draw, also for the units of all layers.
inline int64_t threads_for(const NetworkSizes& n, int64_t block_rows, int64_t tile, bool begins) {
  if (begins) return std::min(kMostThreads, columns_of(n) + n.L * units_of(n));
  return std::min(kMostThreads, std::max(std::max(units_of(n), columns_of(n)) * (block_rows / tile), 32 * block_rows));
}

// What a GPU has.
struct GenerateDevice {
  int64_t multiprocessors;
  int64_t shared_limit;  // bytes that a CTA may have
  int64_t at_once[5];    // clusters of 1, 2, 4, 8 and 16 CTAs, each with all of its memory, that run together; 0: none
  // For tests and measurements: the ways before this one are not taken; CTAs of a cluster, 0: as it suits.
  Way first = Way::cta;
  int64_t wanted_cluster = 0;
};

// With one CTA for a network: as many of them as there are multiprocessors, or more where a CTA cannot hold its share
// of the rows.
inline GeneratePlan plan_one(const NetworkSizes& n, int64_t rows, const GenerateDevice& device) {
  GeneratePlan p{};
  p.needed_bytes = shared_layout(n, 1, 1, threads_for(n, 1, 1, false), false, false).total;
  p.rows = std::max<int64_t>(rows, 1);
  if (p.needed_bytes > device.shared_limit) return p;
  int64_t share = std::min((p.rows + device.multiprocessors - 1) / device.multiprocessors, kMostRowsOfBlock);
  for (; share >= 1; --share) {
    p.tile = share == 1 ? 1 : 8;
    p.block_rows = (share + p.tile - 1) / p.tile * p.tile;
    for (const bool begins : {true, false})
      for (const bool table : {true, false}) {
        if (begins && p.tile != 1) continue;
        p.begins = begins, p.table_on_chip = table;
        p.threads = threads_for(n, p.block_rows, p.tile, begins);
        p.shared_bytes = shared_layout(n, p.block_rows, p.tile, p.threads, table, begins).total;
        if (p.shared_bytes > device.shared_limit) continue;
        p.fits = true;
        p.blocks = (p.rows + p.block_rows - 1) / p.block_rows;
        return p;
      }
  }
  return p;
}

}  // namespace fr::cuda
