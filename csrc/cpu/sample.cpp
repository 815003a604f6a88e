// The draw on the CPU. One row is one task; see csrc/kernels.h for the contract and sampling.h for the arithmetic.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string_view>
#include <vector>

#include "../kernels.h"

// The loops over a tile vectorise only with these; none of them changes a result. They must precede sampling.h,
// because a function keeps the options in force where it was defined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3,no-trapping-math,no-math-errno")
#endif

#include "../sampling.h"

namespace {

using namespace fr::draw;
using fr::Sample;

static_assert(fr::kMaxVocabulary == fr::draw::kMaxVocabulary);

// Working memory of one thread, reused from row to row.
struct Scratch {
  std::vector<float> x;              // (V,) the row after mask and filters
  std::vector<float> largest;        // (tiles,) m_t of x
  std::vector<float> plain_largest;  // (tiles,) m_t of the logits as given
  std::vector<uint64_t> mass;        // (tiles,) prefix sums of U_t
  std::vector<int32_t> ids;          // (V,) candidates of a selection
  std::vector<float> values;         // (V,) their logits
  std::vector<uint32_t> keys;        // (V,) and keys
  std::vector<uint64_t> weights;     // (V,) and weights
  std::vector<int64_t> drawn;        // (mode_of,) tokens
  std::vector<double> margins;       // (mode_of,)
  uint64_t prefix[kTile];            // prefix sums of w_i of one tile
};

// What survives a selection in (value, lowest id) order: ids whose key is larger, and the first `ties` that equal it.
struct Cut {
  uint32_t key;
  int64_t ties;
};

struct Choice {
  int64_t token;
  double margin;
};

FR_HD int64_t tile_size(int64_t tile, int64_t vocabulary) {
  return std::min<int64_t>(kTile, vocabulary - tile * kTile);
}

// Fills largest[t] for each tile; returns the row's largest logit.
FR_HD float row_largest(const float* x, int64_t vocabulary, std::vector<float>& largest, bool& bad) {
  float row = -INFINITY;
  for (size_t t = 0; t < largest.size(); ++t) {
    largest[t] = tile_largest(x + t * kTile, tile_size(t, vocabulary), bad);
    row = std::max(row, largest[t]);
  }
  return row;
}

// Fills prefix sums of the row level; returns U.
FR_HD uint64_t row_prefix(const float* x, int64_t vocabulary, const std::vector<float>& largest, float row, float scale,
                          std::vector<uint64_t>& mass) {
  uint64_t total = 0;
  for (size_t t = 0; t < largest.size(); ++t) {
    const uint64_t sum = tile_sum(x + t * kTile, tile_size(t, vocabulary), largest[t], scale);
    total += largest.size() == 1 ? sum : row_mass(sum, scaled_gap(largest[t], row, scale));
    mass[t] = total;
  }
  return total;
}

FR_HD double log2_total(uint64_t total, size_t tiles) {
  return std::log2(static_cast<double>(total)) - (tiles == 1 ? kTileUnitBits : kRowUnitBits);
}

// The shortest prefix of n candidates, largest key first, whose weights reach `target`, at least 1; equal keys have
// equal weights. A radix selection, O(n). Without weights each counts 1. The candidates are used up.
Cut select(std::vector<uint32_t>& keys, std::vector<uint64_t>* weights, int64_t n, uint64_t target) {
  uint64_t histogram[2048];
  Cut cut{0, 0};
  uint64_t above = 0;                        // weight of all larger keys
  const int digit_bits = n > 4096 ? 11 : 8;  // clearing and reading the histogram is most of the work on few keys
  for (int shift = 32; shift > 0;) {
    const int width = std::min(digit_bits, shift);
    shift -= width;
    const uint32_t digits = (1u << width) - 1;
    std::memset(histogram, 0, (digits + 1) * sizeof histogram[0]);
    for (int64_t i = 0; i < n; ++i) histogram[(keys[i] >> shift) & digits] += weights ? (*weights)[i] : 1;
    int64_t bin = digits;
    while (bin >= 0 && above + histogram[bin] < target) above += histogram[bin--];
    if (bin < 0) return {0, n};  // all of them weigh less: key 0 is below every float's, so all survive
    cut.key |= static_cast<uint32_t>(bin) << shift;
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (((keys[i] >> shift) & digits) != static_cast<uint32_t>(bin)) continue;
      keys[left] = keys[i];
      if (weights) (*weights)[left] = (*weights)[i];
      ++left;
    }
    n = left;
  }
  const uint64_t weight = weights ? (*weights)[0] : 1;
  cut.ties = static_cast<int64_t>((target - above + weight - 1) / weight);
  return cut;
}

// Lists the ids and values of x that are at least `bound` and not -inf; returns how many there are.
int64_t list_candidates(const float* x, int64_t n, float bound, Scratch& s) {
  s.ids.resize(n);
  s.values.resize(n);
  int64_t count = 0;
  for (size_t t = 0; t < s.largest.size(); ++t) {
    if (s.largest[t] < bound) continue;
    const int64_t first = static_cast<int64_t>(t) * kTile, end = first + tile_size(t, n);
    for (int64_t i = first; i < end; ++i) {
      s.ids[count] = static_cast<int32_t>(i);
      s.values[count] = x[i];
      count += x[i] >= bound && x[i] > -INFINITY ? 1 : 0;
    }
  }
  return count;
}

