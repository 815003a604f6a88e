// The cells' gates to about 12 bits, for networks whose weights have 8: a third of the time of cell_math.h's. Compiled
// by each_isa.h for AVX-512 and above.

namespace fr {
namespace FR_ISA {

// e^(x * factor) for factor = -1 or -2, at most 2^60 so that products of two stay finite; NaN for NaN. The polynomial
// is the minimax fit of 2^f on [-1/2, 1/2] of degree 3 that is exact at 0, relative error 1.0e-4.
template <int factor> static FR_INLINE __m512 quick_exp(__m512 x) {
  const __m512 t = _mm512_min_ps(_mm512_set1_ps(60.0f), _mm512_mul_ps(x, _mm512_set1_ps(factor * 1.44269504f)));
  const __m512 f = _mm512_reduce_ps(t, 0);
  __m512 p = _mm512_set1_ps(0.05500893f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24221096f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69328293f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, _mm512_sub_ps(t, f));
}
static FR_INLINE __m512 quick_sigmoid(__m512 x) {
  return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), quick_exp<-1>(x)));
}
// tanh(y) * sigmoid(x) with one reciprocal.
static FR_INLINE __m512 quick_tanh_sigmoid(__m512 y, __m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), ey = quick_exp<-2>(y), ex = quick_exp<-1>(x);
  const __m512 below = _mm512_mul_ps(_mm512_add_ps(one, ey), _mm512_add_ps(one, ex));
  return _mm512_mul_ps(_mm512_sub_ps(one, ey), _mm512_rcp14_ps(below));
}
static FR_INLINE __m512 quick_tanh(__m512 y) {
  const __m512 one = _mm512_set1_ps(1.0f), ey = quick_exp<-2>(y);
  return _mm512_mul_ps(_mm512_sub_ps(one, ey), _mm512_rcp14_ps(_mm512_add_ps(one, ey)));
}

// c becomes the new cell state; returns h.
static FR_INLINE __m512 quick_lstm(__m512 i, __m512 f, __m512 g, __m512 o, __m512& c) {
  c = _mm512_fmadd_ps(quick_sigmoid(f), c, quick_tanh_sigmoid(g, i));
  return quick_tanh_sigmoid(c, o);
}
static FR_INLINE __m512 quick_gru(__m512 r, __m512 z, __m512 xn, __m512 q, __m512 h) {
  const __m512 n = quick_tanh(_mm512_fmadd_ps(quick_sigmoid(r), q, xn));
  return _mm512_fmadd_ps(quick_sigmoid(z), _mm512_sub_ps(h, n), n);
}

}  // namespace FR_ISA
}  // namespace fr
