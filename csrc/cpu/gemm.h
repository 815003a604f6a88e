// The sums of outer products that weight gradients are, tiled in registers. Compiled once per instruction set, by
// each_isa.h.
//
// Each output element is a sum over k in an order that depends on K and the instruction set alone, never on the
// element's place or the tile that holds it: k in turn within a block of outer_block, then the blocks in turn, which
// also lessens the error.

namespace fr {
namespace FR_ISA {

constexpr int64_t outer_block = 512;

// dw (M, N) = or += g^T a and db (M,) += the column sums of g, where it is wanted: g (K, M) with row stride ldg; row k
// of a is at a[k], or is 0 where that is null. K is at least 1.
template <class S> struct OuterSum {
  bool add;  // to what dw holds; else it holds nothing yet
  int64_t N, K;
  const S* g;
  int64_t ldg;
  const S* const* a;
  Real<S>* dw;
  Real<S>* db;
};

// Owns:   an MR x (NV vectors) tile of dw, of which m_valid rows and n_valid columns exist.
// Keeps:  MR * NV accumulator vectors over one block of k.
// Moves:  a block of g and one of a, both packed beforehand: MR elements and NV vectors for each k.
// Syncs:  nothing.
// Limits: none.
template <class F, int MR, int NV>
static void outer_tile(const F* g, const F* a, int64_t K, bool add, F* dw, int64_t ld, int64_t m_valid,
                       int64_t n_valid) {
  using V = Vec<F>;
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[m][n] = V(0);
  for (int64_t k = 0; k < K; ++k) {
    V av[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) av[n] = V::load(a + (k * NV + n) * V::width);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const V gv(g[k * MR + m]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) acc[m][n] = fma(gv, av[n], acc[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    if (m >= m_valid) break;
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      F* p = dw + m * ld + n * V::width;
      const int64_t left = n_valid - n * V::width;
      if (left > 0) (add ? V::load(p, left) + acc[m][n] : acc[m][n]).store(p, left);
    }
  }
}

// Columns n0 .. n0 + NV vectors of the rows m0 .. m1 of dw, for `count` values of k from k0 on; g_block holds g packed,
// MR elements for each k.
template <class S, int MR, int NV>
static void outer_columns(const OuterSum<S>& s, int64_t m0, int64_t m1, int64_t k0, int64_t count, int64_t n0,
                          const Real<S>* g_block, Real<S>* a_block) {
  using V = Vec<Real<S>>;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t n = 0; n < NV; ++n) {
      const S* row = s.a[k0 + k];
      const int64_t column = n0 + n * V::width;
      (row && column < s.N ? load(row + column, s.N - column) : V(0)).store(a_block + (k * NV + n) * V::width);
    }
  for (int64_t m = m0; m < m1; m += MR)
    outer_tile<Real<S>, MR, NV>(g_block + (m - m0) * count, a_block, count, s.add || k0 > 0, s.dw + m * s.N + n0, s.N,
                                m1 - m, s.N - n0);
}

// The rows m0 .. m1 of dw, by tiles. Rows of g may be read up to a vector beyond their end.
template <class S> static void outer_sum_tiled(const OuterSum<S>& s, int64_t m0, int64_t m1) {
  using V = Vec<Real<S>>;
  constexpr int MR = FR_VEC_BYTES == 64 ? 6 : 4, NV = FR_VEC_BYTES == 64 ? 4 : 2;
  const int64_t tiles = (m1 - m0 + MR - 1) / MR, block = s.K < outer_block ? s.K : outer_block;
  const Scratch<Real<S>> a_block(block * NV * V::width), g_block(tiles * block * MR + V::width);
  for (int64_t k0 = 0; k0 < s.K; k0 += block) {
    const int64_t count = k0 + block < s.K ? block : s.K - k0;
    for (int64_t tile = 0; tile < tiles; ++tile)  // each store's end is overwritten by the next
      for (int64_t k = 0; k < count; ++k)
        for (int64_t m = 0; m < MR; m += V::width)
          load(s.g + (k0 + k) * s.ldg + m0 + tile * MR + m).store(g_block.get() + (tile * count + k) * MR + m);
    for (int64_t n0 = 0; n0 < s.N; n0 += NV * V::width) {
      const int64_t left = s.N - n0;
      const auto columns = left > 3 * V::width ? outer_columns<S, MR, NV> : left > 2 * V::width ? outer_columns < S, MR,
                 NV < 3 ? NV : 3 >
          : left > V::width ? outer_columns<S, MR, 2>
                            : outer_columns<S, MR, 1>;
      columns(s, m0, m1, k0, count, n0, g_block.get(), a_block.get());
    }
  }
}

// The same where a has few columns: vectors run along m instead, one column at a time.
template <class S> static void outer_sum_narrow(const OuterSum<S>& s, int64_t m0, int64_t m1) {
  using F = Real<S>;
  using V = Vec<F>;
  constexpr int NV = 4;
  alignas(64) F sums[NV * V::width];
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t m = m0; m < m1; m += NV * V::width) {
      V acc[NV];
      for (int v = 0; v < NV; ++v) acc[v] = V(0);
      for (int64_t k = 0; k < s.K; ++k) {
        if (!s.a[k]) continue;
        const V x(widen(s.a[k][n]));
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const int64_t left = m1 - m - v * V::width;
          if (left > 0) acc[v] = fma(x, load(s.g + k * s.ldg + m + v * V::width, left), acc[v]);
        }
      }
      for (int v = 0; v < NV; ++v) acc[v].store(sums + v * V::width);
      for (int64_t i = 0; i < NV * V::width && m + i < m1; ++i) {
        F& dw = s.dw[(m + i) * s.N + n];
        dw = s.add ? dw + sums[i] : sums[i];
      }
    }
}

// sums[n] += sum_m g[m][n] of g (M, N) with row stride ldg.
template <class S> static void column_sums(int64_t M, int64_t N, const S* g, int64_t ldg, Real<S>* sums) {
  using V = Vec<Real<S>>;
  for (int64_t n = 0; n < N; n += V::width) {
    V total = V::load(sums + n, N - n);
    for (int64_t m0 = 0; m0 < M; m0 += outer_block) {
      V sum(0);
      for (int64_t m = m0; m < M && m < m0 + outer_block; ++m) sum = sum + load(g + m * ldg + n, N - n);
      total = total + sum;
    }
    total.store(sums + n, N - n);
  }
}

}  // namespace FR_ISA
}  // namespace fr
