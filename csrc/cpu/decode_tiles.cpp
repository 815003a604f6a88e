// The products of the generation loop on matrix tiles (AMX): bfloat16 or int8 weights and activations, sums in float32
// or int32, gates and state in float32. A row's numbers are the same whatever rows share its tiles. Of int8, every row
// of weights and every row of activations has a scale of its own, so the sums with the input and those with the state
// are kept apart until both are float32.
#ifndef FR_ISA

#include <cmath>
#include <cstdint>

#include "decoder.h"
#include "simd.h"
#define FR_WITH_AMX
#define FR_FILE "decode_tiles.cpp"
#include "each_isa.h"

#elif FR_AMX

#include "vec.h"
#include "activations.h"
#include "tile_shape.h"
#include "tile_block.h"
#include "tile_linear.h"
#include "quick_gates.h"

namespace fr {
namespace FR_ISA {

// Everything a layer's panel needs to turn sums into state.
template <class T, Cell C> struct Finisher {
  static constexpr int NV = C == Cell::gru ? 3 : 4;
  const LayerJob& job;
  int64_t products;  // elements of a row of init

  // The products with the input and the bias: where the sums of vector v of row i begin.
  FR_INLINE __m512 input_of(const Block& b, int64_t i, int v, float worth1) const {
    const int64_t at = (b.p * NV + v) * kLanes;
    if (job.init) return _mm512_loadu_ps(job.init + (job.index ? job.index[b.r + i] : b.r + i) * products + at);
    const __m512 bias = _mm512_load_ps(job.layer->bias.template as<float>() + at);
    return job.a1 ? add_worth(b.input[v][i], job.layer->input, at, worth1, bias) : bias;
  }
  // The pre-activations of vector v of row i of a block, from the worth of the integers of its two activations; number
  // 3 of the GRU is q, which begins at its own bias.
  FR_INLINE __m512 products_of(const Block& b, int64_t i, int v, float worth1, float worth2) const {
    const bool q = C == Cell::gru && v == 3;
    const int64_t at = (b.p * NV + (q ? 2 : v)) * kLanes;
    if constexpr (T::is_int8) {
      if (C == Cell::gru && v == 2) return input_of(b, i, v, worth1);
      const __m512 base =
          q ? _mm512_load_ps(job.layer->bias_q.template as<float>() + b.p * kLanes) : input_of(b, i, v, worth1);
      return add_worth(b.sums[q ? 2 : v][i], job.layer->hidden, at, worth2, base);
    }
    const __m512 x = _mm512_load_ps(b.sums[v][i]);
    if (!job.table || q) return x;
    return _mm512_add_ps(x, _mm512_loadu_ps(job.init + job.index[b.r + i] * products + at));
  }
  FR_INLINE void store(int64_t row, int64_t unit, __m512 h) const {
    if constexpr (T::is_int8) {
      _mm512_storeu_ps(job.states + row * job.network->padded + unit, h);
    } else {
      char* out = static_cast<char*>(job.out) + row * job.network->row + unit * 2;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(h));
    }
  }
  FR_INLINE void row(const Block& b, int64_t i) const {
    float worth1 = 0, worth2 = 0;
    if constexpr (T::is_int8) {
      const int64_t r = b.r + i, bytes = job.network->row;
      if (job.a1) worth1 = row_scale(static_cast<const char*>(job.a1) + r * job.row1, job.row1);
      worth2 = row_scale(static_cast<const char*>(job.a2) + r * bytes, bytes);
    }
    const __m512 x0 = products_of(b, i, 0, worth1, worth2), x1 = products_of(b, i, 1, worth1, worth2),
                 x2 = products_of(b, i, 2, worth1, worth2), x3 = products_of(b, i, 3, worth1, worth2);
    if constexpr (C == Cell::lstm || C == Cell::gru) {
      float* carry = job.carry + (b.p * job.carry_rows + b.r + i) * kLanes;
      __m512 state = _mm512_load_ps(carry), h;
      if constexpr (C == Cell::lstm)
        h = quick_lstm(x0, x1, x2, x3, state);
      else
        h = state = quick_gru(x0, x1, x2, x3, state);
      _mm512_store_ps(carry, state);
      store(b.r + i, b.p * kLanes, h);
    } else {
      const auto step = [](__m512 x) {  // NaN stays NaN: the second operand is what a comparison with it gives
        return C == Cell::rnn_relu ? _mm512_max_ps(_mm512_setzero_ps(), x) : quick_tanh(x);
      };
      const int64_t unit = b.p * NV * kLanes;
      store(b.r + i, unit, step(x0)), store(b.r + i, unit + kLanes, step(x1));
      store(b.r + i, unit + 2 * kLanes, step(x2)), store(b.r + i, unit + 3 * kLanes, step(x3));
    }
  }
  FR_INLINE void rows(Block& b, int64_t until) const {
    for (; b.done < until; ++b.done) row(b, b.done);
  }
};

// Where the sums of a layer's block begin, but for the GRU's q; those of int8 begin at zero.
template <class T>
static FR_INLINE Start layer_start(const LayerJob& job, int64_t products, int64_t p, int64_t r, int NV) {
  if (T::is_int8 || job.table) return {nullptr, 0};
  if (job.init) return {job.init + r * products + p * NV * kLanes, products * 4};
  return {job.layer->bias.as<float>() + p * NV * kLanes, 0};
}

#define FR_STORE_SUMS(tile, where, vector, row) _tile_stored(tile, (where)[vector][row], kLanes * 4)

#define FR_ZERO_SUMS() \
  _tile_zero(0);       \
  _tile_zero(1);       \
  _tile_zero(2);       \
  _tile_zero(3)
#define FR_STORE_NARROW(where, NV) \
  FR_STORE_SUMS(0, where, 0, 0);   \
  FR_STORE_SUMS(1, where, 1, 0);   \
  FR_STORE_SUMS(2, where, 2, 0);   \
  if constexpr (NV > 3) {          \
    FR_STORE_SUMS(3, where, 3, 0); \
  }
#define FR_STORE_PAIR(where, first)      \
  FR_STORE_SUMS(0, where, first, 0);     \
  FR_STORE_SUMS(1, where, first + 1, 0); \
  FR_STORE_SUMS(2, where, first, 16);    \
  FR_STORE_SUMS(3, where, first + 1, 16)

// The sums of up to 16 rows.
template <class T, Cell C, class Between>
static FR_INLINE void narrow_block(const LayerJob& job, const Operand& in, const Operand& hidden, const Start& s,
                                   Block& b, const Between& between) {
  constexpr int NV = Finisher<T, C>::NV;
  if constexpr (T::is_int8) {
    if (in.blocks) {
      FR_ZERO_SUMS();
      add_narrow<T, NV, 2>(in, between);
      FR_STORE_NARROW(b.input, NV)
    }
    FR_ZERO_SUMS();
    add_narrow<T, NV, 2>(hidden, between);
    FR_STORE_NARROW(b.sums, NV)
  } else {
    FR_TILE_START(0, s, 0, 0);
    FR_TILE_START(1, s, 0, 1);
    FR_TILE_START(2, s, 0, 2);
    const Start q{C == Cell::gru ? job.layer->bias_q.as<float>() + b.p * kLanes
                  : s.from       ? s.from + 3 * kLanes
                                 : nullptr,
                  C == Cell::gru ? 0 : s.stride};
    FR_TILE_START(3, q, 0, 0);
    add_narrow<T, NV, 2>(in, between);
    add_narrow<T, NV, C == Cell::gru ? 3 : 2>(hidden, between);
    FR_STORE_NARROW(b.sums, 4)
  }
}

// The sums of 17 to 32 rows.
template <class T, Cell C, class Between>
static FR_INLINE void wide_block(const LayerJob& job, const Operand& in, const Operand& hidden, const Start& s,
                                 Block& b, const Between& between) {
  constexpr int NV = Finisher<T, C>::NV;
  for (int v = 0; v < (C == Cell::gru ? 2 : 4); v += 2) {
    FR_TILE_START(0, s, 0, v);
    FR_TILE_START(1, s, 0, v + 1);
    FR_TILE_START(2, s, 16, v);
    FR_TILE_START(3, s, 16, v + 1);
    add_pair<T, NV>(in, v, between);
    if constexpr (T::is_int8) {
      if (in.blocks) {
        FR_STORE_PAIR(b.input, v);
        FR_ZERO_SUMS();
      }
    }
    add_pair<T, NV>(hidden, v, between);
    FR_STORE_PAIR(b.sums, v);
  }
  if constexpr (C == Cell::gru) {
    const Start q{T::is_int8 ? nullptr : job.layer->bias_q.as<float>() + b.p * kLanes, 0};
    FR_TILE_START(0, s, 0, 2);
    FR_TILE_START(2, s, 16, 2);
    FR_TILE_START(1, q, 0, 0);
    FR_TILE_START(3, q, 16, 0);
    add_apart<T, NV>(in, hidden, 2, between);
    auto& input = T::is_int8 ? b.input : b.sums;
    auto& q_sums = T::is_int8 ? b.sums[2] : b.sums[3];
    _tile_stored(0, input[2][0], kLanes * 4);
    _tile_stored(2, input[2][16], kLanes * 4);
    _tile_stored(1, q_sums[0], kLanes * 4);
    _tile_stored(3, q_sums[16], kLanes * 4);
  }
}

// Owns:   out and carry of all rows for the panels of `part`.
// Keeps:  the sums of one block in tiles, of two in memory: while the tiles multiply one block the vector units turn
//         the sums of the block before into state.
// Moves:  a panel from the cache once per block of 32 rows, the activations of a block once or twice per panel.
// Syncs:  nothing: the caller waits for all parts before the next layer.
// Limits: memory of whole blocks of 32 rows behind a1, a2 and stored products.
template <class T, Cell C> static void tile_layer(const LayerJob& job, Part part) {
  constexpr int NV = Finisher<T, C>::NV;
  const Panels &in = job.layer->input, &hidden = job.layer->hidden;
  const int64_t products = hidden.count * NV * kLanes, last = part.end(hidden.count);
  const Finisher<T, C> finisher{job, products};
  Block blocks[2];
  int now = 0;
  blocks[1].rows = blocks[1].done = 0;
  configure_tiles(job.rows <= kTileRows ? job.rows : kTileRows);
  for (int64_t p = part.begin(hidden.count); p < last; ++p) {
    const Operand o1 = operand<T, NV>(*job.network, in, job.a1, job.row1, p),
                  o2 = operand<T, NV>(*job.network, hidden, job.a2, job.network->row, p);
    const bool narrow = job.rows <= kTileRows;
    const int64_t both = o1.blocks + o2.blocks, longer = o1.blocks > o2.blocks ? o1.blocks : o2.blocks;
    const int64_t steps = narrow ? both : C == Cell::gru ? both + longer : 2 * both;
    for (int64_t r = 0; r < job.rows; r += kBlockRows, now ^= 1) {
      Block &b = blocks[now], &before = blocks[now ^ 1];
      b.p = p, b.r = r, b.rows = job.rows - r < kBlockRows ? job.rows - r : kBlockRows, b.done = 0;
      const Start s = layer_start<T>(job, products, p, r, NV);
      const int64_t share = (before.rows + steps - 1) / steps;  // rows to turn into state after each step of the tiles
      const auto between = [&] {
        finisher.rows(before, before.done + share < before.rows ? before.done + share : before.rows);
      };
      if (narrow)
        narrow_block<T, C>(job, o1, o2, s, b, between);
      else
        wide_block<T, C>(job, rows_from(o1, r), rows_from(o2, r), s, b, between);
      finisher.rows(before, before.rows);
    }
  }
  finisher.rows(blocks[now ^ 1], blocks[now ^ 1].rows);
}

template <class T> static void layer(const LayerJob& job, Part part) {
  switch (job.network->cell) {
    case Cell::lstm: return tile_layer<T, Cell::lstm>(job, part);
    case Cell::gru: return tile_layer<T, Cell::gru>(job, part);
    case Cell::rnn_tanh: return tile_layer<T, Cell::rnn_tanh>(job, part);
    case Cell::rnn_relu: return tile_layer<T, Cell::rnn_relu>(job, part);
  }
}

template <class T> static void pack(const float* w, int64_t rows, int64_t K, int64_t unit_gates, Panels& out) {
  using E = typename T::Element;
  constexpr int64_t group = T::group, tile_k = group * kTileRows;
  out.weights = Memory(out.count * out.vectors * out.K / tile_k * kTileBytes);
  if (T::is_int8) out.scale = Memory(out.count * out.vectors * kLanes * 4);
  for (int64_t p = 0; p < out.count; ++p)
    for (int64_t n = 0; n < out.vectors; ++n)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t row = panel_row(p, n, lane, kLanes, out.vectors, rows, unit_gates);
        if (row < 0) continue;  // stays zero
        const auto store = [&](int64_t k, E weight) {
          const int64_t tile = (p * (out.K / tile_k) + k / tile_k) * out.vectors + n, line = k % tile_k / group;
          out.weights.as<E>()[tile * kTileRows * tile_k + (line * kLanes + lane) * group + k % group] = weight;
        };
        if constexpr (T::is_int8)
          out.scale.as<float>()[(p * out.vectors + n) * kLanes + lane] = to_int8_weights(w + row * K, K, store);
        else
          for (int64_t k = 0; k < K; ++k) store(k, to_bfloat16(w[row * K + k]));
      }
}

template <class T> static void to_activations(const float* from, int64_t n, void* to, int64_t row) {
  if constexpr (T::is_int8)
    to_int8_row(from, n, to, row);
  else
    for (int64_t i = 0; i < n; ++i) static_cast<bf16*>(to)[i] = to_bfloat16(from[i]);
}
template <class T> static void from_activations(const void* from, int64_t row, int64_t n, float* to) {
  if constexpr (T::is_int8)
    from_int8_row(from, row, n, to);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = widen(static_cast<const bf16*>(from)[i]);
}

template <class T> static const DecoderKernels& tile_kernels() {
  static constexpr DecoderKernels kernels = {
      kLanes,    sizeof(typename T::Element), T::group * kTileRows, pack<T>, layer<T>,
      linear<T>, to_activations<T>,           from_activations<T>,  1,       kTileRows};
  return kernels;
}

}  // namespace FR_ISA
}  // namespace fr

#endif

#ifndef FR_ISA
namespace fr {
#if FR_KNOWS_AMX
const DecoderKernels& tile_decoder(Precision precision) {
  return precision == Precision::int8 ? amx::tile_kernels<amx::Int8>() : amx::tile_kernels<amx::Bfloat16>();
}
#endif
}  // namespace fr
#endif
