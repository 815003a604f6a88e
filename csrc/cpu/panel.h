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
// out: panels * K * NV * width elements.
template <class F, class RowOf>
static void pack_panels(const F* w, int64_t K, int64_t panels, int64_t NV, RowOf row_of, F* out) {
  constexpr int64_t W = Vec<F>::width;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t n = 0; n < NV; ++n)
      for (int64_t lane = 0; lane < W; ++lane) {
        const int64_t row = row_of(p, n, lane);
        F* to = out + (p * K * NV + n) * W + lane;
        for (int64_t k = 0; k < K; ++k) to[k * NV * W] = row < 0 ? F(0) : w[row * K + k];
      }
}

FR_INLINE Vec<float> load_weights(const float* w) { return Vec<float>::load(w); }
FR_INLINE Vec<double> load_weights(const double* w) { return Vec<double>::load(w); }
FR_INLINE Vec<float> load_weights(const uint16_t* w) {
  typedef uint16_t Halves __attribute__((vector_size(FR_VEC_BYTES / 2)));
  typedef uint32_t Words __attribute__((vector_size(FR_VEC_BYTES)));
  Halves halves;
  __builtin_memcpy(&halves, w, sizeof halves);
  return Vec<float>((RawOf<float>::Raw)(__builtin_convertvector(halves, Words) << 16));
}

// acc[m][n] += sum_k a[m][k] w[k][n] for PN panels of PV vectors each, panel_stride elements apart.
// Owns:   an MR x (PN * PV vectors) tile of the product.
// Keeps:  MR * PN * PV accumulator vectors; at most 24 of them fit the 32 registers of AVX-512, 9 the 16 of others.
// Moves:  PN * PV vectors of w and MR elements of a for each k.
// Syncs:  nothing.
// Limits: none.
// w is F, or uint16_t for bfloat16, widened as it is read.
template <class F, int MR, int PN, int PV, class Weight>
FR_INLINE void panel_product(const Weight* w, int64_t panel_stride, const F* const (&a)[MR], int64_t K,
                             Vec<F> (&acc)[MR][PN * PV]) {
  using V = Vec<F>;
  constexpr int64_t ahead = 1024 / sizeof(Weight);  // few rows wait for w: ask for it early
  for (int64_t k = 0; k < K; ++k) {
    V wv[PN * PV];
#pragma GCC unroll 8
    for (int n = 0; n < PN * PV; ++n) {
      const Weight* at = w + (n / PV) * panel_stride + (n % PV) * V::width;
      if constexpr (MR <= 2) __builtin_prefetch(at + ahead);
      wv[n] = load_weights(at);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const V av(a[m][k]);
#pragma GCC unroll 8
      for (int n = 0; n < PN * PV; ++n) acc[m][n] = fma(av, wv[n], acc[m][n]);
    }
    w += PV * V::width;
  }
}

// Rows of a tile for panels of PV vectors: as many as the registers take.
template <int PV> constexpr int tile_rows() {
  constexpr int registers = FR_VEC_BYTES == 64 ? 24 : 9;
  return registers / PV > 8 ? 8 : registers / PV;
}

}  // namespace FR_ISA
}  // namespace fr
