// LSTM on the CPU: forward and backward of one layer, one direction; the contract is in kernels.h, the equations are in
// cell_math.h. This file compiles itself once per instruction set (each_isa.h): kernels first, dispatch at the end.
#ifndef FR_ISA

#include "simd.h"
#define FR_FILE "lstm.cpp"
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
// Owns:   c, m (h where nothing projects) and what is saved, of its rows and units.
// Keeps:  the sums of all four gates, which meet in registers.
// Moves:  a panel of w_hh, h of its rows, gx, and the state.
// Syncs:  nothing.
// Limits: none.
template <class F> struct LstmTile {
  const LstmForward<F>& call;
  const CellWeights<F, 4>& w;
  const Step<F>& step;
  F* m_rows;  // (B, H) where there is a projection
  template <int MR> void run(int64_t p, int64_t m) const {
    using V = Vec<F>;
    const int64_t H = call.in.H, P = call.in.P, j = p * V::width, n = H - j;
    V acc[MR][4];
    const F* h[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const F* gx = step.gx + p * step.panel_stride + step.place[m + i] * 4 * V::width;
      h[i] = step.h[m + i];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[i][v] = V::load(gx + v * V::width);
    }
    panel_product<F, MR, 1, 4>(w.w_hh.get() + p * P * 4 * V::width, 0, h, P, acc);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const int64_t b = step.b[m + i], at = step.t * call.in.B + b;
      F* c = call.cn + b * H + j;
      const LstmStep<V> s = lstm_step(acc[i][0], acc[i][1], acc[i][2], acc[i][3], V::load(c, n));
      s.c.store(c, n);
      s.m.store((m_rows ? m_rows + b * H : call.y + at * H) + j, n);
      if (!call.gates) continue;
      F* gates = call.gates + at * 4 * H + j;
      s.i.store(gates, n);
      s.f.store(gates + H, n);
      s.g.store(gates + 2 * H, n);
      s.o.store(gates + 3 * H, n);
      s.c.store(call.cells + at * H + j, n);
    }
  }
};

// What forward_block needs of the cell. m (B, H): the projection's input of one step; out: where its results go.
template <class F> struct LstmSteps {
  const LstmForward<F>& call;
  const CellWeights<F, 4>& w;
  const PackedMatrix<F>* w_hr;
  F* m;
  const F** m_of;
  F** y_of;
  int64_t b0;

  void step(const Step<F>& s) const {
    const Sequence<F>& q = call.in;
    for (int64_t i = 0; i < s.count; ++i)
      if (is_reset(q, s.t, s.b[i])) zero(call.cn + s.b[i] * q.H, q.H);
    each_tile<4>(w.panels, s.count, LstmTile<F>{call, w, s, m});
    if (!w_hr) return;
    for (int64_t i = 0; i < s.count; ++i)
      m_of[b0 + i] = m + s.b[i] * q.H, y_of[b0 + i] = call.y + (s.t * q.B + s.b[i]) * q.P;
    w_hr->multiply(s.count, m_of + b0, y_of + b0);
  }
  void skip(int64_t t, int64_t b) const {
    const int64_t at = t * call.in.B + b, H = call.in.H, P = call.in.P;
    zero(call.y + at * P, P);
    if (call.gates) zero(call.gates + at * 4 * H, 4 * H), zero(call.cells + at * H, H);
  }
};

template <class F> static void lstm_forward(const LstmForward<F>& call) {
  const Sequence<F>& q = call.in;
  const CellWeights<F, 4> w(q);
  const int64_t projected = call.w_hr ? q.B : 0;
  PackedMatrix<F> w_hr(projected ? q.H : 0, projected ? q.P : 0);
  if (projected) w_hr.pack_rows(q.pool, call.w_hr);
  const Scratch<F> m(projected * q.H);
  const Scratch<const F*> m_of(projected);
  const Scratch<F*> y_of(projected);
  copy(call.c0, q.B * q.H, call.cn);
  const int64_t work = q.T * q.B * (4 * q.H * (q.I + q.P) + (call.w_hr ? q.H * q.P : 0));
  split(q.pool, q.B, work, [&](int64_t b0, int64_t b1) {
    forward_rows(w, b0, b1, call.y,
                 LstmSteps<F>{call, w, projected ? &w_hr : nullptr, m.get(), m_of.get(), y_of.get(), b0});
    for (int64_t b = b0; b < b1; ++b) copy(last_state(q, b, q.h0, call.y, q.P), q.P, call.hn + b * q.P);
  });
}

// One row of one step backwards: dm, dc (H,) reach m and c; dc becomes that of c', dp (4H,) those of the
// pre-activations; c_prev may be null for 0; m may be null: not wanted.
template <class F>
static void lstm_row_grad(int64_t H, const F* dm, F* dc, const F* gates, const F* c, const F* c_prev, F* dp, F* m) {
  using V = Vec<F>;
  for (int64_t j = 0; j < H; j += V::width) {
    const int64_t n = H - j;
    const LstmStepGrad<V> d =
        lstm_step_grad(V::load(dm + j, n), V::load(dc + j, n), V::load(gates + j, n), V::load(gates + H + j, n),
                       V::load(gates + 2 * H + j, n), V::load(gates + 3 * H + j, n), V::load(c + j, n),
                       c_prev ? V::load(c_prev + j, n) : V(0));
    d.c_prev.store(dc + j, n);
    d.pi.store(dp + j, n);
    d.pf.store(dp + H + j, n);
    d.pg.store(dp + 2 * H + j, n);
    d.po.store(dp + 3 * H + j, n);
    if (m) d.m.store(m + j, n);
  }
}

