// The products of the cells for bfloat16 by AVX-512's products of pairs, or on the matrix tiles (AMX); empty for other
// instruction sets. Compiled once per instruction set, by each_isa.h.
//
// A tile is 16 rows of 64 bytes. Of the left factor it holds 16 rows of 32 k; of the right factor 16 pairs of k for 16
// columns, the two of a pair side by side; of the sums 16 x 16 floats. Both factors are packed as whole tiles, 0 where
// K ends. An output element depends on its row and column alone: its sum runs along k, pair by pair.

#if FR_AMX
#include "tile_shape.h"
#endif

namespace fr {
namespace FR_ISA {

// Whether the factors of products of S are packed as tiles, and whether the sums of a step are tiles too, which meet
// the gates in memory; vectors of sums meet them in registers.
template <class S> constexpr bool on_tiles = FR_DOTS && sizeof(S) == sizeof(bf16);
template <class S> constexpr bool sums_on_tiles = FR_AMX && on_tiles<S>;

#if FR_DOTS

constexpr int64_t tile_elements = 512, tile_k = 32, tile_n = 16;
constexpr int64_t tiles_of_k(int64_t K) { return (K + tile_k - 1) / tile_k; }

// 32 numbers as they lie, as 16 pairs; `n` of them, then 0.
FR_INLINE Vec<float> load_pairs(const bf16* p, int64_t n) {
  Vec<float> v;
  if (n >= tile_k) {
    __builtin_memcpy(&v.v, p, sizeof v.v);
    return v;
  }
  bf16 some[tile_k] = {};
  __builtin_memcpy(some, p, static_cast<size_t>(n) * sizeof(bf16));
  __builtin_memcpy(&v.v, some, sizeof v.v);
  return v;
}
// The pairs of 16 numbers at a and 16 at b, each null for 0.
FR_INLINE Vec<float> pair_up(const bf16* a, const bf16* b, int64_t n) {
  const WideBits low = a ? (WideBits)load(a, n).v >> 16 : WideBits{}, high = b ? (WideBits)load(b, n).v : WideBits{};
  return Vec<float>((Vec<float>::Raw)(low | high));
}

// The left factor's tiles of rows given by their addresses (K elements each): [16 rows][K].
static void pack_left(int64_t rows, const bf16* const* a, int64_t K, bf16* out) {
  const int64_t KB = tiles_of_k(K);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t kb = 0; kb < KB; ++kb) {
      const Vec<float> v = load_pairs(a[m] + kb * tile_k, K - kb * tile_k);
      __builtin_memcpy(out + (m / 16 * KB + kb) * tile_elements + m % 16 * tile_k, &v.v, sizeof v.v);
    }
}
constexpr int64_t left_elements(int64_t rows, int64_t K) { return (rows + 15) / 16 * tiles_of_k(K) * tile_elements; }

// One column tile of the right factor: column `lane` is row_of(lane) of w (rows, K), or 0 where that is negative.
template <class RowOf> static void pack_right_rows(const bf16* w, int64_t K, RowOf row_of, bf16* out) {
  for (int64_t kb = 0; kb < tiles_of_k(K); ++kb) {
    Vec<float> block[tile_n];
#pragma GCC unroll 16
    for (int lane = 0; lane < tile_n; ++lane) {
      const int64_t row = row_of(lane);
      block[lane] = row < 0 ? Vec<float>(0) : load_pairs(w + row * K + kb * tile_k, K - kb * tile_k);
    }
    transpose(block);
    __builtin_memcpy(out + kb * tile_elements, block, sizeof block);
  }
}
// One column tile of the right factor: row k of it is n <= 16 numbers at row_of(k), or 0 where that is null.
template <class RowOf> static void pack_right(int64_t K, int64_t n, RowOf row_of, bf16* out) {
  for (int64_t k = 0; k < tiles_of_k(K) * tile_k; k += 2) {
    const Vec<float> v = pair_up(k < K ? row_of(k) : nullptr, k + 1 < K ? row_of(k + 1) : nullptr, n);
    __builtin_memcpy(out + k * tile_n, &v.v, sizeof v.v);
  }
}

// tile_product: out = or += the product of packed factors, `rows` rows and `columns` column tiles. Column tile c of row
// 0 is at at(c), rows are ldc apart.
#if FR_AMX
// c = or += the product of RB row tiles and CB column tiles, each of KB tiles in a row.
template <int RB, int CB>
FR_INLINE void tile_block(const bf16* a, const bf16* w, int64_t KB, bool add, float* c0, float* c1, int64_t ldc) {
  const int64_t stride = ldc * static_cast<int64_t>(sizeof(float)), next = KB * tile_elements;
  if (add) {
    _tile_loadd(0, c0, stride);
    if constexpr (CB > 1) _tile_loadd(1, c1, stride);
    if constexpr (RB > 1) _tile_loadd(2, c0 + 16 * ldc, stride);
    if constexpr (RB > 1 && CB > 1) _tile_loadd(3, c1 + 16 * ldc, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < next; k += tile_elements) {
    _tile_loadd(4, a + k, 64);
    _tile_loadd(6, w + k, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (CB > 1) {
      _tile_loadd(7, w + next + k, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (RB > 1) {
      _tile_loadd(5, a + next + k, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (CB > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c0, stride);
  if constexpr (CB > 1) _tile_stored(1, c1, stride);
  if constexpr (RB > 1) _tile_stored(2, c0 + 16 * ldc, stride);
  if constexpr (RB > 1 && CB > 1) _tile_stored(3, c1 + 16 * ldc, stride);
}

// Owns:   the elements of out.
// Keeps:  2 x 2 tiles of sums.
// Moves:  two column tiles of w, for all rows, then the next two; a for each two.
// Syncs:  nothing.
// Limits: none.
template <class At>
static void tile_product(int64_t rows, const bf16* a, const bf16* w, int64_t KB, int64_t columns, bool add, At at,
                         int64_t ldc) {
  const int64_t full = rows / 16, left = rows % 16, row_tile = KB * tile_elements;
  for (int part = 0; part < 2; ++part) {
    const int64_t r0 = part == 0 ? 0 : full, r1 = part == 0 ? full : full + (left > 0);
    if (r0 == r1) continue;
    configure_tiles(part == 0 ? 16 : left);
    for (int64_t c = 0; c < columns; c += 2) {
      const bool two = c + 1 < columns;
      float *c0 = at(c), *c1 = two ? at(c + 1) : nullptr;
      for (int64_t r = r0; r < r1; r += 2) {
        const bf16 *left_tiles = a + r * row_tile, *right_tiles = w + c * row_tile;
        float *o0 = c0 + r * 16 * ldc, *o1 = two ? c1 + r * 16 * ldc : nullptr;
        if (r + 1 < r1)
          two ? tile_block<2, 2>(left_tiles, right_tiles, KB, add, o0, o1, ldc)
              : tile_block<2, 1>(left_tiles, right_tiles, KB, add, o0, o1, ldc);
        else
          two ? tile_block<1, 2>(left_tiles, right_tiles, KB, add, o0, o1, ldc)
              : tile_block<1, 1>(left_tiles, right_tiles, KB, add, o0, o1, ldc);
      }
    }
  }
  _tile_release();
}
#else
// c[n] = or += the product of MR rows of a row tile and CN column tiles, each of KB tiles in a row.
template <int MR, int CN>
FR_INLINE void dot_block(const bf16* a, const bf16* w, int64_t KB, bool add, float* const (&c)[CN], int64_t ldc) {
  Vec<float> sum[MR][CN];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < CN; ++n) sum[m][n] = add ? load(c[n] + m * ldc) : Vec<float>(0);
  for (int64_t kb = 0; kb < KB; ++kb, a += tile_elements, w += tile_elements)
    for (int64_t k = 0; k < tile_k; k += 2) {
      Bf16Pairs right[CN];
#pragma GCC unroll 4
      for (int n = 0; n < CN; ++n) right[n] = neighbours(w + n * KB * tile_elements + k * tile_n);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Bf16Pairs left = spread(Bf16Pair{a[m * tile_k + k], a[m * tile_k + k + 1]});
#pragma GCC unroll 4
        for (int n = 0; n < CN; ++n) sum[m][n] = fma(left, right[n], sum[m][n]);
      }
    }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < CN; ++n) store(sum[m][n], c[n] + m * ldc);
}

// Owns:   the elements of out.
// Keeps:  8 x 3 vectors of sums.
// Moves:  three column tiles of w for each 8 rows, so from a core's own cache; a once for each three.
// Syncs:  nothing.
// Limits: none.
template <int CN, class At>
static void dot_columns(int64_t rows, const bf16* a, const bf16* w, int64_t KB, int64_t c, bool add, At at,
                        int64_t ldc) {
  const int64_t row_tile = KB * tile_elements;
  const auto block = [&](auto count, int64_t m) {
    float* to[CN];
    for (int n = 0; n < CN; ++n) to[n] = at(c + n) + m * ldc;
    dot_block<decltype(count)::value, CN>(a + m / 16 * row_tile + m % 16 * tile_k, w + c * row_tile, KB, add, to, ldc);
  };
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8) block(std::integral_constant<int, 8>{}, m);
  if (m + 4 <= rows) block(std::integral_constant<int, 4>{}, m), m += 4;
  if (m + 2 <= rows) block(std::integral_constant<int, 2>{}, m), m += 2;
  if (m < rows) block(std::integral_constant<int, 1>{}, m);
}
template <class At>
static void tile_product(int64_t rows, const bf16* a, const bf16* w, int64_t KB, int64_t columns, bool add, At at,
                         int64_t ldc) {
  int64_t c = 0;
  for (; c + 3 <= columns; c += 3) dot_columns<3>(rows, a, w, KB, c, add, at, ldc);
  if (c + 2 == columns) dot_columns<2>(rows, a, w, KB, c, add, at, ldc);
  if (c + 1 == columns) dot_columns<1>(rows, a, w, KB, c, add, at, ldc);
}
#endif

// The rows m0 .. m1 of an outer sum in dw.real. Rows of g may be read up to a vector beyond their end.
static void outer_sum_on_tiles(const OuterSum<bf16>& s, int64_t m0, int64_t m1) {
  const int64_t KB = tiles_of_k(s.K), columns = (s.N + 15) / 16, ldc = columns * 16;
  const Scratch<bf16> right(columns * KB * tile_elements), left(2 * KB * tile_elements);
  const Scratch<float> sums(32 * ldc);
  for (int64_t c = 0; c < columns; ++c) {
    const auto row_of = [&](int64_t k) { return s.a[k] ? s.a[k] + c * 16 : nullptr; };
    pack_right(s.K, s.N - c * 16 < 16 ? s.N - c * 16 : 16, row_of, right.get() + c * KB * tile_elements);
  }
  for (int64_t m = m0; m < m1; m += 32) {
    const int64_t rows = m1 - m < 32 ? m1 - m : 32;
    for (int64_t i = 0; i < rows; i += 16)
      for (int64_t kb = 0; kb < KB; ++kb) {
        bf16* to = left.get() + (i / 16 * KB + kb) * tile_elements;
        const int64_t k0 = kb * tile_k;
        pack_right(
            s.K - k0 < tile_k ? s.K - k0 : tile_k, 16, [&](int64_t k) { return s.g + (k0 + k) * s.ldg + m + i; }, to);
        Vec<float> block[16];
        __builtin_memcpy(block, to, sizeof block);
        transpose(block);
        __builtin_memcpy(to, block, sizeof block);
      }
    tile_product(
        rows, left.get(), right.get(), KB, columns, false, [&](int64_t c) { return sums.get() + c * 16; }, ldc);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t n = 0; n < s.N; n += 16) {
        float* to = s.dw.real + (m + i) * s.N + n;
        const Vec<float> sum = load(sums.get() + i * ldc + n);
        (s.add ? load(to, s.N - n) + sum : sum).store(to, s.N - n);
      }
  }
}

#endif

}  // namespace FR_ISA
}  // namespace fr
