// The products of the generation loop with int8 weights and activations for processors without matrix tiles: the same
// quantisation as decode_tiles.cpp, sums in int32, gates and state in float32 by cell_math.h. The sums are exact, so
// they are those of the tiles; the tiles' gates have 12 bits (quick_gates.h), so the states after them are not. This
// file compiles itself once per instruction set (each_isa.h).
#ifndef FR_ISA

#include <cstdint>

#include "decoder.h"
#include "simd.h"
#define FR_FILE "decode_int8.cpp"
#include "each_isa.h"

#else

#include "vec.h"
#include "../cell_math.h"
#include "activations.h"

namespace fr {
namespace FR_ISA {

// Two neighbours of k are multiplied as 16-bit numbers and added in one instruction, so they lie side by side: a panel
// is w[k / 2][vector][lane][k % 2].
constexpr int64_t kPair = 2;

typedef int8_t Bytes __attribute__((vector_size(FR_VEC_BYTES / 4)));

// W sums of int32.
struct Sums {
  Vec<float>::RawBits v;
  FR_INLINE Vec<float> to_float() const { return Vec<float>(__builtin_convertvector(v, Vec<float>::Raw)); }
};

// The 2 W weights at w, as 16-bit numbers.
struct Pairs {
#if FR_VEC_BYTES == 64
  __m512i v;
  static FR_INLINE Pairs load(const int8_t* w) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)))};
  }
#elif FR_VEC_BYTES == 32
  __m256i v;
  static FR_INLINE Pairs load(const int8_t* w) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)))};
  }
#else
  int32_t even[4], odd[4];
  static FR_INLINE Pairs load(const int8_t* w) {
    Pairs p;
    for (int i = 0; i < 4; ++i) p.even[i] = w[2 * i], p.odd[i] = w[2 * i + 1];
    return p;
  }
#endif
  // sums + this times the pair of activations at a
  FR_INLINE Sums add_to(Sums sums, const int8_t* a) const {
#if FR_VEC_BYTES == 64
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
  for (int64_t k = 0; k < K; k += kPair) {
    Pairs pairs[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      if constexpr (MR == 1) __builtin_prefetch(w + 1024);  // one row waits for weights: ask for them early
      pairs[n] = Pairs::load(w);
      w += kPair * Vec<float>::width;
    }
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sums[m][n] = pairs[n].add_to(sums[m][n], a[m] + k);
  }
}

// Sums that a job has stored in the place of floats.
FR_INLINE Sums load_sums(const float* from) {
  Sums s;
  __builtin_memcpy(&s.v, from, sizeof s.v);
  return s;
}
FR_INLINE void store_sums(Sums s, float* to) { __builtin_memcpy(to, &s.v, sizeof s.v); }

// Activations of a state within -1 .. 1.
FR_INLINE int8_t to_int8(float h) {
  const float x = h > 1.0f ? 1.0f : h > -1.0f ? h : -1.0f;  // NaN, which int8 has not, is -1
  return static_cast<int8_t>(__builtin_rintf(x * 127.0f));
}
FR_INLINE void store_int8(Vec<float> h, int8_t* to) {
  const Vec<float> one(1), shift(12582912.0f);  // 1.5 * 2^23: adding it rounds and leaves the integer in the low bits
  h = if_less(Vec<float>(-1), h, h, Vec<float>(-1));
  h = if_less(h, one, h, one) * Vec<float>(127) + shift;
  const Bytes bytes = __builtin_convertvector(bits_of(h) - bits_of(shift), Bytes);
  __builtin_memcpy(to, &bytes, sizeof bytes);
}

template <Cell C> constexpr int panel_vectors = C == Cell::gru ? 3 : 4;

// The state of one row's units of panel p from the sums with the hidden state, and (GRU: apart) with the input.
template <Cell C>
FR_INLINE void int8_finish(const LayerJob& job, int64_t p, int64_t r, const Sums* hidden, Sums input_n) {
  using V = Vec<float>;
  constexpr int NV = panel_vectors<C>;
  constexpr int64_t W = V::width;
  const int64_t products = job.layer->hidden.count * NV * W, first = p * NV * W;
  const float *scale = job.layer->hidden.scale.as<float>() + first, *bias = job.layer->bias.as<float>() + first;
  if (job.table) bias = job.init + job.index[r] * products + first;
  int8_t* out = static_cast<int8_t*>(job.out) + r * job.network->row;
  const auto sum = [&](Sums s, int n) { return s.to_float() * V::load(scale + n * W) + V::load(bias + n * W); };
  if constexpr (C == Cell::lstm) {
    float* carry = job.carry + (p * job.carry_rows + r) * W;
    const LstmStep<V> s =
        lstm_step(sum(hidden[0], 0), sum(hidden[1], 1), sum(hidden[2], 2), sum(hidden[3], 3), V::load(carry));
    s.c.store(carry);
    store_int8(s.m, out + p * W);
  } else if constexpr (C == Cell::gru) {
    float* carry = job.carry + (p * job.carry_rows + r) * W;
    const V q = hidden[2].to_float() * V::load(scale + 2 * W) + V::load(job.layer->bias_q.as<float>() + p * W);
    const GruStep<V> s = gru_step(sum(hidden[0], 0), sum(hidden[1], 1), sum(input_n, 2), q, V::load(carry));
    s.h.store(carry);
    store_int8(s.h, out + p * W);
  } else {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store_int8(rnn_step(sum(hidden[n], n), false), out + first + n * W);
  }
}

