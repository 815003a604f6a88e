// The products of the generation loop with int8 weights and activations for processors without matrix tiles: the same
// quantisation as decode_tiles.cpp, a scale for every row of weights and for every row of activations, sums in int32,
// gates and state in float32 by cell_math.h. The sums are exact, so they are those of the tiles; the tiles' gates have
// 12 bits (quick_gates.h), so the states after them are not. This file compiles itself once per instruction set
// (each_isa.h).
#ifndef FR_ISA

#include <cstdint>

#include "decoder.h"
#include "simd.h"
#define FR_WITH_DOTS
#define FR_FILE "decode_int8.cpp"
#include "each_isa.h"

#else

#include "vec.h"
#include "../cell_math.h"
#include "activations.h"

namespace fr {
namespace FR_ISA {

// Neighbours of k are multiplied and added in one instruction, two as 16-bit numbers or four as bytes, so they lie side
// by side: a panel is w[k / kLink][vector][lane][k % kLink].
constexpr int64_t kLink = FR_DOTS ? 4 : 2;
// That of four takes activations without a sign: this much is added to them and taken from the sums beforehand.
constexpr int32_t kShift = FR_DOTS ? 128 : 0;

// W sums of int32.
struct Sums {
  Vec<float>::RawBits v;
  FR_INLINE Vec<float> to_float() const { return Vec<float>(__builtin_convertvector(v, Vec<float>::Raw)); }
};
// Where the sums of the vector at a column of a matrix begin.
FR_INLINE Sums first_sums(const Panels& panels, int64_t column) {
  Sums sums{};
  if constexpr (kShift != 0) __builtin_memcpy(&sums.v, panels.start.as<int32_t>() + column, sizeof sums.v);
  return sums;
}

// The W * kLink weights at w, of pairs as 16-bit numbers.
struct Links {
#if FR_DOTS
  __m512i v;
  static FR_INLINE Links load(const int8_t* w) { return {_mm512_loadu_si512(w)}; }
#elif FR_VEC_BYTES == 64
  __m512i v;
  static FR_INLINE Links load(const int8_t* w) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)))};
  }
#elif FR_VEC_BYTES == 32
  __m256i v;
  static FR_INLINE Links load(const int8_t* w) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)))};
  }
#else
  int32_t even[4], odd[4];
  static FR_INLINE Links load(const int8_t* w) {
    Links p;
    for (int i = 0; i < 4; ++i) p.even[i] = w[2 * i], p.odd[i] = w[2 * i + 1];
    return p;
  }
#endif
  // sums + this times the activations at a
  FR_INLINE Sums add_to(Sums sums, const int8_t* a) const {
#if FR_DOTS
    int32_t quad;
    __builtin_memcpy(&quad, a, sizeof quad);
    const __m512i shifted = _mm512_set1_epi32(quad ^ static_cast<int32_t>(0x80808080));
    return {(Vec<float>::RawBits)_mm512_dpbusd_epi32((__m512i)sums.v, shifted, v)};
#elif FR_VEC_BYTES == 64
    const auto pair = static_cast<int>(static_cast<uint16_t>(a[0]) | static_cast<uint32_t>(a[1]) << 16);
    const __m512i products = _mm512_madd_epi16(v, _mm512_set1_epi32(pair));
    return {(Vec<float>::RawBits)_mm512_add_epi32((__m512i)sums.v, products)};
#elif FR_VEC_BYTES == 32
    const auto pair = static_cast<int>(static_cast<uint16_t>(a[0]) | static_cast<uint32_t>(a[1]) << 16);
    const __m256i products = _mm256_madd_epi16(v, _mm256_set1_epi32(pair));
    return {(Vec<float>::RawBits)_mm256_add_epi32((__m256i)sums.v, products)};
#else
    for (int i = 0; i < 4; ++i) sums.v[i] += even[i] * a[0] + odd[i] * a[1];
    return sums;
#endif
  }
};

// sums[m][n] += the products of rows a[m] with a panel of NV vectors.
template <int MR, int NV>
FR_INLINE void int8_product(const int8_t* w, const int8_t* const (&a)[MR], int64_t K, Sums (&sums)[MR][NV]) {
  for (int64_t k = 0; k < K; k += kLink) {
    Links links[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      if constexpr (MR == 1) __builtin_prefetch(w + 1024);  // one row waits for weights: ask for them early
      links[n] = Links::load(w);
      w += kLink * Vec<float>::width;
    }
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sums[m][n] = links[n].add_to(sums[m][n], a[m] + k);
  }
}

