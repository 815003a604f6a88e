// The integer exponentials of a tile of logits, their sum and the search in their prefix sums: sampling.h in vectors.
// Compiled once per instruction set, by each_isa.h; hence no include guard.
//
// Every result is that of sampling.h bit for bit: the float operations are the same, each rounded once, and sums of
// integers do not depend on their order. Three steps are written differently, with equal results:
// - z is kept as y = -z >= 0, so that k = floor(z) is -ceil(y) and f = z - k is ceil(y) - y.
// - q needs no clamp: no term of P is negative, and P of no float up to 1 exceeds 0x1.fffffcp+0.
// - No clamp of y: a shift by 64 or more leaves 0, and ceil(y) of a y beyond int32 becomes 2^31.

namespace fr {
namespace FR_ISA {

#if FR_VEC_BYTES == 64

constexpr int kBlock = 16;  // ids whose masses two vectors hold
typedef __m512 Floats;
typedef __m512i Words;

static FR_INLINE Words no_words() { return _mm512_setzero_si512(); }
static FR_INLINE Floats splat(float x) { return _mm512_set1_ps(x); }
static FR_INLINE Floats fused(Floats a, Floats b, float c) { return _mm512_fmadd_ps(a, b, splat(c)); }

// 2^f for f in [0, 1].
static FR_INLINE Floats exp2_fraction(Floats f) {
  Floats q = fused(splat(draw::kExp2C5), f, draw::kExp2C4);
  q = fused(q, f, draw::kExp2C3);
  q = fused(q, f, draw::kExp2C2);
  q = fused(q, f, draw::kExp2C1);
  return fused(q, f, 1.0f);
}

// The first n logits of a block, -inf in place of the rest.
static FR_INLINE Floats load_block(const float* x, int64_t n) {
  if (n >= kBlock) return _mm512_loadu_ps(x);
  return _mm512_mask_loadu_ps(splat(-INFINITY), static_cast<__mmask16>((1u << n) - 1), x);
}

// The masses of a block: ids 0, 2, .. 14 and ids 1, 3, .. 15.
struct Masses {
  Words even, odd;
};

static FR_INLINE Masses block_masses(Floats x, Floats largest, Floats scale) {
  const Floats y = _mm512_mul_ps(_mm512_sub_ps(largest, x), scale);
  const Words shift = _mm512_cvt_roundps_epi32(y, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  const Floats f = _mm512_sub_ps(_mm512_cvtepi32_ps(shift), y);
  const Floats q = exp2_fraction(f);
  // Bits 0 .. 23 of a float in [1, 2) are its significand, which goes to bits 40 .. 63 (even) or 32 .. 55 (odd).
  const Words bits = _mm512_castps_si512(q);
  const Words even = _mm512_slli_epi64(bits, 40);
  const Words odd = _mm512_and_si512(bits, _mm512_set1_epi64(0x00ffffff00000000));
  const Words count = _mm512_add_epi32(shift, _mm512_set1_epi64(0x0000000100000009));
  return {_mm512_srlv_epi64(even, _mm512_and_si512(count, _mm512_set1_epi64(0xffffffff))),
          _mm512_srlv_epi64(odd, _mm512_srli_epi64(count, 32))};
}

static FR_INLINE uint64_t sum_of(Words w) { return static_cast<uint64_t>(_mm512_reduce_add_epi64(w)); }

// Largest of n logits; NaN where one is NaN; -inf where n is 0.
static FR_INLINE float tile_largest(const float* x, int64_t n) {
  Floats most = splat(-INFINITY), more = most;
  __mmask16 ordered = 0xffff, also = 0xffff;
  int64_t i = 0;
  for (; i + 4 * kBlock <= n; i += 4 * kBlock) {
    const Floats a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + i + 16);
    const Floats c = _mm512_loadu_ps(x + i + 32), d = _mm512_loadu_ps(x + i + 48);
    ordered = _mm512_mask_cmp_ps_mask(ordered, a, b, _CMP_ORD_Q);
    also = _mm512_mask_cmp_ps_mask(also, c, d, _CMP_ORD_Q);
    most = _mm512_max_ps(_mm512_max_ps(a, c), most);
    more = _mm512_max_ps(_mm512_max_ps(b, d), more);
  }
  for (; i < n; i += kBlock) {
    const Floats a = load_block(x + i, n - i);
    ordered = _mm512_mask_cmp_ps_mask(ordered, a, a, _CMP_ORD_Q);
    most = _mm512_max_ps(a, most);
  }
  if ((ordered & also) != 0xffff) return NAN;
  return _mm512_reduce_max_ps(_mm512_max_ps(most, more));
}

// The mass of each of n <= 16 logits, in order.
static FR_INLINE void store_masses(const float* x, int64_t n, float largest, float scale, uint64_t* masses) {
  const Masses w = block_masses(load_block(x, n), splat(largest), splat(scale));
  const Words first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), last = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_mask_storeu_epi64(masses, static_cast<__mmask8>(n >= 8 ? 0xff : (1u << n) - 1),
                           _mm512_permutex2var_epi64(w.even, first, w.odd));
  if (n > 8)
    _mm512_mask_storeu_epi64(masses + 8, static_cast<__mmask8>(n >= 16 ? 0xff : (1u << (n - 8)) - 1),
                             _mm512_permutex2var_epi64(w.even, last, w.odd));
}

// Keys in the order of the logits, as draw::order_key; -0.0 and 0.0 share one.
static FR_INLINE void order_keys(const float* x, int64_t n, uint32_t* keys) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const __mmask16 there = static_cast<__mmask16>(n - i >= kBlock ? 0xffff : (1u << (n - i)) - 1);
    const Words bits = _mm512_castps_si512(_mm512_add_ps(_mm512_maskz_loadu_ps(there, x + i), _mm512_setzero_ps()));
    const Words flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(static_cast<int>(0x80000000)));
    _mm512_mask_storeu_epi32(keys + i, there, _mm512_xor_si512(bits, flip));
  }
}