// Keeps of the `count` listed candidates what survives the cut; returns how many there are.
int64_t keep(Cut cut, int64_t count, Scratch& s) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = order_key(s.values[i]);
    const bool tie = key == cut.key && cut.ties > 0;
    cut.ties -= tie ? 1 : 0;
    s.ids[kept] = s.ids[i];
    s.values[kept] = s.values[i];
    kept += key > cut.key || tie ? 1 : 0;
  }
  return kept;
}

void list_keys(int64_t count, Scratch& s) {
  s.keys.resize(count);
  for (int64_t i = 0; i < count; ++i) s.keys[i] = order_key(s.values[i]);
}

// Sets to -inf what top_k, top_p and min_p remove from x, whose largest logit is `largest`.
FR_HD void filter_row(const Sample& a, int64_t row, float largest, float scale, Scratch& s) {
  const int64_t n = a.V, top_k = a.top_k[row], tiles = static_cast<int64_t>(s.largest.size());
  float* x = s.x.data();
  float bound = -INFINITY;
  if (top_k > 0 && top_k <= tiles) {
    // The k-th largest of the tiles' maxima: k logits at least are as large, so no smaller one is among the first k.
    s.values.assign(s.largest.begin(), s.largest.end());
    std::nth_element(s.values.begin(), s.values.begin() + (top_k - 1), s.values.end(), std::greater<float>());
    bound = s.values[top_k - 1];
  }
  int64_t count = list_candidates(x, n, bound, s);
  if (top_k > 0 && top_k < count) {
    list_keys(count, s);
    count = keep(select(s.keys, nullptr, count, top_k), count, s);
  }
  if (a.top_p[row] > 0) {
    list_keys(count, s);
    s.weights.resize(count);
    uint64_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
      s.weights[i] = exp_mass(scaled_gap(s.values[i], largest, scale)) >> kTopPShift;
      total += s.weights[i];
    }
    count = keep(select(s.keys, &s.weights, count, top_p_target(a.top_p[row], total)), count, s);
  }
  std::fill(x, x + n, -INFINITY);
  for (int64_t i = 0; i < count; ++i) {
    if (-scaled_gap(s.values[i], largest, scale) <= a.min_p[row]) x[s.ids[i]] = s.values[i];
  }
}

// The first of the largest logits, and its distance to the runner-up in logits (+inf if alone).
Choice greedy(const float* x, int64_t n, float largest) {
  const int64_t token = std::find(x, x + n, largest) - x;
  float rest = -INFINITY;
  for (int64_t i = 0; i < n; ++i) rest = i != token && x[i] > rest ? x[i] : rest;
  return {token, static_cast<double>(largest) - static_cast<double>(rest)};
}

// The most frequent token, lowest id on ties. Its margin is that of the draw whose change could first overturn it: a
// lead of L over the second token survives until ceil(L / 2) draws (at least one) have changed.
Choice vote(std::vector<int64_t>& drawn, std::vector<double>& margins) {
  if (drawn.size() == 1) return {drawn[0], margins[0]};
  std::sort(drawn.begin(), drawn.end());
  int64_t best = 0, second = 0, winner = drawn[0];
  for (size_t i = 0; i < drawn.size();) {
    size_t end = i + 1;
    while (end < drawn.size() && drawn[end] == drawn[i]) ++end;
    const int64_t count = static_cast<int64_t>(end - i);
    if (count > best) {
      second = best;
      best = count;
      winner = drawn[i];
    } else {
      second = std::max(second, count);
    }
    i = end;
  }
  const int64_t flips = std::max<int64_t>(1, (best - second + 1) / 2);
  std::nth_element(margins.begin(), margins.begin() + (flips - 1), margins.end());
  return {winner, margins[flips - 1]};
}

// All draws of a row from the prefix sums s.mass of its row level.
FR_HD Choice draw_row(const Sample& a, int64_t row, const float* x, float scale, Scratch& s) {
  const size_t tiles = s.largest.size();
  const uint64_t total = s.mass[tiles - 1];
  int64_t held = -1, held_size = 0;  // the tile whose prefix sums s.prefix holds
  for (int64_t n = 0; n < a.mode_of; ++n) {
    const RandomWords random = random_words(static_cast<uint64_t>(a.seed[row]), static_cast<uint64_t>(a.sequence[row]),
                                            static_cast<uint32_t>(a.step[row]), static_cast<uint32_t>(n));
    int64_t tile = 0;
    double margin = INFINITY;
    if (tiles > 1) {
      const uint64_t threshold = mulhi64(random.tile, total);
      tile = pick(s.mass.data(), tiles, threshold);
      margin = boundary_distance(tile ? s.mass[tile - 1] : 0, s.mass[tile], threshold, total);
    }
    if (tile != held) {
      held = tile;
      held_size = tile_size(tile, a.V);
      tile_prefix(x + tile * kTile, held_size, s.largest[tile], scale, s.prefix);
    }
    const uint64_t tile_total = s.prefix[held_size - 1];
    const uint64_t threshold = mulhi64(random.token, tile_total);
    const int64_t i = pick(s.prefix, held_size, threshold);
    s.drawn[n] = tile * kTile + i;
    s.margins[n] = std::min(margin, boundary_distance(i ? s.prefix[i - 1] : 0, s.prefix[i], threshold, tile_total));
  }
  return vote(s.drawn, s.margins);
}