// base + what the sums of a panel's vector are worth. A layer's products with its input are the same numbers, whether
// a LinearJob has made them or the layer itself.
FR_INLINE Vec<float> add_worth(Sums sums, const Panels& panels, int64_t column, float row_worth, Vec<float> base) {
  return fma(sums.to_float(), Vec<float>::load(panels.scale.as<float>() + column) * Vec<float>(row_worth), base);
}

template <Cell C> constexpr int panel_vectors = C == Cell::gru ? 3 : 4;

// The state of one row's units of panel p from the pre-activations, of the GRU's n: the part of the input and q.
template <Cell C>
FR_INLINE void int8_finish(const LayerJob& job, int64_t p, int64_t r, const Vec<float>* x, Vec<float> q) {
  using V = Vec<float>;
  constexpr int NV = panel_vectors<C>;
  constexpr int64_t W = V::width;
  float* out = job.states + r * job.network->padded;
  if constexpr (C == Cell::lstm || C == Cell::gru) {
    float* carry = job.carry + (p * job.carry_rows + r) * W;
    if constexpr (C == Cell::lstm) {
      const LstmStep<V> s = lstm_step(x[0], x[1], x[2], x[3], V::load(carry));
      s.c.store(carry);
      s.m.store(out + p * W);
    } else {
      const GruStep<V> s = gru_step(x[0], x[1], x[2], q, V::load(carry));
      s.h.store(carry);
      s.h.store(out + p * W);
    }
  } else {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) rnn_step(x[n], C == Cell::rnn_relu).store(out + (p * NV + n) * W);
  }
}

// Rows r .. r + MR of panel p.
template <Cell C, int MR> static void int8_cell_tile(const LayerJob& job, int64_t p, int64_t r) {
  using V = Vec<float>;
  constexpr int NV = panel_vectors<C>;
  constexpr int64_t W = V::width;
  const Panels &in = job.layer->input, &hidden = job.layer->hidden;
  const int64_t first = p * NV * W, products = hidden.count * NV * W;
  const int8_t* a[MR];
  V x[MR][NV];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    const float* init =
        job.init ? job.init + (job.index ? job.index[r + m] : r + m) * products : job.layer->bias.template as<float>();
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) x[m][n] = V::load(init + first + n * W);
  }
  if (job.a1) {
    Sums sums[MR][NV];
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      a[m] = static_cast<const int8_t*>(job.a1) + (r + m) * job.row1;
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sums[m][n] = first_sums(in, first + n * W);
    }
    int8_product<MR, NV>(in.weights.template as<int8_t>() + p * in.K * NV * W, a, in.K, sums);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n)
        x[m][n] = add_worth(sums[m][n], in, first + n * W, row_scale(a[m], job.row1), x[m][n]);
  }
  const int64_t row = job.network->row;
  Sums sums[MR][NV];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    a[m] = static_cast<const int8_t*>(job.a2) + (r + m) * row;
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sums[m][n] = first_sums(hidden, first + n * W);
  }
  int8_product<MR, NV>(hidden.weights.template as<int8_t>() + p * hidden.K * NV * W, a, hidden.K, sums);
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    V q(0);
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      const bool apart = C == Cell::gru && n == 2;
      const V base = apart ? V::load(job.layer->bias_q.template as<float>() + p * W) : x[m][n];
      (apart ? q : x[m][n]) = add_worth(sums[m][n], hidden, first + n * W, row_scale(a[m], row), base);
    }
    int8_finish<C>(job, p, r + m, x[m], q);
  }
}

// Owns:   states and carry of all rows for the panels of `part`.
// Keeps:  the sums of a tile of rows; a unit's gates never leave the registers.
// Moves:  a panel once per tile of four rows (two below AVX-512), the activations once per panel.
// Syncs:  nothing: the caller waits for all parts, then makes the activations, whose scale is of the whole row.
// Limits: sums within int32: pack_network refuses others.
template <Cell C> static void int8_cell_layer(const LayerJob& job, Part part) {
  constexpr int most = FR_VEC_BYTES == 64 ? 4 : 2;
  const int64_t end = part.end(job.layer->hidden.count);
  for (int64_t p = part.begin(job.layer->hidden.count); p < end; ++p) {
    int64_t r = 0;
    for (; r + most <= job.rows; r += most) int8_cell_tile<C, most>(job, p, r);
    for (; r < job.rows; ++r) int8_cell_tile<C, 1>(job, p, r);
  }
}
static void int8_layer(const LayerJob& job, Part part) {
  switch (job.network->cell) {
    case Cell::lstm: return int8_cell_layer<Cell::lstm>(job, part);
    case Cell::gru: return int8_cell_layer<Cell::gru>(job, part);
    case Cell::rnn_tanh: return int8_cell_layer<Cell::rnn_tanh>(job, part);
    case Cell::rnn_relu: return int8_cell_layer<Cell::rnn_relu>(job, part);
  }
}

