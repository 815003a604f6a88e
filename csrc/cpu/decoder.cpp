// Packs a network: which kernels, which layout, what is folded into the first layer's table.
#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include "simd.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fr {
namespace {

constexpr int64_t kLine = 64, kHugePage = 2 << 20;
constexpr int64_t kReadAhead = 2048;  // kernels ask for weights a little ahead of where they are
// A table of products beyond this is not made: an id's embedding is multiplied at each step instead.
constexpr int64_t kTableBytes = 256 << 20;
// From here on the logits of a lane's rows leave the cache before they are drawn from.
constexpr int64_t kLargeVocabulary = 2048;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t scale_bytes(const PackedNetwork& net) { return net.scaled ? static_cast<int64_t>(sizeof(float)) : 0; }

// The vectors of a panel of a linear map with `columns` vectors of columns: the fewest empty ones, then the most.
int64_t linear_vectors(int64_t columns) {
  int64_t best = 1;
  for (int64_t v = 2; v <= 4; ++v)
    if (round_up(columns, v) <= round_up(columns, best)) best = v;
  return best;
}

// Refuses what int8 weights and activations cannot stand for.
void check_int8(const NetworkWeights& from) {
  constexpr int64_t widest = INT32_MAX / (127 * 128);  // a sum is one int32; a state that is NaN may be -128
  const int64_t most = std::max(from.H, from.inputs ? from.E : 0);
  if (most > widest)
    throw std::invalid_argument("int8 sums up to " + std::to_string(widest) + " units, here " + std::to_string(most) +
                                "; use bfloat16");
  const auto check = [](const float* w, int64_t n) {
    for (int64_t i = 0; w && i < n; ++i)
      if (!std::isfinite(w[i])) throw std::invalid_argument("int8 needs weights without NaN and infinity");
  };
  const int64_t rows = gates_of(from.cell) * from.H;
  for (size_t l = 0; l < from.w_ih.size(); ++l) {
    check(from.w_ih[l], rows * (l ? from.H : from.E)), check(from.w_hh[l], rows * from.H);
    check(from.b_ih[l], rows), check(from.b_hh[l], rows);
  }
  check(from.inputs, from.V * from.E), check(from.head, from.V * from.H), check(from.head_bias, from.V);
}

Panels linear_panels(const DecoderKernels& k, const float* w, int64_t rows, int64_t K, int64_t vectors) {
  Panels m;
  m.K = round_up(K, k.k_multiple);
  m.vectors = vectors;
  m.count = (rows + vectors * k.width - 1) / (vectors * k.width);
  k.pack(w, rows, K, 1, m);
  return m;
}

Panels cell_panels(const PackedNetwork& net, const float* w, int64_t K) {
  const DecoderKernels& k = *net.kernels;
  const int64_t gates = gates_of(net.cell);
  if (gates == 1) return linear_panels(k, w, net.H, K, 4);
  Panels m;
  m.K = round_up(K, k.k_multiple);
  m.vectors = gates;
  m.count = net.padded / net.units;
  k.pack(w, gates * net.H, K, gates, m);
  return m;
}

// Where the products of gate g of unit u stand in a row of a layer's products.
int64_t product_at(const PackedNetwork& net, int64_t g, int64_t u) {
  const int64_t gates = gates_of(net.cell), W = net.kernels->width;
  return gates == 1 ? u : (u / W * gates + g) * W + u % W;
}

void pack_bias(const PackedNetwork& net, const float* b_ih, const float* b_hh, PackedLayer& layer) {
  const int64_t gates = gates_of(net.cell);
  layer.bias = Memory(net.padded * gates * 4);
  layer.bias_q = Memory(net.padded * 4);
  for (int64_t g = 0; g < gates; ++g)
    for (int64_t u = 0; u < net.H; ++u) {
      const float hidden = b_hh ? b_hh[g * net.H + u] : 0.0f;
      const bool apart = net.cell == Cell::gru && g == 2;  // r multiplies W_hn h + b_hn
      layer.bias.as<float>()[product_at(net, g, u)] = (b_ih ? b_ih[g * net.H + u] : 0.0f) + (apart ? 0.0f : hidden);
      if (apart) layer.bias_q.as<float>()[u] = hidden;
    }
}

// The table of one-hot input: columns of w_ih (G*H, V) and the bias.
void one_hot_table(const NetworkWeights& from, PackedNetwork& net) {
  const int64_t gates = gates_of(net.cell), products = net.padded * gates;
  const float* bias = net.layers[0].bias.as<float>();
  for (int64_t g = 0; g < gates; ++g)
    for (int64_t u = 0; u < net.H; ++u) {
      const int64_t at = product_at(net, g, u);
      const float* column = from.w_ih[0] + (g * net.H + u) * net.V;
      for (int64_t v = 0; v < net.V; ++v) net.table.as<float>()[v * products + at] = bias[at] + column[v];
    }
}

// The table of any other input: inputs w_ih^T and the bias, in float32 whatever the network's precision.
void product_table(const NetworkWeights& from, PackedNetwork& net) {
  const DecoderKernels& k = decoder_kernels(Precision::float32);
  PackedNetwork plain{};
  plain.cell = net.cell, plain.H = net.H, plain.padded = net.padded, plain.units = net.units, plain.kernels = &k;
  const Panels w = cell_panels(plain, from.w_ih[0], from.E);
  const int64_t products = net.padded * gates_of(net.cell);
  LinearJob job{};
  job.network = &plain, job.panels = &w, job.rows = net.V, job.a = from.inputs, job.row = from.E * 4;
  job.bias = net.layers[0].bias.as<float>(), job.out = net.table.as<float>(), job.out_row = products;
  k.linear(job, {0, 1});
}

// What layer 0 reads: a table of V rows where an id's products are worth keeping, else activations for a product.
void pack_inputs(const NetworkWeights& from, PackedNetwork& net) {
  const int64_t bytes = net.V * net.padded * gates_of(net.cell) * 4;
  const bool one_hot = from.inputs == nullptr;
  if (one_hot || bytes <= kTableBytes) {
    net.table = Memory(bytes);
    one_hot ? one_hot_table(from, net) : product_table(from, net);
    return;
  }
  const DecoderKernels& k = *net.kernels;
  net.input_row = round_up(round_up(from.E, k.k_multiple) * k.activation + scale_bytes(net), kLine);
  net.inputs = Memory(net.V * net.input_row);
  for (int64_t v = 0; v < net.V; ++v)
    k.to_activations(from.inputs + v * from.E, from.E, net.inputs.as<char>() + v * net.input_row, net.input_row);
  net.layers[0].input = cell_panels(net, from.w_ih[0], from.E);
}

// Moves what a step reads of every layer into one piece of memory, in the order in which it is read: on one huge page,
// or a few, it fills a core's L2 evenly, while what lies on small pages of the system's choice evicts itself long
// before the cache is full.
void lie_together(PackedNetwork& net) {
  std::vector<Memory*> parts;
  const auto add = [&](Panels& m) { parts.insert(parts.end(), {&m.weights, &m.scale, &m.start}); };
  for (PackedLayer& layer : net.layers)
    add(layer.input), add(layer.hidden), parts.insert(parts.end(), {&layer.bias, &layer.bias_q});
  add(net.head), parts.push_back(&net.head_bias);
  int64_t bytes = 0;
  for (const Memory* part : parts) bytes += round_up(part->bytes(), kLine);
  const Memory all(bytes >= kHugePage / 4 ? std::max(bytes, kHugePage - kReadAhead) : bytes);
  for (int64_t at = 0; Memory* part : parts) {
    if (!part->get()) continue;
    std::memcpy(all.as<char>() + at, part->get(), static_cast<size_t>(part->bytes()));
    const int64_t size = part->bytes();
    *part = Memory(all, at);
    at += round_up(size, kLine);
  }
}

// The panels of `columns` columns each, which whole panels fill, as matrices of their own in the memory of m.
std::vector<Panels> sliced(const PackedNetwork& net, const Panels& m, int64_t panel_bytes, int64_t columns) {
  const int64_t width = m.vectors * net.kernels->width, each = columns / width;
  std::vector<Panels> slices;
  for (int64_t p = 0; p < m.count; p += each) {
    Panels& slice = slices.emplace_back();
    slice.K = m.K, slice.vectors = m.vectors, slice.count = std::min(each, m.count - p);
    slice.weights = Memory(m.weights, p * panel_bytes);
    if (m.scale.get()) slice.scale = Memory(m.scale, p * width * static_cast<int64_t>(sizeof(float)));
    if (m.start.get()) slice.start = Memory(m.start, p * width * static_cast<int64_t>(sizeof(int32_t)));
  }
  return slices;
}

}  // namespace

