// A CTA's share of a network that a cluster runs (generate_cluster.cu): its view of its memory, and the products of its
// weights with the states of the rows.
#pragma once

#include "cell_tile.cuh"
#include "generate.h"

namespace fr::cuda {

static_assert(kTileSide == kUnits && kTileRows == kRows && kClusterWarps == kMaxWarps);
constexpr int kThreads = 32 * kClusterWarps, kSums = 4 * 32;  // sums of a tile: of a lane, of a warp

// What every CTA is told of a row after its draw.
struct alignas(8) Order {
  int32_t id;       // what the next step reads, as in DeviceRow; kIdleRow: the row runs nothing
  int32_t request;  // the place in the queue of the request that it begins with, or kNoRequest
};

// A warp's work on tiles: `part` of the `parts` that k is cut into, of the tiles group, group + groups ...
struct Work {
  int parts, part, group, groups;
  __device__ explicit Work(int64_t parts_of_tile) : parts(static_cast<int>(parts_of_tile)) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    part = warp & (parts - 1), group = warp / parts, groups = kMaxWarps / parts;
  }
};

// What a launch is given.
struct ClusterCall {
  GenerateCall call;
  ClusterSplit split;
  ClusterLayout at;
};

// A CTA's share of the cluster's work, and its view of its memory.
struct Share {
  const GenerateCall& c;
  const ClusterSplit& split;
  const ClusterLayout& at;
  unsigned char* memory;
  int cluster, shift, rank, warp, lane, layers;  // cluster: a power of two, 1 << shift
  int existing;                                  // rows of the cluster that the call has
  int64_t first;                                 // the number of the cluster's first row

  __device__ Share(const ClusterCall& call, unsigned char* shared)
      : c(call.call), split(call.split), at(call.at), memory(shared) {
    cluster = static_cast<int>(c.plan.cluster), shift = __ffs(cluster) - 1;
    rank = static_cast<int>(blockIdx.x & (cluster - 1)), layers = static_cast<int>(c.net.L);
    warp = static_cast<int>(threadIdx.x / 32), lane = lane_of_thread();
    first = (blockIdx.x >> shift) * c.plan.block_rows;
    existing = static_cast<int>(at_most<int64_t>(c.plan.block_rows, c.plan.rows - first));
  }
  template <class T> __device__ T* in(int64_t offset) const { return reinterpret_cast<T*>(memory + offset); }
  __device__ Order* orders() const { return in<Order>(at.orders); }
  // The CTA's weights, and the floats of all.
  __device__ const uint32_t* blob() const { return c.blob + rank * at.cta_words; }
  __device__ const float* floats() const { return reinterpret_cast<const float*>(c.blob + (at.cta_words << shift)); }
  // h of a layer at a step, `turn` being the step modulo L + 1. While a layer makes its h of the next step, the layers
  // below have made theirs and the layer below needs its old one no more: L + 1 slots do.
  template <class E> __device__ E* h(int layer, int turn) const {
    return in<E>(at.h) + (layer - turn + (layer < turn ? layers + 1 : 0)) * at.slot;
  }
  __device__ int after(int turn) const { return turn == layers ? 0 : turn + 1; }
  // Where the float of one unit of a row is kept that goes from step to step; unit: of the CTA.
  __device__ float* carry(int layer, int unit, int row) const {
    const int i = unit / 8 % 2 * 2 + row % 2, of_lane = unit % 8 * 4 + row % 8 / 2;
    const int64_t tile = (layer * split.unit_tiles + unit / kUnits) * (c.plan.block_rows / kRows) + row / kRows;
    return in<float>(at.carry) + (tile * 4 + i) * 32 + of_lane;
  }
  __device__ int first_unit() const { return static_cast<int>(rank * split.unit_tiles * kUnits); }
  __device__ int units_end() const {
    return static_cast<int>(at_most<int64_t>(c.net.H, first_unit() + split.unit_tiles * kUnits));
  }
  // Row r of the cluster is drawn by CTA r modulo the cluster.
  __device__ float* logits(int r) const {
    if (!c.plan.logits_on_chip) return c.logits + (first + r) * at.logits_row;
    float* const own = in<float>(at.logits) + (r >> shift) * at.logits_row;
    const int drawn_by = r & (cluster - 1);
    return drawn_by == rank ? own : cluster_map(own, static_cast<unsigned>(drawn_by));
  }
  // What goes to and comes from global memory between the two holds up no other CTA.
  __device__ void arrive() const {
    if (cluster > 1) cluster_arrive();
  }
  __device__ void wait() const {
    if (cluster > 1)
      cluster_wait();
    else
      __syncthreads();
  }
  __device__ void meet() const { arrive(), wait(); }
};

