// GRU on the CPU: forward and backward of one layer, one direction; the contract is in kernels.h, the equations are in
// cell_math.h. This file compiles itself once per instruction set (each_isa.h): kernels first, dispatch at the end.
#ifndef FR_ISA

#include "simd.h"
#define FR_WITH_AMX
#define FR_WITH_DOTS
#define FR_FILE "gru.cpp"
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
// Owns:   y (h) and what is saved, of its rows and units.
// Keeps:  the sums of r and z, and q, which meet in registers.
// Moves:  a panel of w_hh, h of its rows, gx.
// Syncs:  nothing.
// Limits: none.
template <class S> struct GruTile {
  const GruForward<S>& call;
  const Step<S, 3>& step;
  template <int MR> void run(int64_t p, int64_t m) const {
    using V = Vec<Real<S>>;
    const int64_t H = call.in.H, j = p * V::width, n = H - j;
    V acc[MR][3];
    const S* h[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Real<S>* gx = step.gx + (p - step.p0) * step.panel_stride + step.place[m + i] * 4 * V::width;
      h[i] = step.h[m + i];
      acc[i][0] = load(gx), acc[i][1] = load(gx + V::width), acc[i][2] = load(gx + 3 * V::width);
    }
    step.template multiply<MR>(p, m, h, acc);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Real<S>* xn = step.gx + (p - step.p0) * step.panel_stride + (step.place[m + i] * 4 + 2) * V::width;
      const V q = acc[i][2];
      const GruStep<V> s = gru_step(acc[i][0], acc[i][1], load(xn), q, load(h[i] + j, n));
      const int64_t at = step.t * call.in.B + step.b[m + i];
      store(s.h, call.y + at * H + j, n);
      if (!call.gates) continue;
      S* gates = call.gates + at * 4 * H + j;
      store(s.r, gates, n);
      store(s.z, gates + H, n);
      store(s.n, gates + 2 * H, n);
      store(q, gates + 3 * H, n);
    }
  }
};

// What forward_steps needs of the cell.
template <class S> struct GruSteps {
  const GruForward<S>& call;
  void step(const Step<S, 3>& s) const { each_tile<3>(s.p0, s.p1, s.count, GruTile<S>{call, s}); }
  void skip(int64_t t, int64_t b) const {
    const int64_t at = t * call.in.B + b, H = call.in.H;
    zero(call.y + at * H, H);
    if (call.gates) zero(call.gates + at * 4 * H, 4 * H);
  }
};

template <class S> static void gru_forward(const GruForward<S>& call) {
  const Sequence<S>& q = call.in;
  forward_steps<S, 3>(q, q.T * q.B * 3 * q.H * (q.I + q.H), call.y, GruSteps<S>{call});
  for (int64_t b = 0; b < q.B; ++b) copy(last_state(q, b, q.h0, call.y, q.H), q.H, call.hn + b * q.H);
}

// One row of one step backwards: dh (H,) reaches h and becomes the direct part of that of h'; dp (4H,) gets those of
// n's input part, r, z and q, so that the parts of W_ih and of W_hh are neighbours each; h_prev may be null for 0.
template <class S>
static void gru_row_grad(int64_t H, const S* dy, Real<S>* dh, const S* gates, const S* h_prev, S* dp) {
  using V = Vec<Real<S>>;
  for (int64_t j = 0; j < H; j += V::width) {
    const int64_t n = H - j;
    const GruStepGrad<V> d =
        gru_step_grad(load(dy + j, n) + load(dh + j, n), load(gates + j, n), load(gates + H + j, n),
                      load(gates + 2 * H + j, n), load(gates + 3 * H + j, n), h_prev ? load(h_prev + j, n) : V(0));
    store(d.h_prev, dh + j, n);
    store(d.pn, dp + j, n);
    store(d.pr, dp + H + j, n);
    store(d.pz, dp + 2 * H + j, n);
    store(d.q, dp + 3 * H + j, n);
  }
}

template <class S> struct GruBackwardKernel {
  const GruBackward<S>& call;
  Real<S>* dh0;                // the running gradient
  PackedMatrix<S> w_hh, w_ih;  // w_ih in the order n r z
};

