// A whole sequence in one launch, W_hh resident: the kernels that the three cells share, forward and backward.
//
// A Cell is a struct of a cell's equations over its tensors (lstm.cu, gru.cu, rnn.cu):
//   forward   from x, the input's part of the pre-activations, and q = W_hh h + b_hh, makes h and c
//   load      reads what backward needs of a step, early
//   backward  from the gradients that reach h and c makes those of the pre-activations, and leaves in dh and dc those
//             of the h and c before, of h without what goes through W_hh
//   save      writes what either leaves of a step
#pragma once

#include "cell_place.cuh"

namespace fr::cuda {

template <class M, int gates, int row_tiles> constexpr int kept_in = kept_tiles(M::precision, gates, row_tiles);

// A warp's share of W_hh: the first `kept` tiles along k in registers, the others in shared memory.
template <class M, int gates, int kept> struct Weights {
  using E = typename M::E;
  Fragment<E> registers[kept > 0 ? kept : 1][gates];
  Fragment<E>* shared;  // of this lane; the next fragment is 32 further on
  int64_t tiles;
  // get(k tile, gate): a fragment
  template <class Get> FR_DEVICE void load(Fragment<E>* memory, int64_t k_tiles, const Get& get) {
    shared = memory + lane_of_thread(), tiles = k_tiles;
#pragma unroll
    for (int k = 0; k < kept; ++k)
      if (k < tiles)
#pragma unroll
        for (int gate = 0; gate < gates; ++gate) registers[k][gate] = get(k, gate);
    for (int64_t k = kept; k < tiles; ++k)
      for (int gate = 0; gate < gates; ++gate) shared[((k - kept) * gates + gate) * 32] = get(k, gate);
  }
  // Calls add(k tile, gate, fragment) for all, k upwards.
  template <class Add> FR_DEVICE void operator()(const Add& add) const {
#pragma unroll
    for (int k = 0; k < kept; ++k)
      if (k < tiles)
#pragma unroll
        for (int gate = 0; gate < gates; ++gate) add(k, gate, registers[k][gate]);
    for (int64_t k = kept; k < tiles; ++k)
#pragma unroll
      for (int gate = 0; gate < gates; ++gate) add(k, gate, shared[((k - kept) * gates + gate) * 32]);
  }
};

// Where a warp of a resident kernel stands: its slice of the batch, its 16 units, its memory.
template <class M, int gates, int kept, int row_tiles> struct Seat {
  using E = typename M::E;
  const Plan& plan;
  Steps steps;
  int64_t b0, unit0, rows;  // rows of the slice that exist
  int64_t tiles;            // along k; 0 for a warp that has no unit
  int64_t length[row_tiles][2];
  Fragment<E>* weights;
  E* factors;  // two buffers (8 * row_tiles, stride), taking turns
  FR_DEVICE Seat(const Plan& p, const Steps& q, unsigned char* memory) : plan(p), steps(q) {
    const int64_t warp = threadIdx.x / 32, slice = blockIdx.x / p.cluster;
    b0 = slice * kRows * row_tiles, unit0 = (blockIdx.x % p.cluster * p.warps + warp) * kUnits;
    rows = at_most<int64_t>(kRows * row_tiles, q.B - b0), tiles = unit0 < q.H ? p.unit_tiles : 0;
    weights = reinterpret_cast<Fragment<E>*>(memory) + warp * at_least<int64_t>(0, p.unit_tiles - kept) * gates * 32;
    factors = reinterpret_cast<E*>(memory + p.weight_bytes);
#pragma unroll
    for (int n = 0; n < row_tiles; ++n)
      length[n][0] = q.length(b0 + row(n, 0)), length[n][1] = q.length(b0 + row(n, 1));
  }
  // Row in the slice and unit of sum i of tile n
  FR_DEVICE int64_t row(int n, int i) const { return n * 8 + lane_of_thread() % 4 * 2 + i % 2; }
  FR_DEVICE int64_t unit(int i) const { return unit0 + lane_of_thread() / 4 + i / 2 * 8; }
  FR_DEVICE Place place(int64_t s, int n, int i) const {
    return steps.place(s, b0 + row(n, i), unit(i), length[n][i % 2]);
  }
  // Calls work(n, i) for the sums of this lane that are units of rows.
  template <class Work> FR_DEVICE void each(const Work& work) const {
#pragma unroll
    for (int n = 0; n < row_tiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (row(n, i) < rows && unit(i) < steps.H) work(n, i);
  }
  FR_DEVICE E* buffer(int64_t s) const { return factors + s % 2 * kRows * row_tiles * plan.stride; }
  // Writes a factor of a product where the other warps read it; column: of gate after gate.
  FR_DEVICE void show(E* buffer, int n, int i, int64_t column, float v) const {
    buffer[row(n, i) * plan.stride + column] = M::factor(rounded<E>(v));
  }
  // How `multiply` reads what is shown.
  FR_DEVICE auto shown(const E* buffer, int64_t apart) const {
    return [=, stride = plan.stride](int64_t r, int gate, int64_t column) {
      return *reinterpret_cast<const Four<E>*>(buffer + r * stride + gate * apart + column);
    };
  }
  // Both buffers become 0.
  FR_DEVICE void clear() const {
    for (int64_t i = threadIdx.x; i < 2 * kRows * row_tiles * plan.stride; i += blockDim.x)
      factors[i] = rounded<E>(0.0f);
  }
  FR_DEVICE void meet() const { arrive(), wait(); }
  // What goes to and comes from global memory between the two holds up no other CTA.
  FR_DEVICE void arrive() const {
    if (plan.cluster > 1) cluster_arrive();
  }
  FR_DEVICE void wait() const {
    if (plan.cluster > 1)
      cluster_wait();
    else
      __syncthreads();
  }
  // Gives what this warp has shown in a buffer, `parts` times 16 columns that lie `apart`, to the other CTAs of the
  // cluster; 16 bytes at a time.
  FR_DEVICE void hand_out(E* buffer, int parts, int64_t apart) const {
    if (plan.cluster == 1 || tiles == 0) return;
    __syncwarp();
    constexpr int each = 16 / sizeof(E), pieces = kUnits / each;
    const int total = pieces * parts * kRows * row_tiles;
    for (unsigned peer = 1; peer < plan.cluster; ++peer) {
      const unsigned to = (cluster_rank() + peer) & static_cast<unsigned>(plan.cluster - 1);  // a power of two
      for (int i = lane_of_thread(); i < total; i += 32) {
        const int piece = i % pieces, part = i / pieces % parts, r = i / (pieces * parts);
        E* from = buffer + r * plan.stride + part * apart + unit0 + piece * each;
        *reinterpret_cast<uint4*>(cluster_map(from, to)) = *reinterpret_cast<const uint4*>(from);
      }
    }
  }
};

// What a step leaves in memory.
template <class Cell, class E>
__device__ __forceinline__ void keep_step(const CellForward& a, const Place& p, float h,
                                          const typename Cell::Step& step) {
  put<E>(a.y, p.gate(0, 1), p.there ? h : 0.0f);
  Cell::save(a, p, step);
}

// Forward.
// Owns:   all results of a slice of the batch (8 rows, or 32) and of the CTA's units.
// Keeps:  W_hh of its units, in registers and shared memory; h of all units, twice, in shared memory; c in registers.
// Moves:  a step reads gx, one step early where there are 8 rows, and writes y, gates and cells; a cluster's CTAs
//         give each other their h.
// Syncs:  the CTA, or its cluster, once a step: who writes h for the next step has read the h of two steps before.
// Limits: a CTA has 8 warps of 16 units and as much memory as plan.h counts.
template <class Cell, class M, int row_tiles>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) sequence_forward_kernel(CellForward a, Plan plan) {
  constexpr int gates = Cell::gates, kept = kept_in<M, gates, row_tiles>;
  constexpr bool early = row_tiles == 1;  // loads for the next step; stores after the others have been given h
  using E = typename M::E;
  FR_DYNAMIC_SHARED(unsigned char, memory);
  const Seat<M, gates, kept, row_tiles> seat(plan, steps_of(a), memory);
  const int64_t H = a.H;
  Weights<M, gates, kept> weights;
  weights.load(seat.weights, seat.tiles, [&](int64_t k, int gate) {
    return weights_of<M>(static_cast<const E*>(a.w_hh) + gate * H * H, H, H, seat.unit0, k * 16);
  });
  seat.clear();
  __syncthreads();
  for (int64_t i = threadIdx.x; i < seat.rows * H; i += blockDim.x)
    seat.buffer(0)[i / H * plan.stride + i % H] = M::factor(static_cast<const E*>(a.h0)[seat.b0 * H + i]);

  float h[row_tiles][4], c[row_tiles][4], bias[2][gates];
  E gx[row_tiles][4][gates];  // of the next step, where it is read early
  const auto load = [&](int64_t s, int n, int i) {
    const E* from = static_cast<const E*>(a.gx) + seat.place(s, n, i).row * gates * H + seat.unit(i);
#pragma unroll
    for (int gate = 0; gate < gates; ++gate) gx[n][i][gate] = from[gate * H];
  };
  seat.each([&](int n, int i) {
    const Place p = seat.place(0, n, i);
    h[n][i] = at<E>(a.h0, p.state), c[n][i] = Cell::has_c ? at<E>(a.c0, p.state) : 0.0f;
    for (int gate = 0; gate < gates; ++gate) bias[i / 2][gate] = a.b_hh ? at<E>(a.b_hh, gate * H + p.unit) : 0.0f;
    if (early) load(0, n, i);
  });
  seat.meet();
  for (int64_t s = 0; s < a.T; ++s) {
    float sum[row_tiles][gates][4];
    typename Cell::Step step[4];
    multiply<M, gates>(seat.rows, weights, seat.shown(seat.buffer(s), 0), sum);
    seat.each([&](int n, int i) {
      const Place p = seat.place(s, n, i);
      float x[gates], q[gates];
      if (!early) load(s, n, i);
#pragma unroll
      for (int gate = 0; gate < gates; ++gate)
        x[gate] = to_float(gx[n][i][gate]), q[gate] = bias[i / 2][gate] + (p.fresh ? 0.0f : sum[n][gate][i]);
      step[i] = Cell::forward(a, p, x, q, h[n][i], c[n][i]);
      if (!early) keep_step<Cell, E>(a, p, h[n][i], step[i]);
      seat.show(seat.buffer(s + 1), n, i, p.unit, h[n][i]);
    });
    seat.hand_out(seat.buffer(s + 1), 1, 0);
    seat.arrive();
    if (early)
      seat.each([&](int n, int i) {
        keep_step<Cell, E>(a, seat.place(s, n, i), h[n][i], step[i]);
        if (s + 1 < a.T) load(s + 1, n, i);
      });
    seat.wait();  // after the last step too: a CTA must not end while another writes into it
  }
  seat.each([&](int n, int i) {
    put<E>(a.hn, seat.place(0, n, i).state, h[n][i]);
    if constexpr (Cell::has_c) put<E>(a.cn, seat.place(0, n, i).state, c[n][i]);
  });
}

// Backward.
// Owns:   dgx (and dgh), dh0 and dc0 of a slice of the batch and of the CTA's units.
// Keeps:  W_hh's columns of its units, in registers and shared memory; the gradients of all pre-activations of a step,
//         twice, in shared memory; those of its h and c in registers.
// Moves:  a step reads dy, gates and cells (or y), one step early where there are 8 rows, and writes dgx; a cluster's
//         CTAs give each other their part of it.
// Syncs:  as forward.
// Limits: as forward.
template <class Cell, class M, int row_tiles>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) sequence_backward_kernel(CellBackward a, Plan plan) {
  constexpr int gates = Cell::gates, kept = kept_in<M, gates, row_tiles>;
  constexpr bool early = row_tiles == 1;
  using E = typename M::E;
  FR_DYNAMIC_SHARED(unsigned char, memory);
  const Seat<M, gates, kept, row_tiles> seat(plan, steps_of(a), memory);
  const int64_t H = a.H, apart = plan.unit_tiles * kUnits;
  Weights<M, gates, kept> weights;
  weights.load(seat.weights, seat.tiles, [&](int64_t k, int gate) {
    return transposed_weights_of<M>(static_cast<const E*>(a.w_hh) + gate * H * H, H, H, seat.unit0, k * 16);
  });
  seat.clear();
  float dh[row_tiles][4], dc[row_tiles][4];
  typename Cell::Saved saved[4];
  seat.each([&](int n, int i) {
    const Place p = seat.place(a.T - 1, n, i);
    dh[n][i] = at<E>(a.dhn, p.state), dc[n][i] = Cell::has_c ? at<E>(a.dcn, p.state) : 0.0f;
    if (early) saved[i] = Cell::load(a, p);
  });
  seat.meet();
  for (int64_t s = a.T - 1; s >= 0; --s) {
    E* mine = seat.buffer(s);
    typename Cell::Gradient d[4];
    seat.each([&](int n, int i) {
      const Place p = seat.place(s, n, i);
      d[i] = Cell::backward(a, p, early ? saved[i] : Cell::load(a, p), dh[n][i], dc[n][i]);
      if (!early) Cell::save(a, p, d[i]);
#pragma unroll
      for (int gate = 0; gate < gates; ++gate) seat.show(mine, n, i, gate * apart + p.unit, d[i].product[gate]);
    });
    seat.hand_out(mine, gates, apart);
    seat.arrive();
    if (early)
      seat.each([&](int n, int i) {
        Cell::save(a, seat.place(s, n, i), d[i]);
        if (s > 0) saved[i] = Cell::load(a, seat.place(s - 1, n, i));
      });
    seat.wait();
    float sum[row_tiles][1][4];
    multiply<M, gates>(seat.rows, weights, seat.shown(mine, apart), sum);
    seat.each([&](int n, int i) {
      const Place p = seat.place(s, n, i);
      if (p.there) dh[n][i] = p.fresh ? 0.0f : dh[n][i] + sum[n][0][i];
    });
  }
  seat.each([&](int n, int i) {
    const Place p = seat.place(0, n, i);
    put<E>(a.dh0, p.state, dh[n][i]);
    if constexpr (Cell::has_c) put<E>(a.dc0, p.state, dc[n][i]);
  });
}

}  // namespace fr::cuda