void write(const Sample& a, int64_t row, Status status, int64_t token, double logprob, double tempered, double margin) {
  a.token[row] = token;
  a.status[row] = status;
  if (!a.logprobs) return;
  a.logprob[row] = static_cast<float>(logprob);
  a.tempered_logprob[row] = static_cast<float>(tempered);
  a.margin[row] = static_cast<float>(margin);
}

void refuse(const Sample& a, int64_t row, Status status) { write(a, row, status, 0, NAN, NAN, NAN); }

FR_HD void sample_row(const Sample& a, int64_t row, Scratch& s) {
  const int64_t n = a.V;
  const float* logits = a.logits + row * a.logits_stride;
  if (!parameters_ok(a.scale[row], a.top_k[row], a.top_p[row], a.min_p[row])) return refuse(a, row, kParameter);
  bool bad = false;
  const float plain_row = row_largest(logits, n, s.plain_largest, bad);
  if (bad) {
    const bool nan = std::any_of(logits, logits + n, [](float v) { return v != v; });
    return refuse(a, row, nan ? kNan : kInfinite);
  }
  const bool is_greedy = a.scale[row] == 0.0f;
  const bool filtered = !is_greedy && (a.top_k[row] > 0 || a.top_p[row] > 0 || a.min_p[row] < INFINITY);
  const float* x = logits;
  float row_top = plain_row;
  if (a.mask != nullptr || filtered) {
    const bool* allowed = a.mask == nullptr ? nullptr : a.mask + row * a.mask_stride;
    for (int64_t i = 0; i < n; ++i) s.x[i] = allowed == nullptr || allowed[i] ? logits[i] : -INFINITY;
    x = s.x.data();
    row_top = row_largest(x, n, s.largest, bad);
  } else {
    s.largest = s.plain_largest;
  }
  if (row_top == -INFINITY) return refuse(a, row, kEmpty);
  const float scale = is_greedy ? kLog2E : a.scale[row];
  Choice choice;
  uint64_t total = 0;
  if (is_greedy) {
    choice = greedy(x, n, row_top);
  } else {
    if (filtered) {
      filter_row(a, row, row_top, scale, s);
      row_top = row_largest(x, n, s.largest, bad);
    }
    total = row_prefix(x, n, s.largest, row_top, scale, s.mass);
    choice = draw_row(a, row, x, scale, s);
  }
  if (!a.logprobs) return write(a, row, kOk, choice.token, 0, 0, 0);
  const size_t tiles = s.largest.size();
  const double value = logits[choice.token];
  const double tempered =
      is_greedy ? 0.0 : kLn2 * ((value - row_top) * static_cast<double>(scale) - log2_total(total, tiles));
  const bool same = !is_greedy && x == logits && scale == kLog2E;  // the total at hand is the one needed
  if (!same) total = row_prefix(logits, n, s.plain_largest, plain_row, kLog2E, s.mass);
  write(a, row, kOk, choice.token, value - plain_row - kLn2 * log2_total(total, tiles), tempered, choice.margin);
}

FR_HD void sample_rows(const Sample& a, int64_t begin, int64_t end) {
  const size_t tiles = static_cast<size_t>((a.V + kTile - 1) / kTile);
  Scratch s;
  s.x.resize(a.V);
  s.largest.resize(tiles);
  s.plain_largest.resize(tiles);
  s.mass.resize(tiles);
  s.drawn.resize(a.mode_of);
  s.margins.resize(a.mode_of);
  for (int64_t row = begin; row < end; ++row) sample_row(a, row, s);
}

void rows_portable(int64_t begin, int64_t end, void* call) {
  sample_rows(*static_cast<const Sample*>(call), begin, end);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void rows_avx2(int64_t begin, int64_t end, void* call) {
  sample_rows(*static_cast<const Sample*>(call), begin, end);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void rows_avx512(int64_t begin, int64_t end,
                                                                                   void* call) {
  sample_rows(*static_cast<const Sample*>(call), begin, end);
}
#endif

}  // namespace

void fr::sample(const Sample& call) {
  auto* rows = rows_portable;
#if defined(__x86_64__)
  const std::string_view isa = cpu_isa();
  if (isa == "avx2") rows = rows_avx2;
  if (isa == "avx512") rows = rows_avx512;
#endif
  Sample copy = call;
  // About 1 ns a logit and 20 ns a draw: below 10 us in all, waking threads costs more than they save.
  if (call.B * (call.V + 20 * call.mode_of) < 10000) return rows(0, call.B, &copy);
  call.pool.run(call.B, rows, &copy);
}