// Owns:   dh0 and the chunk's arrays of the rows b0 .. b1.
// Keeps:  the running gradient of h in dh0.
// Moves:  a step reads w_hh and rows * (4H gates + 3H), writes rows * 5H.
// Syncs:  nothing: rows do not meet.
// Limits: none beyond kernels.h.
template <class S>
static void gru_backward_steps(const GruBackwardKernel<S>& k, const Chunk<S>& c, int64_t b0, int64_t b1) {
  const GruBackward<S>& call = k.call;
  const Sequence<S>& q = call.in;
  const int64_t rows = b1 - b0, H = q.H;
  const Scratch<Real<S>> through_w(rows * H);
  const Scratch<const S*> a(rows);
  const Scratch<Real<S>*> out(rows);
  const Scratch<int64_t> b_of(rows);
  for (int64_t s = c.s1 - 1; s >= c.s0; --s) {
    const int64_t t = time_of(q, s);
    int64_t count = 0;
    for (int64_t b = b0; b < b1; ++b) {
      if (!enter_row(q, c, s, b, call.y)) continue;
      const int64_t at = t * q.B + b, in_chunk = c.at(t, b, q.B);
      S* dp = c.dp + in_chunk * c.ld;
      gru_row_grad(H, call.dy + at * H, k.dh0 + b * H, call.gates + at * 4 * H, c.h[in_chunk], dp);
      a.get()[count] = dp + H, out.get()[count] = through_w.get() + count * H, b_of.get()[count++] = b;
    }
    k.w_hh.multiply(count, a.get(), out.get());
    for (int64_t i = 0; i < count; ++i) {
      Real<S>*dh = k.dh0 + b_of.get()[i] * H, *part = through_w.get() + i * H;
      for (int64_t j = 0; j < H; ++j) dh[j] += part[j];
    }
    apply_reset(q, t, b0, b1, k.dh0, H);
  }
}

template <class S> static void gru_backward(const GruBackward<S>& call) {
  const Sequence<S>& q = call.in;
  const int64_t H = q.H, G = 3 * H;
  const Accumulator<S> dh0(call.dh0, q.B * H), dw_ih(call.dw_ih, G * q.I, whole_sums(q, q.I)),
      dw_hh(call.dw_hh, G * H, whole_sums(q, H)), db_ih(call.db_ih, G), db_hh(call.db_hh, G);
  dh0.start(call.dhn);
  db_ih.start(), db_hh.start();
  if (q.T * q.B == 0) dw_ih.start(), dw_hh.start();
  const bool ahead = !few_rows(q);
  GruBackwardKernel<S> k{call, dh0.get(), {G, H, ahead}, {call.dx ? G : 0, q.I, ahead}};
  k.w_hh.pack_transposed(q.pool, q.w_hh);
  if (call.dx) k.w_ih.pack_transposed(q.pool, q.w_ih, 2 * H);
  Real<S>* db_n = call.db_ih ? db_ih.get() + 2 * H : nullptr;
  backward_chunks(
      q, 4 * H, q.T * q.B * H * G, [&](const Chunk<S>& c, int64_t b0, int64_t b1) { gru_backward_steps(k, c, b0, b1); },
      [&](const Chunk<S>& c) {
        if (call.dx) input_grad(q, c, c.dp, k.w_ih, G, call.dx);
        weight_grad<S>(q.pool, 2 * H, {!c.first, q.I, c.rows, c.dp + H, c.ld, c.x, dw_ih.at(0), db_ih.get()});
        weight_grad<S>(q.pool, H, {!c.first, q.I, c.rows, c.dp, c.ld, c.x, dw_ih.at(2 * H * q.I), db_n});
        weight_grad<S>(q.pool, G, {!c.first, H, c.rows, c.dp + H, c.ld, c.h, dw_hh.at(0), db_hh.get()});
      });
  for (const Accumulator<S>* result : {&dh0, &dw_ih, &dw_hh, &db_ih, &db_hh}) result->finish();
}

}  // namespace FR_ISA
}  // namespace fr

#endif

#ifndef FR_ISA
namespace fr {
template <class F> void gru_forward(const GruForward<F>& call) { FR_DISPATCH_OF(F, gru_forward<F>, call) }
template <class F> void gru_backward(const GruBackward<F>& call) { FR_DISPATCH_OF(F, gru_backward<F>, call) }
template void gru_forward(const GruForward<float>&);
template void gru_forward(const GruForward<double>&);
template void gru_forward(const GruForward<bf16>&);
template void gru_backward(const GruBackward<float>&);
template void gru_backward(const GruBackward<double>&);
template void gru_backward(const GruBackward<bf16>&);
}  // namespace fr
#endif
