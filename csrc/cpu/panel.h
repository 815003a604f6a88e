// Weights packed into panels, and the product of rows with a panel in registers. Compiled once per instruction set, by
// each_isa.h.
//
// A panel holds NV vectors of columns for every k: w[k][n][lane], one stream in the order in which it is read. Which
// row of the matrix a lane stands for is the caller's: a panel of a cell holds the same units of each gate, so that the
// gates of a unit meet in registers.
//
// Each output element is one chain of multiply-adds in the order of k, whatever the number of rows and the tile. That
// is what makes a row of a batch equal, bit for bit, to that row by itself, and lets a chain be stored and continued.

namespace fr {
namespace FR_ISA {

FR_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Row `lane` of vector n of panel p is row_of(p, n, lane) of the matrix w (rows, K), or none where that is negative.
// Packs the panels p0 .. p1 of `out`, which takes K * NV * width elements a panel. While a vector's rows are read the
// next one's are asked for: so many rows at once are more than what the processor foresees by itself.
template <class S, class RowOf>
static void pack_panels(const S* w, int64_t K, int64_t p0, int64_t p1, int64_t NV, RowOf row_of, Real<S>* out) {
  using V = Vec<Real<S>>;
  constexpr int64_t W = V::width;
  for (int64_t p = p0; p < p1; ++p)
    for (int64_t n = 0; n < NV; ++n) {
      const S *rows[W], *next[W];
      bool all = true;
      for (int64_t lane = 0; lane < W; ++lane) {
        const int64_t row = row_of(p, n, lane), after = n + 1 < NV ? row_of(p, n + 1, lane) : row_of(p + 1, 0, lane);
        rows[lane] = row < 0 ? nullptr : w + row * K;
        next[lane] = after < 0 ? w : w + after * K;
        all = all && row >= 0;
      }
      Real<S>* to = out + (p * K * NV + n) * W;
      for (int64_t k = 0; k < K; k += W) {
        V block[W];
        const int64_t count = K - k < W ? K - k : W;
        if (all && count == W) {
#pragma GCC unroll 16
          for (int lane = 0; lane < W; ++lane) {
            block[lane] = load(rows[lane] + k);
            __builtin_prefetch(next[lane] + k, 0, 2);
          }
          transpose(block);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) block[i].store(to + (k + i) * NV * W);
        } else {
          for (int lane = 0; lane < W; ++lane) block[lane] = rows[lane] ? load(rows[lane] + k, count) : V(0);
          transpose(block);
          for (int64_t i = 0; i < count; ++i) block[i].store(to + (k + i) * NV * W);
        }
      }
    }
}
template <class S, class RowOf>
static void pack_panels(const S* w, int64_t K, int64_t panels, int64_t NV, RowOf row_of, Real<S>* out) {
  pack_panels(w, K, 0, panels, NV, row_of, out);
}

// The same for a matrix that is used as it lies: w (K, N), lane `lane` of vector n of panel p is column
// (p * NV + n) * width + lane. Its rows are taken from row `first` on, in a circle.
template <class S>
static void pack_columns(const S* w, int64_t K, int64_t N, int64_t first, int64_t p0, int64_t p1, int64_t NV,
                         Real<S>* out) {
  using V = Vec<Real<S>>;
  constexpr int64_t W = V::width;
  for (int64_t p = p0; p < p1; ++p)
    for (int64_t k = 0; k < K; ++k) {
      const S* row = w + (k + first < K ? k + first : k + first - K) * N;
      for (int64_t n = 0; n < NV; ++n) {
        const int64_t column = (p * NV + n) * W;
        (column < N ? load(row + column, N - column) : V(0)).store(out + ((p * K + k) * NV + n) * W);
      }
    }
}

// acc[m][n] += sum_k a[m][k] w[k][n] for PN panels of PV vectors each, panel_stride elements apart. Meanwhile a vector
// for each k is asked for at `next`, which is where the caller will want weights soon. w is F, or bf16, widened as it
// is read; or both are Bf16Pair, and k counts those.
//
// Owns:   an MR x (PN * PV vectors) tile of the product.
// Keeps:  MR * PN * PV accumulator vectors; at most 24 of them fit the 32 registers of AVX-512, 9 the 16 of others.
// Moves:  PN * PV vectors of w and MR elements of a for each k.
// Syncs:  nothing.
// Limits: none.
template <class F, int MR, int PN, int PV, class Weight, class S>
FR_INLINE void panel_product(const Weight* w, int64_t panel_stride, const S* const (&a)[MR], int64_t K,
                             Vec<F> (&acc)[MR][PN * PV], const Weight* next = nullptr) {
  using V = Vec<F>;
  constexpr int64_t ahead = 1024 / sizeof(Weight);  // few rows wait for w: ask for it early
  if (!next) next = w;
  for (int64_t k = 0; k < K; ++k) {
    decltype(load(w)) wv[PN * PV];
#pragma GCC unroll 8
    for (int n = 0; n < PN * PV; ++n) {
      const Weight* at = w + (n / PV) * panel_stride + (n % PV) * V::width;
      if constexpr (MR <= 2) __builtin_prefetch(at + ahead);
      wv[n] = load(at);
    }
    if constexpr (MR > 2) __builtin_prefetch(next + k * V::width, 0, 2);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const auto av = spread(a[m][k]);
#pragma GCC unroll 8
      for (int n = 0; n < PN * PV; ++n) acc[m][n] = fma(av, wv[n], acc[m][n]);
    }
    w += PV * V::width;
  }
}

