// The equations of the cells, and the two functions they need, for host and device.
//
// R is a real number or a vector of them; S the scalar in it (float or double). Where FR_ISA is defined this text is
// compiled into namespace fr::FR_ISA for that namespace's Vec type (cpu/each_isa.h says why), so it has no include
// guard there and includes nothing; elsewhere it is compiled once, into namespace fr, for float and double.
//
// Sources: Hochreiter & Schmidhuber 1997 and Gers et al. 2000 (LSTM), Sak et al. 2014 (projection), Cho et al. 2014
// (GRU, in PyTorch's form: r multiplies W_hn h + b_hn), Elman 1990 (RNN); formulas as in torch.nn's documentation.
#if defined(FR_ISA) || !defined(FR_CELL_MATH_H)

#ifndef FR_ISA
#define FR_CELL_MATH_H
#include <cstdint>
#include <cstring>
#endif

#ifndef FR_HD
#if defined(__CUDACC__)
#define FR_HD __host__ __device__ __forceinline__
#else
#define FR_HD inline __attribute__((always_inline))
#endif
#endif

namespace fr {
#ifdef FR_ISA
namespace FR_ISA {
#else

// The primitives of a scalar R; vectors bring their own.
template <class R> struct ScalarOf {
  using type = R;
};
FR_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FR_HD double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
FR_HD float abs(float a) { return __builtin_fabsf(a); }
FR_HD double abs(double a) { return __builtin_fabs(a); }
FR_HD float copysign(float a, float sign) { return __builtin_copysignf(a, sign); }
FR_HD double copysign(double a, double sign) { return __builtin_copysign(a, sign); }
// a < b ? yes : no, so a NaN in a or b gives `no`
template <class R> FR_HD R if_less(R a, R b, R yes, R no) { return a < b ? yes : no; }
// x brought to low or to high; NaN stays NaN
template <class R> FR_HD R at_least(R low, R x) { return x < low ? low : x; }
template <class R> FR_HD R at_most(R high, R x) { return high < x ? high : x; }
// a / b for b from 1 to the greatest number; vectors may round twice
template <class R> FR_HD R quotient(R a, R b) { return a / b; }
// The number whose exponent field is the lowest mantissa bits of `shifted` (see expm1_parts)
FR_HD float exponent_of_low_bits(float shifted) {
  uint32_t u;
  memcpy(&u, &shifted, sizeof u);
  u <<= 23;
  memcpy(&shifted, &u, sizeof u);
  return shifted;
}
FR_HD double exponent_of_low_bits(double shifted) {
  uint64_t u;
  memcpy(&u, &shifted, sizeof u);
  u <<= 52;
  memcpy(&shifted, &u, sizeof u);
  return shifted;
}
#endif

// Numbers that depend on the precision. ln2 = ln2_hi + ln2_lo, with ln2_hi short enough that n * ln2_hi is exact.
// `shift` is 1.5 * 2^(mantissa bits) plus the bias of the exponent: adding it rounds to an integer n and leaves the
// exponent field of 2^n in the lowest bits. exp_most: e^x and twice it are finite up to here, 1 / (1 + e^x) is no
// subnormal number; exp_least: 2^n is still normal here. expm1_least: e^x - 1 rounds to -1 from here.
template <class S> struct ExpConstants;
template <> struct ExpConstants<float> {
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440055e-4f, shift = 12582912.0f + 127.0f;
  static constexpr float exp_most = 87.3365f, exp_least = -87.0f, expm1_least = -20.0f;
};
template <> struct ExpConstants<double> {
  static constexpr double ln2_hi = 0.69314670562744140625, ln2_lo = 4.749325039031672321e-7;
  static constexpr double shift = 6755399441055744.0 + 1023.0;
  static constexpr double exp_most = 708.3964, exp_least = -708.0, expm1_least = -44.0;
};

// (e^r - 1 - r) / r^2 for |r| <= ln(2)/2: Chebyshev fits, absolute error 6.6e-8 and 1.5e-18.
template <class R> FR_HD R expm1_tail(R r, float) {
  R p = fma(R(1.392621347e-3f), r, R(8.363202972e-3f));
  p = fma(p, r, R(4.166655444e-2f));
  p = fma(p, r, R(1.666657685e-1f));
  return fma(p, r, R(0.5f));
}
template <class R> FR_HD R expm1_tail(R r, double) {
  R p = fma(R(2.0914717341716376e-9), r, R(2.51052595384484934e-8));
  p = fma(p, r, R(2.75572735701021397e-7));
  p = fma(p, r, R(2.75572552979696444e-6));
  p = fma(p, r, R(2.48015873256053228e-5));
  p = fma(p, r, R(1.98412698749012592e-4));
  p = fma(p, r, R(1.38888888888837318e-3));
  p = fma(p, r, R(8.33333333332611205e-3));
  p = fma(p, r, R(4.16666666666666698e-2));
  p = fma(p, r, R(1.6666666666666671e-1));
  return fma(p, r, R(0.5));
}

// e^x = scale * (1 + q) with scale a power of two, q in [-0.30, 0.42] and q relatively accurate: q -> x for x -> 0.
// x within [exp_least, exp_most] or NaN, which reaches q.
template <class R> struct Expm1Parts {
  R scale, q;
};
template <class R> FR_HD Expm1Parts<R> expm1_parts(R x) {
  using S = typename ScalarOf<R>::type;
  using C = ExpConstants<S>;
  const R shifted = fma(x, R(S(1.44269504088896340736)), R(C::shift));
  const R n = shifted - R(C::shift);
  const R r = fma(n, R(-C::ln2_lo), fma(n, R(-C::ln2_hi), x));
  return {exponent_of_low_bits(shifted), fma(r * r, expm1_tail(r, S(0)), r)};
}

// 1 / (1 + e^-x), within 3 ulp, and within 1 where it is near 1, for gradients have 1 - sigmoid in them; from
// 1 / (1 + e^exp_most) on, which is about the least normal number. NaN for NaN.
template <class R> FR_HD R sigmoid(R x) {
  using C = ExpConstants<typename ScalarOf<R>::type>;
  const Expm1Parts<R> e = expm1_parts(at_most(R(C::exp_most), at_least(R(C::exp_least), R(0) - x)));
  return quotient(R(1), fma(e.scale, R(1) + e.q, R(1)));
}

// (1 - e^-2|x|) / (1 + e^-2|x|) with x's sign, through e^u - 1 so that it is within 4 ulp near 0 as well; NaN for NaN.
template <class R> FR_HD R tanh(R x) {
  using C = ExpConstants<typename ScalarOf<R>::type>;
  const Expm1Parts<R> e = expm1_parts(at_least(R(C::expm1_least), R(-2) * abs(x)));
  const R em1 = fma(e.scale, e.q, e.scale - R(1));
  return quotient(copysign(em1, x), em1 + R(2));
}

// max(x, 0), NaN for NaN
template <class R> FR_HD R relu(R x) { return if_less(x, R(0), R(0), x); }

// LSTM: i f o = sigmoid, g = tanh of the pre-activations p; c = f c' + i g; m = o tanh(c) is h before the projection.
template <class R> struct LstmStep {
  R i, f, g, o, c, m;
};
template <class R> FR_HD LstmStep<R> lstm_step(R pi, R pf, R pg, R po, R c_prev) {
  LstmStep<R> s;
  s.i = sigmoid(pi);
  s.f = sigmoid(pf);
  s.g = tanh(pg);
  s.o = sigmoid(po);
  s.c = fma(s.f, c_prev, s.i * s.g);
  s.m = s.o * tanh(s.c);
  return s;
}
// dm, dc: gradients that reach m and c from outside this step. Gives those of the pre-activations and of c', and m
// again.
template <class R> struct LstmStepGrad {
  R pi, pf, pg, po, c_prev, m;
};
template <class R> FR_HD LstmStepGrad<R> lstm_step_grad(R dm, R dc, R i, R f, R g, R o, R c, R c_prev) {
  LstmStepGrad<R> d;
  const R tc = tanh(c);
  d.m = o * tc;
  dc = fma(dm * o, fma(R(0) - tc, tc, R(1)), dc);
  d.pi = dc * g * (i * (R(1) - i));
  d.pf = dc * c_prev * (f * (R(1) - f));
  d.pg = dc * i * fma(R(0) - g, g, R(1));
  d.po = dm * tc * (o * (R(1) - o));
  d.c_prev = dc * f;
  return d;
}

// GRU: r z = sigmoid of the pre-activations p, n = tanh(xn + r q), h = (1 - z) n + z h'; xn from the input, q from h'.
template <class R> struct GruStep {
  R r, z, n, h;
};
template <class R> FR_HD GruStep<R> gru_step(R pr, R pz, R xn, R q, R h_prev) {
  GruStep<R> s;
  s.r = sigmoid(pr);
  s.z = sigmoid(pz);
  s.n = tanh(fma(s.r, q, xn));
  s.h = fma(s.z, h_prev - s.n, s.n);
  return s;
}
// dh reaches h. pr pz pn: gradients of the input's part, of the hidden part too but for n, where q is; h_prev: the
// direct path only, without W_hh.
template <class R> struct GruStepGrad {
  R pr, pz, pn, q, h_prev;
};
template <class R> FR_HD GruStepGrad<R> gru_step_grad(R dh, R r, R z, R n, R q, R h_prev) {
  GruStepGrad<R> d;
  d.pz = dh * (h_prev - n) * (z * (R(1) - z));
  d.pn = dh * (R(1) - z) * fma(R(0) - n, n, R(1));
  d.q = d.pn * r;
  d.pr = d.pn * q * (r * (R(1) - r));
  d.h_prev = dh * z;
  return d;
}

// Elman: h = tanh(p) or relu(p); the gradient of p from that of h, given h.
template <class R> FR_HD R rnn_step(R p, bool use_relu) { return use_relu ? relu(p) : tanh(p); }
template <class R> FR_HD R rnn_step_grad(R dh, R h, bool use_relu) {
  return use_relu ? dh * if_less(R(0), h, R(1), R(0)) : dh * fma(R(0) - h, h, R(1));
}

#ifdef FR_ISA
}  // namespace FR_ISA
#endif
}  // namespace fr

#endif
