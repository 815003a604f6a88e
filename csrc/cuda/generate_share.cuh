// A CTA's share of a network that a cluster runs (generate_cluster.cu): its view of its memory.
#pragma once

#include "generate_tile.cuh"

namespace fr::cuda {

// What every CTA is told of a row after its draw.
struct alignas(8) Order {
  int32_t id;       // what the next step reads, as in DeviceRow; kIdleRow: the row runs nothing
  int32_t request;  // the place in the queue of the request that it begins with, or kNoRequest
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
  // From a fragment on: the first ones of all are kept.
  template <class E> struct Weights {
    const Fragment<E>*kept, *streamed;
    int count;  // that are kept
    __device__ Fragment<E> operator[](int i) const { return load_fragment((i < count ? kept : streamed) + i * 32); }
  };
  template <class E> __device__ Weights<E> weights(int64_t fragment) const {
    const int64_t first = fragment * 32 + lane;
    return {in<const Fragment<E>>(at.weights) + first, reinterpret_cast<const Fragment<E>*>(blob()) + first,
            static_cast<int>(c.plan.resident - fragment)};
  }
  __device__ int stride() const { return static_cast<int>(at.stride); }
  __device__ int k_tiles() const { return static_cast<int>(split.k_tiles); }
  __device__ float* partial() const { return in<float>(at.partial); }
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
    if (!c.plan.logits_on_chip) return static_cast<float*>(c.scratch) + (first + r) * at.logits_row;
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

}  // namespace fr::cuda
