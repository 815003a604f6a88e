// What top_k, top_p and min_p leave of a row of logits, exactly as fastrnn/reference_sample.py defines it. Compiled
// once per instruction set, by each_isa.h; hence no include guard (it needs what draw.h defines first).

namespace fr {
namespace FR_ISA {

// What survives a selection in (value, lowest id) order: ids whose key is larger, and the first `ties` that equal it.
struct Cut {
  uint32_t key;
  int64_t ties;
};

// The element that would stand at index k of the n values in ascending order; the values change places.
template <class F> static F nth_smallest(F* values, int64_t n, int64_t k) {
  int64_t low = 0, high = n - 1;
  while (low < high) {
    const F pivot = values[low + (high - low) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (values[i] < pivot) ++i;
      while (pivot < values[j]) --j;
      if (i > j) break;
      const F swapped = values[i];
      values[i++] = values[j];
      values[j--] = swapped;
    }
    if (k <= j)
      high = j;
    else if (k >= i)
      low = i;
    else
      return pivot;
  }
  return values[k];
}

// The sum of the weights (each 1 where there are none) of the keys that are at least `bound`.
static FR_INLINE uint64_t weight_from(const uint32_t* keys, const uint64_t* weights, int64_t n, uint32_t bound) {
  uint64_t sum = 0;
#if FR_VEC_BYTES == 64
  Words low = no_words(), high = no_words();
  const Words least = _mm512_set1_epi32(static_cast<int>(bound));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 there = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1u << (n - i)) - 1);
    const __mmask16 taken = _mm512_mask_cmpge_epu32_mask(there, _mm512_maskz_loadu_epi32(there, keys + i), least);
    if (weights == nullptr) {
      sum += static_cast<uint64_t>(__builtin_popcount(taken));
      continue;
    }
    low = _mm512_add_epi64(low, _mm512_maskz_loadu_epi64(static_cast<__mmask8>(taken), weights + i));
    high = _mm512_add_epi64(high, _mm512_maskz_loadu_epi64(static_cast<__mmask8>(taken >> 8), weights + i + 8));
  }
  if (weights != nullptr) sum = sum_of(_mm512_add_epi64(low, high));
#else
  for (int64_t i = 0; i < n; ++i) sum += keys[i] >= bound ? (weights == nullptr ? 1 : weights[i]) : 0;
#endif
  return sum;
}

// The selection of `select` on few keys: its key bit by bit, each from a sum over all of them.
static Cut select_few(const uint32_t* keys, const uint64_t* weights, int64_t n, uint64_t target) {
  if (weight_from(keys, weights, n, 0) < target) return {0, n};
  Cut cut{0, 0};
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t key = cut.key | 1u << bit;
    if (weight_from(keys, weights, n, key) >= target) cut.key = key;
  }
  const uint64_t above = cut.key == ~0u ? 0 : weight_from(keys, weights, n, cut.key + 1);
  int64_t equal = 0;
  while (keys[equal] != cut.key) ++equal;
  const uint64_t weight = weights ? weights[equal] : 1;
  cut.ties = static_cast<int64_t>((target - above + weight - 1) / weight);
  return cut;
}

// The shortest prefix of n candidates, largest key first, whose weights reach `target`, at least 1; equal keys have
// equal weights. A radix selection, O(n). Without weights each counts 1. The candidates are used up.
static Cut select(uint32_t* keys, uint64_t* weights, int64_t n, uint64_t target) {
  constexpr int64_t few = 1024;
  if (n <= few) return select_few(keys, weights, n, target);
  uint64_t histogram[2048];
  Cut cut{0, 0};
  uint64_t above = 0;                        // weight of all larger keys
  const int digit_bits = n > 4096 ? 11 : 8;  // clearing and reading the histogram is most of the work on few keys
  for (int shift = 32; shift > 0;) {
    const int width = digit_bits < shift ? digit_bits : shift;
    shift -= width;
    const uint32_t digits = (1u << width) - 1;
    __builtin_memset(histogram, 0, (digits + 1) * sizeof histogram[0]);
    for (int64_t i = 0; i < n; ++i) histogram[(keys[i] >> shift) & digits] += weights ? weights[i] : 1;
    int64_t bin = digits;
    while (bin >= 0 && above + histogram[bin] < target) above += histogram[bin--];
    if (bin < 0) return {0, n};  // all of them weigh less: key 0 is below every float's, so all survive
    cut.key |= static_cast<uint32_t>(bin) << shift;
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (((keys[i] >> shift) & digits) != static_cast<uint32_t>(bin)) continue;
      keys[left] = keys[i];
      if (weights) weights[left] = weights[i];
      ++left;
    }
    n = left;
  }
  const uint64_t weight = weights ? weights[0] : 1;
  cut.ties = static_cast<int64_t>((target - above + weight - 1) / weight);
  return cut;
}

