// The products of the generation loop by vectors: with float32 weights, and for processors without matrix tiles with
// bfloat16 weights, which are multiplied pair by pair or, where there is no instruction for that, widened as they are
// read. This file compiles itself once per instruction set (each_isa.h).
#ifndef FR_ISA

#include <cstring>

#include "decoder.h"
#include "simd.h"
#define FR_WITH_DOTS
#define FR_FILE "decode.cpp"
#include "each_isa.h"

#else

#include "vec.h"
#include "../cell_math.h"
#include "panel.h"
#include "activations.h"

namespace fr {
namespace FR_ISA {

// What meets a Weight in a product: `Activation`, stored as `count` of State, along k. Those of float are floats, those
// of bf16 the floats nearest to a state that a bfloat16 holds, those of Bf16Pair two neighbours.
template <class Weight> struct Link {
  using Activation = float;
  using State = float;
  static constexpr int64_t count = 1;
};
template <> struct Link<Bf16Pair> {
  using Activation = Bf16Pair;
  using State = bf16;
  static constexpr int64_t count = 2;
};
template <class Weight> FR_INLINE void store_state(Vec<float> h, typename Link<Weight>::State* to) {
  if constexpr (sizeof(Weight) == sizeof(bf16))
    nearest_bfloat16(h).store(to);
  else
    store(h, to);
}
// K of a matrix, in products of a sum.
template <class Weight> FR_INLINE int64_t links(const Panels& m) { return m.K / Link<Weight>::count; }

// What the tiles of one panel share.
template <class Weight> struct CellPanel {
  const LayerJob& job;
  const Weight *input, *hidden;  // this panel's weights
  const Weight* next;            // what is read after them, or null
  const float *bias, *bias_q;
  int64_t p;

  using Activation = typename Link<Weight>::Activation;
  using State = typename Link<Weight>::State;
  FR_INLINE const Activation* a1(int64_t r) const {
    return reinterpret_cast<const Activation*>(static_cast<const char*>(job.a1) + r * job.row1);
  }
  FR_INLINE const Activation* a2(int64_t r) const {
    return reinterpret_cast<const Activation*>(static_cast<const char*>(job.a2) + r * job.network->row);
  }
  // Where the sums of row r begin, of a layer with `products` of them a row and `width` in a panel.
  FR_INLINE const float* start(int64_t r, int64_t products, int64_t width) const {
    return job.init ? job.init + (job.index ? job.index[r] : r) * products + p * width : bias;
  }
  FR_INLINE State* out(int64_t r) const {
    return reinterpret_cast<State*>(static_cast<char*>(job.out) + r * job.network->row);
  }
};

// The state of one unit vector of row r from its pre-activations; xn: the GRU's input part of n.
template <Cell C, int NV, class Weight>
FR_INLINE void finish(const CellPanel<Weight>& panel, int64_t p, int64_t r, const Vec<float>* acc, Vec<float> xn) {
  using V = Vec<float>;
  auto* out = panel.out(r) + p * (C == Cell::lstm || C == Cell::gru ? 1 : NV) * V::width;
  if constexpr (C == Cell::lstm || C == Cell::gru) {
    float* carry = panel.job.carry + (p * panel.job.carry_rows + r) * V::width;
    if constexpr (C == Cell::lstm) {
      const LstmStep<V> s = lstm_step(acc[0], acc[1], acc[2], acc[3], V::load(carry));
      s.c.store(carry);
      store_state<Weight>(s.m, out);
    } else {
      const GruStep<V> s = gru_step(acc[0], acc[1], xn, acc[2], V::load(carry));
      s.h.store(carry);
      store_state<Weight>(s.h, out);
    }
  } else {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store_state<Weight>(rnn_step(acc[n], C == Cell::rnn_relu), out + n * V::width);
  }
}

// Rows r .. r + MR of PN panels.
template <Cell C, int NV, int MR, int PN, class Weight>
static void cell_tile(const CellPanel<Weight>& panel, int64_t r) {
  using V = Vec<float>;
  const LayerJob& job = panel.job;
  const int64_t p = panel.p, products = job.layer->hidden.count * NV * V::width;
  const int64_t K1 = job.a1 ? links<Weight>(job.layer->input) : 0, K2 = links<Weight>(job.layer->hidden);
  V acc[MR][PN * NV], xn[MR][PN];
  const typename Link<Weight>::Activation *a1[MR], *a2[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    const int64_t row = r + m;
    const float* init = panel.start(row, products, NV * V::width);
#pragma GCC unroll 8
    for (int n = 0; n < PN * NV; ++n) acc[m][n] = V::load(init + n * V::width);
    a1[m] = K1 ? panel.a1(row) : nullptr;
    a2[m] = panel.a2(row);
  }
  if (K1) panel_product<float, MR, PN, NV>(panel.input, K1 * NV * V::width, a1, K1, acc);
  if constexpr (C == Cell::gru) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int i = 0; i < PN; ++i) {
        xn[m][i] = acc[m][i * NV + 2];
        acc[m][i * NV + 2] = V::load(panel.bias_q + i * V::width);
      }
  }
  panel_product<float, MR, PN, NV>(panel.hidden, K2 * NV * V::width, a2, K2, acc);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < PN; ++i) finish<C, NV>(panel, p + i, r + m, &acc[m][i * NV], xn[m][i]);
}

