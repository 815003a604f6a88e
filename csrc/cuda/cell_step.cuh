// One step a launch: the kernels of all cells for a single step, where both products and the gates are one launch, and
// for sequences whose W_hh no cluster holds.
#pragma once

#include "cell_place.cuh"

namespace fr::cuda {

constexpr int kStepWarps = 8;

// The CTA of a step: 16 units and 8 * row_tiles rows; its warps share out the tiles along k.
template <class M, int row_tiles> struct Bench {
  using E = typename M::E;
  int64_t unit0, b0, B;
  const E** rows;  // in shared memory: where each row's factors lie, or null for zeros
  float* partial;  // in shared memory: the sums of each warp
  FR_DEVICE Bench(int64_t batch, int64_t H, unsigned char* memory) : B(batch) {
    const int64_t tiles = (H + kUnits - 1) / kUnits;
    unit0 = blockIdx.x % tiles * kUnits, b0 = blockIdx.x / tiles * kRows * row_tiles;
    rows = reinterpret_cast<const E**>(memory);
    partial = reinterpret_cast<float*>(memory + kRows * row_tiles * sizeof(E*));
  }
  static constexpr int64_t shared_bytes(int sums) {
    return kRows * row_tiles * (sizeof(E*) + kStepWarps * sums * kUnits * sizeof(float));
  }
  FR_DEVICE int warp() const { return static_cast<int>(threadIdx.x / 32); }
  FR_DEVICE int64_t row(int i) const { return b0 + warp() * kRows + lane_of_thread() % 4 * 2 + i % 2; }
  FR_DEVICE int64_t unit(int i) const { return unit0 + lane_of_thread() / 4 + i / 2 * 8; }

  // sum[m][i]: for warp n < row_tiles the sums of tile n of rows over k of `columns`, added up over the warps.
  // weights(gate, k) gives a fragment, from(b) the factors of row b: `parts` times `columns` of them.
  template <int gates, int N, class W, class From>
  FR_DEVICE void product(int64_t columns, bool parts, const W& weights, const From& from, float (&sum)[N][4]) const {
    __syncthreads();
    for (int r = threadIdx.x; r < kRows * row_tiles; r += blockDim.x) rows[r] = b0 + r < B ? from(b0 + r) : nullptr;
    __syncthreads();
    float own[row_tiles][N][4];
    multiply<M, gates>(
        B - b0,
        [&](const auto& add) {
          for (int64_t k = warp(); k * kUnits < columns; k += kStepWarps)
#pragma unroll
            for (int gate = 0; gate < gates; ++gate) add(k, gate, weights(gate, k * kUnits));
        },
        [&](int r, int gate, int64_t k) {
          const E* row = rows[r];
          return four_of<M>(row && parts ? row + gate * columns : row, k, columns);
        },
        own);
#pragma unroll
    for (int n = 0; n < row_tiles; ++n)
#pragma unroll
      for (int m = 0; m < N * 4; ++m)
        partial[((warp() * row_tiles + n) * N * 4 + m) * 32 + lane_of_thread()] = own[n][m / 4][m % 4];
    __syncthreads();
#pragma unroll
    for (int m = 0; m < N * 4; ++m) {
      float total = 0;
      if (warp() < row_tiles)
        for (int w = 0; w < kStepWarps; ++w)
          total += partial[((w * row_tiles + warp()) * N * 4 + m) * 32 + lane_of_thread()];
      sum[m / 4][m % 4] = total;
    }
  }
  // Calls work(b, unit, i) for the sums of this lane that are units of rows.
  template <class Work> FR_DEVICE void each(int64_t H, const Work& work) const {
    if (warp() >= row_tiles) return;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (row(i) < B && unit(i) < H) work(row(i), unit(i), i);
  }
};

// Step s, forward.
// Owns:   the results of 16 units of 8 rows, or 32.
// Keeps:  nothing; c lies in `a.c`, h in y.
// Moves:  the units' rows of W_hh, h of the rows; of W_ih and x too where there is no gx; y, gates and cells.
// Syncs:  the CTA's warps, which share out k.
// Limits: none.
template <class Cell, class M, int row_tiles>
__global__ void __launch_bounds__(32 * kStepWarps, 1) step_forward_kernel(CellForward a, int64_t s) {
  constexpr int gates = Cell::gates;
  using E = typename M::E;
  FR_DYNAMIC_SHARED(unsigned char, memory);
  const Bench<M, row_tiles> bench(a.B, a.H, memory);
  const Steps steps = steps_of(a);
  const int64_t H = a.H;
  float from_x[gates][4], from_h[gates][4];
  // The input's product where there is no gx, then that of h; one piece of code for both, which is a long one.
#pragma unroll 1
  for (int product = a.gx ? 1 : 0; product < 2; ++product) {
    const bool of_h = product == 1;
    const E* w = static_cast<const E*>(of_h ? a.w_hh : a.w_ih);
    const int64_t columns = of_h ? H : a.I;
    bench.template product<gates>(
        columns, false,
        [&](int gate, int64_t k) { return weights_of<M>(w + gate * H * columns, H, columns, bench.unit0, k); },
        [&](int64_t b) -> const E* {
          if (!of_h) return static_cast<const E*>(a.x) + b * columns;
          const Place p = steps.place(s, b, 0, steps.length(b));
          if (p.fresh || !p.there) return nullptr;
          return p.before < 0 ? static_cast<const E*>(a.h0) + b * H : static_cast<const E*>(a.y) + p.before * H;
        },
        from_h);
    if (of_h) break;
#pragma unroll
    for (int gate = 0; gate < gates; ++gate)
#pragma unroll
      for (int i = 0; i < 4; ++i) from_x[gate][i] = from_h[gate][i];
  }
  bench.each(H, [&](int64_t b, int64_t unit, int i) {
    const Place p = steps.place(s, b, unit, steps.length(b));
    float x[gates], q[gates];
#pragma unroll
    for (int gate = 0; gate < gates; ++gate) {
      const int64_t bias = gate * H + unit;
      x[gate] = a.gx ? at<E>(a.gx, p.gate(gate, gates)) : from_x[gate][i] + (a.b_ih ? at<E>(a.b_ih, bias) : 0.0f);
      q[gate] = from_h[gate][i] + (a.b_hh ? at<E>(a.b_hh, bias) : 0.0f);
    }
    float h = to_float(state_before<E>(p, a.y, a.h0)), c = 0;
    if constexpr (Cell::has_c) c = s == 0 ? at<E>(a.c0, p.state) : a.c[p.state];
    Cell::save(a, p, Cell::forward(a, p, x, q, h, c));
    put<E>(a.y, p.gate(0, 1), p.there ? h : 0.0f);
    if (!p.there && s > 0) return;
    put<E>(a.hn, p.state, h);
    if constexpr (Cell::has_c) {
      put<E>(a.cn, p.state, c);
      if (s + 1 < a.T) a.c[p.state] = c;
    }
  });
}

// Step s, backward, and before it what step s + 1 gave to h; s = -1 gives dh0 and dc0.
// Owns:   dgx (and dgh) and the running gradients of 16 units of 8 rows, or 32.
// Keeps:  nothing; the gradients of h and c lie in `a.dh` and `a.dc`.
// Moves:  the units' columns of W_hh, dgx of step s + 1; dy, gates and cells (or y); dgx.
// Syncs:  the CTA's warps, which share out k.
// Limits: none.
template <class Cell, class M, int row_tiles>
__global__ void __launch_bounds__(32 * kStepWarps, 1) step_backward_kernel(CellBackward a, int64_t s) {
  constexpr int gates = Cell::gates;
  using E = typename M::E;
  FR_DYNAMIC_SHARED(unsigned char, memory);
  const Bench<M, row_tiles> bench(a.B, a.H, memory);
  const Steps steps = steps_of(a);
  const int64_t H = a.H;
  const bool last = s + 1 == a.T;
  float sum[1][4];
  if (!last) {
    const E* dp = static_cast<const E*>(a.dgh ? a.dgh : a.dgx);
    bench.template product<gates>(
        H, true,
        [&](int gate, int64_t k) {
          return transposed_weights_of<M>(static_cast<const E*>(a.w_hh) + gate * H * H, H, H, bench.unit0, k);
        },
        [&](int64_t b) -> const E* {
          const Place p = steps.place(s + 1, b, 0, steps.length(b));
          return p.there && !p.fresh ? dp + p.row * gates * H : nullptr;
        },
        sum);
  }
  bench.each(H, [&](int64_t b, int64_t unit, int i) {
    const int64_t length = steps.length(b), state = b * H + unit;
    float dh = last ? at<E>(a.dhn, state) : a.dh[state], dc = 0;
    if constexpr (Cell::has_c) dc = last ? at<E>(a.dcn, state) : a.dc[state];
    if (!last) {
      const Place later = steps.place(s + 1, b, unit, length);
      if (later.there) dh = later.fresh ? 0.0f : dh + sum[0][i];
    }
    if (s < 0) {
      put<E>(a.dh0, state, dh);
      if constexpr (Cell::has_c) put<E>(a.dc0, state, dc);
      return;
    }
    const Place p = steps.place(s, b, unit, length);
    Cell::save(a, p, Cell::backward(a, p, Cell::load(a, p), dh, dc));
    a.dh[state] = dh;
    if constexpr (Cell::has_c) a.dc[state] = dc;
  });
}

}  // namespace fr::cuda