// Prefix sums over the eight lanes.
static FR_INLINE Words scan(Words w) {
  w = _mm512_add_epi64(w, _mm512_alignr_epi64(w, no_words(), 7));
  w = _mm512_add_epi64(w, _mm512_alignr_epi64(w, no_words(), 6));
  return _mm512_add_epi64(w, _mm512_alignr_epi64(w, no_words(), 4));
}

// In turn for each of the four pairs of lanes: the sum of those of a, the sum of those of b.
static FR_INLINE Words add_pairs(Words a, Words b) {
  return _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// The sums of quarters 0 and 1 of a, 2 and 3 of a, and the same of b.
static FR_INLINE Words add_quarters(Words a, Words b) {
  return _mm512_add_epi64(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
}

// Lane i of the result is the sum over the lanes of w[i].
static FR_INLINE Words sums_of_eight(const Words* w) {
  const Words low = add_quarters(add_pairs(w[0], w[1]), add_pairs(w[2], w[3]));
  const Words high = add_quarters(add_pairs(w[4], w[5]), add_pairs(w[6], w[7]));
  return add_quarters(low, high);
}

// U_t of eight tiles, whose shift is clamped as in sampling.h because U_t starts from more bits.
static FR_INLINE void eight_row_masses(const float* largest, const uint64_t* sums, int64_t n, float top, float scale,
                                       uint64_t* masses) {
  const __mmask8 there = static_cast<__mmask8>(n >= 8 ? 0xff : (1u << n) - 1);
  const Floats m = _mm512_mask_loadu_ps(splat(-INFINITY), there, largest);
  const Floats y = _mm512_min_ps(_mm512_mul_ps(_mm512_sub_ps(splat(top), m), splat(scale)), splat(63.0f));
  const Words shift = _mm512_cvt_roundps_epi32(y, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  const Floats q = exp2_fraction(_mm512_sub_ps(_mm512_cvtepi32_ps(shift), y));
  const Words bits = _mm512_and_si512(_mm512_castps_si512(q), _mm512_set1_epi32(0x00ffffff));
  const Words significand = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(bits));
  const Words sum = _mm512_srli_epi64(_mm512_maskz_loadu_epi64(there, sums), 24);
  const Words mass = _mm512_srli_epi64(_mm512_mullo_epi64(sum, significand), 16);
  _mm512_mask_storeu_epi64(masses, there,
                           _mm512_srlv_epi64(mass, _mm512_cvtepu32_epi64(_mm512_castsi512_si256(shift))));
}

// Fills masses[t] = U_t of several tiles from their m_t and W_t; may work in place.
static FR_INLINE void row_masses(const float* largest, const uint64_t* sums, int64_t tiles, float top, float scale,
                                 uint64_t* masses) {
  for (int64_t t = 0; t < tiles; t += 8) eight_row_masses(largest + t, sums + t, tiles - t, top, scale, masses + t);
}

// The masses of one tile in memory, and the search in their prefix sums.
class TileMasses {
 public:
  // Owns:   the object: 256 masses and the prefix sums of 16 blocks.
  // Keeps:  eight blocks' masses in registers until their sums are known.
  // Moves:  reads n logits, writes 8n bytes of masses.
  // Syncs:  nothing.
  // Limits: 1 <= n <= 256, finite largest.
  // Returns W_t.
  FR_INLINE uint64_t fill(const float* x, int64_t n, float largest, float scale) {
    const Words first = fill_half(x, n, largest, scale, masses_);
    groups_ = n > kBlock * 8 ? 2 : 1;
    Words prefix = scan(first);
    _mm512_storeu_si512(prefix_ + 1, prefix);
    if (groups_ == 2) {
      const Words second = fill_half(x + 128, n - 128, largest, scale, masses_ + 128);
      prefix = _mm512_add_epi64(scan(second), _mm512_permutexvar_epi64(_mm512_set1_epi64(7), prefix));
      _mm512_storeu_si512(prefix_ + 9, prefix);
    }
    return prefix_[8 * groups_];
  }

  // First id whose prefix sum exceeds threshold, which is below W_t.
  FR_INLINE int64_t find(uint64_t threshold) const {
    const Words at = _mm512_set1_epi64(static_cast<long long>(threshold));
    int64_t block = count(_mm512_cmple_epu64_mask(_mm512_loadu_si512(prefix_ + 1), at));
    if (groups_ == 2) block += count(_mm512_cmple_epu64_mask(_mm512_loadu_si512(prefix_ + 9), at));
    const Words even = _mm512_load_si512(masses_ + block * kBlock),
                odd = _mm512_load_si512(masses_ + block * kBlock + 8);
    const Words base = _mm512_set1_epi64(static_cast<long long>(prefix_[block]));
    const Words through_odd = _mm512_add_epi64(scan(_mm512_add_epi64(even, odd)), base);
    const Words through_even = _mm512_sub_epi64(through_odd, odd);
    return block * kBlock + count(_mm512_cmple_epu64_mask(through_even, at)) +
           count(_mm512_cmple_epu64_mask(through_odd, at));
  }

  // Sum of the masses of ids 0 .. id - 1, and the mass of id.
  uint64_t before(int64_t id) const {
    uint64_t sum = prefix_[id / kBlock];
    for (int64_t i = id / kBlock * kBlock; i < id; ++i) sum += mass(i);
    return sum;
  }
  uint64_t mass(int64_t id) const { return masses_[id / kBlock * kBlock + id % 2 * 8 + id % kBlock / 2]; }

 private:
  alignas(64) uint64_t masses_[draw::kTile];  // a block: its even ids, its odd ids
  uint64_t prefix_[17] = {};                  // sums of the blocks before each, and of all
  int groups_ = 1;                            // of eight blocks

  static FR_INLINE int64_t count(__mmask8 mask) { return __builtin_popcount(mask); }

  // The sums of eight blocks; those beyond n are 0.
  static FR_INLINE Words fill_half(const float* x, int64_t n, float largest, float scale, uint64_t* masses) {
    Words sums[8];
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) {
      sums[b] = no_words();
      if (b * kBlock >= n) continue;
      const Masses w = block_masses(load_block(x + b * kBlock, n - b * kBlock), splat(largest), splat(scale));
      _mm512_store_si512(masses + b * kBlock, w.even);
      _mm512_store_si512(masses + b * kBlock + 8, w.odd);
      sums[b] = _mm512_add_epi64(w.even, w.odd);
    }
    return sums_of_eight(sums);
  }
};

#elif FR_VEC_BYTES == 32

constexpr int kBlock = 8;  // ids whose masses two vectors hold
typedef __m256 Floats;
typedef __m256i Words;

static FR_INLINE Words no_words() { return _mm256_setzero_si256(); }
static FR_INLINE Floats splat(float x) { return _mm256_set1_ps(x); }
static FR_INLINE Floats fused(Floats a, Floats b, float c) { return _mm256_fmadd_ps(a, b, splat(c)); }

// 2^f for f in [0, 1].
static FR_INLINE Floats exp2_fraction(Floats f) {
  Floats q = fused(splat(draw::kExp2C5), f, draw::kExp2C4);
  q = fused(q, f, draw::kExp2C3);
  q = fused(q, f, draw::kExp2C2);
  q = fused(q, f, draw::kExp2C1);
  return fused(q, f, 1.0f);
}

static FR_INLINE Floats load_block(const float* x, int64_t n) {
  if (n >= kBlock) return _mm256_loadu_ps(x);
  const Words there =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_blendv_ps(splat(-INFINITY), _mm256_maskload_ps(x, there), _mm256_castsi256_ps(there));
}

// The masses of a block: ids 0, 2, 4, 6 and ids 1, 3, 5, 7.
struct Masses {
  Words even, odd;
};

static FR_INLINE Masses block_masses(Floats x, Floats largest, Floats scale) {
  const Floats y = _mm256_mul_ps(_mm256_sub_ps(largest, x), scale);
  const Floats ceiling = _mm256_ceil_ps(y);
  const Floats f = _mm256_sub_ps(ceiling, y);
  const Floats q = exp2_fraction(f);
  // Bits 0 .. 23 of a float in [1, 2) are its significand, which goes to bits 40 .. 63 (even) or 32 .. 55 (odd).
  const Words bits = _mm256_castps_si256(q);
  const Words even = _mm256_slli_epi64(bits, 40);
  const Words odd = _mm256_and_si256(bits, _mm256_set1_epi64x(0x00ffffff00000000));
  const Words count = _mm256_add_epi32(_mm256_cvttps_epi32(ceiling), _mm256_set1_epi64x(0x0000000100000009));
  return {_mm256_srlv_epi64(even, _mm256_and_si256(count, _mm256_set1_epi64x(0xffffffff))),
          _mm256_srlv_epi64(odd, _mm256_srli_epi64(count, 32))};
}

static FR_INLINE uint64_t sum_of(Words w) {
  uint64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<Words*>(lanes), w);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

static FR_INLINE float tile_largest(const float* x, int64_t n) {
  Floats most = splat(-INFINITY), unordered = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += kBlock) {
    const Floats a = load_block(x + i, n - i);
    unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    most = _mm256_max_ps(a, most);
  }
  if (_mm256_movemask_ps(unordered) != 0) return NAN;
  float lanes[kBlock], largest = -INFINITY;
  _mm256_storeu_ps(lanes, most);
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// The mass of each of n <= 8 logits, in order.
static FR_INLINE void store_masses(const float* x, int64_t n, float largest, float scale, uint64_t* masses) {
  const Masses w = block_masses(load_block(x, n), splat(largest), splat(scale));
  const Words low = _mm256_unpacklo_epi64(w.even, w.odd), high = _mm256_unpackhi_epi64(w.even, w.odd);
  const Words first = _mm256_permute2x128_si256(low, high, 0x20), last = _mm256_permute2x128_si256(low, high, 0x31);
  const Words at = _mm256_setr_epi64x(0, 1, 2, 3), count = _mm256_set1_epi64x(n);
  long long* to = reinterpret_cast<long long*>(masses);
  _mm256_maskstore_epi64(to, _mm256_cmpgt_epi64(count, at), first);
  _mm256_maskstore_epi64(to + 4, _mm256_cmpgt_epi64(count, _mm256_add_epi64(at, _mm256_set1_epi64x(4))), last);
}

#else

static inline float tile_largest(const float* x, int64_t n) {
  bool bad = false, nan = false;
  const float largest = draw::tile_largest(x, n, bad);
  if (bad)
    for (int64_t i = 0; i < n; ++i) nan = nan || x[i] != x[i];
  return nan ? NAN : largest;
}

static inline uint64_t tile_sum(const float* x, int64_t n, float largest, float scale) {
  return draw::tile_sum(x, n, largest, scale);
}

constexpr int kBlock = 1;
static inline void store_masses(const float* x, int64_t, float largest, float scale, uint64_t* masses) {
  *masses = draw::exp_mass(draw::scaled_gap(*x, largest, scale));
}

#endif

#if FR_VEC_BYTES == 64 || FR_VEC_BYTES == 32

// W_t; zero for a tile without survivors (largest = -inf).
static FR_INLINE uint64_t tile_sum(const float* x, int64_t n, float largest, float scale) {
  if (largest == -INFINITY) return 0;
  const Floats top = splat(largest), c = splat(scale);
  Words even = no_words(), odd = no_words();
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    const Masses w = block_masses(load_block(x + i, kBlock), top, c);
    even += w.even;
    odd += w.odd;
  }
  if (i < n) {
    const Masses w = block_masses(load_block(x + i, n - i), top, c);
    even += w.even;
    odd += w.odd;
  }
  return sum_of(even + odd);
}

