// Draws with masks, filters, votes, log-probabilities, and greedy ones: what draw.h includes for the rows that are no
// plain draw. Compiled once per instruction set; hence no include guard.

namespace fr {
namespace FR_ISA {

struct Choice {
  int64_t token;
  double margin;
};

// U of a row from its m_t, with prefix sums in mass.
static FR_INLINE uint64_t row_total(const float* x, int64_t V, const float* largest, float top, float scale,
                                    uint64_t* mass) {
  for (int64_t t = 0; t * kTile < V; ++t) mass[t] = tile_sum(x + t * kTile, tile_size(t, V), largest[t], scale);
  return V <= kTile ? mass[0] : row_prefix(largest, mass, (V + kTile - 1) / kTile, top, scale, mass);
}

static inline double log2_total(uint64_t total, int64_t tiles) {
  return ::log2(static_cast<double>(total)) - (tiles == 1 ? draw::kTileUnitBits : draw::kRowUnitBits);
}

// The first of the largest logits, and its distance to the runner-up in logits (+inf if alone).
static Choice greedy(const float* x, int64_t V, const float* largest, float top, bool wants_margin) {
  int64_t token = 0;
  while (largest[token / kTile] != top) token += kTile;
  while (x[token] != top) ++token;
  if (!wants_margin) return {token, 0};
  float rest = -INFINITY;
  for (int64_t i = 0; i < V; ++i) rest = i != token && x[i] > rest ? x[i] : rest;
  return {token, static_cast<double>(top) - static_cast<double>(rest)};
}

// The most frequent token, lowest id on ties. Its margin is that of the draw whose change could first overturn it: a
// lead of L over the second token survives until ceil(L / 2) draws (at least one) have changed.
static Choice vote(const Sample& a, DrawScratch& s) {
  const int64_t n = a.mode_of;
  const int64_t* drawn = s.drawn.get();
  int32_t* votes = s.votes.get();
  if (n == 1) return {drawn[0], s.margins.get()[0]};
  for (int64_t i = 0; i < n; ++i) ++votes[drawn[i]];
  int64_t winner = drawn[0];
  int32_t best = 0, second = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t count = votes[drawn[i]];
    if (count > best || (count == best && drawn[i] < winner)) best = count, winner = drawn[i];
  }
  for (int64_t i = 0; i < n; ++i)
    if (drawn[i] != winner && votes[drawn[i]] > second) second = votes[drawn[i]];
  for (int64_t i = 0; i < n; ++i) votes[drawn[i]] = 0;
  if (!a.logprobs) return {winner, 0};
  const int64_t flips = (best - second + 1) / 2;
  return {winner, nth_smallest(s.margins.get(), n, flips > 1 ? flips - 1 : 0)};
}

// Looks up the token of draw n, whose tile s.tile[0] holds.
static FR_INLINE void look_up(const Sample& a, int64_t n, int64_t tile, uint64_t tile_total, DrawScratch& s) {
  const uint64_t threshold = draw::mulhi64(s.words.get()[n], tile_total);
  const int64_t i = s.tile[0].find(threshold);
  s.drawn.get()[n] = tile * kTile + i;
  if (!a.logprobs) return;
  const uint64_t low = s.tile[0].before(i);
  const double margin = draw::boundary_distance(low, low + s.tile[0].mass(i), threshold, tile_total);
  if (margin < s.margins.get()[n]) s.margins.get()[n] = margin;
}

// All draws of a row from the prefix sums s.mass of its row level: first the tile of each, then the tokens, tile by
// tile, so that a tile's masses are made once however many draws fall into it.
static Choice draw_votes(const Sample& a, int64_t row, const float* x, float scale, DrawScratch& s) {
  const uint64_t *mass = s.mass.get(), total = mass[s.tiles - 1];
  int64_t *next = s.next.get(), *first = s.first.get();
  uint64_t tile_words[kRows], token_words[kRows];  // not those in s, which are of the rows to come
  for (int64_t n = 0; n < a.mode_of; ++n) {
    if (n % kRows == 0) words_of_draws(a, row, n, tile_words, token_words);
    s.words.get()[n] = token_words[n % kRows];
    s.margins.get()[n] = INFINITY;
    int64_t tile = 0;
    if (s.tiles > 1) {
      const uint64_t threshold = draw::mulhi64(tile_words[n % kRows], total);
      tile = draw::pick(mass, s.tiles, threshold);
      if (a.logprobs)
        s.margins.get()[n] = draw::boundary_distance(tile ? mass[tile - 1] : 0, mass[tile], threshold, total);
    }
    s.drawn.get()[n] = tile * kTile;
    next[n] = first[tile];
    first[tile] = n + 1;
  }
  for (int64_t n = 0; n < a.mode_of; ++n) {
    const int64_t tile = s.drawn.get()[n] / kTile;
    if (first[tile] == 0) continue;
    const float largest = s.largest.get()[tile];
    const uint64_t tile_total = s.tile[0].fill(x + tile * kTile, tile_size(tile, a.V), largest, scale);
    for (int64_t m = first[tile]; m != 0; m = next[m - 1]) look_up(a, m - 1, tile, tile_total, s);
    first[tile] = 0;
  }
  return vote(a, s);
}

static inline void write(const Sample& a, int64_t row, Status status, int64_t token, double logprob, double tempered,
                         double margin) {
  a.token[row] = token;
  a.status[row] = status;
  if (!a.logprobs) return;
  a.logprob[row] = static_cast<float>(logprob);
  a.tempered_logprob[row] = static_cast<float>(tempered);
  a.margin[row] = static_cast<float>(margin);
}

static inline void refuse(const Sample& a, int64_t row, Status status) { write(a, row, status, 0, NAN, NAN, NAN); }

// Draws one row with all that a call can ask for.
static __attribute__((noinline)) void sample_general(const Sample& a, int64_t row, DrawScratch& s) {
  const int64_t V = a.V;
  const float* logits = a.logits + row * a.logits_stride;
  if (!draw::parameters_ok(a.scale[row], a.top_k[row], a.top_p[row], a.min_p[row]))
    return refuse(a, row, draw::kParameter);
  const float given_top = row_largest(logits, V, s.given.get());
  if (!(given_top < INFINITY)) return refuse(a, row, status_of(given_top));
  const bool is_greedy = a.scale[row] == 0.0f;
  const bool filtered = !is_greedy && is_filtered(a, row);
  const float *x = logits, *largest = s.given.get();
  float top = given_top;
  if (a.mask != nullptr || filtered) {
    copy_allowed(logits, a.mask == nullptr ? nullptr : a.mask + row * a.mask_stride, V, s.x.get());
    x = s.x.get();
    top = row_largest(x, V, s.largest.get());
  } else {
    for (int64_t t = 0; t < s.tiles; ++t) s.largest.get()[t] = largest[t];
  }
  if (top == -INFINITY) return refuse(a, row, draw::kEmpty);
  const float scale = is_greedy ? draw::kLog2E : a.scale[row];
  Choice choice;
  uint64_t total = 0;
  if (is_greedy) {
    choice = greedy(x, V, s.largest.get(), top, a.logprobs);
  } else {
    if (filtered) {
      filter_row(a, row, top, scale, s);
      top = row_largest(x, V, s.largest.get());
    }
    total = row_total(x, V, s.largest.get(), top, scale, s.mass.get());
    choice = draw_votes(a, row, x, scale, s);
  }
  if (!a.logprobs) return write(a, row, draw::kOk, choice.token, 0, 0, 0);
  const double value = logits[choice.token];
  const double tempered =
      is_greedy ? 0.0 : draw::kLn2 * ((value - top) * static_cast<double>(scale) - log2_total(total, s.tiles));
  const bool same = !is_greedy && x == logits && scale == draw::kLog2E;  // the total at hand is the one needed
  if (!same) total = row_total(logits, V, s.given.get(), given_top, draw::kLog2E, s.mass.get());
  const double plain = value - given_top - draw::kLn2 * log2_total(total, s.tiles);
  write(a, row, draw::kOk, choice.token, plain, tempered, choice.margin);
}

}  // namespace FR_ISA
}  // namespace fr