// The same for one panel of a matrix as it lies, row `lane` of vector n at rows[n][lane]: blocks of it are transposed
// in registers. Meanwhile the next vector's rows are asked for, after the last one's those `ahead` elements after the
// first's.
//
// Owns:   as panel_product.
// Keeps:  MR accumulators and a block of width vectors.
// Moves:  PV * width elements of w and MR elements of a for each k.
// Syncs:  nothing.
// Limits: none.
template <int MR, int PV, class S>
static void panel_product_in_place(const S* const (&rows)[PV][Vec<Real<S>>::width], int64_t ahead,
                                   const S* const (&a)[MR], int64_t K, Vec<Real<S>> (&acc)[MR][PV]) {
  using V = Vec<Real<S>>;
  constexpr int W = V::width;
  for (int n = 0; n < PV; ++n) {
    const bool last = n + 1 == PV;
    V sum[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) sum[m] = acc[m][n];
    const auto add = [&](const V& w, int64_t k) {
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) sum[m] = fma(V(widen(a[m][k])), w, sum[m]);
    };
    int64_t k = 0;
    for (; k + W <= K; k += W) {
      V block[W];
#pragma GCC unroll 16
      for (int lane = 0; lane < W; ++lane) {
        block[lane] = load(rows[n][lane] + k);
        __builtin_prefetch((last ? rows[0][lane] + ahead : rows[n + 1][lane]) + k, 0, 2);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) add(block[i], k + i);
    }
    if (k < K) {
      V block[W];
      for (int lane = 0; lane < W; ++lane) block[lane] = load(rows[n][lane] + k, K - k);
      transpose(block);
      for (int64_t i = 0; k + i < K; ++i) add(block[i], k + i);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) acc[m][n] = sum[m];
  }
}

// What the tile at row m asks for: a share of the panel that comes after p, in a circle, or nothing.
template <class F, int MR, int PV>
FR_INLINE const F* next_panel(const F* w, int64_t panels, int64_t K, int64_t p, int64_t m) {
  const int64_t share = m / MR;
  return share < PV ? w + (((p + 1 < panels ? p + 1 : 0) * PV + share) * K) * Vec<F>::width : nullptr;
}

// Rows of a tile for panels of PV vectors: as many as the registers take.
template <int PV> constexpr int tile_rows() {
  constexpr int registers = FR_VEC_BYTES == 64 ? 24 : 9;
  return registers / PV > 8 ? 8 : registers / PV;
}

// Calls tile.run<MR>(p, m) for the panels p0 .. p1 and for tiles of MR rows from m on that cover rows 0 .. rows. The
// rows are innermost: a panel is read from memory once.
template <int PV, class Tile> FR_INLINE void each_tile(int64_t p0, int64_t p1, int64_t rows, const Tile& tile) {
  constexpr int MR = tile_rows<PV>();
  for (int64_t p = p0; p < p1; ++p) {
    int64_t m = 0;
    for (; m + MR <= rows; m += MR) tile.template run<MR>(p, m);
    if constexpr (MR > 4)
      if (m + 4 <= rows) tile.template run<4>(p, m), m += 4;
    if constexpr (MR > 2)
      for (; m + 2 <= rows; m += 2) tile.template run<2>(p, m);
    if (m < rows) tile.template run<1>(p, m);
  }
}

// out[m] (N,) = a[m] (K,) w for rows given by their addresses and w packed by panels of PV vectors.
template <class S, class O, int PV> struct RowProduct {
  using F = Real<S>;
  const F* w;
  int64_t K, N, panels;
  const S* const* a;
  O* const* out;
  template <int MR> FR_INLINE void run(int64_t p, int64_t m) const {
    using V = Vec<F>;
    V acc[MR][PV];
    const S* rows[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      rows[i] = a[m + i];
#pragma GCC unroll 8
      for (int n = 0; n < PV; ++n) acc[i][n] = V(0);
    }
    panel_product<F, MR, 1, PV>(w + p * K * PV * V::width, 0, rows, K, acc, next_panel<F, MR, PV>(w, panels, K, p, m));
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int n = 0; n < PV; ++n) {
        const int64_t column = (p * PV + n) * V::width;
        if (column < N) store(acc[i][n], out[m + i] + column, N - column);
      }
  }
};

}  // namespace FR_ISA
}  // namespace fr
