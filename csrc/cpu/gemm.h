// The two matrix products of the cells, tiled in registers. Compiled once per instruction set, by each_isa.h.
//
// Each output element is a sum over k in an order that depends on K and the instruction set alone, never on the number
// of rows, the element's place or the tile that holds it. That is what makes a row of a batch equal, bit for bit, to
// that row by itself.

namespace fr {
namespace FR_ISA {

// Row r of a matrix whose rows come in groups: base + (r / group) * group_stride + (r % group) * row_stride.
template <class F> struct Rows {
  F* base;
  int64_t row_stride, group, group_stride;
  FR_INLINE F* operator[](int64_t r) const {
    return group_stride == 0 ? base + r * row_stride : base + (r / group) * group_stride + (r % group) * row_stride;
  }
};
template <class F> FR_INLINE Rows<F> dense_rows(F* base, int64_t row_stride) { return {base, row_stride, 1, 0}; }

// ---- dot: c[m][n] = base + sum_k a[m][k] w[n][k], both operands contiguous in k, as W x with PyTorch's weights.
// Owns:   an MR x NR tile of c.
// Keeps:  MR * NR accumulator vectors; lane l sums k = l, l + W, ... in turn, then lane_sums adds the W lanes.
// Moves:  (MR + NR) * K elements in, from L1: `dot_gemm` walks w in blocks that stay there.
// Syncs:  nothing.
// Limits: NR is a multiple of 4.

// What a dot product is added to: the bias of column n (or 0), or what c holds.
enum class Onto { bias, c };

template <class F, int MR, int NR>
static void dot_tile(const F* const* a, const F* const* w, int64_t K, Onto onto, const F* bias, F* const* c,
                     int64_t n_valid) {
  using V = Vec<F>;
  V acc[MR][NR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) acc[m][n] = V(0);
  int64_t k = 0;
  for (; k + V::width <= K; k += V::width) {
    V wv[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) wv[n] = V::load(w[n] + k);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const V av = V::load(a[m] + k);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) acc[m][n] = fma(av, wv[n], acc[m][n]);
    }
  }
  if (k < K) {
    V wv[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) wv[n] = V::load_first(w[n] + k, K - k);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const V av = V::load_first(a[m] + k, K - k);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) acc[m][n] = fma(av, wv[n], acc[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NR; n += 4) {
      const Four<F> sum = lane_sums(acc[m][n], acc[m][n + 1], acc[m][n + 2], acc[m][n + 3]);
      const F* base = onto == Onto::c ? c[m] : bias;
      if (n + 4 <= n_valid) {
        Four<F>{base ? Four<F>::load(base + n).v + sum.v : F(0) + sum.v}.store(c[m] + n);
      } else {
        for (int i = n; i < n_valid; ++i) c[m][i] = (base ? base[i] : F(0)) + sum.v[i - n];
      }
    }
}

template <class F, int MR, int NR>
static void dot_rows(const Rows<const F>& a, int64_t m0, const F* w, int64_t n0, int64_t n1, int64_t N, int64_t K,
                     Onto onto, const F* bias, const Rows<F>& c) {
  const F* ar[MR];
  for (int m = 0; m < MR; ++m) ar[m] = a[m0 + m];
  for (int64_t n = n0; n < n1; n += NR) {
    const F* wr[NR];
    F* cr[MR];
    for (int i = 0; i < NR; ++i) wr[i] = w + (n + i < N ? n + i : N - 1) * K;  // a repeated row is not stored
    for (int m = 0; m < MR; ++m) cr[m] = c[m0 + m] + n;
    dot_tile<F, MR, NR>(ar, wr, K, onto, bias ? bias + n : nullptr, cr, N - n);
  }
}

// c (M, N) = base + a (M, K) w^T, w (N, K) dense.
template <class F>
static void dot_gemm(int64_t M, int64_t N, int64_t K, const Rows<const F>& a, const F* w, Onto onto, const F* bias,
                     const Rows<F>& c) {
  constexpr int MR = FR_VEC_BYTES == 64 ? 6 : 2;  // 32 registers, or 16
  constexpr int64_t block_bytes = 24 * 1024;      // of w: half of a 48 KB L1, so that rows of a fit beside it
  const int64_t row_bytes = (K > 0 ? K : 1) * static_cast<int64_t>(sizeof(F));
  const int64_t block = row_bytes * 8 > block_bytes ? 8 : block_bytes / row_bytes / 8 * 8;
  for (int64_t n0 = 0; n0 < N; n0 += block) {
    const int64_t n1 = n0 + block < N ? n0 + block : N;
    int64_t m = 0;
    for (; m + MR <= M; m += MR) dot_rows<F, MR, 4>(a, m, w, n0, n1, N, K, onto, bias, c);
    for (; m + 2 <= M; m += 2) dot_rows<F, 2, 4>(a, m, w, n0, n1, N, K, onto, bias, c);
    if (m < M) dot_rows<F, 1, 8>(a, m, w, n0, n1, N, K, onto, bias, c);
  }
}

// ---- outer: c[m][n] = base + sum_k a(m, k) b[k][n], b and c contiguous in n; a's element is read with any strides, so
// that a may be transposed.
// Owns:   an MR x (NV vectors) tile of c.
// Keeps:  MR * NV accumulator vectors over one block of outer_block values of k.
// Moves:  the block of b once per MR rows, copied beforehand where it is used often or has a ragged edge.
// Syncs:  nothing.
// Limits: none. Sums are blocked: k in turn within a block, then the blocks in turn, which also halves the error.

constexpr int64_t outer_block = 128;

// a(m, k) = at[m * m_stride + k * k_stride]
template <class F> struct Strided {
  const F* at;
  int64_t m_stride, k_stride;
};

template <class F, int MR, int NV>
static void outer_tile(const Strided<F>& a, const F* b, int64_t ldb, int64_t K, bool add, F* c, int64_t ldc,
                       int64_t n_valid) {
  using V = Vec<F>;
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[m][n] = V(0);
  for (int64_t k = 0; k < K; ++k) {
    V bv[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) bv[n] = V::load(b + k * ldb + n * V::width);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const V av(a.at[m * a.m_stride + k * a.k_stride]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) acc[m][n] = fma(av, bv[n], acc[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      F* p = c + m * ldc + n * V::width;
      const int64_t left = n_valid - n * V::width;
      if (left <= 0) continue;
      if (add) acc[m][n] = V::load(p, left) + acc[m][n];
      acc[m][n].store(p, left);
    }
}

template <class F>
static void outer_gemm(int64_t M, int64_t N, int64_t K, const Strided<F>& a, const F* b, int64_t ldb, bool add, F* c,
                       int64_t ldc) {
  using V = Vec<F>;
  constexpr int MR = FR_VEC_BYTES == 64 ? 6 : FR_VEC_BYTES == 32 ? 4 : 4;
  constexpr int NV = FR_VEC_BYTES == 64 ? 4 : 2;
  constexpr int64_t NR = NV * V::width;
  alignas(64) F copy[outer_block * NR];
  if (K == 0 && !add)
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) c[m * ldc + n] = F(0);
  for (int64_t k0 = 0; k0 < K; k0 += outer_block) {
    const int64_t k_count = k0 + outer_block < K ? outer_block : K - k0;
    for (int64_t n0 = 0; n0 < N; n0 += NR) {
      const int64_t n_count = n0 + NR < N ? NR : N - n0;
      const F* panel = b + k0 * ldb + n0;
      int64_t ld = ldb;
      if (n_count < NR || M > 2 * MR) {
        for (int64_t k = 0; k < k_count; ++k)
          for (int64_t n = 0; n < NR; n += V::width) {
            const int64_t left = n_count - n;
            (left > 0 ? V::load(panel + k * ldb + n, left) : V(0)).store(copy + k * NR + n);
          }
        panel = copy;
        ld = NR;
      }
      const bool onto = add || k0 > 0;
      int64_t m = 0;
      for (; m + MR <= M; m += MR)
        outer_tile<F, MR, NV>({a.at + m * a.m_stride + k0 * a.k_stride, a.m_stride, a.k_stride}, panel, ld, k_count,
                              onto, c + m * ldc + n0, ldc, n_count);
      for (; m < M; ++m)
        outer_tile<F, 1, NV>({a.at + m * a.m_stride + k0 * a.k_stride, a.m_stride, a.k_stride}, panel, ld, k_count,
                             onto, c + m * ldc + n0, ldc, n_count);
    }
  }
}

// sums[n] = sum_m a[m][n] of a (M, N) with row stride lda, blocked as above.
template <class F> static void column_sums(int64_t M, int64_t N, const F* a, int64_t lda, F* sums) {
  using V = Vec<F>;
  for (int64_t n = 0; n < N; n += V::width) {
    V total(0);
    for (int64_t m0 = 0; m0 < M; m0 += outer_block) {
      V sum(0);
      for (int64_t m = m0; m < M && m < m0 + outer_block; ++m) sum = sum + V::load(a + m * lda + n, N - n);
      total = total + sum;
    }
    total.store(sums + n, N - n);
  }
}

}  // namespace FR_ISA
}  // namespace fr