// tile<MR> for the rows r .. r + size, of at most MR.
template <int MR, class Tile> FR_INLINE void tile_of(int64_t size, int64_t r, const Tile& tile) {
  if (MR == 1 || size == MR) return tile(std::integral_constant<int, MR>{}, r);
  if constexpr (MR > 1) tile_of<MR - 1>(size, r, tile);
}
// Runs tile<MR> over `rows` rows in tiles of even size, at most tile_rows<NV>().
template <int NV, class Tile> FR_INLINE void even_tiles(int64_t rows, const Tile& tile) {
  constexpr int most = tile_rows<NV>();
  int64_t tiles = (rows + most - 1) / most;
  for (int64_t r = 0; r < rows; --tiles) {
    const int64_t size = (rows - r + tiles - 1) / tiles;
    tile_of<most>(size, r, tile);
    r += size;
  }
}

// sums[m] += a[m] w for MR rows, over K links of each; K vectors are asked for at `next`.
template <int NV, int MR, class Weight>
static void add_tile(const Weight* w, int64_t K, const char* a, int64_t row, float* sums, int64_t sums_row,
                     const Weight* next) {
  using V = Vec<float>;
  V acc[MR][NV];
  using Activation = typename Link<Weight>::Activation;
  const Activation* rows[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    rows[m] = reinterpret_cast<const Activation*>(a + m * row);
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[m][n] = V::load(sums + m * sums_row + n * V::width);
  }
  panel_product<float, MR, 1, NV>(w, 0, rows, K, acc, next);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[m][n].store(sums + m * sums_row + n * V::width);
}

constexpr int64_t kStretchBytes = 24 << 10;  // of weights: half of an L1 cache
constexpr int64_t kGroupRows = 48;           // whose sums stay there meanwhile

// sums[r] += a[r] w for one panel, a stretch of k at a time: it comes from L2 once and meets all the rows in L1. While
// they meet, the tiles of rows ask for the next stretch, a share each; `after` (or null) is what follows the last one.
template <int NV, class Weight>
static void add_panel(const Weight* w, int64_t K, const char* a, int64_t row, int64_t rows, float* sums,
                      int64_t sums_row, const Weight* after) {
  constexpr int64_t W = Vec<float>::width, width = NV * W;
  constexpr int64_t step = kStretchBytes / (width * static_cast<int64_t>(sizeof(Weight)));
  constexpr int64_t link_bytes = sizeof(typename Link<Weight>::Activation);
  for (int64_t k = 0; k < K; k += step) {
    const int64_t count = K - k < step ? K - k : step;
    const Weight* next = k + count < K ? w + (k + count) * width : after;
    int64_t share = 0;
    even_tiles<NV>(rows, [&](auto size, int64_t r) {
      const Weight* wanted = next && share < NV ? next + share++ * count * W : nullptr;
      add_tile<NV, decltype(size)::value>(w + k * width, count, a + r * row + k * link_bytes, row, sums + r * sums_row,
                                          sums_row, wanted);
    });
  }
}

