// What the kernels of a step (generate_steps.cu) share: what they are given, and the sums of a warp's tile.
#pragma once

#include "generate_tile.cuh"

namespace fr::cuda {

// What the kernels of a step are given: the same in every launch of a graph. All else is in *launch.
struct StepCall {
  NetworkSizes net;
  GeneratePlan plan;
  CellKind cell;
  bool relu;
  ClusterSplit split;
  StepsLayout at;
  const uint32_t* blob;
  DeviceRow* rows;
  float* state;
  unsigned char* scratch;

  template <class T> __device__ T* in(int64_t offset) const { return reinterpret_cast<T*>(scratch + offset); }
  __device__ GenerateCall* launch() const { return in<GenerateCall>(at.launch); }
  __device__ int64_t* step() const { return in<int64_t>(at.step); }
  __device__ int32_t* ids() const { return in<int32_t>(at.ids); }  // as Order::id of a cluster
  __device__ float* logits(int64_t row) const { return in<float>(at.logits) + row * columns_of(net); }
  __device__ const float* floats() const {
    return reinterpret_cast<const float*>(blob + split.all * fragment_words(net));
  }
  // h of a layer and a row, of the steps of a parity. A layer reads that of the step before while it writes the other.
  template <class E> __device__ E* h(int layer, int parity, int64_t row) const {
    return in<E>(at.h) + ((parity * net.L + layer) * at.rows + row) * at.stride;
  }
  __device__ float* carry(int layer, int64_t row) const { return state + ((row * net.L + layer) * 2 + 1) * net.H; }
};

// A warp's place in the grid of a kernel that multiplies tiles of weights, and its view of memory.
template <bool whole, int row_tiles> struct StepTile {
  const StepCall& c;
  Work work;
  int warp, lane;
  int64_t tile, row;  // the first of its rows
  float* parts;

  __device__ StepTile(const StepCall& call, const StepGrid& grid, int64_t parts_of_tile, float* shared)
      : c(call), work(parts_of_tile), warp(static_cast<int>(threadIdx.x / 32)), lane(lane_of_thread()), parts(shared) {
    constexpr int rows = row_tiles * kRows, across = static_cast<int>(kWholeTiles);
    tile = blockIdx.x % grid.tile_groups * grid.cta_tiles + (whole ? warp % across : work.group);
    row = blockIdx.x / grid.tile_groups * grid.cta_rows + (whole ? warp / across * rows : 0);
  }
  // Whether one of the rows runs: the same for all warps that share a tile.
  __device__ bool any_runs() const {
    return __any_sync(kAllLanes, lane < row_tiles * kRows && c.ids()[row + lane] != kIdleRow);
  }
  __device__ int existing() const { return static_cast<int>(at_most<int64_t>(row_tiles * kRows, c.plan.rows - row)); }
  // Element i of the lane in tile n of the rows.
  __device__ int64_t row_of(int n, int i) const { return row + n * kRows + lane % 4 * 2 + i % 2; }
  __device__ int unit_of(int i) const { return static_cast<int>(tile * kUnits) + lane / 4 + i / 2 * 8; }

  template <class E> struct Weights {
    const Fragment<E>* from;
    __device__ Fragment<E> operator[](int i) const { return load_fragment(from + i * 32); }
  };
  template <class E> __device__ Weights<E> weights(int64_t fragment) const {
    return {reinterpret_cast<const Fragment<E>*>(c.blob) + fragment * 32 + lane};
  }
  __device__ int stride() const { return static_cast<int>(c.at.stride); }
  __device__ int k_tiles() const { return static_cast<int>(c.split.k_tiles); }
  __device__ float* partial() const { return parts; }
};

// Of a warp's tile: add(sums, work) adds the products of a part of k; start and use as in TileSums::total, here of all
// elements of the lane where the warp has the tile to itself.
template <class M, int values, bool whole, int row_tiles, class Add, class Start, class Use>
FR_DEVICE void sum_tile(const StepTile<whole, row_tiles>& s, bool has_tile, const Add& add, const Start& start,
                        const Use& use) {
  constexpr int ahead = M::on_tensor_cores && row_tiles == 1 ? 4 : 2;
  TileSums<M, values, row_tiles, ahead> sums;
  if constexpr (!whole) {
    const int part = s.work.part;
    float given[row_tiles][values] = {};  // of the first element that the warp adds up: on its way meanwhile
    if (has_tile && part < 4)
#pragma unroll
      for (int n = 0; n < row_tiles; ++n) start(n, part, given[n]);
    if (has_tile) sums.start(s.existing()), add(sums, s.work), sums.finish();
    const auto start_late = [&](int n, int i, float (&all)[values]) {
      if (i != part) return start(n, i, all);
#pragma unroll
      for (int v = 0; v < values; ++v) all[v] = given[n][v];
    };
    sums.total(s, s.work, has_tile, 0, start_late, use);
  } else {
    if (!has_tile) return;
    float all[row_tiles][4][values];
#pragma unroll
    for (int n = 0; n < row_tiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) start(n, i, all[n][i]);
    Work work = s.work;
#pragma unroll 1
    for (work.part = 0; work.part < work.parts; ++work.part) {
      sums.start(s.existing()), add(sums, work), sums.finish();
#pragma unroll
      for (int n = 0; n < row_tiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int v = 0; v < values; ++v) all[n][i][v] += sums.of[n].sum[v][i];
    }
#pragma unroll
    for (int n = 0; n < row_tiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) use(n, i, all[n][i]);
  }
}

// Of shared memory, for the parts of sums.
template <int values, bool whole, int row_tiles>
constexpr int kPartialFloats = whole ? 1 : (row_tiles > 1 ? 2 : 1) * kMaxWarps * values * kSums;

}  // namespace fr::cuda
