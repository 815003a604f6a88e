// Rounding to bfloat16, and which weight a lane of a panel stands for. Compiled once per instruction set, by
// each_isa.h.

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
