// LSTM on the CPU: forward and backward of one layer, one direction; the contract is in kernels.h, the equations are in
// cell_math.h. This file compiles itself once per instruction set (each_isa.h): kernels first, dispatch at the end.
#ifndef FR_ISA

#include "simd.h"
#define FR_FILE "lstm.cpp"
#include "each_isa.h"

#else

#include "vec.h"
#include "../cell_math.h"
#include "gemm.h"
#include "sequence.h"

namespace fr {
namespace FR_ISA {

// One row of one step: p (4H,) pre-activations, c (H,) the state in place; m (H,) = o tanh(c), h where nothing
// projects.
template <class F> static void lstm_row(int64_t H, const F* p, F* c, F* m, F* gates, F* cells) {
  using V = Vec<F>;
  for (int64_t j = 0; j < H; j += V::width) {
    const int64_t n = H - j;
    const LstmStep<V> s = lstm_step(V::load(p + j, n), V::load(p + H + j, n), V::load(p + 2 * H + j, n),
                                    V::load(p + 3 * H + j, n), V::load(c + j, n));
    s.c.store(c + j, n);
    s.m.store(m + j, n);
    if (!gates) continue;
    s.i.store(gates + j, n);
    s.f.store(gates + H + j, n);
    s.g.store(gates + 2 * H + j, n);
    s.o.store(gates + 3 * H + j, n);
    s.c.store(cells + j, n);
  }
}

// Owns:   all outputs of the rows b0 .. b1, for all steps.
// Keeps:  h and c in hn and cn; the pre-activations of a chunk of steps; m of one step where there is a projection.
// Moves:  a step reads w_hh, w_hr and (once per chunk) w_ih, rows * (4H + P + H) of state and pre-activations.
// Syncs:  nothing: rows do not meet.
// Limits: none beyond kernels.h.
template <class F> struct LstmForwardKernel {
  const LstmForward<F>& call;
  const F* bias;
};
template <class F> static void lstm_forward_rows(int64_t b0, int64_t b1, const void* ctx) {
  const LstmForward<F>& call = static_cast<const LstmForwardKernel<F>*>(ctx)->call;
  const F* bias = static_cast<const LstmForwardKernel<F>*>(ctx)->bias;
  const Sequence<F>& q = call.in;
  const int64_t rows = b1 - b0, H = q.H, P = q.P;
  copy(q.h0 + b0 * P, rows * P, call.hn + b0 * P);
  copy(call.c0 + b0 * H, rows * H, call.cn + b0 * H);
  const int64_t chunk = steps_per_chunk(q, rows);
  const Scratch<F> pre(chunk * rows * 4 * H), m(call.w_hr ? rows * (H + P) : 0);
  F* projected = m.get() + (call.w_hr ? rows * H : 0);
  for (int64_t s = 0; s < q.T; ++s) {
    if (s % chunk == 0) input_product(q, 4 * H, s, s + chunk < q.T ? s + chunk : q.T, b0, b1, bias, pre.get());
    const int64_t t = time_of(q, s);
    apply_reset(q, t, b0, b1, call.hn, P);
    apply_reset(q, t, b0, b1, call.cn, H);
    F* p = pre.get() + (s % chunk) * rows * 4 * H;
    dot_gemm<F>(rows, 4 * H, P, dense_rows<const F>(call.hn + b0 * P, P), q.w_hh, Onto::c, nullptr,
                dense_rows(p, 4 * H));
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t at = t * q.B + b;
      F* gates = call.gates ? call.gates + at * 4 * H : nullptr;
      F* cells = call.gates ? call.cells + at * H : nullptr;
      F* row_m = call.w_hr ? m.get() + (b - b0) * H : call.y + at * P;
      if (takes_part(q, t, b)) {
        lstm_row(H, p + (b - b0) * 4 * H, call.cn + b * H, row_m, gates, cells);
        if (!call.w_hr) copy(row_m, P, call.hn + b * P);
      } else {
        zero(row_m, H);
        if (gates) zero(gates, 4 * H), zero(cells, H);
      }
    }
    if (!call.w_hr) continue;
    dot_gemm<F>(rows, P, H, dense_rows<const F>(m.get(), H), call.w_hr, Onto::bias, nullptr, dense_rows(projected, P));
    for (int64_t b = b0; b < b1; ++b) {
      F* y = call.y + (t * q.B + b) * P;
      if (takes_part(q, t, b)) {
        copy(projected + (b - b0) * P, P, y);
        copy(y, P, call.hn + b * P);
      } else {
        zero(y, P);
      }
    }
  }
}

template <class F> static void lstm_forward(const LstmForward<F>& call) {
  const Sequence<F>& q = call.in;
  const Scratch<F> bias(q.b_ih || q.b_hh ? 4 * q.H : 0);
  const LstmForwardKernel<F> kernel{call, sum_of_biases(q, 4 * q.H, bias.get())};
  const int64_t work = q.T * q.B * (4 * q.H * (q.I + q.P) + (call.w_hr ? q.H * q.P : 0));
  run_split(q.pool, q.B, work, &kernel, lstm_forward_rows<F>);
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

// What the steps leave for the weight gradients, (T*B, .) each; all 0 where a row does not take part.
template <class F> struct LstmBackwardKernel {
  const LstmBackward<F>& call;
  F* dp;  // (T*B, 4H) gradients of the pre-activations
  F* h;   // (T*B, P) the h each step started from
  F* dh;  // (T*B, P) gradients of the projected h, where there is a projection
  F* m;   // (T*B, H) the projection's input
};

// Adds dy to what reaches h at step s and takes the rows through the projection. Result: dm of row b at dm + (b - b0) *
// H.
template <class F> static void lstm_reach_m(const LstmBackwardKernel<F>& k, int64_t t, int64_t b0, int64_t b1, F* dm) {
  const Sequence<F>& q = k.call.in;
  const int64_t P = q.P;
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t at = t * q.B + b;
    F* out = k.call.w_hr ? k.dh + at * P : dm + (b - b0) * P;
    const F *dy = k.call.dy + at * P, *dh = k.call.dh0 + b * P;
    if (!takes_part(q, t, b))
      zero(out, P);
    else
      for (int64_t j = 0; j < P; ++j) out[j] = dy[j] + dh[j];
  }
  if (k.call.w_hr) outer_gemm<F>(b1 - b0, q.H, P, {k.dh + (t * q.B + b0) * P, P, 1}, k.call.w_hr, q.H, false, dm, q.H);
}

// Owns:   dh0, dc0 and the kernel's arrays of the rows b0 .. b1.
// Keeps:  the running gradients of h and c in dh0 and dc0.
// Moves:  a step reads w_hh (and w_hr) and rows * (4H gates + 2H cells + P + H), writes rows * (4H + P).
// Syncs:  nothing: rows do not meet.
// Limits: none beyond kernels.h.
template <class F> static void lstm_backward_rows(int64_t b0, int64_t b1, const void* ctx) {
  const LstmBackwardKernel<F>& k = *static_cast<const LstmBackwardKernel<F>*>(ctx);
  const LstmBackward<F>& call = k.call;
  const Sequence<F>& q = call.in;
  const int64_t rows = b1 - b0, H = q.H, P = q.P;
  copy(call.dhn + b0 * P, rows * P, call.dh0 + b0 * P);
  copy(call.dcn + b0 * H, rows * H, call.dc0 + b0 * H);
  const Scratch<F> scratch(rows * (H + P));
  F *dm = scratch.get(), *dh_prev = dm + rows * H;
  for (int64_t s = q.T - 1; s >= 0; --s) {
    const int64_t t = time_of(q, s);
    lstm_reach_m(k, t, b0, b1, dm);
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t at = t * q.B + b;
      F *dp = k.dp + at * 4 * H, *h = k.h + at * P, *m = call.w_hr ? k.m + at * H : nullptr;
      if (!takes_part(q, t, b)) {
        zero(dp, 4 * H), zero(h, P);
        if (m) zero(m, H);
        continue;
      }
      const F* c_prev = state_before(q, s, b, call.c0, call.cells, H);
      const F* h_prev = state_before(q, s, b, q.h0, call.y, P);
      lstm_row_grad(H, dm + (b - b0) * H, call.dc0 + b * H, call.gates + at * 4 * H, call.cells + at * H, c_prev, dp,
                    m);
      if (h_prev)
        copy(h_prev, P, h);
      else
        zero(h, P);
    }
    outer_gemm<F>(rows, P, 4 * H, {k.dp + (t * q.B + b0) * 4 * H, 4 * H, 1}, q.w_hh, P, false, dh_prev, P);
    for (int64_t b = b0; b < b1; ++b)
      if (takes_part(q, t, b)) copy(dh_prev + (b - b0) * P, P, call.dh0 + b * P);
    apply_reset(q, t, b0, b1, call.dh0, P);
    apply_reset(q, t, b0, b1, call.dc0, H);
  }
}

template <class F> static void lstm_backward(const LstmBackward<F>& call) {
  const Sequence<F>& q = call.in;
  const int64_t rows = q.T * q.B, H = q.H, P = q.P;
  const Scratch<F> scratch(rows * (4 * H + P + (call.w_hr ? P + H : 0)));
  LstmBackwardKernel<F> k{call, scratch.get(), nullptr, nullptr, nullptr};
  if (rows) {
    k.h = k.dp + rows * 4 * H;
    k.dh = call.w_hr ? k.h + rows * P : nullptr;
    k.m = call.w_hr ? k.dh + rows * P : nullptr;
  }
  run_split(q.pool, q.B, rows * H * (4 * P + (call.w_hr ? P : 0)), &k, lstm_backward_rows<F>);
  input_grads<F>(q, 4 * H, k.dp, 4 * H, call.dx, call.dw_ih, call.db);
  weight_grad<F>(q.pool, 4 * H, {P, rows, k.dp, 4 * H, k.h, call.dw_hh, nullptr});
  if (call.w_hr) weight_grad<F>(q.pool, P, {H, rows, k.dh, P, k.m, call.dw_hr, nullptr});
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
