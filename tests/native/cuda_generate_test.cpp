// The generation loop of a CTA (csrc/cuda/generate.cu), run on the CPU: the tokens of the loop of csrc/cpu, whose sums
// are in another order; and the same bits however the steps are sliced, whatever ran or runs beside a row, how many
// rows a CTA has, and whether the next step is begun beside the draw.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "../../csrc/cpu/row_states.h"
#include "../../csrc/cpu/session.h"
#include "generation_oracle.h"

using fr::cuda::GenerateDevice;
using fr::cuda::GeneratePlan;
using fr::cuda::NetworkSizes;
using fr::cuda::shared_layout;

namespace {

constexpr int64_t kAll = 226 << 10;

// What a CTA with one sequence has the memory to keep: everything, all but the table, or neither the table, where that
// is not the smaller, nor what the next step begins with.
enum class Room { all, no_table, no_begun };
constexpr Room kRooms[] = {Room::all, Room::no_table, Room::no_begun};

GenerateDevice device_of(const NetworkSizes& n, int64_t multiprocessors, Room room) {
  GenerateDevice has{multiprocessors, kAll, {}};
  const int64_t threads = fr::cuda::threads_for(n, 1, 1, true);
  if (room != Room::all) has.shared_limit = shared_layout(n, 1, 1, threads, room == Room::no_table, true).total - 16;
  return has;
}

// How a session runs; a CTA has one row where the GPU has as many multiprocessors, else tiles of 8.
struct Course {
  int64_t rows, multiprocessors, steps, feed;
  Room room = Room::all;
};

Results run_way(const Model& model, Precision precision, const Requests& requests, const Course& way) {
  const auto& w = model.weights;
  const NetworkSizes n = fr::cuda::sizes_of(w.cell, w.L, w.H, w.V, precision);
  const auto has = device_of(n, way.multiprocessors, way.room);
  const std::shared_ptr<fr::cuda::PackedNetwork> net = fr::cuda::pack_network(w, precision, 0, has);
  const GeneratePlan plan = fr::cuda::plan_generate(n, way.rows, net->has);
  const bool one = way.rows <= way.multiprocessors;
  CHECK(plan.way == fr::cuda::Way::cta && plan.tile == (one ? 1 : 8));
  CHECK(plan.begins == (one && way.room != Room::no_begun) && (plan.table_on_chip || !one || way.room != Room::all));
  fr::cuda::Session session(net, way.rows, nullptr);
  return run(session, requests, way.steps, static_cast<size_t>(way.feed));
}

void test_network(Cell cell, Precision precision, const Shape& shape, bool few) {
  const auto [L, H, V, E] = shape;
  at() = std::string(kCells[static_cast<int>(cell)]) + " " + kPrecisions[static_cast<int>(precision)] +
         " L=" + std::to_string(L) + " H=" + std::to_string(H) + " V=" + std::to_string(V);
  const Model model(cell, L, H, V, E, 11);
  // Where h is rounded to bfloat16, a sum in another order may round to another one, and long requests drift apart.
  const bool half = precision == Precision::bfloat16;
  const Requests requests = half || few ? short_requests(few ? 4 : 12, V) : many_requests(12, V, 0);
  fr::Session reference(model.pack(precision), 5, false, 1);
  const Results expected = run(reference, requests, 0, requests.size());
  cuda_on_cpu::options.order = cuda_on_cpu::Order::backward;
  const Results base = run_way(model, precision, requests, {2, 132, 4, 8});
  check_close(model, requests, expected, base);
  cuda_on_cpu::options.order = cuda_on_cpu::Order::shuffled;
  check_same(base, run_way(model, precision, requests, {1, 132, 0, 50, half ? Room::no_table : Room::all}));
  check_same(base, run_way(model, precision, requests, {3, 1, 0, 5}));
  if (few) return;
  check_same(base, run_way(model, precision, requests, {1, 132, 0, 50, Room::no_begun}));
  check_same(base, run_way(model, precision, requests, {4, 132, 1, 50, half ? Room::all : Room::no_table}));
  check_same(base, run_way(model, precision, requests, {20, 2, 3, 50}));
}

// A state that was read, and requests that start from it: in rows that others have left in the same launch, and in rows
// of their own.
void test_reading(Cell cell, Precision precision) {
  at() = std::string("reading ") + kCells[static_cast<int>(cell)];
  const Model model(cell, 2, 9, 21, 5, 12);
  const NetworkSizes n = fr::cuda::sizes_of(cell, 2, 9, 21, precision);
  Results base;
  for (const Room room : kRooms) {
    const auto has = device_of(n, 132, room);
    const std::shared_ptr<fr::cuda::PackedNetwork> net = fr::cuda::pack_network(model.weights, precision, 0, has);
    const FromState requests(*net, 9);  // read with as much room
    if (room == Room::all) {
      base = run_way(model, precision, requests.ids, {9, 132, 0, 50});
      check_same(base, run_way(model, precision, requests.state, {2, 1, 0, 50}));
    }
    check_same(base, run_way(model, precision, requests.state, {1, 132, 0, 50, room}));
    check_same(base, run_way(model, precision, requests.state, {3, 132, room == Room::no_begun ? 3 : 1, 50, room}));
  }
}

// The host reads what a kernel has published while it runs: each token once, in its order, and none before it is there.
void test_streaming(Cell cell) {
  const Model model(cell, 1, 9, 21, 5, 14);
  const std::shared_ptr<fr::cuda::PackedNetwork> net = fr::cuda::pack_network(model.weights, Precision::float32, 0);
  Requests requests = many_requests(14, 21, 0);
  for (auto& q : requests) q.max_new_tokens += 150;
  fr::cuda::Session whole(net, 5, nullptr);
  const Results expected = run(whole, requests, 0, requests.size());
  cuda_on_cpu::options.beside = true;
  Results results;
  std::map<int64_t, std::vector<int32_t>> streamed;
  int64_t early = 0;
  {
    fr::cuda::Session session(net, 5, nullptr);
    size_t added = 0;
    for (int turns = 0; results.size() < requests.size(); ++turns) {
      CHECK(turns < 1'000'000);
      if (added < requests.size() && session.queued() < 3) session.add(requests[added++]);
      session.run(1000, 0, added < requests.size(), true);
      const std::vector<fr::TokenEvent> events = session.take_events();
      early += cuda_on_cpu::is_busy() && !events.empty();
      for (const fr::TokenEvent& e : events) streamed[e.index].push_back(static_cast<int32_t>(e.token));
      for (fr::GenerationResult& r : session.take_results()) results.emplace(r.index, std::move(r));
    }
    CHECK(session.running() == 0 && session.queued() == 0);
    session.add(requests[0]);
    session.run(0, 0, false, true);  // a session may go away while its kernel runs
  }
  cuda_on_cpu::wait_for_kernel();
  cuda_on_cpu::options.beside = false;
  CHECK(early > 0);
  check_same(expected, results);
  for (const auto& [index, r] : results) CHECK(streamed[index] == r.tokens);
}

void test_stop() {
  const Model model(Cell::gru, 1, 8, 5, 0, 13);
  const std::shared_ptr<fr::cuda::PackedNetwork> net = fr::cuda::pack_network(model.weights, Precision::float32, 0);
  Requests requests = many_requests(12, 5, 0);
  for (auto& q : requests) q.max_new_tokens = 30, q.eos.clear(), q.penalty = q.inverse_penalty = 1.0f;
  fr::cuda::Session session(net, 4, nullptr);
  for (const auto& q : requests) session.add(q);
  size_t done = 0, stopped = 0;
  for (int turns = 0; done < requests.size(); ++turns) {
    CHECK(turns < 1000);
    session.run(1000, 3, false, true);
    for (const fr::TokenEvent& e : session.take_events())
      if (e.index % 2) session.stop(e.index);
    for (const fr::GenerationResult& r : session.take_results()) {
      ++done, stopped += r.finish == fr::Finish::stop;
      CHECK(r.index % 2 ? r.tokens.size() <= 3 : r.tokens.size() == 30);
    }
  }
  CHECK(stopped == 6);
}

void check_plan(const NetworkSizes& n, int64_t rows, const GenerateDevice& has, const GeneratePlan& p) {
  CHECK(p.shared_bytes <= has.shared_limit && p.threads % 32 == 0 && p.threads <= fr::cuda::kMostThreads);
  CHECK(p.block_rows % p.tile == 0 && p.blocks * p.block_rows >= rows);
  CHECK((p.blocks - 1) * p.block_rows < rows);
  CHECK(p.tile == 1 ? p.block_rows == 1 : !p.begins);
  const auto s = shared_layout(n, p.block_rows, p.tile, p.threads, p.table_on_chip, p.begins);
  CHECK(s.total == p.shared_bytes && s.logits - s.begun == (p.begins ? 4 * n.L * n.gates * fr::cuda::units_of(n) : 0));
  const int64_t parts[] = {s.h,         s.carry,        s.begun,      s.logits,       s.rows,
                           s.draw.mass, s.draw.margins, s.draw.slots, s.draw.largest, s.draw.drawn};
  for (size_t i = 1; i < std::size(parts); ++i) CHECK(parts[i] % 16 == 0 && parts[i] >= parts[i - 1]);
  CHECK(p.tile == 1 || s.pitch % 4 == 0);
  const int64_t warps = p.threads / 32, teams = std::min(p.block_rows, warps);  // each that draws has its own memory
  CHECK(s.draw.end - s.draw.drawn >= 4 * fr::cuda::kVotesInShared * teams &&
        s.draw.largest - s.draw.slots >= 8 * warps);
}

// Over all shapes: what is said to fit does, parts do not overlap, every row has a place, and a network that fits fits
// though there be no room for what steps begin with.
void test_plans() {
  int64_t fit = 0, begin = 0, without = 0;
  for (const int64_t gates : {1, 3, 4})
    for (const int64_t per_word : {1, 2})
      for (const int64_t L : {1, 2, 4})
        for (int64_t H = 1; H < 400; H += 7)
          for (const int64_t V : {1, 65, 300, 5000})
            for (const int64_t limit : {int64_t{98} << 10, int64_t{226} << 10}) {
              const NetworkSizes n{L, H, V, gates, per_word, gates > 1};
              const GenerateDevice has{132, limit, {}};
              const bool alone = fr::cuda::plan_one(n, 1, has).fits;
              for (const int64_t rows : {1, 2, 64, 133, 4096, 100000}) {
                const GeneratePlan p = fr::cuda::plan_one(n, rows, has);
                CHECK(p.fits == alone && p.fits == (p.needed_bytes <= limit));
                if (!p.fits) continue;
                check_plan(n, rows, has, p);
                ++fit, p.begins ? ++begin : p.tile == 1 ? ++without : 0;
              }
            }
  CHECK(fit > 1000 && begin > 1000 && without > 0);
}

}  // namespace

int main(int, char** arguments) {
  const bool few = arguments[1] != nullptr;  // for a sanitizer that is slow
  fr::set_cpu_isa("avx2");
  if (!few) test_plans();
  for (const Precision precision : {Precision::float32, Precision::bfloat16})
    for (const Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu}) {
      test_network(cell, precision, {2, 7, 40, 3}, few);  // the head has two warps
      if (few) continue;
      test_network(cell, precision, {1, 1, 1, 0}, false);
      test_network(cell, precision, {2, 33, 70, 0}, true);
      test_network(cell, precision, {1, 12, 300, 5}, true);
      test_reading(cell, precision);
    }
  test_streaming(Cell::lstm);
  test_stop();
  std::printf("generation in a CTA holds\n");
}
