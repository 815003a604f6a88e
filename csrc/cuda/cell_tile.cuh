// A tile of 16 units and 8 rows of the batch, owned by one warp: how it is multiplied in each precision.
//
// Lane 4g + q holds the sums of the units g and g + 8 and of the rows 2q and 2q + 1: sum[0] (g, 2q), sum[1] (g, 2q+1),
// sum[2] (g+8, 2q), sum[3] (g+8, 2q+1), where mma.sync leaves them (PTX ISA, "Matrix Fragments for mma.m16n8k16").
// Along k a tile is 16 numbers, of which lane 4g + q takes 4q .. 4q+3: which k a product calls first does not matter as
// long as both factors agree, and so each factor is one load of neighbours.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../cell_math.h"
#include "plan.h"
#include "portable.h"

#define FR_DEVICE __device__ __forceinline__

namespace fr::cuda {

FR_DEVICE int lane_of_thread() { return static_cast<int>(threadIdx.x % 32); }

FR_DEVICE float to_float(float v) { return v; }
FR_DEVICE float to_float(__half v) { return __half2float(v); }
FR_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class E> FR_DEVICE E rounded(float v) {
  if constexpr (sizeof(E) == 4)
    return v;
  else if constexpr (std::is_same_v<E, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

// Four neighbours along k, and what a lane holds of 16 x 16 weights: those of unit g, then those of unit g + 8.
template <class E> struct alignas(4 * sizeof(E)) Four {
  E at[4];
};
template <class E> struct Fragment {
  Four<E> low, high;
};

// Two 16-bit numbers as a register, the first in its lower half
template <class E> FR_DEVICE uint32_t pair_of(const Four<E>& v, int first) {
  uint32_t bits;
  memcpy(&bits, &v.at[first], sizeof bits);
  return bits;
}
FR_DEVICE uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}
// To 10 bits of fraction, ties away from zero, as cvt.rna.tf32 does; infinity and NaN stay.
FR_DEVICE float to_tf32(float v) {
  uint32_t bits = bits_of(v);
  if ((bits & 0x7f800000u) == 0x7f800000u) return v;
  bits = (bits + 0x1000u) & 0xffffe000u;
  memcpy(&v, &bits, sizeof v);
  return v;
}

enum class Mma { f16, bf16, tf32 };
#ifdef FR_CUDA_ON_CPU
// Number k, counted along the 16 or 8 of the product, of a register that holds it.
template <Mma kind> float number_in(uint32_t bits, unsigned k) {
  if constexpr (kind == Mma::tf32) return __builtin_bit_cast(float, bits);
  const auto half = static_cast<uint16_t>(bits >> (k % 2 * 16));
  if constexpr (kind == Mma::f16)
    return __half2float(__builtin_bit_cast(__half, half));
  else
    return __bfloat162float(__builtin_bit_cast(__nv_bfloat16, half));
}
#endif

// sum (16 x 8) += a (16 x k) b (k x 8), k = 16 or, in tf32, 8; registers as the PTX ISA numbers them.
template <Mma kind> FR_DEVICE void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FR_CUDA_ON_CPU
  struct Factors {
    uint32_t a[4], b[2];
  };
  cuda_on_cpu::exchange(~0u, Factors{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, {__FILE__, __LINE__});
  const unsigned g = cuda_on_cpu::lane() / 4, q = cuda_on_cpu::lane() % 4;
  constexpr unsigned each = kind == Mma::tf32 ? 1 : 2;  // numbers in a register
  Factors left[4], right[2][4];
  for (unsigned l = 0; l < 4; ++l) {
    left[l] = cuda_on_cpu::lane_of<Factors>(g * 4 + l);
    for (unsigned n = 0; n < 2; ++n) right[n][l] = cuda_on_cpu::lane_of<Factors>((q * 2 + n) * 4 + l);
  }
  for (unsigned e = 0; e < 4; ++e)
    for (unsigned k = 0; k < 8 * each; ++k) {
      const unsigned l = k / each % 4, second = k / (4 * each);
      sum[e] =
          fma(number_in<kind>(left[l].a[e / 2 + 2 * second], k), number_in<kind>(right[e % 2][l].b[second], k), sum[e]);
    }
#else
#define FR_MMA(shape)                                                                                       \
  asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (kind == Mma::f16)
    FR_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  else if constexpr (kind == Mma::bf16)
    FR_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  else
    FR_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#undef FR_MMA
#endif
}

// A precision: its number E, how a factor of a product is rounded, and whether tensor cores multiply.
template <Precision p> struct Numbers {
  using E = float;
  static constexpr Precision precision = p;
  static constexpr bool on_tensor_cores = p != Precision::f32;
  static FR_DEVICE float factor(float v) { return p == Precision::tf32 ? to_tf32(v) : v; }
  // sum += the product of 16 x 16 weights and of 8 rows, of which `row` is this lane's: row g
  static FR_DEVICE void multiply(float (&sum)[4], const Fragment<E>& w, const Four<E>& row) {
    const float *l = w.low.at, *h = w.high.at;
#pragma unroll
    for (int i = 0; i < 4; i += 2)
      mma<Mma::tf32>(sum, {bits_of(l[i]), bits_of(h[i]), bits_of(l[i + 1]), bits_of(h[i + 1])},
                     {bits_of(row.at[i]), bits_of(row.at[i + 1])});
  }
};
template <class Element, Mma kind> struct HalfNumbers {
  using E = Element;
  static constexpr bool on_tensor_cores = true;
  static FR_DEVICE E factor(float v) { return rounded<E>(v); }
  static FR_DEVICE E factor(E v) { return v; }
  static FR_DEVICE void multiply(float (&sum)[4], const Fragment<E>& w, const Four<E>& row) {
    mma<kind>(sum, {pair_of(w.low, 0), pair_of(w.high, 0), pair_of(w.low, 2), pair_of(w.high, 2)},
              {pair_of(row, 0), pair_of(row, 2)});
  }
};
template <> struct Numbers<Precision::f16> : HalfNumbers<__half, Mma::f16> {
  static constexpr Precision precision = Precision::f16;
};
template <> struct Numbers<Precision::bf16> : HalfNumbers<__nv_bfloat16, Mma::bf16> {
  static constexpr Precision precision = Precision::bf16;
};

// Sums of all 8 rows, over the k of one lane, become those of the lane's own two rows over the k of four lanes: each
// exchange halves the rows that a lane looks after. A row's terms are added in one order, whatever its place.
FR_DEVICE void gather_rows(const float (&low)[8], const float (&high)[8], float (&sum)[4]) {
  const bool upper = lane_of_thread() & 2, odd = lane_of_thread() & 1;
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
    const float (&all)[8] = unit ? high : low;
    float half[4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
      half[r] = (upper ? all[r + 4] : all[r]) + __shfl_xor_sync(~0u, upper ? all[r] : all[r + 4], 2);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      sum[2 * unit + r] += (odd ? half[r + 2] : half[r]) + __shfl_xor_sync(~0u, odd ? half[r] : half[r + 2], 1);
  }
}

// The products of one tile of rows, while they are summed over k. N sums: a gate each, or all gates in sum 0.
// add(gate, weights, rows, k): rows(r, k) gives four neighbours of row r from k on.
template <class M, int N, bool tensor = M::on_tensor_cores> struct Products {
  using E = typename M::E;
  float sum[N][4];
  FR_DEVICE void start(int) {
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
  }
  template <class Row> FR_DEVICE void add(int n, const Fragment<E>& w, const Row& row, int64_t k) {
    M::multiply(sum[n], w, row(lane_of_thread() / 4, k + lane_of_thread() % 4 * 4));
  }
  FR_DEVICE void finish() {}
};
template <class M, int N> struct Products<M, N, false> {
  using E = typename M::E;
  float sum[N][4], low[N][8], high[N][8];
  int rows;  // that exist, the first ones
  FR_DEVICE void start(int existing) {
    rows = existing;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
#pragma unroll
      for (int r = 0; r < 8; ++r) low[n][r] = high[n][r] = 0;
    }
  }
  template <class Row> FR_DEVICE void add(int n, const Fragment<E>& w, const Row& row, int64_t k) {
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      if (r >= rows) break;
      const Four<E> v = row(r, k + lane_of_thread() % 4 * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[n][r] = fma(w.low.at[i], v.at[i], low[n][r]);
        high[n][r] = fma(w.high.at[i], v.at[i], high[n][r]);
      }
    }
  }
  FR_DEVICE void finish() {
#pragma unroll
    for (int n = 0; n < N; ++n) gather_rows(low[n], high[n], sum[n]);
  }
};

