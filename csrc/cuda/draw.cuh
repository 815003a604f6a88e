// The draw of one row of logits by a team of warps: fastrnn/reference_sample.py's definition through ../sampling.h, bit
// for bit. sample.cu draws the rows of a matrix with it, generate_rows.cuh those of a step; logits may be in shared or
// global memory.
#pragma once

#include "team.cuh"
#include "../sampling.h"

namespace fr::cuda {

using draw::kTile;

// A key in the order of the logits that a NaN tops; and the logit of a key.
__device__ __forceinline__ uint32_t key_of(float x) { return x != x ? ~0u : draw::order_key(x); }
__device__ __forceinline__ float of_key(uint32_t key) { return draw::bits_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The logits of a row as the draw sees them: -inf for what is masked or filtered out, less for what has occurred.
struct Logits {
  const float* x;
  int64_t V;
  const bool* allowed;  // or null
  const uint8_t* seen;  // with a repetition penalty, or null
  float penalty, inverse_penalty;
  // What survives top_k and top_p: keys above `key`, and of its ties the ids up to `id`. key 0: all.
  uint32_t key;
  int64_t id;
  float min_p, top, scale;  // min_p +inf: off

  __device__ float penalised(int64_t i) const {
    const float v = x[i];
    return seen != nullptr && seen[i] ? draw::mul_rn(v, v > 0.0f ? inverse_penalty : penalty) : v;
  }
  __device__ float at(int64_t i) const {
    const float v = penalised(i);
    if (allowed != nullptr && !allowed[i]) return -INFINITY;
    if (key != 0) {
      const uint32_t own = draw::order_key(v);
      if (own < key || (own == key && i > id)) return -INFINITY;
    }
    if (min_p < INFINITY && !(-draw::scaled_gap(v, top, scale) <= min_p)) return -INFINITY;
    return v;
  }
};

struct DrawNumbers {
  float scale, min_p;
  int64_t top_k, top_p;
  uint64_t seed, sequence;
  uint32_t step;
  int64_t mode_of;
  bool logprobs;
};

struct Drawn {
  int64_t token;
  draw::Status status;
  float logprob, tempered_logprob, margin;
};

// Memory that a team shares: largest and mass where there are several tiles; drawn and margins where mode_of > 1.
struct DrawScratch {
  uint32_t* largest;  // (tiles,) keys
  uint64_t* mass;     // (tiles,) prefix sums of the row level
  int32_t* drawn;     // (mode_of,)
  double* margins;    // (mode_of,)
};

__device__ __forceinline__ int tile_size(int64_t tile, int64_t V) {
  return V - tile * kTile < kTile ? static_cast<int>(V - tile * kTile) : kTile;
}

// The largest key of a row. Of the logits as given where `given`, else as the draw sees them.
template <int Warps> __device__ uint32_t row_most(const Team<Warps>& team, const Logits& x, bool given) {
  uint32_t most = 0;
  for (int64_t i = team.rank(); i < x.V; i += Team<Warps>::kThreads) {
    const uint32_t key = key_of(given ? x.x[i] : x.at(i));
    most = key > most ? key : most;
  }
  return team.most(most);
}

// U of a row, in units of the last level, at inverse temperature `scale`; for several tiles prefix sums in s.mass and
// m_t in s.largest. `top`: the row's largest logit.
template <int Warps>
__device__ uint64_t row_level(const Team<Warps>& team, const Logits& x, bool given, float top, float scale,
                              const DrawScratch& s) {
  const int64_t tiles = (x.V + kTile - 1) / kTile;
  team.sync();  // nobody reads what an earlier call has left
  for (int64_t t = team.warp(); t < tiles; t += Warps) {
    const int n = tile_size(t, x.V);
    float v[kTile / 32];
    uint32_t most = 0;
#pragma unroll
    for (int j = 0; j < kTile / 32; ++j) {
      const int i = j * 32 + team.lane();
      v[j] = i >= n ? -INFINITY : given ? x.x[t * kTile + i] : x.at(t * kTile + i);
      most = draw::order_key(v[j]) > most ? draw::order_key(v[j]) : most;
    }
    most = warp_max(most);
    const float largest = of_key(most);
    uint64_t sum = 0;
#pragma unroll
    for (int j = 0; j < kTile / 32; ++j)
      sum += v[j] > -INFINITY ? draw::exp_mass(draw::scaled_gap(v[j], largest, scale)) : 0;
    sum = Team<1>{nullptr}.sum(sum);
    if (tiles == 1) {
      if constexpr (Warps == 1) return sum;
    }
    if (team.lane() == 0) {
      s.largest[t] = most;
      s.mass[t] = tiles == 1 ? sum : draw::row_mass(sum, draw::scaled_gap(largest, top, scale));
    }
  }
  team.sync();
  uint64_t before = 0;
  for (int64_t first = 0; first < tiles; first += Team<Warps>::kThreads) {
    const int64_t t = first + team.rank();
    uint64_t total;
    const uint64_t through = team.through(t < tiles ? s.mass[t] : 0, total);
    if (t < tiles) s.mass[t] = before + through;
    before += total;
  }
  team.sync();
  return before;
}

// The masses of a tile in the lanes of a warp: lane l has ids l * each and the following, in order.
struct TileMasses {
  uint64_t w[kTile / 32], through, total;
  int each;

  __device__ void fill(const Logits& x, int64_t tile, uint32_t largest, float scale) {
    const int n = tile_size(tile, x.V), lane = Team<1>::lane();
    each = (n + 31) / 32;
    uint64_t own = 0;
#pragma unroll
    for (int j = 0; j < kTile / 32; ++j) {
      const int i = lane * each + j;
      const float v = j < each && i < n ? x.at(tile * kTile + i) : -INFINITY;
      w[j] = v > -INFINITY ? draw::exp_mass(draw::scaled_gap(v, of_key(largest), scale)) : 0;
      own += w[j];
    }
    through = Team<1>{nullptr}.through(own, total);
  }
  // First id whose prefix sum exceeds threshold, below total; the sums before it and through it.
  __device__ int find(uint64_t threshold, uint64_t& low, uint64_t& high) const {
    const int holder = __ffs(static_cast<int>(__ballot_sync(kAllLanes, through > threshold))) - 1;
    uint64_t sum = through, mass = 0;
#pragma unroll
    for (int j = 0; j < kTile / 32; ++j) sum -= w[j];
    int at = -1;
    low = 0;
#pragma unroll
    for (int j = 0; j < kTile / 32; ++j) {
      const bool here = at < 0 && sum + w[j] > threshold;
      at = here ? j : at;
      low = here ? sum : low;
      mass = here ? w[j] : mass;
      sum += w[j];
    }
    low = __shfl_sync(kAllLanes, low, holder);
    high = low + __shfl_sync(kAllLanes, mass, holder);
    return holder * each + __shfl_sync(kAllLanes, at, holder);
  }
};

// The first of the largest, and its distance to the runner-up in logits (+inf if alone).
template <int Warps>
__device__ void draw_greedy(const Team<Warps>& team, const Logits& x, float top, bool wants_margin, Drawn& out) {
  uint32_t first = 0;  // grows as the id falls, so that the largest is the first
  for (int64_t i = team.rank(); i < x.V; i += Team<Warps>::kThreads)
    if (x.at(i) == top && first == 0) first = ~static_cast<uint32_t>(i);
  out.token = static_cast<int64_t>(~team.most(first));
  if (!wants_margin) return;
  uint32_t rest = draw::order_key(-INFINITY);
  for (int64_t i = team.rank(); i < x.V; i += Team<Warps>::kThreads) {
    const uint32_t key = i == out.token ? 0 : draw::order_key(x.at(i));
    rest = key > rest ? key : rest;
  }
  out.margin = static_cast<float>(static_cast<double>(top) - static_cast<double>(of_key(team.most(rest))));
}

// The votes of a row's draws: the most frequent token, lowest id on ties, and the margin of the draw whose change could
// first overturn it. Compares each with each, which for votes of some hundred draws is less than clearing a count a
// token.
template <int Warps>
__device__ void count_votes(const Team<Warps>& team, const DrawNumbers& q, const DrawScratch& s, Drawn& out) {
  const auto votes_of = [&](int32_t token) {
    int64_t votes = 0;
    for (int64_t n = 0; n < q.mode_of; ++n) votes += s.drawn[n] == token ? 1 : 0;
    return votes;
  };
  uint32_t best = 0, lowest = 0, second = 0;
  for (int64_t n = team.rank(); n < q.mode_of; n += Team<Warps>::kThreads) {
    const auto votes = static_cast<uint32_t>(votes_of(s.drawn[n]));
    const auto place = ~static_cast<uint32_t>(s.drawn[n]);
    if (votes > best || (votes == best && place > lowest)) best = votes, lowest = place;
  }
  const uint32_t most = team.most(best);
  const uint32_t winner = ~team.most(best == most ? lowest : 0);
  out.token = static_cast<int64_t>(winner);
  if (!q.logprobs) return;
  for (int64_t n = team.rank(); n < q.mode_of; n += Team<Warps>::kThreads) {
    if (static_cast<uint32_t>(s.drawn[n]) == winner) continue;
    const auto votes = static_cast<uint32_t>(votes_of(s.drawn[n]));
    second = votes > second ? votes : second;
  }
  const int64_t flips = (static_cast<int64_t>(most) - team.most(second) + 1) / 2, rank = flips > 1 ? flips - 1 : 0;
  team.sync();
  for (int64_t n = team.rank(); n < q.mode_of; n += Team<Warps>::kThreads) {
    int64_t below = 0, through = 0;
    for (int64_t m = 0; m < q.mode_of; ++m) {
      below += s.margins[m] < s.margins[n] ? 1 : 0;
      through += s.margins[m] <= s.margins[n] ? 1 : 0;
    }
    if (below <= rank && rank < through) team.slots[0] = __builtin_bit_cast(uint64_t, s.margins[n]);  // all the same
  }
  team.sync();
  out.margin = static_cast<float>(__builtin_bit_cast(double, team.slots[0]));
  team.sync();
}

// All draws of a row whose level is known; each warp makes some of them.
template <int Warps>
__device__ void draw_votes(const Team<Warps>& team, const Logits& x, const DrawNumbers& q, float top, uint64_t total,
                           const DrawScratch& s, Drawn& out) {
  const int64_t tiles = (x.V + kTile - 1) / kTile;
  TileMasses masses;
  int64_t held = -1;
  for (int64_t n = q.mode_of == 1 ? 0 : team.warp(); n < q.mode_of; n += Warps) {
    const draw::RandomWords words = draw::random_words(q.seed, q.sequence, q.step, static_cast<uint32_t>(n));
    int64_t tile = 0;
    double margin = INFINITY;
    if (tiles > 1) {
      const uint64_t threshold = draw::mulhi64(words.tile, total);
      tile = draw::pick(s.mass, tiles, threshold);
      if (q.logprobs) margin = draw::boundary_distance(tile ? s.mass[tile - 1] : 0, s.mass[tile], threshold, total);
    }
    if (tile != held) masses.fill(x, tile, tiles > 1 ? s.largest[tile] : draw::order_key(top), x.scale);
    held = tile;
    uint64_t low, high;
    const uint64_t threshold = draw::mulhi64(words.token, masses.total);
    out.token = tile * kTile + masses.find(threshold, low, high);
    if (q.logprobs) {
      const double inside = draw::boundary_distance(low, high, threshold, masses.total);
      margin = inside < margin ? inside : margin;
      out.margin = static_cast<float>(margin);
    }
    if (q.mode_of > 1 && team.lane() == 0) {
      s.drawn[n] = static_cast<int32_t>(out.token);
      if (q.logprobs) s.margins[n] = margin;
    }
  }
  if (q.mode_of == 1) return;
  team.sync();
  count_votes(team, q, s, out);
}

__device__ __forceinline__ double log2_total(uint64_t total, int64_t V) {
  return log2(static_cast<double>(total)) - (V <= kTile ? draw::kTileUnitBits : draw::kRowUnitBits);
}

// What top_k and top_p leave: shortens x to the shortest prefix in (value, lowest id) order whose weights, each 1 for
// top_k, reach `target`, at least 1. Nothing where all weigh less.
template <int Warps> __device__ void shorten(const Team<Warps>& team, Logits& x, bool weighted, uint64_t target) {
  const auto weight = [&](float v) -> uint64_t {
    if (!(v > -INFINITY)) return 0;
    return weighted ? draw::exp_mass(draw::scaled_gap(v, x.top, x.scale)) >> draw::kTopPShift : 1;
  };
  const auto weight_from = [&](uint32_t least) {
    uint64_t sum = 0;
    for (int64_t i = team.rank(); i < x.V; i += Team<Warps>::kThreads) {
      const float v = x.at(i);
      sum += draw::order_key(v) >= least ? weight(v) : 0;
    }
    return team.sum(sum);
  };
  if (weight_from(0) < target) return;
  uint32_t key = 0;
  for (int bit = 31; bit >= 0; --bit)
    if (weight_from(key | 1u << bit) >= target) key |= 1u << bit;
  const uint64_t above = weight_from(key + 1), each = weight(of_key(key));
  uint64_t ties = (target - above + each - 1) / each;
  int64_t last = 0;
  for (int64_t first = 0; first < x.V && ties > 0; first += Team<Warps>::kThreads) {
    const int64_t i = first + team.rank();
    const bool tie = i < x.V && draw::order_key(x.at(i)) == key;
    uint64_t total;
    const uint64_t rank = team.through(tie ? 1 : 0, total);
    if (total >= ties) {
      const uint32_t found = team.most(tie && rank == ties ? static_cast<uint32_t>(i - first) : 0);
      last = first + found;
      ties = 0;
    } else {
      ties -= total;
    }
  }
  x.key = key, x.id = last;
}

// Owns:   the row's draw; every thread of the team gets it.
// Keeps:  the masses of one tile in registers, the row level of a row of several tiles in s.
// Moves:  a plain row of one tile is read twice, of several tiles also its largest first; filters read it 34 times
// each. Syncs:  the team, nothing beyond. Limits: V from 1 to 2^24; s and team.slots as they say.
template <int Warps>
__device__ Drawn draw_row(const Team<Warps>& team, Logits x, const DrawNumbers& q, const DrawScratch& s) {
  Drawn out{0, draw::kParameter, NAN, NAN, NAN};
  if (!draw::parameters_ok(q.scale, q.top_k, q.top_p, q.min_p)) return out;
  const bool greedy = q.scale == 0.0f;
  x.key = 0, x.id = 0, x.min_p = INFINITY, x.scale = greedy ? draw::kLog2E : q.scale, x.top = 0.0f;
  const float given_top = of_key(row_most(team, x, true));
  out.status = given_top != given_top ? draw::kNan : given_top == INFINITY ? draw::kInfinite : draw::kEmpty;
  if (!(given_top < INFINITY)) return out;
  const bool changed = x.allowed != nullptr || x.seen != nullptr;
  x.top = changed ? of_key(row_most(team, x, false)) : given_top;
  if (x.top == -INFINITY) return out;
  if (!(x.top < INFINITY)) {  // a penalty can do that
    out.status = x.top != x.top ? draw::kNan : draw::kInfinite;
    return out;
  }
  out.status = draw::kOk;
  uint64_t total = 0;
  if (greedy) {
    draw_greedy(team, x, x.top, q.logprobs, out);
  } else {
    if (q.top_k > 0 && q.top_k < x.V) shorten(team, x, false, static_cast<uint64_t>(q.top_k));
    if (q.top_p > 0) {
      uint64_t all = 0;
      for (int64_t i = team.rank(); i < x.V; i += Team<Warps>::kThreads) {
        const float v = x.at(i);
        all += v > -INFINITY ? draw::exp_mass(draw::scaled_gap(v, x.top, x.scale)) >> draw::kTopPShift : 0;
      }
      shorten(team, x, true, draw::top_p_target(static_cast<uint64_t>(q.top_p), team.sum(all)));
    }
    x.min_p = q.min_p;
    if (x.V > kTile || q.logprobs) total = row_level(team, x, false, x.top, x.scale, s);
    draw_votes(team, x, q, x.top, total, s, out);
  }
  if (!q.logprobs) return out;
  const double value = x.x[out.token], drawn = x.penalised(out.token);
  out.tempered_logprob =
      greedy
          ? 0.0f
          : static_cast<float>(draw::kLn2 * ((drawn - x.top) * static_cast<double>(x.scale) - log2_total(total, x.V)));
  total = row_level(team, x, true, given_top, draw::kLog2E, s);
  out.logprob = static_cast<float>(value - given_top - draw::kLn2 * log2_total(total, x.V));
  return out;
}

}  // namespace fr::cuda
