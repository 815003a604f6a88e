// Draws of tokens from rows of logits, as fastrnn/reference_sample.py defines them. Compiled once per instruction set,
// by each_isa.h; hence no include guard, and the includes below are of the same kind (it needs vec.h, buffer.h and
// sampling.h).
//
// A plain draw (no mask, filter, vote or log-probability) goes straight from the logits to the token and stands here;
// draw_general.h has the rest. A caller that makes the logits tile by tile uses tile_stats and draw_plain_row.
#include "mass.h"
#include "words.h"

namespace fr {
namespace FR_ISA {

constexpr int64_t kRows = 8;  // whose random words, and in small vocabularies whose tokens, are drawn together
using draw::kTile;
using draw::RandomWords;
using draw::Status;

// What a row's draw comes to; token is 0 where status is not 0.
struct Drawn {
  int64_t token;
  Status status;
};

// Working memory of one thread for rows of V logits, reused from row to row.
struct DrawScratch {
  const int64_t tiles;
  TileMasses tile[kRows];      // the tiles in which tokens are looked up
  uint64_t tile_words[kRows];  // the rows' random words
  uint64_t token_words[kRows];
  const Buffer<float> largest;     // (tiles,) m_t of the row as it is drawn from
  const Buffer<uint64_t> mass;     // (tiles,) W_t, then prefix sums of U_t
  const Buffer<float> x;           // (V,) the row after mask and filters; this and the following only if `general`
  const Buffer<float> given;       // (tiles,) m_t of the logits as given
  const Buffer<float> groups;      // (16 * tiles,) largest of groups of logits
  const Buffer<int32_t> ids;       // (V + 16,) candidates of a selection
  const Buffer<float> values;      // (V + 16,) their logits
  const Buffer<uint32_t> keys;     // (V,) and keys
  const Buffer<uint64_t> weights;  // (V,) and weights
  const Buffer<int64_t> first;     // (tiles,) of a vote: 1 + the last draw in each tile, 0: none
  const Buffer<int32_t> votes;     // (V,) draws of each token, 0 between rows
  const Buffer<int64_t> next;      // (mode_of,) 1 + another draw in the same tile, 0: none
  const Buffer<uint64_t> words;    // (mode_of,) words for the token
  const Buffer<int64_t> drawn;     // (mode_of,) tokens
  const Buffer<double> margins;    // (mode_of,)

