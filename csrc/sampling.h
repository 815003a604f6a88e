// A draw: the arithmetic that fastrnn/reference_sample.py defines, for host and device, bit for bit.
//
// Only float32 fma, mul, sub and compare, each correctly rounded, and integer operations stand on the path of a
// decision. Host code must be compiled with -ffp-contract=off: z - floor(z) after a multiplication would otherwise
// become one fma. Pieces here are scalar or serial over one tile; a kernel owns the loops and the reductions around
// them, which may run in any order because every sum is one of integers.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define FR_HD __host__ __device__ __forceinline__
#else
#define FR_HD inline __attribute__((always_inline))
#endif

namespace fr::draw {

constexpr int kTile = 256;                   // ids in a tile, canonical
constexpr int64_t kMaxVocabulary = 1 << 24;  // keeps every sum below 2^63
constexpr int kTileUnitBits = 54;            // exp_mass(0) = 2^54
constexpr int kRowUnitBits = 37;             // row_mass of one token at z = 0: ((2^54 >> 24) * 2^23) >> 16
constexpr int kTopPShift = 16;
constexpr float kScaleMin = 0x1p-126f;
constexpr float kLog2E = 0x1.715476p+0f;
constexpr double kLn2 = 0.6931471805599453;
// Minimax fit P of 2^f on [0, 1] in relative error with P(0) = 1; the coefficients of reference_sample.py.
constexpr float kExp2C1 = 0x1.62e4bap-1f;
constexpr float kExp2C2 = 0x1.ebdb6ap-3f;
constexpr float kExp2C3 = 0x1.c91c10p-5f;
constexpr float kExp2C4 = 0x1.277c1cp-7f;
constexpr float kExp2C5 = 0x1.e96912p-10f;

enum Status : int32_t { kOk = 0, kNan = 1, kInfinite = 2, kEmpty = 3, kParameter = 4 };

FR_HD float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

FR_HD float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FR_HD float sub_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

FR_HD uint32_t float_bits(float a) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(a);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return bits;
#endif
}

FR_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float a;
  __builtin_memcpy(&a, &bits, sizeof a);
  return a;
#endif
}

// High 64 bits of a * b.
FR_HD uint64_t mulhi64(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// 2^z for z <= 0 as significand * 2^(-23 - shift), significand in [2^23, 2^24); z below -63 and NaN count as -63.
struct Exp2Parts {
  uint32_t significand;
  uint32_t shift;
};

FR_HD Exp2Parts exp2_parts(float z) {
  z = z > -63.0f ? z : -63.0f;
  int32_t k = static_cast<int32_t>(z);
  k -= static_cast<float>(k) > z ? 1 : 0;
  const float f = sub_rn(z, static_cast<float>(k));
  float q = fma_rn(kExp2C5, f, kExp2C4);
  q = fma_rn(q, f, kExp2C3);
  q = fma_rn(q, f, kExp2C2);
  q = fma_rn(q, f, kExp2C1);
  q = fma_rn(q, f, 1.0f);
  // Clamped to [1, 2) as bits, which order positive floats; compares of floats would keep loops from vectorising.
  int32_t bits = static_cast<int32_t>(float_bits(q)) - 0x3f000000;
  bits = bits < 0x800000 ? 0x800000 : bits;
  bits = bits > 0xffffff ? 0xffffff : bits;
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(-k)};
}

// E(z): 2^z in units of 2^-54 for z <= 0, zero below -54.
FR_HD uint64_t exp_mass(float z) {
  const Exp2Parts parts = exp2_parts(z);
  return (static_cast<uint64_t>(parts.significand) << 31) >> parts.shift;
}

// z of logit x against the largest logit of its tile or row. -inf gives -inf, or NaN where the largest is -inf too:
// exp_mass counts both as zero mass.
FR_HD float scaled_gap(float x, float largest, float scale) { return mul_rn(sub_rn(x, largest), scale); }

// U_t: the mass of a tile whose integer sum is tile_sum and whose largest logit lies z below the row's.
FR_HD uint64_t row_mass(uint64_t tile_sum, float z) {
  const Exp2Parts parts = exp2_parts(z);
  return (((tile_sum >> 24) * parts.significand) >> 16) >> parts.shift;
}

