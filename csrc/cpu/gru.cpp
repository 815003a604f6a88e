// GRU on the CPU: forward and backward of one layer, one direction; the contract is in kernels.h, the equations are in
// cell_math.h. This file compiles itself once per instruction set (each_isa.h): kernels first, dispatch at the end.
#ifndef FR_ISA

#include "simd.h"
#define FR_FILE "gru.cpp"
#include "each_isa.h"

#else

#include "vec.h"
#include "../cell_math.h"
#include "gemm.h"
#include "sequence.h"

namespace fr {
namespace FR_ISA {

// One row of one step: px, ph (3H,) the input's and the hidden state's parts of r z n; h (H,) in place.
template <class F> static void gru_row(int64_t H, const F* px, const F* ph, F* h, F* y, F* gates) {
  using V = Vec<F>;
  for (int64_t j = 0; j < H; j += V::width) {
    const int64_t n = H - j;
    const V q = V::load(ph + 2 * H + j, n);
    const GruStep<V> s = gru_step(V::load(px + j, n), V::load(px + H + j, n), V::load(px + 2 * H + j, n),
                                  V::load(ph + j, n), V::load(ph + H + j, n), q, V::load(h + j, n));
    s.h.store(h + j, n);
    s.h.store(y + j, n);
    if (!gates) continue;
    s.r.store(gates + j, n);
    s.z.store(gates + H + j, n);
    s.n.store(gates + 2 * H + j, n);
    q.store(gates + 3 * H + j, n);
  }
}

// Owns:   all outputs of the rows b0 .. b1, for all steps.
// Keeps:  h in hn; the input's part of a chunk of steps, the hidden part of one.
// Moves:  a step reads w_hh and (once per chunk) w_ih, rows * (6H + H) of pre-activations and state.
// Syncs:  nothing: rows do not meet.
// Limits: none beyond kernels.h.
template <class F> static void gru_forward_rows(int64_t b0, int64_t b1, const void* ctx) {
  const GruForward<F>& call = *static_cast<const GruForward<F>*>(ctx);
  const Sequence<F>& q = call.in;
  const int64_t rows = b1 - b0, H = q.H;
  copy(q.h0 + b0 * H, rows * H, call.hn + b0 * H);
  const int64_t chunk = steps_per_chunk(q, rows);
  const Scratch<F> scratch((chunk + 1) * rows * 3 * H);
  F *pre = scratch.get(), *ph = pre + chunk * rows * 3 * H;
  for (int64_t s = 0; s < q.T; ++s) {
    if (s % chunk == 0) input_product(q, 3 * H, s, s + chunk < q.T ? s + chunk : q.T, b0, b1, q.b_ih, pre);
    const int64_t t = time_of(q, s);
    apply_reset(q, t, b0, b1, call.hn, H);
    const F* px = pre + (s % chunk) * rows * 3 * H;
    dot_gemm<F>(rows, 3 * H, H, dense_rows<const F>(call.hn + b0 * H, H), q.w_hh, Onto::bias, q.b_hh,
                dense_rows(ph, 3 * H));
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t at = t * q.B + b;
      F *y = call.y + at * H, *gates = call.gates ? call.gates + at * 4 * H : nullptr;
      if (takes_part(q, t, b)) {
        gru_row(H, px + (b - b0) * 3 * H, ph + (b - b0) * 3 * H, call.hn + b * H, y, gates);
      } else {
        zero(y, H);
        if (gates) zero(gates, 4 * H);
      }
    }
  }
}

template <class F> static void gru_forward(const GruForward<F>& call) {
  const Sequence<F>& q = call.in;
  run_split(q.pool, q.B, q.T * q.B * 3 * q.H * (q.I + q.H), &call, gru_forward_rows<F>);
}

// One row of one step backwards: dh (H,) reaches h and becomes the direct part of that of h'; dp (4H,) gets those of r
// and z, of n's input part and of q; h_prev may be null for 0.
template <class F> static void gru_row_grad(int64_t H, const F* dy, F* dh, const F* gates, const F* h_prev, F* dp) {
  using V = Vec<F>;
  for (int64_t j = 0; j < H; j += V::width) {
    const int64_t n = H - j;
    const GruStepGrad<V> d = gru_step_grad(V::load(dy + j, n) + V::load(dh + j, n), V::load(gates + j, n),
                                           V::load(gates + H + j, n), V::load(gates + 2 * H + j, n),
                                           V::load(gates + 3 * H + j, n), h_prev ? V::load(h_prev + j, n) : V(0));
    d.h_prev.store(dh + j, n);
    d.pr.store(dp + j, n);
    d.pz.store(dp + H + j, n);
    d.pn.store(dp + 2 * H + j, n);
    d.q.store(dp + 3 * H + j, n);
  }
}

// What the steps leave for the weight gradients; all 0 where a row does not take part.
template <class F> struct GruBackwardKernel {
  const GruBackward<F>& call;
  F* dp;  // (T*B, 4H) gradients of r, z, n's input part, q
  F* h;   // (T*B, H) the h each step started from
};

// Owns:   dh0 and the kernel's arrays of the rows b0 .. b1.
// Keeps:  the running gradient of h in dh0.
// Moves:  a step reads w_hh and rows * (4H gates + 3H), writes rows * 6H.
// Syncs:  nothing: rows do not meet.
// Limits: none beyond kernels.h.
template <class F> static void gru_backward_rows(int64_t b0, int64_t b1, const void* ctx) {
  const GruBackwardKernel<F>& k = *static_cast<const GruBackwardKernel<F>*>(ctx);
  const GruBackward<F>& call = k.call;
  const Sequence<F>& q = call.in;
  const int64_t rows = b1 - b0, H = q.H;
  copy(call.dhn + b0 * H, rows * H, call.dh0 + b0 * H);
  const Scratch<F> through_w(rows * H);
  for (int64_t s = q.T - 1; s >= 0; --s) {
    const int64_t t = time_of(q, s);
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t at = t * q.B + b;
      F *dp = k.dp + at * 4 * H, *h = k.h + at * H;
      if (!takes_part(q, t, b)) {
        zero(dp, 4 * H), zero(h, H);
        continue;
      }
      const F* h_prev = state_before(q, s, b, q.h0, call.y, H);
      gru_row_grad(H, call.dy + at * H, call.dh0 + b * H, call.gates + at * 4 * H, h_prev, dp);
      if (h_prev)
        copy(h_prev, H, h);
      else
        zero(h, H);
    }
    const F* dp = k.dp + (t * q.B + b0) * 4 * H;
    outer_gemm<F>(rows, H, 2 * H, {dp, 4 * H, 1}, q.w_hh, H, false, through_w.get(), H);
    outer_gemm<F>(rows, H, H, {dp + 3 * H, 4 * H, 1}, q.w_hh + 2 * H * H, H, true, through_w.get(), H);
    for (int64_t b = b0; b < b1; ++b) {
      if (!takes_part(q, t, b)) continue;
      F* dh = call.dh0 + b * H;
      for (int64_t j = 0; j < H; ++j) dh[j] += through_w.get()[(b - b0) * H + j];
    }
    apply_reset(q, t, b0, b1, call.dh0, H);
  }
}

