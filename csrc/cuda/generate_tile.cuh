// Products of tiles of weights with the states of rows, and what the sums of a unit become: what generate_cluster.cu
// and generate_steps.cu have in common.
#pragma once

#include "cell_tile.cuh"
#include "generate_rows.cuh"

namespace fr::cuda {

static_assert(kTileSide == kUnits && kTileRows == kRows && kClusterWarps == kMaxWarps);
constexpr int kThreads = 32 * kClusterWarps, kSums = 4 * 32;  // sums of a tile: of a lane, of a warp

// A warp's work on tiles: `part` of the `parts` that k is cut into, of the tiles group, group + groups ...
struct Work {
  int parts, part, group, groups;
  __device__ explicit Work(int64_t parts_of_tile) : parts(static_cast<int>(parts_of_tile)) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    part = warp & (parts - 1), group = warp / parts, groups = kMaxWarps / parts;
  }
};

// The sums of a unit: a gate each, as in PyTorch; the GRU's n has one of its input's part and, the last, one of its
// hidden state's. RNN: the first alone. Which of them the products of an input and of a hidden state have, as bits:
FR_DEVICE unsigned input_gates(const NetworkSizes& n) { return (1u << n.gates) - 1; }
FR_DEVICE unsigned hidden_gates(CellKind cell, const NetworkSizes& n) {
  return cell == CellKind::gru ? 0b1011 : input_gates(n);
}

// What the sums of a unit are added to: the table's row of the id that is read, or the bias. floats: of the blob.
FR_DEVICE void load_given(CellKind cell, const NetworkSizes& n, const float* floats, int layer, int unit, int32_t id,
                          float (&given)[kSumsOfUnit]) {
  const int64_t units = units_of(n);
  const float* from = floats + bias_in(n, layer);
  if (layer == 0) from = floats + table_in(n) + (id < 0 ? 0 : id) * n.gates * units;
#pragma unroll
  for (int v = 0; v < kSumsOfUnit; ++v) given[v] = v < n.gates ? from[v * units + unit] : 0.0f;
  if (cell == CellKind::gru) given[3] = floats[bias_q_in(n, layer) + unit];
}

// The new h of a unit from its sums; `carried` is updated.
FR_DEVICE float state_from(CellKind cell, bool relu, const float (&sum)[kSumsOfUnit], float& carried) {
  if (cell == CellKind::lstm) return new_state<CellKind::lstm>(sum, 0.0f, false, carried);
  if (cell == CellKind::gru) {
    const float gates[3] = {sum[0], sum[1], sum[3]};
    return new_state<CellKind::gru>(gates, sum[2], false, carried);
  }
  const float gates[1] = {sum[0]};
  return new_state<CellKind::rnn>(gates, 0.0f, relu, carried);
}

// The weights of a fragment that are the lane's, 16 bytes at a time; p is aligned to that.
template <class E> FR_DEVICE Fragment<E> load_fragment(const Fragment<E>* p) {
  Fragment<E> f;
  uint4 parts[sizeof f / 16];
#pragma unroll
  for (size_t i = 0; i < sizeof f / 16; ++i) parts[i] = reinterpret_cast<const uint4*>(p)[i];
  memcpy(&f, parts, sizeof f);
  return f;
}

