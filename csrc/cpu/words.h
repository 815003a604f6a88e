// The random words of several draws at once: draw::random_words in vectors. Compiled once per instruction set, by
// each_isa.h; hence no include guard.

namespace fr {
namespace FR_ISA {

#if FR_VEC_BYTES == 64

// The words of eight draws, by rows or by draw numbers: the counters' and keys' low 32 bits of each lane count.
static FR_INLINE void philox_eight(__m512i seed, __m512i sequence, __m512i step, __m512i draw, uint64_t* tile,
                                   uint64_t* token) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  __m512i k0 = seed, k1 = _mm512_srli_epi64(seed, 32);
  __m512i c0 = draw, c1 = step, c2 = sequence, c3 = _mm512_srli_epi64(sequence, 32);
  for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(m0, c0), p1 = _mm512_mul_epu32(m1, c2);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, k0, 0x96);  // the exclusive or of three
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, k1, 0x96);
    c1 = p1;
    c3 = p0;
    k0 = _mm512_add_epi64(k0, _mm512_set1_epi64(0x9E3779B9));
    k1 = _mm512_add_epi64(k1, _mm512_set1_epi64(0xBB67AE85));
  }
  const __mmask16 high = 0xaaaa;
  _mm512_storeu_si512(tile, _mm512_mask_blend_epi32(high, c0, _mm512_slli_epi64(c1, 32)));
  _mm512_storeu_si512(token, _mm512_mask_blend_epi32(high, c2, _mm512_slli_epi64(c3, 32)));
}

// The words of the first draws of up to eight rows.
static FR_INLINE void words_of_rows(const Sample& a, int64_t row, int64_t count, uint64_t* tile, uint64_t* token) {
  const __mmask8 there = static_cast<__mmask8>((1u << count) - 1);
  philox_eight(_mm512_maskz_loadu_epi64(there, a.seed + row), _mm512_maskz_loadu_epi64(there, a.sequence + row),
               _mm512_maskz_loadu_epi64(there, a.step + row), _mm512_setzero_si512(), tile, token);
}

// The words of draws n .. n + 7 of a row.
static FR_INLINE void words_of_draws(const Sample& a, int64_t row, int64_t n, uint64_t* tile, uint64_t* token) {
  const __m512i draw = _mm512_add_epi64(_mm512_set1_epi64(n), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  philox_eight(_mm512_set1_epi64(a.seed[row]), _mm512_set1_epi64(a.sequence[row]), _mm512_set1_epi64(a.step[row]), draw,
               tile, token);
}

#else

static FR_INLINE void words_of(const Sample& a, int64_t row, int64_t n, uint64_t* tile, uint64_t* token) {
  const draw::RandomWords words =
      draw::random_words(static_cast<uint64_t>(a.seed[row]), static_cast<uint64_t>(a.sequence[row]),
                         static_cast<uint32_t>(a.step[row]), static_cast<uint32_t>(n));
  *tile = words.tile;
  *token = words.token;
}

// The words of the first draws of up to eight rows.
static FR_INLINE void words_of_rows(const Sample& a, int64_t row, int64_t count, uint64_t* tile, uint64_t* token) {
  for (int64_t i = 0; i < count; ++i) words_of(a, row + i, 0, tile + i, token + i);
}

// The words of draws n .. n + 7 of a row.
static FR_INLINE void words_of_draws(const Sample& a, int64_t row, int64_t n, uint64_t* tile, uint64_t* token) {
  for (int64_t i = 0; i < 8; ++i) words_of(a, row, n + i, tile + i, token + i);
}

#endif

}  // namespace FR_ISA
}  // namespace fr