template <class F> static void gru_backward(const GruBackward<F>& call) {
  const Sequence<F>& q = call.in;
  const int64_t rows = q.T * q.B, H = q.H;
  const Scratch<F> scratch(rows * 5 * H);
  GruBackwardKernel<F> k{call, scratch.get(), rows ? scratch.get() + rows * 4 * H : nullptr};
  run_split(q.pool, q.B, rows * H * 3 * H, &k, gru_backward_rows<F>);
  input_grads<F>(q, 3 * H, k.dp, 4 * H, call.dx, call.dw_ih, call.db_ih);
  weight_grad<F>(q.pool, 2 * H, {H, rows, k.dp, 4 * H, k.h, call.dw_hh, call.db_hh});
  weight_grad<F>(q.pool, H,
                 {H, rows, rows ? k.dp + 3 * H : nullptr, 4 * H, k.h, call.dw_hh + 2 * H * H,
                  call.db_hh ? call.db_hh + 2 * H : nullptr});
}

}  // namespace FR_ISA
}  // namespace fr

#endif

#ifndef FR_ISA
namespace fr {
template <class F> void gru_forward(const GruForward<F>& call) { FR_DISPATCH(gru_forward<F>, call) }
template <class F> void gru_backward(const GruBackward<F>& call) { FR_DISPATCH(gru_backward<F>, call) }
template void gru_forward(const GruForward<float>&);
template void gru_forward(const GruForward<double>&);
template void gru_backward(const GruBackward<float>&);
template void gru_backward(const GruBackward<double>&);
}  // namespace fr
#endif