#endif

// The mass of each of n logits, in order.
static FR_INLINE void list_masses(const float* x, int64_t n, float largest, float scale, uint64_t* masses) {
  for (int64_t i = 0; i < n; i += kBlock) store_masses(x + i, n - i, largest, scale, masses + i);
}

#if FR_VEC_BYTES != 64

// Keys in the order of the logits; -0.0 and 0.0 share one.
static FR_INLINE void order_keys(const float* x, int64_t n, uint32_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = draw::order_key(x[i]);
}

class TileMasses {
 public:
  FR_INLINE uint64_t fill(const float* x, int64_t n, float largest, float scale) {
    list_masses(x, n, largest, scale, prefix_ + 1);
    n_ = n;
    uint64_t sum = 0;
    for (int64_t i = 1; i <= n; ++i) prefix_[i] = sum += prefix_[i];
    return sum;
  }
  FR_INLINE int64_t find(uint64_t threshold) const { return draw::pick(prefix_ + 1, n_, threshold); }
  uint64_t before(int64_t id) const { return prefix_[id]; }
  uint64_t mass(int64_t id) const { return prefix_[id + 1] - prefix_[id]; }

 private:
  uint64_t prefix_[1 + draw::kTile] = {};
  int64_t n_ = 0;
};

// Fills masses[t] = U_t of several tiles from their m_t and W_t; may work in place.
static FR_INLINE void row_masses(const float* largest, const uint64_t* sums, int64_t tiles, float top, float scale,
                                 uint64_t* masses) {
  for (int64_t t = 0; t < tiles; ++t) masses[t] = draw::row_mass(sums[t], draw::scaled_gap(largest[t], top, scale));
}

#endif

}  // namespace FR_ISA
}  // namespace fr
