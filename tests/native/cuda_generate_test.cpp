// The generation loop of csrc/cuda, run on the CPU, against that of csrc/cpu: the same tokens and log-probabilities,
// bit for bit, however the steps are sliced and whatever runs beside a row.
#include <array>
#include <cmath>
#include <map>

#include "../../csrc/cpu/row_states.h"
#include "../../csrc/cpu/session.h"
#include "cuda_generate_cases.h"

namespace {

// Equal but for the log-probabilities of a row with a penalty, whose sum the CPU takes in floating point.
void check_equal(const Requests& requests, const Results& a, const Results& b) {
  CHECK(a.size() == b.size());
  for (const auto& [index, x] : a) {
    const fr::GenerationResult& y = b.at(index);
    CHECK(x.tokens == y.tokens && x.finish == y.finish && x.status == y.status);
    if (requests[static_cast<size_t>(index)].penalty == 1.0f) CHECK(same_bits(x.logprobs, y.logprobs));
  }
}

void test_network(Cell cell, Precision precision, int64_t L, int64_t H, int64_t V, int64_t E, bool few) {
  at() = std::string(kCells[static_cast<int>(cell)]) + " " + kPrecisions[static_cast<int>(precision)] +
         " L=" + std::to_string(L) + " H=" + std::to_string(H) + " V=" + std::to_string(V);
  const Model model(cell, L, H, V, E, 11);
  const Net host = model.pack(precision);
  const std::shared_ptr<fr::cuda::PackedNetwork> net = fr::cuda::pack_network(model.weights, precision, 0);
  const Requests requests = many_requests(few ? 6 : 12, V, 0);
  fr::Session reference(host, 5, false, 1);
  const Results expected = run(reference, requests, 0, requests.size());
  for (const auto& [rows, steps, feed] : {std::array<int64_t, 3>{1, 0, 50}, {5, 4, 8}, {40, 1, 50}}) {
    if (few && rows != 5) continue;
    cuda_on_cpu::options.order = rows == 5 ? cuda_on_cpu::Order::backward : cuda_on_cpu::Order::shuffled;
    fr::cuda::Session session(net, rows, nullptr);
    check_equal(requests, expected, run(session, requests, steps, static_cast<size_t>(feed)));
  }
}

// A state that was read, and requests that start from it.
void test_reading(Cell cell, Precision precision) {
  const Model model(cell, 2, 9, 21, 5, 12);
  const std::shared_ptr<fr::cuda::PackedNetwork> net = fr::cuda::pack_network(model.weights, precision, 0);
  const FromState requests(*net, 9);
  fr::cuda::Session one(net, 4, nullptr), other(net, 3, nullptr);
  check_same(run(one, requests.ids, 0, 50), run(other, requests.state, 3, 50));
}

// The host reads what a kernel has published while it runs: each token once, in its order, and none before it is there.
void test_streaming(Cell cell) {
  const Model model(cell, 2, 9, 21, 5, 14);
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

// Over all shapes: what is said to fit does, parts do not overlap, and every row has a place.
void test_plans() {
  int64_t fit = 0;
  for (const int64_t gates : {1, 3, 4})
    for (const int64_t per_word : {1, 2})
      for (const int64_t L : {1, 2, 4})
        for (int64_t H = 1; H < 400; H += 7)
          for (const int64_t V : {1, 65, 300, 5000})
            for (const int64_t rows : {1, 2, 64, 133, 4096, 100000})
              for (const int64_t limit : {int64_t{98} << 10, int64_t{226} << 10}) {
                const fr::cuda::NetworkSizes n{L, H, V, gates, per_word, gates > 1};
                const auto p = fr::cuda::plan_one(n, rows, {132, limit, {}});
                if (!p.fits) {
                  CHECK(p.needed_bytes > limit);
                  continue;
                }
                ++fit;
                CHECK(p.shared_bytes <= limit && p.threads % 32 == 0 && p.threads <= fr::cuda::kMostThreads);
                CHECK(p.block_rows % p.tile == 0 && p.blocks * p.block_rows >= rows);
                CHECK((p.blocks - 1) * p.block_rows < rows);
                const auto s = fr::cuda::shared_layout(n, p.block_rows, p.tile, p.threads, p.table_on_chip);
                const int64_t parts[] = {s.h,          s.carry,        s.logits,    s.rows, s.draw.mass, s.draw.margins,
                                         s.draw.slots, s.draw.largest, s.draw.drawn};
                for (size_t i = 1; i < std::size(parts); ++i) CHECK(parts[i] % 16 == 0 && parts[i] >= parts[i - 1]);
                CHECK(p.tile == 1 || s.pitch % 4 == 0);
              }
  CHECK(fit > 1000);
}

}  // namespace

int main(int, char** arguments) {
  const bool few = arguments[1] != nullptr;  // for a sanitizer that is slow
  fr::set_cpu_isa("avx2");
  test_plans();
  for (const Precision precision : {Precision::float32, Precision::bfloat16})
    for (const Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu}) {
      test_network(cell, precision, 2, 7, 5, 3, few);
      if (few) continue;
      test_network(cell, precision, 1, 1, 1, 0, false);
      test_network(cell, precision, 1, 33, 70, 0, true);
      test_network(cell, precision, 1, 12, 300, 5, true);
      test_reading(cell, precision);
    }
  test_streaming(Cell::lstm);
  test_stop();
  std::printf("generation on csrc/cuda: the bits of csrc/cpu holds\n");
}
