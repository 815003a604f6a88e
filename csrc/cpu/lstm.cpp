// LSTM on the CPU: forward and backward of one layer, one direction; the contract is in kernels.h, the equations are in
// cell_math.h. This file compiles itself once per instruction set (each_isa.h): kernels first, dispatch at the end.
#ifndef FR_ISA

#include "simd.h"
#define FR_WITH_AMX
#define FR_WITH_DOTS
#define FR_FILE "lstm.cpp"
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
// Owns:   c, m (h where nothing projects) and what is saved, of its rows and units.
// Keeps:  the sums of all four gates, which meet in registers.
// Moves:  a panel of w_hh, h of its rows, gx, and the state.
// Syncs:  nothing.
// Limits: none.
template <class S> struct LstmTile {
  const LstmForward<S>& call;
  const Step<S, 4>& step;
  Real<S>* c_rows;  // (B, H)
  S* m_rows;        // (B, H) where there is a projection
  template <int MR> void run(int64_t p, int64_t m) const {
    using V = Vec<Real<S>>;
    const int64_t H = call.in.H, j = p * V::width, n = H - j;
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
      const int64_t b = step.b[m + i], at = step.t * call.in.B + b;
      Real<S>* c = c_rows + b * H + j;
      const LstmStep<V> s =
          lstm_step(acc[i][0], acc[i][1], acc[i][2], acc[i][3], is_reset(call.in, step.t, b) ? V(0) : load(c, n));
      store(s.c, c, n);
      store(s.m, (m_rows ? m_rows + b * H : call.y + at * H) + j, n);
      if (!call.gates) continue;
      S* gates = call.gates + at * 4 * H + j;
      store(s.i, gates, n);
      store(s.f, gates + H, n);
      store(s.g, gates + 2 * H, n);
      store(s.o, gates + 3 * H, n);
      store(s.c, call.cells + at * H + j, n);
    }
  }
};

// What forward_steps needs of the cell. m (B, H): the projection's input of one step.
template <class S> struct LstmSteps {
  const LstmForward<S>& call;
  const PackedMatrix<S>* w_hr;
  Real<S>* c;
  S* m;

  void step(const Step<S, 4>& s) const {
    each_tile<4>(s.p0, s.p1, s.count, LstmTile<S>{call, s, c, m});
    if (w_hr && call.in.T > 1) project(s.t, s.count, s.b);
  }
  void project(int64_t t, int64_t count, const int64_t* b) const {
    const int64_t H = call.in.H, P = call.in.P;
    const Scratch<const S*> from(count);
    const Scratch<S*> to(count);
    for (int64_t i = 0; i < count; ++i) from.get()[i] = m + b[i] * H, to.get()[i] = call.y + (t * call.in.B + b[i]) * P;
    w_hr->multiply(count, from.get(), to.get());
  }
  void skip(int64_t t, int64_t b) const {
    const int64_t at = t * call.in.B + b, H = call.in.H, P = call.in.P;
    zero(call.y + at * P, P);
    if (call.gates) zero(call.gates + at * 4 * H, 4 * H), zero(call.cells + at * H, H);
  }
};

template <class S> static void lstm_forward(const LstmForward<S>& call) {
  const Sequence<S>& q = call.in;
  const int64_t projected = call.w_hr ? q.B : 0;
  PackedMatrix<S> w_hr(projected ? q.H : 0, projected ? q.P : 0);
  if (projected) w_hr.pack_rows(q.pool, call.w_hr);
  const Scratch<S> m(projected * q.H);
  const Accumulator<S> c(call.cn, q.B * q.H);
  c.start(call.c0);
  const LstmSteps<S> steps{call, projected ? &w_hr : nullptr, c.get(), m.get()};
  forward_steps<S, 4>(q, q.T * q.B * (4 * q.H * (q.I + q.P) + (projected ? q.H * q.P : 0)), call.y, steps);
  if (projected && q.T == 1) {  // the panels of a single step are done by several threads; m is whole only now
    const Scratch<int64_t> b_of(q.B);
    int64_t count = 0;
    for (int64_t b = 0; b < q.B; ++b)
      if (takes_part(q, 0, b)) b_of.get()[count++] = b;
    steps.project(0, count, b_of.get());
  }
  for (int64_t b = 0; b < q.B; ++b) copy(last_state(q, b, q.h0, call.y, q.P), q.P, call.hn + b * q.P);
  c.finish();
}

// One row of one step backwards: dm, dc (H,) reach m and c; dc becomes that of c', dp (4H,) those of the
// pre-activations; c_prev may be null for 0; m may be null: not wanted.
template <class S>
static void lstm_row_grad(int64_t H, const Real<S>* dm, Real<S>* dc, const S* gates, const S* c, const S* c_prev, S* dp,
                          S* m) {
  using V = Vec<Real<S>>;
  for (int64_t j = 0; j < H; j += V::width) {
    const int64_t n = H - j;
    const LstmStepGrad<V> d = lstm_step_grad(
        load(dm + j, n), load(dc + j, n), load(gates + j, n), load(gates + H + j, n), load(gates + 2 * H + j, n),
        load(gates + 3 * H + j, n), load(c + j, n), c_prev ? load(c_prev + j, n) : V(0));
    store(d.c_prev, dc + j, n);
    store(d.pi, dp + j, n);
    store(d.pf, dp + H + j, n);
    store(d.pg, dp + 2 * H + j, n);
    store(d.po, dp + 3 * H + j, n);
    if (m) store(d.m, m + j, n);
  }
}

