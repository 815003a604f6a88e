// The generation loop of step kernels (csrc/cuda/generate_steps.cu), run on the CPU: the tokens of the loop of
// csrc/cpu, whose sums are in another order; and the same bits however the steps are sliced and whether a graph replays
// them, whatever runs beside a row, how many rows a warp multiplies at a time, and whether warps share a tile.
#include <array>
#include <stdexcept>

#include "../../csrc/cpu/row_states.h"
#include "../../csrc/cpu/session.h"
#include "generation_oracle.h"

using namespace fr::cuda;
using fr::Precision;

namespace {

constexpr int64_t kAll = 226 << 10;

// A device that takes step kernels whatever else would suit; with few multiprocessors warps share no tiles.
GenerateDevice device_of(int64_t multiprocessors) {
  GenerateDevice has{multiprocessors, kAll, {}};
  has.first = Way::steps;
  return has;
}
constexpr int64_t kH100 = 132, kTiny = 1;

// How a session runs.
struct Course {
  int64_t rows, steps, feed, multiprocessors;
};

Results run_course(const Model& model, Precision precision, const Requests& requests, const Course& course) {
  const std::shared_ptr<fr::cuda::PackedNetwork> net =
      pack_network(model.weights, precision, 0, device_of(course.multiprocessors));
  const GeneratePlan plan = plan_generate(net->sizes, course.rows, net->has);
  const bool many = course.rows > 2 * kTileRows, half = precision == Precision::bfloat16;
  CHECK(plan.way == Way::steps && plan.rows == course.rows);
  CHECK(plan.row_tiles == (many && half ? kMostRowTiles : 1));
  CHECK(plan.whole_units == (many && course.multiprocessors == kTiny) && plan.whole_columns == plan.whole_units);
  fr::cuda::Session session(net, course.rows, nullptr);
  return run(session, requests, course.steps, static_cast<size_t>(course.feed));
}

void test_network(Cell cell, Precision precision, const Shape& shape, bool all_courses) {
  at() = std::string(kCells[static_cast<int>(cell)]) + " " + kPrecisions[static_cast<int>(precision)] +
         " L=" + std::to_string(shape.L) + " H=" + std::to_string(shape.H) + " V=" + std::to_string(shape.V);
  const Model model(cell, shape.L, shape.H, shape.V, shape.E, 11);
  const Requests requests = short_requests(shape.H > 100 ? 4 : 8, shape.V);  // the wide ones are costly
  fr::Session reference(model.pack(precision), 5, false, 1);
  const Results expected = run(reference, requests, 0, requests.size());
  cuda_on_cpu::options.order = cuda_on_cpu::Order::shuffled;
  const Results base = run_course(model, precision, requests, {5, 3, 8, kH100});
  check_close(model, requests, expected, base);
  if (!all_courses) return;
  cuda_on_cpu::options.order = cuda_on_cpu::Order::backward;
  check_same(base, run_course(model, precision, requests, {1, 11, 50, kH100}));
  const bool costly = shape.V > 256;  // a CTA a row
  check_same(base, run_course(model, precision, requests, {costly ? 17 : 20, 1, 50, kH100}));
  check_same(base, run_course(model, precision, requests, {costly ? 17 : 40, 5, 50, kTiny}));
}

// A state that was read, and requests that start from it.
void test_reading(Cell cell, Precision precision) {
  at() = "reading";
  const Model model(cell, 2, 20, 21, 5, 12);
  const std::shared_ptr<fr::cuda::PackedNetwork> net = pack_network(model.weights, precision, 0, device_of(kH100));
  FromState requests(*net, 4);
  for (auto* all : {&requests.ids, &requests.state})
    for (auto& q : *all) q.max_new_tokens = std::min<int64_t>(q.max_new_tokens, 3);
  fr::cuda::Session one(net, 4, nullptr), other(net, 3, nullptr);
  check_same(run(one, requests.ids, 9, 50), run(other, requests.state, 3, 50));
}

// Steps that a graph replays, and some beside it; the host reads what they publish while others go on. A graph that
// cannot be had is an error.
void test_graph() {
  at() = "graph";
  const Model model(Cell::gru, 1, 8, 5, 0, 13);
  const std::shared_ptr<fr::cuda::PackedNetwork> net =
      pack_network(model.weights, Precision::bfloat16, 0, device_of(kH100));
  Requests requests = short_requests(5, 5);
  for (auto& q : requests) q.max_new_tokens = 20 + 15 * q.index, q.eos.clear();
  fr::cuda::Session sliced(net, 3, nullptr), replayed(net, 3, nullptr), refused(net, 3, nullptr);
  const Results expected = run(sliced, requests, 7, 50);
  cuda_on_cpu::options.beside = true;
  check_same(expected, run(replayed, requests, 3 * kPublished + 5, 2));
  cuda_on_cpu::wait_for_kernel();
  cuda_on_cpu::options.beside = false, cuda_on_cpu::options.no_graphs = true;
  std::string told;
  try {
    run(refused, requests, 2 * kPublished, 50);
  } catch (const std::runtime_error& error) {
    told = error.what();
  }
  cuda_on_cpu::options.no_graphs = false;
  CHECK(told == "generator: launch: operation not supported");
}

void check_grid(const StepGrid& g, int64_t tiles, int64_t parts, int64_t k_tiles, const GeneratePlan& p, bool whole) {
  CHECK(parts >= 1 && parts <= kClusterWarps && parts <= std::max<int64_t>(k_tiles, 1) && (parts & (parts - 1)) == 0);
  CHECK(whole ? g.cta_tiles * g.cta_rows == kClusterWarps * p.row_tiles * kTileRows
              : g.cta_tiles * parts == kClusterWarps && g.cta_rows == p.row_tiles * kTileRows);
  CHECK(g.tile_groups * g.cta_tiles >= tiles && (g.tile_groups - 1) * g.cta_tiles < tiles);
  const int64_t row_groups = g.blocks / g.tile_groups;
  CHECK(g.blocks == row_groups * g.tile_groups && g.blocks <= INT32_MAX);
  CHECK(row_groups * g.cta_rows >= p.rows && (row_groups - 1) * g.cta_rows < p.rows);
}

// Over all shapes: everything has a plan whose parts do not overlap, and how a sum is cut does not depend on the rows.
void test_plans() {
  int64_t whole = 0, shared = 0;
  for (const int64_t multiprocessors : {1, 84, 132})
    for (const int64_t gates : {1, 3, 4})
      for (const int64_t per_word : {1, 2})
        for (const int64_t L : {1, 3})
          for (int64_t H = 1; H < 5000; H += H < 300 ? 13 : 331)
            for (const int64_t V : {1, 65, 300, 10000, 1 << 20}) {
              const NetworkSizes n{L, H, V, gates, per_word, gates > 1};
              const ClusterSplit split = steps_split(n);
              for (const int64_t rows : {1, 16, 17, 500, 1 << 14}) {
                const GeneratePlan p = plan_generate(n, rows, device_of(multiprocessors));
                CHECK(p.fits && p.way == Way::steps && p.rows == rows && p.shared_bytes <= kAll);
                CHECK(p.blocks * drawn_by_cta(n) >= rows && (p.blocks - 1) * drawn_by_cta(n) < rows);
                (p.whole_units ? whole : shared) += 1;
                const StepGrid units = layer_grid(n, p), columns = head_grid(n, p);
                check_grid(units, split.unit_tiles, split.unit_parts, split.k_tiles, p, p.whole_units);
                check_grid(columns, split.column_tiles, split.column_parts, split.k_tiles, p, p.whole_columns);
                const StepsLayout s = steps_layout(n, p);
                CHECK(s.rows % units.cta_rows == 0 && s.rows % columns.cta_rows == 0 && s.rows >= rows);
                CHECK(s.stride >= H && s.stride % kTileSide == 0);
                const int64_t parts[] = {s.launch, s.step, s.ids, s.logits, s.h, s.end};
                for (size_t i = 1; i < std::size(parts); ++i) CHECK(parts[i] % 16 == 0 && parts[i] > parts[i - 1]);
                CHECK(s.h - s.logits == 4 * rows * columns_of(n) && s.end == scratch_bytes(n, p));
              }
            }
  CHECK(whole > 1000 && shared > 1000);
  const GenerateDevice has{kH100, kAll, {132, 66, 33, 16, 7}};
  for (const auto& [L, H, V] : {std::array<int64_t, 3>{3, 512, 128}, {2, 1024, 256}, {1, 256, 10000}})
    CHECK(plan_generate(sizes_of(Cell::lstm, L, H, V, Precision::bfloat16), 1, has).way == Way::steps);
  CHECK(refuse_network(sizes_of(Cell::lstm, 3, 512, 128, Precision::bfloat16), has).empty());
  const std::string refusal = refuse_network(sizes_of(Cell::gru, 1, 32, 1 << 24, Precision::float32), has);
  CHECK(refusal.find("a draw from V=16777216 tokens needs") == 0);
}

}  // namespace

int main(int, char** arguments) {
  const bool few = arguments[1] != nullptr;  // for a sanitizer that is slow
  fr::set_cpu_isa("avx2");
  if (!few) test_plans();
  const Shape odd{2, 33, 70, 3}, small{2, 20, 21, 3}, words{1, 20, 300, 0}, deep{3, 7, 5, 2}, wide{1, 140, 40, 0};
  for (const Precision precision : {Precision::float32, Precision::bfloat16}) {
    const bool half = precision == Precision::bfloat16;
    test_network(Cell::gru, precision, small, !few && !half);
    if (few && half) test_network(Cell::lstm, precision, words, false);
    if (few) continue;
    test_network(Cell::lstm, precision, odd, half);
    test_network(Cell::rnn_tanh, precision, words, !half);
    test_network(Cell::lstm, precision, deep, false);
    test_network(Cell::rnn_relu, precision, wide, half);
    test_reading(half ? Cell::lstm : Cell::gru, precision);
  }
  test_graph();
  std::printf("generation by step kernels holds\n");
}