// Rows r .. r + MR of panel p.
template <Cell C, int MR> static void int8_cell_tile(const LayerJob& job, int64_t p, int64_t r) {
  constexpr int NV = panel_vectors<C>;
  constexpr int64_t W = Vec<float>::width;
  const Panels &in = job.layer->input, &hidden = job.layer->hidden;
  const int8_t *a1[MR], *a2[MR];
  Sums sums[MR][NV], input_n[MR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    a1[m] = job.a1 ? static_cast<const int8_t*>(job.a1) + (r + m) * job.row1 : nullptr;
    a2[m] = static_cast<const int8_t*>(job.a2) + (r + m) * job.network->row;
    const bool stored = job.init && !job.table;
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n)
      sums[m][n] = stored ? load_sums(job.init + (r + m) * hidden.count * NV * W + (p * NV + n) * W) : Sums{};
  }
  if (job.a1) int8_product<MR, NV>(in.weights.as<int8_t>() + p * in.K * NV * W, a1, in.K, sums);
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    input_n[m] = sums[m][2];
    if constexpr (C == Cell::gru) sums[m][2] = Sums{};
  }
  int8_product<MR, NV>(hidden.weights.as<int8_t>() + p * hidden.K * NV * W, a2, hidden.K, sums);
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) int8_finish<C>(job, p, r + m, sums[m], input_n[m]);
}

// Owns:   out and carry of all rows for the panels of `part`.
// Keeps:  the sums of a tile of rows; a unit's gates never leave the registers.
// Moves:  a panel once per tile of four rows (two below AVX-512), the activations once per panel.
// Syncs:  nothing: the caller waits for all parts before the next layer.
// Limits: states within -1 .. 1, sums within int32: pack_network refuses others.
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
    default: return int8_cell_layer<Cell::rnn_tanh>(job, part);  // relu has no int8
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
    for (int n = 0; n < NV; ++n) sums[m][n] = Sums{};
  }
  int8_product<MR, NV>(panels.weights.as<int8_t>() + p * panels.K * NV * V::width, a, panels.K, sums);
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      const int64_t column = (p * NV + n) * V::width;
      float* out = job.out + (r + m) * job.out_row + column;
      if (job.stored)
        store_sums(sums[m][n], out);
      else
        fma(sums[m][n].to_float(), V::load(panels.scale.as<float>() + column), V::load(job.bias + column)).store(out);
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

static void int8_pack(const float* w, int64_t rows, int64_t K, int64_t unit_gates, const float* largest, Panels& out) {
  constexpr int64_t W = Vec<float>::width;
  out.weights = Memory(out.count * out.vectors * W * out.K);
  out.scale = Memory(out.count * out.vectors * W * 4);
  for (int64_t p = 0; p < out.count; ++p)
    for (int64_t n = 0; n < out.vectors; ++n)
      for (int64_t lane = 0; lane < W; ++lane) {
        const int64_t row = panel_row(p, n, lane, W, out.vectors, rows, unit_gates);
        if (row < 0) continue;  // stays zero
        const float most = largest[row], scale = most > 0 ? 127.0f / most : 0.0f;
        out.scale.as<float>()[(p * out.vectors + n) * W + lane] = most / (127.0f * 127.0f);
        for (int64_t k = 0; k < K; ++k) {
          const int64_t pair = (p * out.K / kPair + k / kPair) * out.vectors + n;
          out.weights.as<int8_t>()[(pair * W + lane) * kPair + k % kPair] =
              static_cast<int8_t>(__builtin_rintf(w[row * K + k] * scale));
        }
      }
}

static void int8_activations(const float* from, int64_t n, void* to) {
  for (int64_t i = 0; i < n; ++i) static_cast<int8_t*>(to)[i] = to_int8(from[i]);
}
static void int8_floats(const void* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(static_cast<const int8_t*>(from)[i]) / 127.0f;
}

static const DecoderKernels& int8_decoder(Precision) {
  static constexpr DecoderKernels kernels = {Vec<float>::width, 1,          kPair, int8_pack, int8_layer, int8_linear,
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