template <int NV, int MR> static void int8_linear_tile(const LinearJob& job, int64_t p, int64_t r) {
  using V = Vec<float>;
  const Panels& panels = *job.panels;
  const int8_t* a[MR];
  Sums sums[MR][NV];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    a[m] = static_cast<const int8_t*>(job.a) + (r + m) * job.row;
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sums[m][n] = first_sums(panels, (p * NV + n) * V::width);
  }
  int8_product<MR, NV>(panels.weights.as<int8_t>() + p * panels.K * NV * V::width, a, panels.K, sums);
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      const int64_t column = (p * NV + n) * V::width;
      add_worth(sums[m][n], panels, column, row_scale(a[m], job.row), V::load(job.bias + column))
          .store(job.out + (r + m) * job.out_row + column);
    }
}

// Owns:   the columns of `part` of all rows of out.
// Keeps:  the sums of a tile.
// Moves:  a panel once per tile of rows, a once per panel, out once.
// Syncs:  nothing.
// Limits: none.
template <int NV> static void int8_linear_panels(const LinearJob& job, Part part) {
  constexpr int most = FR_VEC_BYTES == 64 ? 4 : 2;
  const int64_t begin = part.begin(job.panels->count), end = part.end(job.panels->count);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t p = job.backwards ? end - 1 - (i - begin) : i;
    int64_t r = 0;
    for (; r + most <= job.rows; r += most) int8_linear_tile<NV, most>(job, p, r);
    for (; r < job.rows; ++r) int8_linear_tile<NV, 1>(job, p, r);
  }
}
static void int8_linear(const LinearJob& job, Part part) {
  switch (job.panels->vectors) {
    case 1: return int8_linear_panels<1>(job, part);
    case 2: return int8_linear_panels<2>(job, part);
    case 3: return int8_linear_panels<3>(job, part);
    default: return int8_linear_panels<4>(job, part);
  }
}

static void int8_pack(const float* w, int64_t rows, int64_t K, int64_t unit_gates, Panels& out) {
  constexpr int64_t W = Vec<float>::width;
  out.weights = Memory(out.count * out.vectors * W * out.K);
  out.scale = Memory(out.count * out.vectors * W * 4);
  if (kShift != 0) out.start = Memory(out.count * out.vectors * W * 4);
  for (int64_t p = 0; p < out.count; ++p)
    for (int64_t n = 0; n < out.vectors; ++n)
      for (int64_t lane = 0; lane < W; ++lane) {
        const int64_t row = panel_row(p, n, lane, W, out.vectors, rows, unit_gates);
        if (row < 0) continue;  // stays zero
        const int64_t column = (p * out.vectors + n) * W + lane;
        int32_t sum = 0;
        out.scale.as<float>()[column] = to_int8_weights(w + row * K, K, [&](int64_t k, int8_t integer) {
          const int64_t link = (p * out.K / kLink + k / kLink) * out.vectors + n;
          out.weights.as<int8_t>()[(link * W + lane) * kLink + k % kLink] = integer;
          sum += integer;
        });
        if (kShift != 0) out.start.as<int32_t>()[column] = -kShift * sum;
      }
}

static void int8_activations(const float* from, int64_t n, void* to, int64_t row) { to_int8_row(from, n, to, row); }
static void int8_floats(const void* from, int64_t row, int64_t n, float* to) { from_int8_row(from, row, n, to); }

static const DecoderKernels& int8_decoder(Precision) {
  static constexpr DecoderKernels kernels = {Vec<float>::width, 1,          kLink, int8_pack, int8_layer, int8_linear,
                                             int8_activations,  int8_floats};
  return kernels;
}

}  // namespace FR_ISA
}  // namespace fr

#endif

#ifndef FR_ISA
namespace fr {
const DecoderKernels& int8_decoder() {
  FR_DISPATCH(int8_decoder, Precision::int8)
  __builtin_unreachable();
}
}  // namespace fr
#endif
