// The generation loop of a cluster (csrc/cuda/generate_cluster.cu), run on the CPU: the tokens of the loop of csrc/cpu,
// whose sums are in another order; and the same bits however the steps are sliced, whatever runs beside a row, how many
// rows a CTA multiplies at a time, and how many of its weights it keeps.
#include <algorithm>
#include <bit>

#include "../../csrc/cpu/row_states.h"
#include "../../csrc/cpu/session.h"
#include "generation_oracle.h"

using namespace fr::cuda;
using fr::Precision;

namespace {

constexpr int64_t kAll = 226 << 10;

// A device whose clusters are of `cluster` CTAs, two of them at once.
GenerateDevice device_of(int64_t cluster, int64_t shared_limit) {
  GenerateDevice has{132, shared_limit, {2, 2, 2, 2, 2}};
  has.first = Way::cluster, has.wanted_cluster = cluster;
  return has;
}

// How a session runs: `kept` of the fragments of a CTA's weights of 100 stay on the chip.
struct Course {
  int64_t rows, steps, feed, kept;
};

Results run_way(const Model& model, Precision precision, int64_t cluster, const Requests& requests, const Course& way) {
  const auto& w = model.weights;
  const NetworkSizes n = sizes_of(w.cell, w.L, w.H, w.V, precision);
  const int64_t tiles = way.rows > 4 * kTileRows ? kMostRowTiles : 1, all = cluster_split(n, cluster).all;
  const int64_t front = cluster_layout(n, cluster, tiles * kTileRows, way.kept == 100 || w.V <= 256).weights;
  const int64_t limit = front + all * way.kept / 100 * 4 * fragment_words(n);
  const std::shared_ptr<fr::cuda::PackedNetwork> net = pack_network(w, precision, 0, device_of(cluster, limit));
  const GeneratePlan plan = plan_generate(n, way.rows, net->has);
  CHECK(plan.way == Way::cluster && plan.cluster == cluster && plan.block_rows == tiles * kTileRows &&
        plan.rows == way.rows);
  CHECK(way.kept == 100 ? plan.resident == all : plan.resident < all);
  fr::cuda::Session session(net, way.rows, nullptr);
  return run(session, requests, way.steps, static_cast<size_t>(way.feed));
}

void test_network(Cell cell, Precision precision, const Shape& shape, int64_t cluster, bool all_ways) {
  at() = std::string(kCells[static_cast<int>(cell)]) + " " + kPrecisions[static_cast<int>(precision)] +
         " L=" + std::to_string(shape.L) + " H=" + std::to_string(shape.H) + " V=" + std::to_string(shape.V) +
         " cluster=" + std::to_string(cluster);
  const Model model(cell, shape.L, shape.H, shape.V, shape.E, 11);
  const Requests requests = short_requests(8, shape.V);
  fr::Session reference(model.pack(precision), 5, false, 1);
  const Results expected = run(reference, requests, 0, requests.size());
  cuda_on_cpu::options.order = cuda_on_cpu::Order::shuffled;
  const Results base = run_way(model, precision, cluster, requests, {5, 3, 8, 100});
  check_close(model, requests, expected, base);
  if (!all_ways) return;
  cuda_on_cpu::options.order = cuda_on_cpu::Order::backward;
  check_same(base, run_way(model, precision, cluster, requests, {1, 0, 50, 100}));
  check_same(base, run_way(model, precision, cluster, requests, {12, 1, 50, 60}));
  check_same(base, run_way(model, precision, cluster, requests, {40, 0, 50, 40}));
}

// A state that was read, and requests that start from it.
void test_reading(Cell cell, Precision precision) {
  at() = "reading";
  const Model model(cell, 2, 20, 21, 5, 12);
  const std::shared_ptr<fr::cuda::PackedNetwork> net = pack_network(model.weights, precision, 0, device_of(2, kAll));
  FromState requests(*net, 4);
  for (auto* all : {&requests.ids, &requests.state})
    for (auto& q : *all) q.max_new_tokens = std::min<int64_t>(q.max_new_tokens, 3);
  fr::cuda::Session one(net, 4, nullptr), other(net, 3, nullptr);
  check_same(run(one, requests.ids, 0, 50), run(other, requests.state, 3, 50));
}

void check_plan(const NetworkSizes& n, int64_t rows, const GenerateDevice& has, const GeneratePlan& p) {
  const ClusterSplit split = cluster_split(n, p.cluster);
  const ClusterLayout s = cluster_layout(n, p.cluster, p.block_rows, p.logits_on_chip);
  CHECK(split.unit_tiles * p.cluster * kTileSide >= n.H && split.column_tiles * p.cluster * kTileSide >= n.V);
  CHECK(split.unit_parts * split.unit_tiles <= kClusterWarps);  // a tile a warp
  CHECK(split.column_parts == 1 || split.column_parts * split.column_tiles <= kClusterWarps);
  CHECK(s.stride >= split.k_tiles * kTileSide && p.shared_bytes <= has.shared_limit);
  const int64_t streamed = (split.all - p.resident) * 4 * fragment_words(n);
  CHECK(p.resident >= 0 && streamed <= kStreamedBytes * p.block_rows / kTileRows);
  CHECK(s.weights + p.resident * 4 * fragment_words(n) == p.shared_bytes);
  CHECK(p.rows >= 1 && p.rows <= rows && p.blocks * p.block_rows >= p.rows * p.cluster);
  CHECK(p.blocks / p.cluster <= has.at_once[std::countr_zero(static_cast<uint64_t>(p.cluster))]);
  const int64_t parts[] = {s.h,         s.carry,        s.partial,    s.logits,       s.rows,       s.orders,
                           s.draw.mass, s.draw.margins, s.draw.slots, s.draw.largest, s.draw.drawn, s.weights};
  for (size_t i = 1; i < std::size(parts); ++i) CHECK(parts[i] % 16 == 0 && parts[i] >= parts[i - 1]);
}

// Over all shapes: what is said to fit does, in the smallest cluster; what runs a network does not depend on the rows.
void test_plans() {
  const GenerateDevice devices[] = {{132, kAll, {132, 66, 33, 16, 7}},
                                    {132, kAll, {132, 66, 33, 16, 0}},
                                    {108, 162 << 10, {108, 0, 0, 0, 0}},
                                    {84, 98 << 10, {84, 42, 21, 10, 0}}};
  int64_t fit = 0, beyond = 0;
  for (const auto& has : devices)
    for (const int64_t gates : {1, 3, 4})
      for (const int64_t per_word : {1, 2})
        for (const int64_t L : {1, 2, 4})
          for (int64_t H = 1; H < 2200; H += H < 300 ? 13 : 97)
            for (const int64_t V : {1, 65, 300, 10000}) {
              const NetworkSizes n{L, H, V, gates, per_word, gates > 1};
              const GeneratePlan alone = plan_generate(n, 1, has);
              CHECK(plan_one(n, 1, has).fits == (alone.way == Way::cta));
              CHECK(plan_cluster(n, 1, has).fits || alone.way != Way::cluster);
              for (const int64_t rows : {1, 8, 9, 500, 1 << 20}) {
                const GeneratePlan p = plan_generate(n, rows, has);
                CHECK(p.fits && p.way == alone.way && p.cluster == alone.cluster);
                p.way == Way::steps ? ++beyond : ++fit;
                if (p.way == Way::cluster) check_plan(n, rows, has, p);
              }
            }
  CHECK(fit > 1000 && beyond > 1000);
}

// The networks that the README and the benchmarks speak of, on an H100.
void test_what_fits() {
  const GenerateDevice has{132, kAll, {132, 66, 33, 16, 7}};
  const auto cluster = [&](Cell cell, int64_t L, int64_t H, int64_t V, Precision precision) -> int64_t {
    const GeneratePlan p = plan_generate(sizes_of(cell, L, H, V, precision), 1, has);
    return p.way == Way::steps ? -1 : p.cluster;
  };
  CHECK(cluster(Cell::gru, 1, 32, 64, Precision::float32) == 0);
  CHECK(cluster(Cell::lstm, 4, 256, 65, Precision::bfloat16) == 16);
  CHECK(cluster(Cell::lstm, 4, 256, 65, Precision::float32) == -1);
  CHECK(cluster(Cell::gru, 2, 256, 65, Precision::bfloat16) == 8);
  CHECK(cluster(Cell::lstm, 1, 128, 10000, Precision::bfloat16) == 16);
  CHECK(cluster(Cell::lstm, 1, 128, 65, Precision::float32) == 2);
  CHECK(cluster(Cell::lstm, 3, 512, 128, Precision::bfloat16) == -1);
  for (const int64_t rows : {1, 1 << 20}) {
    const NetworkSizes n = sizes_of(Cell::lstm, 4, 256, 65, Precision::bfloat16);
    const GeneratePlan p = plan_generate(n, rows, has);
    const int64_t streamed = (cluster_split(n, 16).all - p.resident) * 4 * fragment_words(n);
    std::printf(
        "LSTM 4x256 V=65: %lld rows at once, %lld a cluster of 16 CTAs, each with %lld bytes of shared memory and "
        "%lld read again each step\n",
        static_cast<long long>(p.rows), static_cast<long long>(p.block_rows), static_cast<long long>(p.shared_bytes),
        static_cast<long long>(streamed));
  }
}

}  // namespace

int main(int, char** arguments) {
  const bool few = arguments[1] != nullptr;  // for a sanitizer that is slow
  fr::set_cpu_isa("avx2");
  if (!few) test_plans();
  test_what_fits();
  const Shape odd{2, 33, 70, 3}, small{2, 20, 21, 3}, words{1, 20, 300, 0}, deep{3, 7, 5, 2}, wide{1, 70, 150, 0};
  for (const Precision precision : {Precision::float32, Precision::bfloat16}) {
    const bool half = precision == Precision::bfloat16;
    test_network(Cell::gru, precision, small, few ? 2 : 4, !few && !half);
    if (few && half) test_network(Cell::lstm, precision, words, 2, false);
    if (few) continue;
    test_network(Cell::lstm, precision, odd, 2, half);
    test_network(Cell::rnn_tanh, precision, words, 1, !half);
    test_network(Cell::lstm, precision, words, 2, half);
    test_network(Cell::lstm, precision, deep, 1, false);
    test_network(Cell::rnn_relu, precision, wide, 1, false);
    test_reading(half ? Cell::lstm : Cell::gru, precision);
  }
  std::printf("generation in a cluster holds\n");
}