// ceil(top_p * total), top_p in units of 2^-63, total up to 2^62.
FR_HD uint64_t top_p_target(uint64_t top_p, uint64_t total) {
  return mulhi64(top_p, 2 * total) + (top_p * (2 * total) != 0 ? 1 : 0);
}

// An unsigned key in the order of float values; -0.0 and 0.0 share one.
FR_HD uint32_t order_key(float x) {
  const uint32_t bits = x == 0.0f ? 0u : float_bits(x);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// Whether scale, top_k, top_p and min_p of a row are in range; NaN is not.
FR_HD bool parameters_ok(float scale, int64_t top_k, int64_t top_p, float min_p) {
  const bool scale_ok = scale == 0.0f || (scale >= kScaleMin && scale <= 0x1.fffffep+127f);
  return scale_ok && top_k >= 0 && top_p >= 0 && min_p >= 0.0f;
}

struct Words4 {
  uint32_t w[4];
};

// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).
FR_HD Words4 philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

struct RandomWords {
  uint64_t tile, token;
};

// The two 64-bit words of draw number `draw` at `step` of `sequence`.
FR_HD RandomWords random_words(uint64_t seed, uint64_t sequence, uint32_t step, uint32_t draw) {
  const Words4 r = philox(seed, draw, step, static_cast<uint32_t>(sequence), static_cast<uint32_t>(sequence >> 32));
  return {r.w[0] | static_cast<uint64_t>(r.w[1]) << 32, r.w[2] | static_cast<uint64_t>(r.w[3]) << 32};
}

// Largest of n logits (at least -inf); sets `bad` where one is NaN or +inf. Works on signed integers in the order of
// the floats, whose maxima vectorise: NaN lies above +inf or below -inf there.
FR_HD float tile_largest(const float* x, int64_t n, bool& bad) {
  constexpr int32_t kMinusInfinity = -0x7f800001, kPlusInfinity = 0x7f800000;
  int32_t most = kMinusInfinity, least = kMinusInfinity;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = static_cast<int32_t>(float_bits(x[i]));
    const int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
    most = key > most ? key : most;
    least = key < least ? key : least;
  }
  bad = bad || most >= kPlusInfinity || least < kMinusInfinity;
  return bits_float(static_cast<uint32_t>(most ^ ((most >> 31) & 0x7fffffff)));
}

// W_t; zero for a tile without survivors (largest = -inf).
FR_HD uint64_t tile_sum(const float* x, int64_t n, float largest, float scale) {
  uint64_t sum = 0;
  if (largest == -INFINITY) return sum;
  for (int64_t i = 0; i < n; ++i) sum += exp_mass(scaled_gap(x[i], largest, scale));
  return sum;
}

// Writes the prefix sums of the masses of a tile that has a survivor; returns the last one, W_t.
FR_HD uint64_t tile_prefix(const float* x, int64_t n, float largest, float scale, uint64_t* prefix) {
  for (int64_t i = 0; i < n; ++i) prefix[i] = exp_mass(scaled_gap(x[i], largest, scale));
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) prefix[i] = sum += prefix[i];
  return sum;
}

// First index whose prefix sum exceeds threshold; the last prefix sum must exceed it.
FR_HD int64_t pick(const uint64_t* prefix, int64_t n, uint64_t threshold) {
  int64_t low = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    const bool right = prefix[low + half] <= threshold;
    low = right ? low + half + 1 : low;
    n = right ? n - half - 1 : half;
  }
  return low;
}

// Distance of a threshold in [low, high) from the nearest inner boundary, relative to total; the ends 0 and total are
// no boundaries, because no change of logits can carry a threshold across them.
FR_HD double boundary_distance(uint64_t low, uint64_t high, uint64_t threshold, uint64_t total) {
  const double below = low == 0 ? INFINITY : static_cast<double>(threshold - low);
  const double above = high == total ? INFINITY : static_cast<double>(high - threshold);
  return (below < above ? below : above) / static_cast<double>(total);
}

}  // namespace fr::draw
