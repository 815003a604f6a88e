// Host code, no kernel: a network's weights as the kernels of the loop read them (generate_pack.h).
#include "generate_pack.h"

#include <stdexcept>

#include "portable.h"

namespace fr::cuda {
namespace {

uint32_t float_word(float x) { return __builtin_bit_cast(uint32_t, x); }
uint32_t nearest_bf16(float x) {
  const uint32_t bits = float_word(x);
  return x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

// Number i, counted along k, of a row of words that begin as 0.
void put(const NetworkSizes& n, uint32_t* words, int64_t i, float x) {
  words[i / n.per_word] |= n.per_word == 1 ? float_word(x) : nearest_bf16(x) << (16 * (i % 2));
}

// w (gates * rows, H) into words (of k, gates, width).
void pack_matrix(const NetworkSizes& n, const float* w, int64_t gates, int64_t rows, int64_t width, uint32_t* to) {
  for (int64_t g = 0; g < gates; ++g)
    for (int64_t u = 0; u < rows; ++u)
      for (int64_t k = 0; k < n.H; ++k)
        put(n, to + (k / n.per_word * gates + g) * width + u, k % n.per_word, w[(g * rows + u) * n.H + k]);
}

// w (gates * rows, H) into the fragments of one CTA, of its tiles of rows: (tiles, tiles of k, gates). Lane 4g + q of a
// fragment holds columns 4q to 4q + 3 of row g, then of row g + 8.
void pack_tiles(const NetworkSizes& n, const float* w, int64_t gates, int64_t rows, int64_t tiles, int64_t cta,
                uint32_t* to) {
  const int64_t k_tiles = ceil_of(n.H, kTileSide), begin = cta * tiles * kTileSide;
  for (int64_t g = 0; g < gates; ++g)
    for (int64_t u = begin; u < std::min(rows, begin + tiles * kTileSide); ++u)
      for (int64_t k = 0; k < n.H; ++k) {
        const int64_t tile = ((u - begin) / kTileSide * k_tiles + k / kTileSide) * gates + g;
        const int64_t lane = u % 8 * 4 + k % kTileSide / 4, half = u % kTileSide / 8;
        put(n, to + tile * fragment_words(n), (lane * 2 + half) * 4 + k % 4, w[(g * rows + u) * n.H + k]);
      }
}

void pack_ctas(const NetworkWeights& from, const NetworkSizes& n, int64_t cluster, uint32_t* to) {
  const ClusterSplit split = cluster_split(n, cluster);
  for (int64_t cta = 0; cta < cluster; ++cta, to += split.all * fragment_words(n)) {
    const auto place = [&](int64_t fragment) { return to + fragment * fragment_words(n); };
    for (int64_t l = 0; l < n.L; ++l) {
      if (l) pack_tiles(n, from.w_ih[l], n.gates, n.H, split.unit_tiles, cta, place(input_fragment(split, l)));
      pack_tiles(n, from.w_hh[l], n.gates, n.H, split.unit_tiles, cta, place(hidden_fragment(split, l)));
    }
    pack_tiles(n, from.head, 1, n.V, split.column_tiles, cta, place(split.head));
  }
}

void pack_floats(const NetworkWeights& from, const NetworkSizes& n, float* floats) {
  for (int64_t l = 0; l < n.L; ++l) {
    const float *b_ih = from.b_ih[l], *b_hh = from.b_hh[l];
    for (int64_t g = 0; g < n.gates; ++g)
      for (int64_t u = 0; u < n.H; ++u) {
        const float hidden = b_hh ? b_hh[g * n.H + u] : 0.0f;
        const bool apart = from.cell == Cell::gru && g == 2;  // r multiplies W_hn h + b_hn
        floats[bias_in(n, l) + g * units_of(n) + u] = (b_ih ? b_ih[g * n.H + u] : 0.0f) + (apart ? 0.0f : hidden);
        if (apart) floats[bias_q_in(n, l) + u] = hidden;
      }
  }
  if (from.head_bias) std::copy_n(from.head_bias, n.V, floats + head_bias_in(n));
}

}  // namespace

NetworkSizes sizes_of(Cell cell, int64_t L, int64_t H, int64_t V, Precision precision) {
  if (precision == Precision::int8)
    throw std::invalid_argument("the loop on the GPU has no int8 weights; use bfloat16");
  return {L, H, V, gates_of(cell), precision == Precision::float32 ? 1 : 2, gates_of(cell) > 1};
}

GenerateDevice generate_device(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
    if (error != cudaSuccess) throw std::runtime_error(std::string("generator: device: ") + cudaGetErrorString(error));
    return value;
  };
  GenerateDevice has{};
  has.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  // But for the kernels' own arrays and what CUDA keeps of a CTA's.
  has.shared_limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024;
  const bool has_clusters = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  has.at_once[0] = has.multiprocessors;
  for (int i = 1; i < 5 && has_clusters; ++i) has.at_once[i] = generate_clusters_at_once(1 << i, has.shared_limit);
  return has;
}

GenerateDevice device_with(int64_t shared_limit, int64_t cluster) {
  GenerateDevice has{cluster, shared_limit, {}};
  for (int i = 0; i < 5; ++i) has.at_once[i] = cluster >> i;
  return has;
}

int64_t largest_cluster(const GenerateDevice& has) {
  int64_t largest = 1;
  for (int i = 1; i < 5; ++i) largest = has.at_once[i] > 0 ? 1 << i : largest;
  return largest;
}

std::string refuse_network(const NetworkSizes& n, const GenerateDevice& has) {
  const GeneratePlan plan = plan_generate(n, 1, has);
  if (plan.fits) return "";
  const auto text = [](int64_t number) { return std::to_string(number); };
  return "a draw from V=" + text(n.V) + " tokens needs " + text(plan.needed_bytes) +
         " bytes in one multiprocessor; there are " + text(has.shared_limit) + " of shared memory";
}

std::string way_of(const NetworkSizes& n, const GenerateDevice& has) {
  const Way way = plan_generate(n, 1, has).way;
  return way == Way::cta ? "cta" : way == Way::cluster ? "cluster" : "steps";
}

std::vector<uint32_t> pack_blob(const NetworkWeights& from, Precision precision, int64_t cluster) {
  const NetworkSizes n = sizes_of(from.cell, from.L, from.H, from.V, precision);
  const int64_t floats = cluster ? cluster_floats_at(n, cluster) : floats_at(n);
  std::vector<uint32_t> blob(static_cast<size_t>(floats + table_in(n)));
  pack_floats(from, n, reinterpret_cast<float*>(blob.data() + floats));
  if (cluster) {
    pack_ctas(from, n, cluster, blob.data());
    return blob;
  }
  for (int64_t l = 0; l < n.L; ++l) {
    if (l) pack_matrix(n, from.w_ih[l], n.gates, n.H, units_of(n), blob.data() + input_at(n, l));
    pack_matrix(n, from.w_hh[l], n.gates, n.H, units_of(n), blob.data() + hidden_at(n, l));
  }
  pack_matrix(n, from.head, 1, n.V, columns_of(n), blob.data() + head_at(n));
  return blob;
}

std::vector<float> pack_first(const NetworkWeights& from, const NetworkSizes& n) {
  const int64_t units = units_of(n);
  std::vector<float> to(static_cast<size_t>(from.E * n.gates * units));
  for (int64_t g = 0; g < n.gates; ++g)
    for (int64_t u = 0; u < n.H; ++u)
      for (int64_t e = 0; e < from.E; ++e)
        to[static_cast<size_t>((e * n.gates + g) * units + u)] = from.w_ih[0][(g * n.H + u) * from.E + e];
  return to;
}

}  // namespace fr::cuda