// sum[n][gate]: the products of tile n of rows with weights. weights(add) calls add(k tile, gate, fragment) for all
// that are to be added; rows(r, gate, k) gives four neighbours of row r, counted over all tiles, of which `existing`
// exist. N, the sums of a tile: `gates`, or 1 where all gates are to be added up.
template <class M, int gates, int row_tiles, int N, class W, class R>
FR_DEVICE void multiply(int64_t existing, const W& weights, const R& rows, float (&sum)[row_tiles][N][4]) {
  using E = typename M::E;
  // Tensor cores are kept busy by one chain of sums a gate; where float is multiplied registers are dear.
  constexpr int chains = M::on_tensor_cores ? gates : N, together = M::on_tensor_cores ? row_tiles : 1;
#pragma unroll
  for (int n0 = 0; n0 < row_tiles; n0 += together) {
    Products<M, chains> products[together];
#pragma unroll
    for (int n = 0; n < together; ++n) products[n].start(static_cast<int>(existing) - (n0 + n) * kRows);
    weights([&](int64_t k, int gate, const Fragment<E>& fragment) {
#pragma unroll
      for (int n = 0; n < together; ++n)
        products[n].add(
            chains == 1 ? 0 : gate, fragment,
            [&](int r, int64_t column) { return rows((n0 + n) * kRows + r, gate, column); }, k * kUnits);
    });
#pragma unroll
    for (int n = 0; n < together; ++n) {
      products[n].finish();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int m = 0; m < N; ++m) sum[n0 + n][m][i] = products[n].sum[m][i];
#pragma unroll
        for (int m = N; m < chains; ++m) sum[n0 + n][0][i] += products[n].sum[m][i];
      }
    }
  }
}