// The sums of a warp's part of a tile, for row_tiles tiles of 8 rows, while products are added to them.
template <class M, int values, int row_tiles> struct TileSums {
  using E = typename M::E;
  Products<M, values> of[row_tiles];

  // existing: of the rows from the first tile on
  FR_DEVICE void start(int existing) {
#pragma unroll
    for (int n = 0; n < row_tiles; ++n) of[n].start(existing - n * kRows);
  }
  // Adds h times the weights of a tile that begin at a fragment, (tiles of k, gates): a gate for each bit of `gates`,
  // which says to which sum it is added.
  FR_DEVICE void add(const Share& s, const Work& work, int64_t fragment, const E* h, unsigned gates) {
    constexpr bool ahead = M::on_tensor_cores;  // where float is multiplied registers are dear
    constexpr int held = ahead ? 1 : kRows;     // rows of a tile that a lane multiplies
    const auto resident = static_cast<int>(s.c.plan.resident), stride = static_cast<int>(s.at.stride);
    const auto k_tiles = static_cast<int>(s.split.k_tiles), each = __popc(gates);
    const auto* kept = s.in<const Fragment<E>>(s.at.weights) + s.lane;
    const auto* streamed = reinterpret_cast<const Fragment<E>*>(s.blob()) + s.lane;
    h += (ahead ? s.lane / 4 : 0) * stride + s.lane % 4 * 4;
#pragma unroll 1
    for (int k = work.part; k < k_tiles; k += work.parts) {
      int next = static_cast<int>(fragment) + k * each;
      const auto load = [&] {
        const int i = next++;
        return (i < resident ? kept : streamed)[i * 32];
      };
      Fragment<E> weights[values] = {};
      Four<E> factor[row_tiles][held];
#pragma unroll
      for (int v = 0; v < values && ahead; ++v)
        if (gates >> v & 1) weights[v] = load();
#pragma unroll
      for (int n = 0; n < row_tiles; ++n)
#pragma unroll
        for (int r = 0; r < held; ++r)
          factor[n][r] = *reinterpret_cast<const Four<E>*>(h + (n * kRows + r) * stride + k * kUnits);
#pragma unroll
      for (int v = 0; v < values; ++v) {
        if (!(gates >> v & 1)) continue;
        if (!ahead) weights[0] = load();
#pragma unroll
        for (int n = 0; n < row_tiles; ++n)
          of[n].add(v, weights[ahead ? v : 0], [&](int r, int64_t) { return factor[n][ahead ? 0 : r]; }, 0);
      }
    }
  }
  FR_DEVICE void finish() {
#pragma unroll
    for (int n = 0; n < row_tiles; ++n) of[n].finish();
  }
  // Adds the parts of the tile up. first: the number of the first tile of rows. For each element i of the lane that is
  // this warp's, start(n, i, all) says what the parts are added to and use(n, i, all) gets the sums.
  template <class Start, class Use>
  FR_DEVICE void total(const Share& s, const Work& work, bool has_tile, int first, const Start& start, const Use& use) {
#pragma unroll
    for (int n = 0; n < row_tiles; ++n) {  // two buffers take turns: who writes one has seen all read it
      float* buffer = s.in<float>(s.at.partial) + (first + n) % 2 * (kMaxWarps * values * kSums) + s.lane;
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
};

}  // namespace fr::cuda