// The sums of a warp's part of a tile, for row_tiles tiles of 8 rows, while products are added to them. A CTA's view S
// of its memory has weights(fragment) of the lane from a fragment on, stride() and k_tiles() of h, warp and lane, and
// partial() for the parts' sums. ahead: tiles along k that are on their way from memory together.
template <class M, int values, int row_tiles, int ahead = 1> struct TileSums {
  using E = typename M::E;
  // Where float is multiplied registers are dear: what can is loaded when it is needed, for all rows of a tile.
  static constexpr bool weights_ahead = M::on_tensor_cores || ahead > 1, rows_ahead = M::on_tensor_cores;
  static constexpr int held = rows_ahead ? 1 : kRows;  // rows of a tile that a lane multiplies
  struct Loaded {
    Fragment<E> weights[values];
    Four<E> factor[row_tiles][held];
  };
  Products<M, values> of[row_tiles];

  // existing: of the rows from the first tile on
  FR_DEVICE void start(int existing) {
#pragma unroll
    for (int n = 0; n < row_tiles; ++n) of[n].start(existing - n * kRows);
  }
  // Adds h times the weights of a tile that begin at a fragment, (tiles of k, gates): a gate for each bit of `gates`,
  // which says to which sum it is added.
  template <class S> FR_DEVICE void add(const S& s, const Work& work, int64_t fragment, const E* h, unsigned gates) {
    const int k_tiles = s.k_tiles(), stride = s.stride(), each = __popc(gates);
    const auto from = s.template weights<E>(fragment);
    h += (rows_ahead ? s.lane / 4 : 0) * stride + s.lane % 4 * 4;
    const auto load = [&](int k, Loaded& t) {
      int next = k * each;
#pragma unroll
      for (int v = 0; v < values && weights_ahead; ++v)
        if (gates >> v & 1) t.weights[v] = from[next++];
      if (rows_ahead) load_rows(h + k * kUnits, stride, t);
    };
    const auto multiply = [&](int k, Loaded& t) {
      int next = k * each;
      if (!rows_ahead) load_rows(h + k * kUnits, stride, t);
#pragma unroll
      for (int v = 0; v < values; ++v) {
        if (!(gates >> v & 1)) continue;
        if (!weights_ahead) t.weights[0] = from[next++];
#pragma unroll
        for (int n = 0; n < row_tiles; ++n)
          of[n].add(
              v, t.weights[weights_ahead ? v : 0], [&](int r, int64_t) { return t.factor[n][rows_ahead ? 0 : r]; }, 0);
      }
    };
    Loaded loaded[ahead] = {};
#pragma unroll
    for (int j = 0; j < ahead && ahead > 1; ++j)
      if (work.part + j * work.parts < k_tiles) load(work.part + j * work.parts, loaded[j]);
#pragma unroll 1
    for (int k0 = work.part; k0 < k_tiles; k0 += ahead * work.parts)
#pragma unroll
      for (int j = 0; j < ahead; ++j) {
        const int k = k0 + j * work.parts, next = k + ahead * work.parts;
        if (k >= k_tiles) break;
        if (ahead == 1) load(k, loaded[j]);
        multiply(k, loaded[j]);
        if (ahead > 1 && next < k_tiles) load(next, loaded[j]);
      }
  }
  FR_DEVICE void finish() {
#pragma unroll
    for (int n = 0; n < row_tiles; ++n) of[n].finish();
  }
  // Adds the parts of the tile up. first: the number of the first tile of rows. For each element i of the lane that is
  // this warp's, start(n, i, all) says what the parts are added to and use(n, i, all) gets the sums.
  template <class S, class Start, class Use>
  FR_DEVICE void total(const S& s, const Work& work, bool has_tile, int first, const Start& start, const Use& use) {
#pragma unroll
    for (int n = 0; n < row_tiles; ++n) {  // two buffers take turns: who writes one has seen all read it
      float* buffer = s.partial() + (first + n) % 2 * (kMaxWarps * values * kSums) + s.lane;
      if (has_tile)
#pragma unroll
        for (int v = 0; v < values; ++v)
#pragma unroll
          for (int i = 0; i < 4; ++i) buffer[(s.warp * values + v) * kSums + i * 32] = of[n].sum[v][i];
      if (work.parts > 1) __syncthreads();
      if (!has_tile) continue;
      const float* const parts = buffer + work.group * work.parts * values * kSums;
#pragma unroll 1  // few registers are worth more than what the compiler would compute ahead
      for (int i = work.part; i < 4; i += work.parts) {
        float all[values];
        start(n, i, all);
#pragma unroll 4
        for (int part = 0; part < work.parts; ++part)
#pragma unroll
          for (int v = 0; v < values; ++v) all[v] += parts[(part * values + v) * kSums + i * 32];
        use(n, i, all);
      }
    }
  }

 private:
  static FR_DEVICE void load_rows(const E* h, int stride, Loaded& t) {
#pragma unroll
    for (int n = 0; n < row_tiles; ++n)
#pragma unroll
      for (int r = 0; r < held; ++r) t.factor[n][r] = *reinterpret_cast<const Four<E>*>(h + (n * kRows + r) * stride);
  }
};

}  // namespace fr::cuda