// Row r from column k on of a matrix of which only rows x columns exist: 0 beyond.
template <class M> FR_DEVICE Four<typename M::E> four_of(const typename M::E* row, int64_t k, int64_t columns) {
  using E = typename M::E;
  Four<E> v;
  if (row && columns % 4 == 0 && k < columns) {  // k is a multiple of 4, tensors are aligned
    v = *reinterpret_cast<const Four<E>*>(row + k);
#pragma unroll
    for (int i = 0; i < 4; ++i) v.at[i] = M::factor(v.at[i]);
    return v;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) v.at[i] = row && k + i < columns ? M::factor(row[k + i]) : rounded<E>(0.0f);
  return v;
}

// This lane's part of the weights of 16 units from unit0 on, along 16 numbers from k on; 0 beyond the matrix.
// w (units, columns).
template <class M>
FR_DEVICE Fragment<typename M::E> weights_of(const typename M::E* w, int64_t units, int64_t columns, int64_t unit0,
                                             int64_t k) {
  const int64_t unit = unit0 + lane_of_thread() / 4, at = k + lane_of_thread() % 4 * 4;
  return {four_of<M>(unit < units ? w + unit * columns : nullptr, at, columns),
          four_of<M>(unit + 8 < units ? w + (unit + 8) * columns : nullptr, at, columns)};
}
// The same of the transpose: w (columns, units).
template <class M>
FR_DEVICE Fragment<typename M::E> transposed_weights_of(const typename M::E* w, int64_t units, int64_t columns,
                                                        int64_t unit0, int64_t k) {
  using E = typename M::E;
  const int64_t unit = unit0 + lane_of_thread() / 4, at = k + lane_of_thread() % 4 * 4;
  Fragment<E> f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const E* row = w + (at + i) * units + unit;
    const bool inside = at + i < columns;
    f.low.at[i] = inside && unit < units ? M::factor(row[0]) : rounded<E>(0.0f);
    f.high.at[i] = inside && unit + 8 < units ? M::factor(row[8]) : rounded<E>(0.0f);
  }
  return f;
}

}  // namespace fr::cuda