// Rows r .. r + rows (at most kGroupRows) of one panel that does not fit L1.
template <Cell C, int NV, class Weight>
static void cell_group(const CellPanel<Weight>& panel, int64_t first, int64_t rows) {
  using V = Vec<float>;
  constexpr int64_t width = NV * V::width;
  const LayerJob& job = panel.job;
  const int64_t products = job.layer->hidden.count * width;
  alignas(64) float sums[kGroupRows][width], xn[kGroupRows][V::width];
  for (int64_t r = 0; r < rows; ++r)
    for (int n = 0; n < NV; ++n)
      V::load(panel.start(first + r, products, width) + n * V::width).store(sums[r] + n * V::width);
  if (job.a1)
    add_panel<NV>(panel.input, links<Weight>(job.layer->input), reinterpret_cast<const char*>(panel.a1(first)),
                  job.row1, rows, sums[0], width, panel.hidden);
  if constexpr (C == Cell::gru)
    for (int64_t r = 0; r < rows; ++r) {
      V::load(sums[r] + 2 * V::width).store(xn[r]);
      V::load(panel.bias_q).store(sums[r] + 2 * V::width);
    }
  add_panel<NV>(panel.hidden, links<Weight>(job.layer->hidden), reinterpret_cast<const char*>(panel.a2(first)),
                job.network->row, rows, sums[0], width, panel.next);
  for (int64_t r = 0; r < rows; ++r) {
    V acc[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[n] = V::load(sums[r] + n * V::width);
    finish<C, NV>(panel, panel.p, first + r, acc, C == Cell::gru ? V::load(xn[r]) : V(0));
  }
}

// Owns:   out and carry of all rows for the panels of `part`.
// Keeps:  the accumulators of a tile of rows and one or two panels; where a panel exceeds L1 and several tiles meet it,
//         the sums of a group of rows in L1.
// Moves:  a panel from L2 once per group or tile of rows, a1, a2 and init once per panel, out and carry once.
// Syncs:  nothing: the caller waits for all parts before the next layer.
// Limits: none.
template <Cell C, class Weight> static void cell_layer(const LayerJob& job, Part part) {
  constexpr int NV = C == Cell::lstm ? 4 : C == Cell::gru ? 3 : 4;
  constexpr int64_t W = Vec<float>::width;
  const Panels &in = job.layer->input, &hidden = job.layer->hidden;
  const int64_t end = part.end(hidden.count);
  const int64_t K1 = job.a1 ? links<Weight>(in) : 0, K2 = links<Weight>(hidden);
  const int64_t bytes = (K1 + K2) * NV * W * static_cast<int64_t>(sizeof(Weight));
  const bool grouped = job.rows > tile_rows<NV>() && bytes > kStretchBytes;
  for (int64_t p = part.begin(hidden.count); p < end; ++p) {
    CellPanel<Weight> panel{job, nullptr, nullptr, nullptr, nullptr, nullptr, p};
    panel.input = in.weights.as<Weight>() + p * links<Weight>(in) * NV * W;
    panel.hidden = hidden.weights.as<Weight>() + p * K2 * NV * W;
    if (p + 1 < end) panel.next = job.a1 ? panel.input + K1 * NV * W : panel.hidden + K2 * NV * W;
    panel.bias = job.layer->bias.as<float>() + p * NV * W;
    panel.bias_q = job.layer->bias_q.as<float>() + p * W;
    if (job.rows == 1 && p + 1 < end) {
      cell_tile<C, NV, 1, 2>(panel, 0);  // one row of one panel has too few sums under way to keep the units busy
      ++p;
    } else if (grouped) {
      for (int64_t r = 0; r < job.rows; r += kGroupRows)
        cell_group<C, NV>(panel, r, job.rows - r < kGroupRows ? job.rows - r : kGroupRows);
    } else {
      even_tiles<NV>(job.rows, [&](auto size, int64_t r) { cell_tile<C, NV, decltype(size)::value, 1>(panel, r); });
    }
  }
}

template <class Weight> static void layer(const LayerJob& job, Part part) {
  switch (job.network->cell) {
    case Cell::lstm: return cell_layer<Cell::lstm, Weight>(job, part);
    case Cell::gru: return cell_layer<Cell::gru, Weight>(job, part);
    case Cell::rnn_tanh: return cell_layer<Cell::rnn_tanh, Weight>(job, part);
    case Cell::rnn_relu: return cell_layer<Cell::rnn_relu, Weight>(job, part);
  }
}

template <int NV, int MR, class Weight>
static void linear_tile(const LinearJob& job, const Weight* w, const Weight* next, int64_t column, int64_t r) {
  using V = Vec<float>;
  V acc[MR][NV];
  using Activation = typename Link<Weight>::Activation;
  const int64_t K = links<Weight>(*job.panels);
  const Activation* a[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    a[m] = reinterpret_cast<const Activation*>(static_cast<const char*>(job.a) + (r + m) * job.row);
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[m][n] = V::load(job.bias + column + n * V::width);
  }
  const int64_t share = r / MR;  // of the next panel, for which the tile asks meanwhile
  panel_product<float, MR, 1, NV>(w, 0, a, K, acc, next && share < NV ? next + share * K * V::width : nullptr);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[m][n].store(job.out + (r + m) * job.out_row + column + n * V::width);
}

// Rows first .. first + rows (at most kGroupRows) of one panel that does not fit L1.
template <int NV, class Weight>
static void linear_group(const LinearJob& job, const Weight* w, const Weight* next, int64_t column, int64_t first,
                         int64_t rows) {
  using V = Vec<float>;
  alignas(64) float sums[kGroupRows][NV * V::width];
  for (int64_t r = 0; r < rows; ++r)
    for (int n = 0; n < NV; ++n) V::load(job.bias + column + n * V::width).store(sums[r] + n * V::width);
  add_panel<NV>(w, links<Weight>(*job.panels), static_cast<const char*>(job.a) + first * job.row, job.row, rows,
                sums[0], NV * V::width, next);
  for (int64_t r = 0; r < rows; ++r)
    for (int n = 0; n < NV; ++n)
      V::load(sums[r] + n * V::width).store(job.out + (first + r) * job.out_row + column + n * V::width);
}

// Owns:   the columns of `part` of all rows of out.
// Keeps:  the accumulators of a tile; where a panel exceeds L1 and several tiles meet it, the sums of a group in L1.
// Moves:  a panel from L2 once per group or tile of rows, a once per panel, out once.
// Syncs:  nothing.
// Limits: none.
template <int NV, class Weight> static void linear_panels(const LinearJob& job, Part part) {
  const Panels& m = *job.panels;
  const int64_t K = links<Weight>(m);
  constexpr int64_t width = NV * Vec<float>::width;
  const int64_t begin = part.begin(m.count), end = part.end(m.count);
  const bool grouped =
      job.rows > tile_rows<NV>() && K * width * static_cast<int64_t>(sizeof(Weight)) > kStretchBytes * 3 / 2;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t p = job.backwards ? end - 1 - (i - begin) : i;
    const Weight *w = m.weights.as<Weight>() + p * K * width, *next = nullptr;
    if (i + 1 < end) next = job.backwards ? w - K * width : w + K * width;
    if (grouped)
      for (int64_t r = 0; r < job.rows; r += kGroupRows)
        linear_group<NV>(job, w, next, p * width, r, job.rows - r < kGroupRows ? job.rows - r : kGroupRows);
    else
      even_tiles<NV>(job.rows,
                     [&](auto size, int64_t r) { linear_tile<NV, decltype(size)::value>(job, w, next, p * width, r); });
  }
}
template <class Weight> static void linear(const LinearJob& job, Part part) {
  switch (job.panels->vectors) {
    case 1: return linear_panels<1, Weight>(job, part);
    case 2: return linear_panels<2, Weight>(job, part);
    case 3: return linear_panels<3, Weight>(job, part);
    default: return linear_panels<4, Weight>(job, part);
  }
}

