// The generation loop: the tokens of a request are the same bits whatever runs beside it and on however many threads,
// every request comes back, and what cannot be drawn from says so.
#include <cmath>
#include <map>
#include <memory>

#include "../../csrc/cpu/row_states.h"
#include "../../csrc/cpu/session.h"
#include "../../csrc/sampling.h"
#include "generation_cases.h"

namespace {

struct Way {
  int64_t rows, threads, microseconds, steps;
  size_t feed;  // requests added at once; 0: all
  bool events;
};

Results run(const Net& net, const Requests& requests, bool windowed, const Way& way) {
  fr::Session session(net, way.rows, windowed, way.threads);
  Results results;
  std::map<int64_t, std::vector<int32_t>> events;
  size_t added = 0;
  for (int turns = 0; results.size() < requests.size(); ++turns) {
    CHECK(turns < 100000);
    const size_t want = way.feed ? way.feed : requests.size();
    while (added < requests.size() && session.queued() < static_cast<int64_t>(want)) session.add(requests[added++]);
    session.run(way.microseconds, way.steps, added < requests.size(), way.events);
    for (const fr::TokenEvent& e : session.take_events()) {
      CHECK(e.token >= 0 && e.token < net->V);
      events[e.index].push_back(static_cast<int32_t>(e.token));
    }
    for (fr::GenerationResult& r : session.take_results()) {
      CHECK(!results.count(r.index));
      check_result(requests[static_cast<size_t>(r.index)], r);
      if (way.events) CHECK(events[r.index] == r.tokens);
      results.emplace(r.index, std::move(r));
    }
  }
  CHECK(session.running() == 0 && session.queued() == 0);
  return results;
}

// Every way of running the same requests, against each by itself.
void test_ways(const Net& net, int64_t count, bool windowed) {
  constexpr int64_t minute = 60'000'000;
  const Requests requests = many_requests(count, net->V, windowed ? 5 : 0);
  const Results alone = run(net, requests, windowed, {1, 1, minute, 0, 0, false});
  for (const Way& way : {Way{7, 1, minute, 0, 16, true}, Way{40, 2, 200, 0, 80, false}, Way{5, 2, minute, 3, 10, true}})
    check_same(alone, run(net, requests, windowed, way));
}

// A prompt read at once, id by id, by a team, or in another life of which only the state is left.
void test_reading(const Net& net) {
  const int64_t size = net->L * net->H, columns = net->head_columns, length = 37;
  Random random(3);
  std::vector<int32_t> ids(static_cast<size_t>(length));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(net->V));
  fr::Team alone(1), team(2);
  auto start = std::make_shared<fr::StartState>();
  for (const bool at_once : {false, true}) {
    fr::RowStates states(*net, 3);
    fr::PromptReader reader(*net, 2);
    fr::Team& used = at_once ? team : alone;
    if (at_once)
      reader.read(states, {{2, ids.data(), length}, {0, ids.data(), 5}}, used);
    else
      for (const int32_t id : ids) {
        const int32_t three[] = {0, 0, id};
        states.advance(three, 3, used);
      }
    std::vector<float> h(static_cast<size_t>(size)), c(h), logits(static_cast<size_t>(columns));
    states.get_row(2, h.data(), c.data());
    states.logits(2, 1, logits.data(), columns, used);
    logits.resize(static_cast<size_t>(net->V));
    if (at_once) CHECK(same_bits(h, start->h) && same_bits(c, start->c) && same_bits(logits, start->logits));
    start->h = h, start->c = c, start->logits = logits;
  }
  start->seen.assign(static_cast<size_t>(net->V), 0);
  for (const int32_t id : ids) start->seen[static_cast<size_t>(id)] = 1;
  Requests from_ids = many_requests(12, net->V, 0), from_state = from_ids;
  for (size_t i = 0; i < from_ids.size(); ++i) {
    std::vector<int32_t>& more = from_state[i].prompt;
    if (i % 3) more.clear();
    from_ids[i].prompt = ids;
    from_ids[i].prompt.insert(from_ids[i].prompt.end(), more.begin(), more.end());
    from_state[i].start = start;
  }
  check_same(run(net, from_ids, false, {4, 1, 1000, 0, 0, false}),
             run(net, from_state, false, {5, 1, 1000, 0, 0, true}));
}

void test_stop(const Net& net, bool windowed) {
  Requests requests = many_requests(20, net->V, 4);
  for (auto& q : requests) q.max_new_tokens = 50, q.eos.clear();
  fr::Session session(net, 6, windowed, 2);
  for (const auto& q : requests) session.add(q);
  size_t done = 0, stopped = 0;
  for (int turns = 0; done < requests.size(); ++turns) {
    CHECK(turns < 100000);
    session.run(turns % 2 ? 0 : 1000, turns % 3, turns % 4 == 0, true);
    for (const fr::TokenEvent& e : session.take_events())
      if (e.index % 2) session.stop(e.index);
    for (const fr::GenerationResult& r : session.take_results()) {
      ++done, stopped += r.finish == fr::Finish::stop;
      CHECK(r.index % 2 || r.tokens.size() == 50);
    }
  }
  CHECK(stopped > 0);
}

