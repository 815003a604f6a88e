// Elman RNN (tanh or relu) on the CPU: forward and backward of one layer, one direction; the contract is in kernels.h,
// the equations are in cell_math.h. This file compiles itself once per instruction set (each_isa.h): kernels first,
// dispatch at the end.
#ifndef FR_ISA

#include "simd.h"
#define FR_FILE "rnn.cpp"
#include "each_isa.h"

#else

#include "vec.h"
#include "../cell_math.h"
#include "panel.h"
#include "gemm.h"
#include "sequence.h"

namespace fr {
namespace FR_ISA {

// Rows m .. m + MR of one step for the units of one panel.
// Owns:   y (h) of its rows and units.
// Keeps:  the sums, in registers.
// Moves:  a panel of w_hh, h of its rows, gx.
// Syncs:  nothing.
// Limits: none.
template <class F> struct RnnTile {
  const RnnForward<F>& call;
  const CellWeights<F, 1>& w;
  const Step<F>& step;
  template <int MR> void run(int64_t p, int64_t m) const {
    using V = Vec<F>;
    const int64_t H = call.in.H;
    V acc[MR][4];
    const F* h[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const F* gx = step.gx + p * step.panel_stride + step.place[m + i] * 4 * V::width;
      h[i] = step.h[m + i];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[i][v] = V::load(gx + v * V::width);
    }
    panel_product<F, MR, 1, 4>(w.w_hh.get() + p * H * 4 * V::width, 0, h, H, acc);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      F* y = call.y + (step.t * call.in.B + step.b[m + i]) * H;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const int64_t j = (p * 4 + v) * V::width;
        if (j < H) rnn_step(acc[i][v], call.relu).store(y + j, H - j);
      }
    }
  }
};

// What forward_block needs of the cell.
template <class F> struct RnnSteps {
  const RnnForward<F>& call;
  const CellWeights<F, 1>& w;
  void step(const Step<F>& s) const { each_tile<4>(w.panels, s.count, RnnTile<F>{call, w, s}); }
  void skip(int64_t t, int64_t b) const { zero(call.y + (t * call.in.B + b) * call.in.H, call.in.H); }
};

template <class F> static void rnn_forward(const RnnForward<F>& call) {
  const Sequence<F>& q = call.in;
  const CellWeights<F, 1> w(q);
  split(q.pool, q.B, q.T * q.B * q.H * (q.I + q.H), [&](int64_t b0, int64_t b1) {
    forward_rows(w, b0, b1, call.y, RnnSteps<F>{call, w});
    for (int64_t b = b0; b < b1; ++b) copy(last_state(q, b, q.h0, call.y, q.H), q.H, call.hn + b * q.H);
  });
}

template <class F> struct RnnBackwardKernel {
  const RnnBackward<F>& call;
  PackedMatrix<F> w_hh, w_ih;
};

// Owns:   dh0 and the chunk's arrays of the rows b0 .. b1.
// Keeps:  the running gradient of h in dh0.
// Moves:  a step reads w_hh and rows * 3H, writes rows * 2H.
// Syncs:  nothing: rows do not meet.
// Limits: none beyond kernels.h.
template <class F>
static void rnn_backward_steps(const RnnBackwardKernel<F>& k, const Chunk<F>& c, int64_t b0, int64_t b1) {
  using V = Vec<F>;
  const RnnBackward<F>& call = k.call;
  const Sequence<F>& q = call.in;
  const int64_t rows = b1 - b0, H = q.H;
  const Scratch<const F*> a(rows);
  const Scratch<F*> out(rows);
  for (int64_t s = c.s1 - 1; s >= c.s0; --s) {
    const int64_t t = time_of(q, s);
    int64_t count = 0;
    for (int64_t b = b0; b < b1; ++b) {
      if (!enter_row(q, c, s, b, call.y)) continue;
      const int64_t at = (t * q.B + b) * H;
      const F *dy = call.dy + at, *y = call.y + at, *dh = call.dh0 + b * H;
      F* dp = c.dp + c.at(t, b, q.B) * c.ld;
      for (int64_t j = 0; j < H; j += V::width) {
        const int64_t n = H - j;
        rnn_step_grad(V::load(dy + j, n) + V::load(dh + j, n), V::load(y + j, n), call.relu).store(dp + j, n);
      }
      a.get()[count] = dp, out.get()[count++] = call.dh0 + b * H;
    }
    k.w_hh.multiply(count, a.get(), out.get());
    apply_reset(q, t, b0, b1, call.dh0, H);
  }
}

template <class F> static void rnn_backward(const RnnBackward<F>& call) {
  const Sequence<F>& q = call.in;
  const int64_t H = q.H;
  copy(call.dhn, q.B * H, call.dh0);
  zero(call.dw_ih, H * q.I), zero(call.dw_hh, H * H);
  if (call.db) zero(call.db, H);
  if (q.T == 0 || q.B == 0) return;
  RnnBackwardKernel<F> k{call, {H, H}, {H, q.I}};
  k.w_hh.pack_transposed(q.pool, q.w_hh);
  k.w_ih.pack_transposed(q.pool, q.w_ih);
  backward_chunks(
      q, H, q.T * q.B * H * H, [&](const Chunk<F>& c, int64_t b0, int64_t b1) { rnn_backward_steps(k, c, b0, b1); },
      [&](const Chunk<F>& c) {
        input_grad(q, c, c.dp, k.w_ih, H, call.dx);
        weight_grad<F>(q.pool, H, {q.I, c.rows, c.dp, c.ld, c.x, call.dw_ih, call.db});
        weight_grad<F>(q.pool, H, {H, c.rows, c.dp, c.ld, c.h, call.dw_hh, nullptr});
      });
}

}  // namespace FR_ISA
}  // namespace fr

#endif

#ifndef FR_ISA
namespace fr {
template <class F> void rnn_forward(const RnnForward<F>& call) { FR_DISPATCH(rnn_forward<F>, call) }
template <class F> void rnn_backward(const RnnBackward<F>& call) { FR_DISPATCH(rnn_backward<F>, call) }
template void rnn_forward(const RnnForward<float>&);
template void rnn_forward(const RnnForward<double>&);
template void rnn_backward(const RnnBackward<float>&);
template void rnn_backward(const RnnBackward<double>&);
}  // namespace fr
#endif