template <class Weight> static void pack(const float* w, int64_t rows, int64_t K, int64_t unit_gates, Panels& out) {
  constexpr int64_t W = Vec<float>::width, count = Link<Weight>::count;
  const int64_t width = out.vectors * W, elements = out.count * width * K;
  Memory plain(elements * 4);
  pack_panels(
      w, K, out.count, out.vectors,
      [&](int64_t p, int64_t n, int64_t lane) { return panel_row(p, n, lane, W, out.vectors, rows, unit_gates); },
      plain.as<float>());
  if constexpr (count == 1 && sizeof(Weight) == sizeof(float)) {
    out.weights = static_cast<Memory&&>(plain);
  } else {
    out.weights = Memory(out.count * width * out.K * 2);  // 0 beyond K
    bf16* to = out.weights.as<bf16>();
    for (int64_t p = 0; p < out.count; ++p)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t i = 0; i < width; ++i)
          to[((p * out.K + k) / count * width + i) * count + k % count] =
              to_bfloat16(plain.as<float>()[(p * K + k) * width + i]);
  }
}

template <class Weight> static void to_activations(const float* from, int64_t n, void* to, int64_t) {
  for (int64_t i = 0; i < n; ++i)
    if constexpr (Link<Weight>::count > 1)
      static_cast<bf16*>(to)[i] = to_bfloat16(from[i]);
    else
      static_cast<float*>(to)[i] = sizeof(Weight) == sizeof(float) ? from[i] : widen(to_bfloat16(from[i]));
}
template <class State> static void from_activations(const void* from, int64_t, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(static_cast<const State*>(from)[i]);
}

template <class Weight> static const DecoderKernels& kernels_of() {
  using State = typename Link<Weight>::State;
  static constexpr DecoderKernels kernels = {Vec<float>::width,      sizeof(State),          Link<Weight>::count,
                                             pack<Weight>,           layer<Weight>,          linear<Weight>,
                                             to_activations<Weight>, from_activations<State>};
  return kernels;
}
static const DecoderKernels& vector_decoder(Precision precision) {
  if (precision == Precision::float32) return kernels_of<float>();
#if FR_DOTS
  return kernels_of<Bf16Pair>();
#else
  return kernels_of<bf16>();
#endif
}

}  // namespace FR_ISA
}  // namespace fr

#endif

#ifndef FR_ISA
namespace fr {
const DecoderKernels& vector_decoder(Precision precision) {
  FR_DISPATCH(vector_decoder, precision)
  __builtin_unreachable();
}
}  // namespace fr
#endif
