// The sums of outer products that weight gradients are, tiled in registers. Compiled once per instruction set, by
// each_isa.h.
//
// Each output element is a sum over k in an order that depends on K and the instruction set alone, never on the
// element's place or the tile that holds it: k in turn within a block of outer_block, then the blocks in turn, which
// also lessens the error.

namespace fr {
namespace FR_ISA {

constexpr int64_t outer_block = 512;

// Where an outer sum goes, one of the two: `real`, to be added to and rounded later, or `whole`, for a sum that is all
// there is to add, rounded as it is written.
template <class S> struct SumsAt {
  Real<S>* real;
  S* whole;
};

// dw (M, N) = or += g^T a and db (M,) += the column sums of g, where it is wanted: g (K, M) with row stride ldg; row k
// of a is at a[k], or is 0 where that is null. K is at least 1.
template <class S> struct OuterSum {
  bool add;  // to what dw holds; else it holds nothing yet
  int64_t N, K;
  const S* g;
  int64_t ldg;
  const S* const* a;
  SumsAt<S> dw;
  Real<S>* db;
};

// Owns:   an MR x (NV vectors) tile of dw, of which m_valid rows and n_valid columns exist.
// Keeps:  MR * NV accumulator vectors over one block of k.
// Moves:  a block of g and one of a, both packed beforehand: MR elements and NV vectors for each k.
// Syncs:  nothing.
// Limits: none.
template <int MR, int NV, class F, class O>
static void outer_tile(const F* g, const F* a, int64_t K, bool add, O* dw, int64_t ld, int64_t m_valid,
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
      O* p = dw + m * ld + n * V::width;
      const int64_t left = n_valid - n * V::width;
      if (left > 0) store(add ? load(p, left) + acc[m][n] : acc[m][n], p, left);
    }
  }
}

// The rows m0 .. m1 of the sum in dw, by tiles. Rows of g may be read up to a vector beyond their end. Of few k many
// columns are packed at once, so that dw is written along its rows.
template <class S, class O> static void outer_sum_tiled(const OuterSum<S>& s, int64_t m0, int64_t m1, O* dw) {
  using F = Real<S>;
  using V = Vec<F>;
  constexpr int MR = FR_VEC_BYTES == 64 ? 6 : 4, NV = FR_VEC_BYTES == 64 ? 4 : 2, three = NV < 3 ? NV : 3;
  constexpr int64_t W = V::width, packed_bytes = 64 * 1024;
  const int64_t tiles = (m1 - m0 + MR - 1) / MR, block = s.K < outer_block ? s.K : outer_block;
  const int64_t fit = packed_bytes / (block * NV * FR_VEC_BYTES), panels = (s.N + NV * W - 1) / (NV * W);
  const int64_t at_once = fit < 1 ? 1 : fit < panels ? fit : panels;
  const Scratch<F> a_block(at_once * block * NV * W), g_block(tiles * block * MR + W);
  for (int64_t k0 = 0; k0 < s.K; k0 += block) {
    const int64_t count = k0 + block < s.K ? block : s.K - k0;
    for (int64_t tile = 0; tile < tiles; ++tile)  // each store's end is overwritten by the next
      for (int64_t k = 0; k < count; ++k)
        for (int64_t m = 0; m < MR; m += W)
          load(s.g + (k0 + k) * s.ldg + m0 + tile * MR + m).store(g_block.get() + (tile * count + k) * MR + m);
    for (int64_t p0 = 0; p0 < panels; p0 += at_once) {
      const int64_t p1 = p0 + at_once < panels ? p0 + at_once : panels;
      const auto vectors = [&](int64_t p) { return (s.N - p * NV * W + W - 1) / W; };  // of panel p and those after it
      const auto packed = [&](int64_t p) { return a_block.get() + (p - p0) * count * NV * W; };
      for (int64_t p = p0; p < p1; ++p)
        for (int64_t k = 0, own = vectors(p) < NV ? vectors(p) : NV; k < count; ++k)
          for (int64_t n = 0; n < own; ++n) {
            const int64_t column = (p * NV + n) * W;
            const S* row = s.a[k0 + k];
            (row ? load(row + column, s.N - column) : V(0)).store(packed(p) + (k * own + n) * W);
          }
      for (int64_t m = m0; m < m1; m += MR)
        for (int64_t p = p0; p < p1; ++p) {
          const int64_t left = vectors(p), n0 = p * NV * W;
          const auto tile = left > 3   ? outer_tile<MR, NV, F, O>
                            : left > 2 ? outer_tile<MR, three, F, O>
                            : left > 1 ? outer_tile<MR, 2, F, O>
                                       : outer_tile<MR, 1, F, O>;
          tile(g_block.get() + (m - m0) * count, packed(p), count, s.add || k0 > 0, dw + m * s.N + n0, s.N, m1 - m,
               s.N - n0);
        }
    }
  }
}

// The same in dw.real where a has few columns: vectors run along m instead, one column at a time.
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
        F& dw = s.dw.real[(m + i) * s.N + n];
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
