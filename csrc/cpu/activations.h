// Rounding to bfloat16 and to 8 bits, and which weight a lane of a panel stands for. Compiled once per instruction set,
// by each_isa.h.

namespace fr {
namespace FR_ISA {

// The bfloat16 nearest to x, ties to even; NaN stays NaN.
FR_INLINE bf16 to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
// The floats nearest to x that a bfloat16 holds.
FR_INLINE Vec<float> nearest_bfloat16(Vec<float> x) {
  bf16 some[Vec<float>::width];
  store(x, some);
  return load(some);
}

typedef int8_t Bytes __attribute__((vector_size(FR_VEC_BYTES / 4)));

// The bits of the largest magnitude of n numbers; infinity is beyond every number, NaN beyond infinity.
FR_INLINE int32_t largest_bits(const float* from, int64_t n) {
  using V = Vec<float>;
  V::RawBits most{};
  for (int64_t i = 0; i < n; i += V::width) {
    const V::RawBits now = bits_of(abs(V::load(from + i, n - i)));
    most = now > most ? now : most;
  }
  int32_t largest = 0;
  for (int i = 0; i < V::width; ++i) largest = most[i] > largest ? most[i] : largest;
  return largest;
}

// What one of the integers -127 .. 127 is worth that stand for numbers up to a magnitude: 0 for all but zeros, NaN for
// what is not finite. Its last 8 bits are zero, so that an integer times it is exact: rounding what an integer stands
// for gives that integer and that worth again.
FR_INLINE float worth_of_bits(int32_t largest) {
  constexpr int32_t infinite = 0x7f800000, least = 0x0d800000;  // 2^-100: 1 / worth stays finite
  if (largest < least) return 0.0f;
  if (largest >= infinite) return __builtin_nanf("");
  float worth;
  __builtin_memcpy(&worth, &largest, sizeof worth);
  worth /= 127.0f;
  __builtin_memcpy(&largest, &worth, sizeof worth);
  largest = (largest + 0xff) & ~0xff;  // upwards: no number is beyond 127
  __builtin_memcpy(&worth, &largest, sizeof worth);
  return worth;
}

// The integers nearest to n numbers of one row, with what one is worth at the row's end; beyond n nothing changes.
// NaN gives any integer, worth NaN.
FR_INLINE void to_int8_row(const float* from, int64_t n, void* row, int64_t row_bytes) {
  using V = Vec<float>;
  const float worth = worth_of_bits(largest_bits(from, n));
  row_scale(row, row_bytes) = worth;
  const V each(worth > 0 ? 1.0f / worth : 0.0f);
  const V shift(12582912.0f);  // 1.5 * 2^23: adding it rounds and leaves the integer in the low bits
  int8_t* to = static_cast<int8_t*>(row);
  for (int64_t i = 0; i < n; i += V::width) {
    const V::RawBits whole = bits_of(V::load(from + i, n - i) * each + shift) - bits_of(shift);
    const Bytes bytes = __builtin_convertvector(whole, Bytes);
    const int64_t left = n - i < V::width ? n - i : V::width;
    __builtin_memcpy(to + i, &bytes, static_cast<size_t>(left));
  }
}
FR_INLINE void from_int8_row(const void* row, int64_t row_bytes, int64_t n, float* to) {
  const float worth = row_scale(row, row_bytes);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(static_cast<const int8_t*>(row)[i]) * worth;
}

// The integers nearest to a row of K weights, by `store(k, integer)`; what one is worth.
template <class Store> FR_INLINE float to_int8_weights(const float* w, int64_t K, const Store& store) {
  const float worth = worth_of_bits(largest_bits(w, K)), each = worth > 0 ? 1.0f / worth : 0.0f;
  for (int64_t k = 0; k < K; ++k) store(k, static_cast<int8_t>(__builtin_rintf(w[k] * each)));
  return worth;
}

// The row of a matrix (rows, K) that lane `lane` of vector n of panel p holds, or -1 beyond its end. With unit_gates
// above 1 the vectors of a panel are the gates of the same units, else they follow each other.
FR_INLINE int64_t panel_row(int64_t p, int64_t n, int64_t lane, int64_t W, int64_t vectors, int64_t rows,
                            int64_t unit_gates) {
  if (unit_gates > 1) {
    const int64_t hidden = rows / unit_gates, unit = p * W + lane;
    return unit < hidden ? n * hidden + unit : -1;
  }
  const int64_t row = (p * vectors + n) * W + lane;
  return row < rows ? row : -1;
}

}  // namespace FR_ISA
}  // namespace fr
