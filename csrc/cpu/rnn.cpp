// Elman RNN (tanh or relu) on the CPU: forward and backward of one layer, one direction; the contract is in kernels.h,
// the equations are in cell_math.h. This file compiles itself once per instruction set (each_isa.h): kernels first,
// dispatch at the end.
#ifndef FR_ISA

#include "simd.h"
#define FR_WITH_AMX
#define FR_WITH_DOTS
#define FR_FILE "rnn.cpp"
#include "each_isa.h"

#else

#include "vec.h"
#include "../cell_math.h"
#include "panel.h"
#include "gemm.h"
#include "tiles.h"
#include "products.h"
#include "sequence.h"
#include "forward.h"

namespace fr {
namespace FR_ISA {

// Rows m .. m + MR of one step for the units of one panel.
// Owns:   y (h) of its rows and units.
// Keeps:  the sums, in registers.
// Moves:  a panel of w_hh, h of its rows, gx.
// Syncs:  nothing.
// Limits: none.
template <class S> struct RnnTile {
  const RnnForward<S>& call;
  const Step<S, 1>& step;
  template <int MR> void run(int64_t p, int64_t m) const {
    using V = Vec<Real<S>>;
    const int64_t H = call.in.H;
    V acc[MR][4];
    const S* h[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Real<S>* gx = step.gx + (p - step.p0) * step.panel_stride + step.place[m + i] * 4 * V::width;
      h[i] = step.h[m + i];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[i][v] = load(gx + v * V::width);
    }
    step.template multiply<MR>(p, m, h, acc);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      S* y = call.y + (step.t * call.in.B + step.b[m + i]) * H;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const int64_t j = (p * 4 + v) * V::width;
        if (j < H) store(rnn_step(acc[i][v], call.relu), y + j, H - j);
      }
    }
  }
};

// What forward_steps needs of the cell.
template <class S> struct RnnSteps {
  const RnnForward<S>& call;
  void step(const Step<S, 1>& s) const { each_tile<4>(s.p0, s.p1, s.count, RnnTile<S>{call, s}); }
  void skip(int64_t t, int64_t b) const { zero(call.y + (t * call.in.B + b) * call.in.H, call.in.H); }
};

template <class S> static void rnn_forward(const RnnForward<S>& call) {
  const Sequence<S>& q = call.in;
  forward_steps<S, 1>(q, q.T * q.B * q.H * (q.I + q.H), call.y, RnnSteps<S>{call});
  for (int64_t b = 0; b < q.B; ++b) copy(last_state(q, b, q.h0, call.y, q.H), q.H, call.hn + b * q.H);
}

template <class S> struct RnnBackwardKernel {
  const RnnBackward<S>& call;
  Real<S>* dh0;  // the running gradient
  PackedMatrix<S> w_hh, w_ih;
};

// Owns:   dh0 and the chunk's arrays of the rows b0 .. b1.
// Keeps:  the running gradient of h in dh0.
// Moves:  a step reads w_hh and rows * 3H, writes rows * 2H.
// Syncs:  nothing: rows do not meet.
// Limits: none beyond kernels.h.
template <class S>
static void rnn_backward_steps(const RnnBackwardKernel<S>& k, const Chunk<S>& c, int64_t b0, int64_t b1) {
  using V = Vec<Real<S>>;
  const RnnBackward<S>& call = k.call;
  const Sequence<S>& q = call.in;
  const int64_t rows = b1 - b0, H = q.H;
  const Scratch<const S*> a(rows);
  const Scratch<Real<S>*> out(rows);
  for (int64_t s = c.s1 - 1; s >= c.s0; --s) {
    const int64_t t = time_of(q, s);
    int64_t count = 0;
    for (int64_t b = b0; b < b1; ++b) {
      if (!enter_row(q, c, s, b, call.y)) continue;
      const int64_t at = (t * q.B + b) * H;
      const S *dy = call.dy + at, *y = call.y + at;
      Real<S>* dh = k.dh0 + b * H;
      S* dp = c.dp + c.at(t, b, q.B) * c.ld;
      for (int64_t j = 0; j < H; j += V::width) {
        const int64_t n = H - j;
        store(rnn_step_grad(load(dy + j, n) + load(dh + j, n), load(y + j, n), call.relu), dp + j, n);
      }
      a.get()[count] = dp, out.get()[count++] = dh;
    }
    k.w_hh.multiply(count, a.get(), out.get());
    apply_reset(q, t, b0, b1, k.dh0, H);
  }
}

template <class S> static void rnn_backward(const RnnBackward<S>& call) {
  const Sequence<S>& q = call.in;
  const int64_t H = q.H;
  const Accumulator<S> dh0(call.dh0, q.B * H), dw_ih(call.dw_ih, H * q.I, whole_sums(q, q.I)),
      dw_hh(call.dw_hh, H * H, whole_sums(q, H)), db(call.db, H);
  dh0.start(call.dhn);
  db.start();
  if (q.T * q.B == 0) dw_ih.start(), dw_hh.start();
  const bool ahead = !few_rows(q);
  RnnBackwardKernel<S> k{call, dh0.get(), {H, H, ahead}, {call.dx ? H : 0, q.I, ahead}};
  k.w_hh.pack_transposed(q.pool, q.w_hh);
  if (call.dx) k.w_ih.pack_transposed(q.pool, q.w_ih);
  backward_chunks(
      q, H, q.T * q.B * H * H, [&](const Chunk<S>& c, int64_t b0, int64_t b1) { rnn_backward_steps(k, c, b0, b1); },
      [&](const Chunk<S>& c) {
        if (call.dx) input_grad(q, c, c.dp, k.w_ih, H, call.dx);
        weight_grad<S>(q.pool, H, {!c.first, q.I, c.rows, c.dp, c.ld, c.x, dw_ih.at(0), db.get()});
        weight_grad<S>(q.pool, H, {!c.first, H, c.rows, c.dp, c.ld, c.h, dw_hh.at(0), nullptr});
      });
  for (const Accumulator<S>* result : {&dh0, &dw_ih, &dw_hh, &db}) result->finish();
}

}  // namespace FR_ISA
}  // namespace fr

#endif

#ifndef FR_ISA
namespace fr {
template <class F> void rnn_forward(const RnnForward<F>& call) { FR_DISPATCH_OF(F, rnn_forward<F>, call) }
template <class F> void rnn_backward(const RnnBackward<F>& call) { FR_DISPATCH_OF(F, rnn_backward<F>, call) }
template void rnn_forward(const RnnForward<float>&);
template void rnn_forward(const RnnForward<double>&);
template void rnn_forward(const RnnForward<bf16>&);
template void rnn_backward(const RnnBackward<float>&);
template void rnn_backward(const RnnBackward<double>&);
template void rnn_backward(const RnnBackward<bf16>&);
}  // namespace fr
#endif