void test_nan(const Model& model, Precision precision) {
  Model broken = model;
  const std::vector<float> head(static_cast<size_t>(model.weights.V * model.weights.H), NAN);
  broken.weights.head = head.data();
  if (precision == Precision::int8) return CHECK(throws([&] { broken.pack(precision); }));
  const Net net = broken.pack(precision);
  const Requests requests = many_requests(9, net->V, 0);
  fr::Session session(net, 4, false, 2);
  for (const auto& q : requests) session.add(q);
  size_t errors = 0;
  for (int turns = 0; errors < requests.size(); ++turns) {
    CHECK(turns < 1000);
    session.run(1000, 0, false, false);
    for (const fr::GenerationResult& r : session.take_results())
      CHECK(r.finish == fr::Finish::error && r.status == fr::draw::kNan && r.tokens.empty()), ++errors;
  }
}

void test_kind(Cell cell, Precision precision, bool one_shape) {
  const std::string kind = std::string(fr::cpu_isa()) + " " + kCells[static_cast<int>(cell)] + " " +
                           kPrecisions[static_cast<int>(precision)];
  constexpr int64_t shapes[][4] = {{1, 1, 1, 0}, {2, 7, 5, 3}, {1, 33, 257, 0}, {3, 12, 600, 5}};  // L, H, V, E
  for (const auto& [L, H, V, E] : shapes) {
    if (one_shape && H != 7) continue;
    at() = kind + " H=" + std::to_string(H) + " V=" + std::to_string(V);
    const Model model(cell, L, H, V, E, 11);
    const Net net = model.pack(precision);
    test_ways(net, 28, false);
    if (V > 1 && V < 600) test_ways(net, 10, true);
    test_reading(net);
    test_stop(net, V == 5);
    test_nan(model, precision);
  }
}

// What only networks of some size do: a team, slices of logits that begin within a block of rows, ids without a table.
void test_large(Precision precision) {
  at() = std::string(fr::cpu_isa()) + " large " + kPrecisions[static_cast<int>(precision)];
  const Net team = Model(Cell::lstm, 3, 300, 70, 5, 1).pack(precision);
  CHECK(team->weight_bytes >= 1 << 20);
  Requests few = many_requests(4, team->V, 0);
  check_same(run(team, few, false, {1, 1, 10'000'000, 0, 0, false}), run(team, few, false, {3, 2, 3000, 0, 0, true}));
  const Net slices = Model(Cell::gru, 1, 9, 2500, 4, 2).pack(precision);
  Requests rows = many_requests(96, slices->V, 0);
  check_same(run(slices, rows, false, {1, 1, 10'000'000, 0, 0, false}),
             run(slices, rows, false, {96, 1, 10'000'000, 0, 0, false}));
}

// Vocabularies whose logits are not kept: rows that are drawn from together, as one row whose logits are.
void test_tiles(Precision precision, bool one_shape) {
  for (const int64_t V : {2305, 2048, 2431}) {
    at() = std::string(fr::cpu_isa()) + " V=" + std::to_string(V) + " " + kPrecisions[static_cast<int>(precision)];
    const Net net = Model(Cell::lstm, 1, 130, V, 4, 2).pack(precision);
    CHECK(net->weight_bytes >= 1 << 18 && !net->head_tiles.empty());
    Requests rows = many_requests(37, net->V, 0);
    for (auto& q : rows) {
      q.max_new_tokens = 1 + q.index % 3;
      q.scale = 0.5f + static_cast<float>(q.index % 5), q.min_p = INFINITY, q.top_k = q.top_p = 0, q.mode_of = 1;
      q.penalty = q.inverse_penalty = 1.0f, q.logprobs = false;
    }
    const Results alone = run(net, rows, false, {1, 1, 10'000'000, 0, 0, false});
    for (const int64_t together : {5, 37})
      check_same(alone, run(net, rows, false, {together, 2, 10'000'000, 0, 0, false}));
    if (one_shape) return;
  }
}

void test_without_table(Precision precision) {
  at() = std::string(fr::cpu_isa()) + " without a table " + kPrecisions[static_cast<int>(precision)];
  const Model model(Cell::lstm, 1, 256, 66000, 5, 4);
  const Net net = model.pack(precision);
  CHECK(!net->table.get());
  Requests rows = many_requests(3, net->V, 0);
  for (auto& q : rows) q.max_new_tokens = 2;
  check_same(run(net, rows, false, {1, 1, 10'000'000, 0, 0, false}),
             run(net, rows, false, {3, 1, 10'000'000, 0, 0, false}));
}

}  // namespace

// Runs on each of the named instruction sets that this processor has; the argument `short` leaves out a large
// network, `few` all but one shape.
int main(int count, char** arguments) {
  std::vector<std::string> names(arguments + 1, arguments + count);
  const bool large = std::erase(names, "short") == 0, one_shape = std::erase(names, "few") != 0;
  on_each(names, "generation", [&] {
    for (const Precision precision : {Precision::float32, Precision::bfloat16, Precision::int8}) {
      for (const Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu})
        test_kind(cell, precision, one_shape);
      test_large(precision);
      test_tiles(precision, one_shape);
      if (large && precision != Precision::float32) test_without_table(precision);
    }
  });
  return 0;
}