template <class F> struct LstmBackwardKernel {
  const LstmBackward<F>& call;
  PackedMatrix<F> w_hh, w_ih, w_hr;
  // Of a chunk, where there is a projection: the gradients of the projected h and the projection's input.
  F *dh, *m;
  int64_t ld_dh;
  const F** m_of;
};

// Owns:   dh0, dc0 and the chunk's arrays of the rows b0 .. b1.
// Keeps:  the running gradients of h and c in dh0 and dc0.
// Moves:  a step reads w_hh (and w_hr) and rows * (4H gates + 2H cells + P + H), writes rows * 4H.
// Syncs:  nothing: rows do not meet.
// Limits: none beyond kernels.h.
template <class F>
static void lstm_backward_steps(const LstmBackwardKernel<F>& k, const Chunk<F>& c, int64_t b0, int64_t b1) {
  const LstmBackward<F>& call = k.call;
  const Sequence<F>& q = call.in;
  const int64_t rows = b1 - b0, H = q.H, P = q.P;
  const Scratch<F> dm(rows * H);
  const Scratch<const F*> a(rows);
  const Scratch<F*> out(rows);
  const Scratch<int64_t> b_of(rows);
  for (int64_t s = c.s1 - 1; s >= c.s0; --s) {
    const int64_t t = time_of(q, s);
    int64_t count = 0;
    for (int64_t b = b0; b < b1; ++b) {
      const bool there = enter_row(q, c, s, b, call.y);
      const int64_t at = c.at(t, b, q.B);
      if (k.m) k.m_of[at] = there ? k.m + at * H : nullptr;
      if (k.m && !there) zero(k.dh + at * k.ld_dh, k.ld_dh);
      if (there) b_of.get()[count++] = b;
    }
    for (int64_t i = 0; i < count; ++i) {  // what reaches h, and m
      const int64_t b = b_of.get()[i];
      F* to = k.m ? k.dh + c.at(t, b, q.B) * k.ld_dh : dm.get() + i * H;
      const F *dy = call.dy + (t * q.B + b) * P, *dh = call.dh0 + b * P;
      for (int64_t j = 0; j < P; ++j) to[j] = dy[j] + dh[j];
      a.get()[i] = to, out.get()[i] = dm.get() + i * H;
    }
    if (k.m) k.w_hr.multiply(count, a.get(), out.get());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = b_of.get()[i], at = t * q.B + b, in_chunk = c.at(t, b, q.B);
      F* dp = c.dp + in_chunk * c.ld;
      lstm_row_grad(H, dm.get() + i * H, call.dc0 + b * H, call.gates + at * 4 * H, call.cells + at * H,
                    state_before(q, s, b, call.c0, call.cells, H), dp, k.m ? k.m + in_chunk * H : nullptr);
      a.get()[i] = dp, out.get()[i] = call.dh0 + b * P;
    }
    k.w_hh.multiply(count, a.get(), out.get());
    apply_reset(q, t, b0, b1, call.dh0, P);
    apply_reset(q, t, b0, b1, call.dc0, H);
  }
}

template <class F> static void lstm_backward(const LstmBackward<F>& call) {
  const Sequence<F>& q = call.in;
  const int64_t H = q.H, P = q.P, G = 4 * H;
  copy(call.dhn, q.B * P, call.dh0);
  copy(call.dcn, q.B * H, call.dc0);
  zero(call.dw_ih, G * q.I), zero(call.dw_hh, G * P);
  if (call.db) zero(call.db, G);
  if (call.w_hr) zero(call.dw_hr, P * H);
  if (q.T == 0 || q.B == 0) return;
  const int64_t kept = call.w_hr ? chunk_steps(q) * q.B : 0, ld_dh = padded_stride(P);
  const Scratch<F> dh(kept * ld_dh), m(kept * H);
  const Scratch<const F*> m_of(kept);
  LstmBackwardKernel<F> k{call, {G, P}, {G, q.I}, {kept ? P : 0, kept ? H : 0}, dh.get(), m.get(), ld_dh, m_of.get()};
  k.w_hh.pack_transposed(q.pool, q.w_hh);
  k.w_ih.pack_transposed(q.pool, q.w_ih);
  if (kept) k.w_hr.pack_transposed(q.pool, call.w_hr);
  backward_chunks(
      q, G, q.T * q.B * H * (4 * P + (kept ? P : 0)),
      [&](const Chunk<F>& c, int64_t b0, int64_t b1) { lstm_backward_steps(k, c, b0, b1); },
      [&](const Chunk<F>& c) {
        input_grad(q, c, c.dp, k.w_ih, G, call.dx);
        weight_grad<F>(q.pool, G, {q.I, c.rows, c.dp, c.ld, c.x, call.dw_ih, call.db});
        weight_grad<F>(q.pool, G, {P, c.rows, c.dp, c.ld, c.h, call.dw_hh, nullptr});
        if (kept) weight_grad<F>(q.pool, P, {H, c.rows, k.dh, ld_dh, m_of.get(), call.dw_hr, nullptr});
      });
}

}  // namespace FR_ISA
}  // namespace fr

#endif

#ifndef FR_ISA
namespace fr {
template <class F> void lstm_forward(const LstmForward<F>& call) { FR_DISPATCH(lstm_forward<F>, call) }
template <class F> void lstm_backward(const LstmBackward<F>& call) { FR_DISPATCH(lstm_backward<F>, call) }
template void lstm_forward(const LstmForward<float>&);
template void lstm_forward(const LstmForward<double>&);
template void lstm_backward(const LstmBackward<float>&);
template void lstm_backward(const LstmBackward<double>&);
}  // namespace fr
#endif
