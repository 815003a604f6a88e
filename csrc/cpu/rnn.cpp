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
#include "gemm.h"
#include "sequence.h"

namespace fr {
namespace FR_ISA {

template <class F> struct RnnForwardKernel {
  const RnnForward<F>& call;
  const F* bias;
};

// Owns:   all outputs of the rows b0 .. b1, for all steps.
// Keeps:  h in hn; the pre-activations of a chunk of steps.
// Moves:  a step reads w_hh and (once per chunk) w_ih, rows * 2H of state and pre-activations.
// Syncs:  nothing: rows do not meet.
// Limits: none beyond kernels.h.
template <class F> static void rnn_forward_rows(int64_t b0, int64_t b1, const void* ctx) {
  using V = Vec<F>;
  const RnnForward<F>& call = static_cast<const RnnForwardKernel<F>*>(ctx)->call;
  const F* bias = static_cast<const RnnForwardKernel<F>*>(ctx)->bias;
  const Sequence<F>& q = call.in;
  const int64_t rows = b1 - b0, H = q.H;
  copy(q.h0 + b0 * H, rows * H, call.hn + b0 * H);
  const int64_t chunk = steps_per_chunk(q, rows);
  const Scratch<F> pre(chunk * rows * H);
  for (int64_t s = 0; s < q.T; ++s) {
    if (s % chunk == 0) input_product(q, H, s, s + chunk < q.T ? s + chunk : q.T, b0, b1, bias, pre.get());
    const int64_t t = time_of(q, s);
    apply_reset(q, t, b0, b1, call.hn, H);
    F* p = pre.get() + (s % chunk) * rows * H;
    dot_gemm<F>(rows, H, H, dense_rows<const F>(call.hn + b0 * H, H), q.w_hh, Onto::c, nullptr, dense_rows(p, H));
    for (int64_t b = b0; b < b1; ++b) {
      F *y = call.y + (t * q.B + b) * H, *row = p + (b - b0) * H, *hn = call.hn + b * H;
      if (!takes_part(q, t, b)) {
        zero(y, H);
        continue;
      }
      for (int64_t j = 0; j < H; j += V::width) {
        const V h = rnn_step(V::load(row + j, H - j), call.relu);
        h.store(y + j, H - j);
        h.store(hn + j, H - j);
      }
    }
  }
}

template <class F> static void rnn_forward(const RnnForward<F>& call) {
  const Sequence<F>& q = call.in;
  const Scratch<F> bias(q.b_ih || q.b_hh ? q.H : 0);
  const RnnForwardKernel<F> kernel{call, sum_of_biases(q, q.H, bias.get())};
  run_split(q.pool, q.B, q.T * q.B * q.H * (q.I + q.H), &kernel, rnn_forward_rows<F>);
}

// What the steps leave for the weight gradients; all 0 where a row does not take part.
template <class F> struct RnnBackwardKernel {
  const RnnBackward<F>& call;
  F* dp;  // (T*B, H) gradients of the pre-activations
  F* h;   // (T*B, H) the h each step started from
};

// Owns:   dh0 and the kernel's arrays of the rows b0 .. b1.
// Keeps:  the running gradient of h in dh0.
// Moves:  a step reads w_hh and rows * 4H, writes rows * 3H.
// Syncs:  nothing: rows do not meet.
// Limits: none beyond kernels.h.
template <class F> static void rnn_backward_rows(int64_t b0, int64_t b1, const void* ctx) {
  using V = Vec<F>;
  const RnnBackwardKernel<F>& k = *static_cast<const RnnBackwardKernel<F>*>(ctx);
  const RnnBackward<F>& call = k.call;
  const Sequence<F>& q = call.in;
  const int64_t rows = b1 - b0, H = q.H;
  copy(call.dhn + b0 * H, rows * H, call.dh0 + b0 * H);
  const Scratch<F> dh_prev(rows * H);
  for (int64_t s = q.T - 1; s >= 0; --s) {
    const int64_t t = time_of(q, s);
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t at = (t * q.B + b) * H;
      F *dp = k.dp + at, *h = k.h + at;
      if (!takes_part(q, t, b)) {
        zero(dp, H), zero(h, H);
        continue;
      }
      const F *dy = call.dy + at, *y = call.y + at, *dh = call.dh0 + b * H;
      for (int64_t j = 0; j < H; j += V::width) {
        const int64_t n = H - j;
        rnn_step_grad(V::load(dy + j, n) + V::load(dh + j, n), V::load(y + j, n), call.relu).store(dp + j, n);
      }
      const F* h_prev = state_before(q, s, b, q.h0, call.y, H);
      if (h_prev)
        copy(h_prev, H, h);
      else
        zero(h, H);
    }
    outer_gemm<F>(rows, H, H, {k.dp + (t * q.B + b0) * H, H, 1}, q.w_hh, H, false, dh_prev.get(), H);
    for (int64_t b = b0; b < b1; ++b)
      if (takes_part(q, t, b)) copy(dh_prev.get() + (b - b0) * H, H, call.dh0 + b * H);
    apply_reset(q, t, b0, b1, call.dh0, H);
  }
}

template <class F> static void rnn_backward(const RnnBackward<F>& call) {
  const Sequence<F>& q = call.in;
  const int64_t rows = q.T * q.B, H = q.H;
  const Scratch<F> scratch(rows * 2 * H);
  RnnBackwardKernel<F> k{call, scratch.get(), rows ? scratch.get() + rows * H : nullptr};
  run_split(q.pool, q.B, rows * H * H, &k, rnn_backward_rows<F>);
  input_grads<F>(q, H, k.dp, H, call.dx, call.dw_ih, call.db);
  weight_grad<F>(q.pool, H, {H, rows, k.dp, H, k.h, call.dw_hh, nullptr});
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
