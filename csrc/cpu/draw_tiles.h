// Plain draws from logits that come tile by tile and are not kept: first every tile is weighed, then each row's group
// is found, and only the logits of that group are needed again. The tokens are those of draw_plain_row. Compiled once
// per instruction set, by each_isa.h; hence no include guard (it needs draw.h).

namespace fr {
namespace FR_ISA {

#if FR_VEC_BYTES == 64

// The sums of the masses of each group of a whole tile that has a survivor.
static FR_INLINE void full_group_sums(const float* x, float largest, float scale, uint64_t* sums) {
  const Floats top = splat(largest), c = splat(scale);
  Words groups[kTileGroups];
#pragma GCC unroll 4
  for (int g = 0; g < kTileGroups; ++g) {
    Words even = no_words(), odd = no_words();
#pragma GCC unroll 4
    for (int i = 0; i < kDrawGroup; i += kBlock) {
      const Masses w = block_masses(_mm512_loadu_ps(x + g * kDrawGroup + i), top, c);
      even += w.even;
      odd += w.odd;
    }
    groups[g] = even + odd;
  }
  const Words halves = add_quarters(add_pairs(groups[0], groups[1]), add_pairs(groups[2], groups[3]));
  const __m256i low = _mm512_castsi512_si256(halves), high = _mm512_extracti64x4_epi64(halves, 1);
  const __m256i sum01 = _mm256_permute2x128_si256(low, high, 0x20), other = _mm256_permute2x128_si256(low, high, 0x31);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), _mm256_add_epi64(sum01, other));
}

#endif

// The sums of the masses of each group of a tile; zero for a group without survivors.
static FR_INLINE void group_sums(const float* x, int64_t n, float largest, float scale, uint64_t* sums) {
#if FR_VEC_BYTES == 64
  if (n == draw::kTile && largest > -INFINITY) return full_group_sums(x, largest, scale, sums);
#endif
  for (int64_t g = 0; g < kTileGroups; ++g) {
    const int64_t left = n - g * kDrawGroup;
    sums[g] = left > 0 ? tile_sum(x + g * kDrawGroup, left < kDrawGroup ? left : kDrawGroup, largest, scale) : 0;
  }
}

// Owns:   m_t and the groups' sums of tile t of all rows.
// Keeps:  the sums of a tile's groups; a row's largest is found while the sums before it are still on their way.
// Moves:  reads the logits twice, the second time from the nearest cache.
// Syncs:  nothing: tiles and rows do not meet.
// Limits: none.
static void weigh_tile(const TileDraw& d, int64_t t, const float* logits, int64_t stride, const float* scale) {
  const int64_t n = tile_size(t, d.V);
  float largest = tile_largest(logits, n);
  for (int64_t row = 0; row < d.rows; ++row) {
    const float* x = logits + row * stride;
    const float next = row + 1 < d.rows ? tile_largest(x + stride, n) : largest;
    group_sums(x, n, largest, scale[row], d.sums + (row * d.tiles + t) * kTileGroups);
    d.largest[row * d.tiles + t] = largest;
    largest = next;
  }
}

// The first group of a tile whose prefix sum exceeds threshold, which becomes what is left of it there.
static FR_INLINE int64_t group_of(const uint64_t* sums, uint64_t& threshold) {
  int64_t g = 0;
  for (; g + 1 < kTileGroups && sums[g] <= threshold; ++g) threshold -= sums[g];
  return g;
}

// Fills group, threshold and top of one row, whose random words are `words`, or returns its status.
static FR_INLINE Status find_group(const TileDraw& d, int64_t row, float scale, RandomWords words, uint64_t* mass) {
  const float* largest = d.largest + row * d.tiles;
  const uint64_t* sums = d.sums + row * d.tiles * kTileGroups;
  float top = largest[0];
  for (int64_t t = 0; t < d.tiles; ++t) {
    top = larger(top, largest[t]);
    const uint64_t* of = sums + t * kTileGroups;
    mass[t] = of[0] + of[1] + of[2] + of[3];
  }
  const Status status = status_of(top);
  if (status != draw::kOk) return status;
  int64_t tile = 0;
  if (d.tiles > 1) {
    const uint64_t total = row_prefix(largest, mass, d.tiles, top, scale, mass);
    tile = draw::pick(mass, d.tiles, draw::mulhi64(words.tile, total));
  }
  const uint64_t* of = sums + tile * kTileGroups;
  d.threshold[row] = draw::mulhi64(words.token, of[0] + of[1] + of[2] + of[3]);
  d.group[row] = tile * kTileGroups + group_of(of, d.threshold[row]);
  d.top[row] = largest[tile];
  return status;
}

static void find_groups(const TileDraw& d, const Sample& a, DrawScratch& s) {
  for (int64_t row = 0; row < d.rows; row += kRows) {
    const int64_t count = d.rows - row < kRows ? d.rows - row : kRows;
    words_of_rows(a, row, count, s.tile_words, s.token_words);
    for (int64_t i = 0; i < count; ++i) {
      const RandomWords words{s.tile_words[i], s.token_words[i]};
      a.status[row + i] = find_group(d, row + i, a.scale[row + i], words, s.mass.get());
      a.token[row + i] = 0;
      if (a.status[row + i] != draw::kOk) d.group[row + i] = -1;
    }
  }
}

// The token of a row from the logits of its group.
static int64_t token_in_group(const TileDraw& d, int64_t row, const float* logits, float scale) {
  const int64_t first = d.group[row] * kDrawGroup;
  TileMasses masses;
  masses.fill(logits, d.V - first < kDrawGroup ? d.V - first : kDrawGroup, d.top[row], scale);
  return first + masses.find(d.threshold[row]);
}

}  // namespace FR_ISA
}  // namespace fr