template <class S> struct LstmBackwardKernel {
  const LstmBackward<S>& call;
  Real<S>*dh0, *dc0;  // the running gradients
  PackedMatrix<S> w_hh, w_ih, w_hr;
  // Of a chunk, where there is a projection: the gradients of the projected h and the projection's input.
  S *dh, *m;
  int64_t ld_dh;
  const S** m_of;
};

// Owns:   dh0, dc0 and the chunk's arrays of the rows b0 .. b1.
// Keeps:  the running gradients of h and c in dh0 and dc0.
// Moves:  a step reads w_hh (and w_hr) and rows * (4H gates + 2H cells + P + H), writes rows * 4H.
// Syncs:  nothing: rows do not meet.
// Limits: none beyond kernels.h.
template <class S>
static void lstm_backward_steps(const LstmBackwardKernel<S>& k, const Chunk<S>& c, int64_t b0, int64_t b1) {
  using V = Vec<Real<S>>;
  const LstmBackward<S>& call = k.call;
  const Sequence<S>& q = call.in;
  const int64_t rows = b1 - b0, H = q.H, P = q.P;
  const Scratch<Real<S>> dm(rows * H);
  const Scratch<Real<S>*> out(rows);
  const Scratch<const S*> a(rows);
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
      const S* dy = call.dy + (t * q.B + b) * P;
      S* dh = k.m ? k.dh + c.at(t, b, q.B) * k.ld_dh : nullptr;
      for (int64_t j = 0; j < P; j += V::width) {
        const V sum = load(dy + j, P - j) + load(k.dh0 + b * P + j, P - j);
        dh ? store(sum, dh + j, P - j) : store(sum, dm.get() + i * H + j, P - j);
      }
      a.get()[i] = dh, out.get()[i] = dm.get() + i * H;
    }
    if (k.m) k.w_hr.multiply(count, a.get(), out.get());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = b_of.get()[i], at = t * q.B + b, in_chunk = c.at(t, b, q.B);
      S* dp = c.dp + in_chunk * c.ld;
      lstm_row_grad(H, dm.get() + i * H, k.dc0 + b * H, call.gates + at * 4 * H, call.cells + at * H,
                    state_before(q, s, b, call.c0, call.cells, H), dp, k.m ? k.m + in_chunk * H : nullptr);
      a.get()[i] = dp, out.get()[i] = k.dh0 + b * P;
    }
    k.w_hh.multiply(count, a.get(), out.get());
    apply_reset(q, t, b0, b1, k.dh0, P);
    apply_reset(q, t, b0, b1, k.dc0, H);
  }
}

template <class S> static void lstm_backward(const LstmBackward<S>& call) {
  const Sequence<S>& q = call.in;
  const int64_t H = q.H, P = q.P, G = 4 * H;
  const Accumulator<S> dh0(call.dh0, q.B * P), dc0(call.dc0, q.B * H), dw_ih(call.dw_ih, G * q.I, whole_sums(q, q.I)),
      dw_hh(call.dw_hh, G * P, whole_sums(q, P)), db(call.db, G), dw_hr(call.dw_hr, P * H, whole_sums(q, H));
  dh0.start(call.dhn), dc0.start(call.dcn);
  db.start();
  if (q.T * q.B == 0) dw_ih.start(), dw_hh.start(), dw_hr.start();
  const int64_t kept = call.w_hr ? chunk_steps(q) * q.B : 0, ld_dh = padded_stride(P);
  const Scratch<S> dh(kept * ld_dh), m(kept * H);
  const Scratch<const S*> m_of(kept);
  const bool ahead = !few_rows(q);
  LstmBackwardKernel<S> k{
      call,     dh0.get(), dc0.get(), {G, P, ahead}, {call.dx ? G : 0, q.I, ahead}, {kept ? P : 0, kept ? H : 0},
      dh.get(), m.get(),   ld_dh,     m_of.get()};
  k.w_hh.pack_transposed(q.pool, q.w_hh);
  if (call.dx) k.w_ih.pack_transposed(q.pool, q.w_ih);
  if (kept) k.w_hr.pack_transposed(q.pool, call.w_hr);
  backward_chunks(
      q, G, q.T * q.B * H * (4 * P + (kept ? P : 0)),
      [&](const Chunk<S>& c, int64_t b0, int64_t b1) { lstm_backward_steps(k, c, b0, b1); },
      [&](const Chunk<S>& c) {
        if (call.dx) input_grad(q, c, c.dp, k.w_ih, G, call.dx);
        weight_grad<S>(q.pool, G, {!c.first, q.I, c.rows, c.dp, c.ld, c.x, dw_ih.at(0), db.get()});
        weight_grad<S>(q.pool, G, {!c.first, P, c.rows, c.dp, c.ld, c.h, dw_hh.at(0), nullptr});
        if (kept) weight_grad<S>(q.pool, P, {!c.first, H, c.rows, k.dh, ld_dh, m_of.get(), dw_hr.at(0), nullptr});
      });
  for (const Accumulator<S>* result : {&dh0, &dc0, &dw_ih, &dw_hh, &db, &dw_hr}) result->finish();
}

}  // namespace FR_ISA
}  // namespace fr

#endif

#ifndef FR_ISA
namespace fr {
template <class F> void lstm_forward(const LstmForward<F>& call) { FR_DISPATCH_OF(F, lstm_forward<F>, call) }
template <class F> void lstm_backward(const LstmBackward<F>& call) { FR_DISPATCH_OF(F, lstm_backward<F>, call) }
template void lstm_forward(const LstmForward<float>&);
template void lstm_forward(const LstmForward<double>&);
template void lstm_forward(const LstmForward<bf16>&);
template void lstm_backward(const LstmBackward<float>&);
template void lstm_backward(const LstmBackward<double>&);
template void lstm_backward(const LstmBackward<bf16>&);
}  // namespace fr
#endif