  // general: some row is more than a plain draw. mode_of is the largest to come.
  DrawScratch(int64_t V, int64_t mode_of, bool general)
      : tiles((V + kTile - 1) / kTile),
        largest(tiles),
        mass(tiles),
        x(general * V),
        given(general * tiles),
        groups(general * 16 * tiles),
        ids(general * (V + 16)),
        values(general * (V + 16)),
        keys(general * V),
        weights(general * V),
        first(general * tiles),
        votes(mode_of > 1 ? V : 0),
        next(general * mode_of),
        words(general * mode_of),
        drawn(general * mode_of),
        margins(general * mode_of) {
    for (int64_t t = 0; general && t < tiles; ++t) first.get()[t] = 0;
    for (int64_t i = 0; mode_of > 1 && i < V; ++i) votes.get()[i] = 0;
  }
};

static FR_INLINE int64_t tile_size(int64_t tile, int64_t V) {
  return V - tile * kTile < kTile ? V - tile * kTile : kTile;
}

// The larger of two; NaN where one is NaN.
static FR_INLINE float larger(float a, float b) { return a > b || a != a ? a : b; }

// What the largest logit of a row, NaN among them counting as such, says of it.
static FR_INLINE Status status_of(float top) {
  if (top != top) return draw::kNan;
  if (top == INFINITY) return draw::kInfinite;
  return top == -INFINITY ? draw::kEmpty : draw::kOk;
}

// m_t and W_t of one tile of n <= 256 logits, at inverse temperature scale. A NaN or +inf among them sets `bad` and is
// `largest`, from which draw_plain_row makes the row's status; the sum is then without meaning.
static FR_INLINE void tile_stats(const float* x, int64_t n, float scale, float& largest, uint64_t& sum, bool& bad) {
  largest = tile_largest(x, n);
  bad = bad || !(largest < INFINITY);
  sum = tile_sum(x, n, largest, scale);
}

// Fills largest[t]; returns the row's largest logit, NaN where one is NaN.
static FR_INLINE float row_largest(const float* x, int64_t V, float* largest) {
  float top = largest[0] = tile_largest(x, tile_size(0, V));
  for (int64_t t = 1; t * kTile < V; ++t) top = larger(top, largest[t] = tile_largest(x + t * kTile, tile_size(t, V)));
  return top;
}

// Fills largest[t] and sums[t] = W_t; a tile's largest is found while the sum before it is still on its way.
static FR_INLINE void row_stats(const float* x, int64_t V, float scale, float* largest, uint64_t* sums) {
  largest[0] = tile_largest(x, tile_size(0, V));
  for (int64_t t = 0; t * kTile < V; ++t) {
    const int64_t next = (t + 1) * kTile;
    if (next < V) largest[t + 1] = tile_largest(x + next, tile_size(t + 1, V));
    sums[t] = tile_sum(x + t * kTile, tile_size(t, V), largest[t], scale);
  }
}

// Fills prefix[t] with prefix sums of U_t of several tiles; returns U. May work in place.
static FR_INLINE uint64_t row_prefix(const float* largest, const uint64_t* sums, int64_t tiles, float top, float scale,
                                     uint64_t* prefix) {
  row_masses(largest, sums, tiles, top, scale, prefix);
  uint64_t total = 0;
  for (int64_t t = 0; t < tiles; ++t) prefix[t] = total += prefix[t];
  return total;
}

// The draw with given random words from a row whose m_t (and W_t, if there are several tiles) are known.
static FR_INLINE Drawn draw_with(const float* logits, int64_t V, const float* largest, const uint64_t* tile_sums,
                                 float scale, RandomWords words, DrawScratch& s) {
  const int64_t tiles = s.tiles;
  float top = largest[0];
  for (int64_t t = 1; t < tiles; ++t) top = larger(top, largest[t]);
  const Status status = status_of(top);
  if (status != draw::kOk) return {0, status};
  int64_t tile = 0;
  if (tiles > 1) {
    const uint64_t total = row_prefix(largest, tile_sums, tiles, top, scale, s.mass.get());
    tile = draw::pick(s.mass.get(), tiles, draw::mulhi64(words.tile, total));
  }
  const uint64_t total = s.tile[0].fill(logits + tile * kTile, tile_size(tile, V), largest[tile], scale);
  return {tile * kTile + s.tile[0].find(draw::mulhi64(words.token, total)), draw::kOk};
}

// The plain draw of a row whose m_t and W_t (unused for V <= 256) are known; scale is in range and not 0.
static FR_INLINE Drawn draw_plain_row(const float* logits, int64_t V, const float* largest, const uint64_t* tile_sums,
                                      float scale, uint64_t seed, uint64_t sequence, uint32_t step, DrawScratch& s) {
  return draw_with(logits, V, largest, tile_sums, scale, draw::random_words(seed, sequence, step, 0), s);
}

// The plain draws of up to eight rows of V <= 256 logits, as draw_with does them one by one: three passes, so that a
// row's next step does not wait for its last.
static FR_INLINE void draw_small_rows(const float* logits, int64_t stride, int64_t V, const float* scale, int64_t rows,
                                      const uint64_t* token_words, DrawScratch& s, int64_t* token, int32_t* status) {
  float largest[kRows];
  uint64_t total[kRows];
  for (int64_t r = 0; r < rows; ++r) {
    largest[r] = tile_largest(logits + r * stride, V);
    status[r] = status_of(largest[r]);
  }
  for (int64_t r = 0; r < rows; ++r)
    if (status[r] == draw::kOk) total[r] = s.tile[r].fill(logits + r * stride, V, largest[r], scale[r]);
  for (int64_t r = 0; r < rows; ++r)
    token[r] = status[r] == draw::kOk ? s.tile[r].find(draw::mulhi64(token_words[r], total[r])) : 0;
}

static FR_INLINE bool is_filtered(const Sample& a, int64_t row) {
  return a.top_k[row] != 0 || a.top_p[row] != 0 || a.min_p[row] != INFINITY;
}

static FR_INLINE bool is_plain(const Sample& a, int64_t row) {
  const float scale = a.scale[row];
  return scale >= draw::kScaleMin && scale < INFINITY && !is_filtered(a, row);
}

}  // namespace FR_ISA
}  // namespace fr

#include "filter.h"
#include "draw_general.h"

namespace fr {
namespace FR_ISA {

// Draws one row, whose random words are those of its first draw.
static FR_INLINE void sample_row(const Sample& a, int64_t row, RandomWords words, DrawScratch& s) {
  if (!is_plain(a, row)) return sample_general(a, row, s);
  const float* logits = a.logits + row * a.logits_stride;
  const float scale = a.scale[row];
  row_stats(logits, a.V, scale, s.largest.get(), s.mass.get());
  const Drawn found = draw_with(logits, a.V, s.largest.get(), s.mass.get(), scale, words, s);
  a.token[row] = found.token;
  a.status[row] = found.status;
}

// Owns:   the outputs of rows begin .. end.
// Keeps:  of a row its tiles' maxima and sums, and the masses of one tile.
// Moves:  reads a plain row once, and the tile of its token once more from the nearest cache.
// Syncs:  nothing: rows do not meet.
// Limits: none beyond kernels.h; `s` is made for a.V, a.mode_of or more, and general rows where there are any.
static void sample_rows(const Sample& a, int64_t begin, int64_t end, DrawScratch& s) {
  const bool whole = a.mask == nullptr && !a.logprobs && a.mode_of == 1;
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t count = end - row < kRows ? end - row : kRows;
    if (!whole) {
      for (int64_t i = row; i < row + count; ++i) sample_general(a, i, s);
      continue;
    }
    words_of_rows(a, row, count, s.tile_words, s.token_words);
    bool small = a.V <= kTile;
    for (int64_t i = row; i < row + count; ++i) small = small && is_plain(a, i);
    if (small)
      draw_small_rows(a.logits + row * a.logits_stride, a.logits_stride, a.V, a.scale + row, count, s.token_words, s,
                      a.token + row, a.status + row);
    else
      for (int64_t i = 0; i < count; ++i) sample_row(a, row + i, {s.tile_words[i], s.token_words[i]}, s);
  }
}

}  // namespace FR_ISA
}  // namespace fr
