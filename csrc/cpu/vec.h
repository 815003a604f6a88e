// A vector of the variant's width (FR_VEC_BYTES) with the operations that cell_math.h and gemm.h are written in.
// Compiled once per instruction set, by each_isa.h; hence no include guard and no includes (it needs <utility>).

namespace fr {
namespace FR_ISA {

// portable is also what a CPU without fused multiply-add runs: there a * b + c rounds twice.
#define FR_INLINE inline __attribute__((always_inline))

// The compiler's vector of F, and that of integers of the same size (typedefs of no template: gcc mistakes those).
template <class F> struct RawOf;
template <> struct RawOf<float> {
  typedef float Raw __attribute__((vector_size(FR_VEC_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(FR_VEC_BYTES)));
};
template <> struct RawOf<double> {
  typedef double Raw __attribute__((vector_size(FR_VEC_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(FR_VEC_BYTES)));
};

template <class F> struct Vec {
  static constexpr int width = FR_VEC_BYTES / sizeof(F);
  using Raw = typename RawOf<F>::Raw;
  using RawBits = typename RawOf<F>::Bits;
  Raw v;

  Vec() = default;
  FR_INLINE explicit Vec(Raw raw) : v(raw) {}
  FR_INLINE explicit Vec(F scalar) : v(scalar - Raw{}) {}
  FR_INLINE explicit Vec(int scalar) : v(F(scalar) - Raw{}) {}

  static FR_INLINE Vec load(const F* p) {
    Vec a;
    __builtin_memcpy(&a.v, p, sizeof a.v);
    return a;
  }
  FR_INLINE void store(F* p) const { __builtin_memcpy(p, &v, sizeof v); }
  // The first n < width elements; the rest read as 0 and are not touched in memory.
  static FR_INLINE Vec load_first(const F* p, int64_t n);
  FR_INLINE void store_first(F* p, int64_t n) const;
  // All of the vector when n >= width, which is the usual case in a loop over a row.
  static FR_INLINE Vec load(const F* p, int64_t n) { return n >= width ? load(p) : load_first(p, n); }
  FR_INLINE void store(F* p, int64_t n) const {
    if (n >= width)
      store(p);
    else
      store_first(p, n);
  }
};

template <class R> struct ScalarOf;
template <class F> struct ScalarOf<Vec<F>> {
  using type = F;
};

template <class F> FR_INLINE Vec<F> operator+(Vec<F> a, Vec<F> b) { return Vec<F>(a.v + b.v); }
template <class F> FR_INLINE Vec<F> operator-(Vec<F> a, Vec<F> b) { return Vec<F>(a.v - b.v); }
template <class F> FR_INLINE Vec<F> operator*(Vec<F> a, Vec<F> b) { return Vec<F>(a.v * b.v); }
template <class F> FR_INLINE Vec<F> operator/(Vec<F> a, Vec<F> b) { return Vec<F>(a.v / b.v); }
template <class F> FR_INLINE Vec<F> if_less(Vec<F> a, Vec<F> b, Vec<F> yes, Vec<F> no) {
  return Vec<F>(a.v < b.v ? yes.v : no.v);
}

#if FR_VEC_BYTES == 64
FR_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>((Vec<float>::Raw)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v));
}
FR_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>((Vec<double>::Raw)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v));
}
template <> FR_INLINE Vec<float> Vec<float>::load_first(const float* p, int64_t n) {
  return Vec((Raw)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p));
}
template <> FR_INLINE Vec<double> Vec<double>::load_first(const double* p, int64_t n) {
  return Vec((Raw)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p));
}
template <> FR_INLINE void Vec<float>::store_first(float* p, int64_t n) const {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
template <> FR_INLINE void Vec<double>::store_first(double* p, int64_t n) const {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
}
#elif FR_VEC_BYTES == 32
FR_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>((Vec<float>::Raw)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v));
}
FR_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>((Vec<double>::Raw)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v));
}
FR_INLINE __m256i first_of_8(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FR_INLINE __m256i first_of_4(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
template <> FR_INLINE Vec<float> Vec<float>::load_first(const float* p, int64_t n) {
  return Vec((Raw)_mm256_maskload_ps(p, first_of_8(n)));
}
template <> FR_INLINE Vec<double> Vec<double>::load_first(const double* p, int64_t n) {
  return Vec((Raw)_mm256_maskload_pd(p, first_of_4(n)));
}
template <> FR_INLINE void Vec<float>::store_first(float* p, int64_t n) const {
  _mm256_maskstore_ps(p, first_of_8(n), (__m256)v);
}
template <> FR_INLINE void Vec<double>::store_first(double* p, int64_t n) const {
  _mm256_maskstore_pd(p, first_of_4(n), (__m256d)v);
}
#else
template <class F> FR_INLINE Vec<F> fma(Vec<F> a, Vec<F> b, Vec<F> c) { return Vec<F>(a.v * b.v + c.v); }
template <class F> FR_INLINE Vec<F> Vec<F>::load_first(const F* p, int64_t n) {
  Vec a(0);
  for (int64_t i = 0; i < n; ++i) a.v[i] = p[i];
  return a;
}
template <class F> FR_INLINE void Vec<F>::store_first(F* p, int64_t n) const {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
#endif

template <class F> FR_INLINE typename Vec<F>::RawBits bits_of(Vec<F> a) { return (typename Vec<F>::RawBits)a.v; }
template <class F> FR_INLINE Vec<F> from_bits(typename Vec<F>::RawBits b) { return Vec<F>((typename Vec<F>::Raw)b); }
template <class F> FR_INLINE typename Vec<F>::RawBits sign_mask() { return bits_of(Vec<F>(F(-0.0))); }
template <class F> FR_INLINE Vec<F> abs(Vec<F> a) { return from_bits<F>(bits_of(a) & ~sign_mask<F>()); }
template <class F> FR_INLINE Vec<F> copysign(Vec<F> a, Vec<F> sign) {
  return from_bits<F>((bits_of(a) & ~sign_mask<F>()) | (bits_of(sign) & sign_mask<F>()));
}
FR_INLINE Vec<float> exponent_of_low_bits(Vec<float> shifted) { return from_bits<float>(bits_of(shifted) << 23); }
FR_INLINE Vec<double> exponent_of_low_bits(Vec<double> shifted) { return from_bits<double>(bits_of(shifted) << 52); }

// What cell_math.h says of them for scalars. The instructions give their second operand where one is NaN.
#if FR_VEC_BYTES == 64
FR_INLINE Vec<float> at_least(Vec<float> low, Vec<float> x) {
  return Vec<float>((Vec<float>::Raw)_mm512_max_ps((__m512)low.v, (__m512)x.v));
}
FR_INLINE Vec<float> at_most(Vec<float> high, Vec<float> x) {
  return Vec<float>((Vec<float>::Raw)_mm512_min_ps((__m512)high.v, (__m512)x.v));
}
FR_INLINE Vec<double> at_least(Vec<double> low, Vec<double> x) {
  return Vec<double>((Vec<double>::Raw)_mm512_max_pd((__m512d)low.v, (__m512d)x.v));
}
FR_INLINE Vec<double> at_most(Vec<double> high, Vec<double> x) {
  return Vec<double>((Vec<double>::Raw)_mm512_min_pd((__m512d)high.v, (__m512d)x.v));
}
#elif FR_VEC_BYTES == 32
FR_INLINE Vec<float> at_least(Vec<float> low, Vec<float> x) {
  return Vec<float>((Vec<float>::Raw)_mm256_max_ps((__m256)low.v, (__m256)x.v));
}
FR_INLINE Vec<float> at_most(Vec<float> high, Vec<float> x) {
  return Vec<float>((Vec<float>::Raw)_mm256_min_ps((__m256)high.v, (__m256)x.v));
}
FR_INLINE Vec<double> at_least(Vec<double> low, Vec<double> x) {
  return Vec<double>((Vec<double>::Raw)_mm256_max_pd((__m256d)low.v, (__m256d)x.v));
}
FR_INLINE Vec<double> at_most(Vec<double> high, Vec<double> x) {
  return Vec<double>((Vec<double>::Raw)_mm256_min_pd((__m256d)high.v, (__m256d)x.v));
}
#else
template <class F> FR_INLINE Vec<F> at_least(Vec<F> low, Vec<F> x) { return if_less(x, low, low, x); }
template <class F> FR_INLINE Vec<F> at_most(Vec<F> high, Vec<F> x) { return if_less(high, x, high, x); }
#endif
template <class F> FR_INLINE Vec<F> quotient(Vec<F> a, Vec<F> b) { return a / b; }
#if FR_VEC_BYTES == 64
// The instruction's 14 bits and a step of Newton's: a division takes three times as long.
FR_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) {
  const Vec<float> y((Vec<float>::Raw)_mm512_rcp14_ps((__m512)b.v));
  return a * fma(y, fma(Vec<float>(0) - b, y, Vec<float>(1)), y);
}
#endif

// What is computed with where S is stored: S itself, or float for bf16. `load` and `store` convert; `widen` one
// element.
template <class S> struct RealOf {
  using type = S;
};
template <> struct RealOf<bf16> {
  using type = float;
};
template <class S> using Real = typename RealOf<S>::type;

FR_INLINE float widen(bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
FR_INLINE float widen(float a) { return a; }
FR_INLINE double widen(double a) { return a; }

template <class F> FR_INLINE Vec<F> load(const F* p) { return Vec<F>::load(p); }
template <class F> FR_INLINE Vec<F> load(const F* p, int64_t n) { return Vec<F>::load(p, n); }
template <class F> FR_INLINE void store(Vec<F> a, F* p) { a.store(p); }
template <class F> FR_INLINE void store(Vec<F> a, F* p, int64_t n) { a.store(p, n); }

typedef uint16_t HalfBits __attribute__((vector_size(FR_VEC_BYTES / 2)));
typedef uint32_t WideBits __attribute__((vector_size(FR_VEC_BYTES)));
FR_INLINE Vec<float> load(const bf16* p) {
  HalfBits h;
  __builtin_memcpy(&h, p, sizeof h);
  return Vec<float>((Vec<float>::Raw)(__builtin_convertvector(h, WideBits) << 16));
}
FR_INLINE Vec<float> load(const bf16* p, int64_t n) {
  if (n >= Vec<float>::width) return load(p);
  bf16 some[Vec<float>::width] = {};
  __builtin_memcpy(some, p, static_cast<size_t>(n) * sizeof(bf16));
  return load(some);
}
// To nearest, ties to even; NaN stays NaN.
FR_INLINE void store(Vec<float> a, bf16* p) {
#if FR_DOTS
  const __m256bh h = _mm512_cvtneps_pbh((__m512)a.v);
#else
  const WideBits bits = (WideBits)a.v, rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const HalfBits h = __builtin_convertvector((a.v == a.v ? rounded : (bits | 0x400000u)) >> 16, HalfBits);
#endif
  __builtin_memcpy(p, &h, sizeof h);
}
FR_INLINE void store(Vec<float> a, bf16* p, int64_t n) {
  if (n >= Vec<float>::width) return store(a, p);
  bf16 some[Vec<float>::width];
  store(a, some);
  __builtin_memcpy(p, some, static_cast<size_t>(n) * sizeof(bf16));
}

// What one multiply-add takes of a row of S along k: a vector or, of bfloat16, pairs, both products of which are added
// to a lane. Of one pair, `spread` fills all lanes.
struct Bf16Pair {
  bf16 of[2];
};
#if FR_DOTS
struct Bf16Pairs {
  __m512bh v;
};
FR_INLINE Bf16Pairs load(const Bf16Pair* p) {
  Bf16Pairs a;
  __builtin_memcpy(&a.v, p, sizeof a.v);
  return a;
}
FR_INLINE Bf16Pairs spread(Bf16Pair pair) {
  int32_t bits;
  __builtin_memcpy(&bits, &pair, sizeof bits);
  return {(__m512bh)_mm512_set1_epi32(bits)};
}
FR_INLINE Vec<float> fma(Bf16Pairs a, Bf16Pairs b, Vec<float> c) {
  return Vec<float>((Vec<float>::Raw)_mm512_dpbf16_ps((__m512)c.v, a.v, b.v));
}
#endif
template <class S> FR_INLINE Vec<Real<S>> spread(S a) { return Vec<Real<S>>(widen(a)); }

template <class S> struct NeighboursOf {
  using type = Vec<Real<S>>;
  static constexpr int64_t count = type::width;
};
template <class S> FR_INLINE Vec<Real<S>> neighbours(const S* p) { return load(p); }
template <class S> FR_INLINE Vec<Real<S>> neighbours(const S* p, int64_t n) { return load(p, n); }
#if FR_DOTS
template <> struct NeighboursOf<bf16> {
  using type = Bf16Pairs;
  static constexpr int64_t count = 2 * Vec<float>::width;
};
FR_INLINE Bf16Pairs neighbours(const bf16* p) {
  Bf16Pairs a;
  __builtin_memcpy(&a.v, p, sizeof a.v);
  return a;
}
FR_INLINE Bf16Pairs neighbours(const bf16* p, int64_t n) {
  bf16 some[NeighboursOf<bf16>::count] = {};
  __builtin_memcpy(some, p, static_cast<size_t>(n) * sizeof(bf16));
  return neighbours(some);
}
#endif
template <class S> using Neighbours = typename NeighboursOf<S>::type;
template <class S> constexpr int64_t neighbour_count = NeighboursOf<S>::count;

// Which lane of the two vectors a, b (numbered through, 0 .. 2W-1) goes to lane i of a shuffle's result: an exchange of
// lanes between two rows D apart of a square, which is the step of a transposition. Up: what becomes the second row.
template <int W, int D> struct Exchange {
  template <int Up> static constexpr int at(int i) { return Up ? (i & D ? W + i : i + D) : (i & D ? W + i - D : i); }
};
template <class Pick, int Up, class F, int... I>
FR_INLINE Vec<F> shuffle(Vec<F> a, Vec<F> b, std::integer_sequence<int, I...>) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  return Vec<F>(__builtin_shufflevector(a.v, b.v, (Pick::template at<Up>(I))...));
#else
  return Vec<F>(__builtin_shuffle(a.v, b.v, typename Vec<F>::RawBits{(Pick::template at<Up>(I))...}));
#endif
}
// Row i becomes column i, for a square of vectors.
template <class F, int D = Vec<F>::width / 2> FR_INLINE void transpose(Vec<F> (&rows)[Vec<F>::width]) {
  constexpr int W = Vec<F>::width;
  constexpr std::make_integer_sequence<int, W> lanes{};
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & D) continue;
    const Vec<F> a = rows[i], b = rows[i + D];
    rows[i] = shuffle<Exchange<W, D>, 0>(a, b, lanes);
    rows[i + D] = shuffle<Exchange<W, D>, 1>(a, b, lanes);
  }
  if constexpr (D > 1) transpose<F, D / 2>(rows);
}

// Lanes D apart added: those of a where the lane's number has no bit D, those of b where it has.
template <int D, class F> FR_INLINE Vec<F> fold(Vec<F> a, Vec<F> b) {
  constexpr int W = Vec<F>::width;
  constexpr std::make_integer_sequence<int, W> lanes{};
  return shuffle<Exchange<W, D>, 0>(a, b, lanes) + shuffle<Exchange<W, D>, 1>(a, b, lanes);
}
// Lane i of the result is the sum of the lanes of rows[i % N] whose numbers are i modulo N, by the same tree for every
// row: neighbours first. With N = width it is the sum of all lanes of rows[i].
template <int D = 1, class F, int N> FR_INLINE Vec<F> lane_sums(Vec<F> (&rows)[N]) {
#pragma GCC unroll 8
  for (int i = 0; i < N; i += 2 * D) rows[i] = fold<D>(rows[i], rows[i + D]);
  if constexpr (2 * D < N) return lane_sums<2 * D>(rows);
  return rows[0];
}

}  // namespace FR_ISA
}  // namespace fr