Memory::Memory(int64_t bytes) : bytes_(bytes) {
  const int64_t align = bytes >= kHugePage ? kHugePage : kLine, size = round_up(bytes + kReadAhead, align);
  void* p = std::aligned_alloc(static_cast<size_t>(align), static_cast<size_t>(size));
  if (!p) throw std::bad_alloc();
#if defined(__linux__)
  if (align == kHugePage) madvise(p, static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
  std::memset(p, 0, static_cast<size_t>(size));
  data_ = std::shared_ptr<void>(p, std::free);
}

const DecoderKernels& decoder_kernels(Precision precision) {
#if FR_KNOWS_AMX
  if (precision != Precision::float32 && current_isa() == Isa::amx) return tile_decoder(precision);
#endif
  return precision == Precision::int8 ? int8_decoder() : vector_decoder(precision);
}

std::unique_ptr<PackedNetwork> pack_network(const NetworkWeights& from, Precision precision) {
  if (precision == Precision::int8) check_int8(from);
  auto net = std::make_unique<PackedNetwork>();
  const DecoderKernels& k = decoder_kernels(precision);
  net->cell = from.cell, net->precision = precision, net->kernels = &k;
  net->scaled = precision == Precision::int8;
  net->L = from.L, net->H = from.H, net->V = from.V;
  const bool plain = gates_of(from.cell) == 1;
  net->units = plain ? 4 * k.width : k.width;
  net->padded = round_up(from.H, net->units);
  const int64_t activations = std::max(net->padded, round_up(from.H, k.k_multiple)) * k.activation;
  net->row = (round_up(activations + scale_bytes(*net), kLine) / kLine | 1) * kLine;
  net->carried = plain ? 0 : net->padded;
  net->layers.resize(static_cast<size_t>(from.L));
  for (int64_t l = 0; l < from.L; ++l) {
    PackedLayer& layer = net->layers[static_cast<size_t>(l)];
    pack_bias(*net, from.b_ih[l], from.b_hh[l], layer);
    layer.hidden = cell_panels(*net, from.w_hh[l], from.H);
    if (l) layer.input = cell_panels(*net, from.w_ih[l], from.H);
    net->weight_bytes += layer.hidden.weights.bytes() + layer.input.weights.bytes();
  }
  pack_inputs(from, *net);
  const bool large = from.V >= kLargeVocabulary;
  const int64_t vectors = large ? k.head_vectors : linear_vectors((from.V + k.width - 1) / k.width);
  net->head = linear_panels(k, from.head, from.V, from.H, vectors);
  net->head_columns = net->head.count * net->head.vectors * k.width;
  net->head_bias = Memory(net->head_columns * 4);
  if (from.head_bias) std::memcpy(net->head_bias.get(), from.head_bias, static_cast<size_t>(from.V) * 4);
  net->weight_bytes += net->head.weights.bytes();
  const int64_t panel_bytes = net->head.weights.bytes() / net->head.count;
  lie_together(*net);
  if (large) {
    net->head_tiles = sliced(*net, net->head, panel_bytes, kDrawTile);
    net->head_groups = sliced(*net, net->head, panel_bytes, kDrawGroup);
  }
  return net;
}

}  // namespace fr