// A lower bound of the top_k-th largest of x, -inf where none is cheap: the top_k-th largest of the maxima of 16 groups
// a tile (group g: ids 256 t + g, + 16, ..): top_k logits at least are as large.
static float top_k_bound(const float* x, int64_t V, int64_t top_k, DrawScratch& s) {
  constexpr int64_t groups_a_tile = 16;
  const int64_t groups = groups_a_tile * (V / kTile);  // a last, shorter tile may only raise the bound
  if (top_k > groups) return -INFINITY;
  float* most = s.groups.get();
  for (int64_t t = 0; t < V / kTile; ++t, most += groups_a_tile) {
    const float* tile = x + t * kTile;
    for (int64_t g = 0; g < groups_a_tile; ++g) most[g] = tile[g];
    for (int64_t i = groups_a_tile; i < kTile; i += groups_a_tile)
      for (int64_t g = 0; g < groups_a_tile; ++g) most[g] = tile[i + g] > most[g] ? tile[i + g] : most[g];
  }
  return nth_smallest(s.groups.get(), groups, groups - top_k);
}

// Lists the ids and values of x that are at least `bound` and not -inf; returns how many there are.
static int64_t list_candidates(const float* x, int64_t V, float bound, DrawScratch& s) {
  int32_t* ids = s.ids.get();
  float* values = s.values.get();
  int64_t count = 0;
  for (int64_t t = 0; t < s.tiles; ++t) {
    if (s.largest.get()[t] < bound) continue;
    const int64_t first = t * kTile, end = first + tile_size(t, V);
#if FR_VEC_BYTES == 64
    const Words lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = first; i < end; i += kBlock) {
      const Floats v = load_block(x + i, end - i);
      const __mmask16 taken =
          _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, splat(bound), _CMP_GE_OQ), v, splat(-INFINITY), _CMP_GT_OQ);
      _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(taken, v));
      const Words id = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(i)), lanes);
      _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(taken, id));
      count += __builtin_popcount(taken);
    }
#else
    for (int64_t i = first; i < end; ++i) {
      ids[count] = static_cast<int32_t>(i);
      values[count] = x[i];
      count += x[i] >= bound && x[i] > -INFINITY ? 1 : 0;
    }
#endif
  }
  return count;
}

// Keeps of the `count` listed candidates what survives the cut; returns how many there are.
static int64_t keep(Cut cut, int64_t count, DrawScratch& s) {
  int32_t* ids = s.ids.get();
  float* values = s.values.get();
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = draw::order_key(values[i]);
    const bool tie = key == cut.key && cut.ties > 0;
    cut.ties -= tie ? 1 : 0;
    ids[kept] = ids[i];
    values[kept] = values[i];
    kept += key > cut.key || tie ? 1 : 0;
  }
  return kept;
}

// The masses of the listed candidates that top_p counts, into s.weights; returns their sum.
static uint64_t list_weights(int64_t count, float largest, float scale, DrawScratch& s) {
  uint64_t total = 0, *weights = s.weights.get();
  list_masses(s.values.get(), count, largest, scale, weights);
  for (int64_t i = 0; i < count; ++i) total += weights[i] >>= draw::kTopPShift;
  return total;
}

// Sets to -inf in s.x what top_k, top_p and min_p remove; `largest` is its largest logit and s.largest its m_t.
static void filter_row(const Sample& a, int64_t row, float largest, float scale, DrawScratch& s) {
  const int64_t V = a.V, top_k = a.top_k[row];
  float* x = s.x.get();
  const float bound = top_k > 0 ? top_k_bound(x, V, top_k, s) : -INFINITY;
  int64_t count = list_candidates(x, V, bound, s);
  if (top_k > 0 && top_k < count) {
    order_keys(s.values.get(), count, s.keys.get());
    count = keep(select(s.keys.get(), nullptr, count, static_cast<uint64_t>(top_k)), count, s);
  }
  if (a.top_p[row] > 0) {
    order_keys(s.values.get(), count, s.keys.get());
    const uint64_t target =
        draw::top_p_target(static_cast<uint64_t>(a.top_p[row]), list_weights(count, largest, scale, s));
    count = keep(select(s.keys.get(), s.weights.get(), count, target), count, s);
  }
  for (int64_t i = 0; i < V; i += Vec<float>::width) Vec<float>(-INFINITY).store(x + i, V - i);
  for (int64_t i = 0; i < count; ++i) {
    const float value = s.values.get()[i];
    if (-draw::scaled_gap(value, largest, scale) <= a.min_p[row]) x[s.ids.get()[i]] = value;
  }
}

// The logits that the mask (null: all) allows, -inf in place of the others.
static void copy_allowed(const float* logits, const bool* allowed, int64_t V, float* x) {
  constexpr int64_t width = Vec<float>::width;
  for (int64_t i = 0; i < V; i += width) Vec<float>::load(logits + i, V - i).store(x + i, V - i);
  for (int64_t i = 0; i < V && allowed != nullptr; ++i) x[i] = allowed[i] ? x[i] : -INFINITY;
}

}  // namespace FR_ISA
}  // namespace fr
